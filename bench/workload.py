"""What an operator's module hands to the harness: tensors in rotation, contenders, and what they should answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.machine import last_level_cache_bytes

if TYPE_CHECKING:
    from bench.correctness import Answers
    from bench.targets import Target

MAX_ROTATION_BYTES = 4 * 2**30
OURS, CEILING = "ours", "plain"
Tensors = dict[str, Tensor]
Call = Callable[[Tensors], Tensor]
Info = Mapping[str, Any]  # a benchmark's extra_info
GEMM_ROWS = 512
GPU_GEMM = 8192  # rows and outputs that fill a large GPU


@dataclass(frozen=True)
class Contender:
    """One way to get a result.

    trained: names of the tensors that its backward differentiates; empty where there is none.
    answers: what its outputs are compared with; "mix" for all that do what ours does.
    is_capturable: whether a CUDA graph can hold it: it reads no value on the host.
    """

    call: Callable[[Tensors], Tensor | tuple[Tensor, ...]]
    trained: tuple[str, ...] = ()
    answers: str = "mix"
    is_capturable: bool = True


@dataclass
class Workload:
    """One case, ready to run.

    sets: the tensors of a call by name; calls take the sets in turn. gradients: incoming, one for each output.
    check_gradients: those of the check, where the exact answer to `gradients` would take too long.
    streams: bytes that one rotation reads, for the same-bytes read; None where the case is not about memory.
    stream_bytes, row_bytes, flops: of one call, what the task needs whatever a method spends.
    gemm: (x [M, D], w [N, D]) of torch's GEMM rate in the same run.
    derived: figures beside the targets, from the others. notes: what was to be measured and could not be, and why.
    """

    case: Case
    device: str
    sets: list[Tensors]
    contenders: dict[str, Contender]
    expected: Callable[[], Answers]
    gradients: tuple[Tensor, ...] | None
    stream_bytes: int
    row_bytes: int
    flops: int
    streams: Tensor | None = None
    gemm: tuple[Tensor, Tensor] | None = None
    targets: Sequence[Target] = ()
    derived: Mapping[str, Callable[[Info], float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("y",)
    check_gradients: tuple[Tensor, ...] | None = None
    mode: Callable[[], AbstractContextManager[Any]] = torch.enable_grad  # no_grad where the case has no gradients
    calls: int | None = None  # a round's calls; None: whole rotations

    def __post_init__(self) -> None:
        if self.case.gradients == "none":
            self.mode = torch.no_grad
        for contender in self.contenders.values():
            for tensors in self.sets:
                for name in contender.trained:
                    tensors[name].requires_grad_()

    @property
    def mixing_peers(self) -> list[str]:
        """Those that do what ours does: the ceiling, and what else computes something simpler, are none."""
        return [name for name, c in self.contenders.items() if c.answers == "mix" and not name.startswith(OURS)]

    @property
    def replays_graphs(self) -> bool:
        return self.case.is_graph and self.device == "cuda"

    def note(self, name: str, error: Exception) -> None:
        """Record that `name` could not be measured as it was meant to be."""
        self.notes[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"

    @property
    def is_cache_resident(self) -> bool:
        """Whether a rotation's weights are less than twice the last-level cache."""
        return self.stream_bytes * len(self.sets) < 2 * last_level_cache_bytes(self.device)


def run(contender: Contender, tensors: Tensors, outputs: Sequence[str], gradients: Sequence[Tensor] | None) -> Tensors:
    """Run one call and, where gradients come in, its backward with every `.grad` None before; return all by name."""
    clear_gradients(contender, [tensors])
    result = contender.call(tensors)
    values = (result,) if isinstance(result, Tensor) else result
    named = dict(zip(outputs, values, strict=True))
    if gradients is not None and contender.trained:
        torch.autograd.backward(values, gradients)
        for name in contender.trained:
            gradient = tensors[name].grad
            assert gradient is not None, f"no gradient for {name}"
            named[f"d_{name}"] = gradient
    return {name: value.detach() for name, value in named.items()}


def clear_gradients(contender: Contender, sets: Sequence[Tensors]) -> None:
    for tensors in sets:
        for name in contender.trained:
            tensors[name].grad = None


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Draw:
    """Seeded random tensors of a case on its device."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(0.0, std, generator=self.generator)

    def ids(self, limit: int) -> Tensor:
        return torch.randint(0, limit, (self.case.M,), generator=self.generator, device=self.device)

    def coefficients(self) -> Tensors:
        """Return c [S, K] float32 (`c`), its row for each of M rows (`row_map`), and `c_rows` [M, K] in x's dtype.

        Ours takes the first two, as a model finds them once for all layers; peers get theirs ready as well.
        """
        case = self.case
        c_SK = torch.rand((case.S, case.K), generator=self.generator, device=self.device)
        sizes = torch.tensor([rows.stop - rows.start for rows in case.segments])
        row_map_M = torch.arange(case.S, dtype=torch.int32).repeat_interleave(sizes).to(self.device)
        return {"c": c_SK, "row_map": row_map_M, "c_rows": c_SK[row_map_M].to(case.x_dtype)}


def gemm_operands(draw: Draw, weight_ND: Tensor) -> tuple[Tensor, Tensor]:
    """x and w of torch's GEMM rate: rows for a CPU on a weight that is there, a square that fills a GPU."""
    case = draw.case
    if not case.is_gpu or draw.device != "cuda":
        return draw.normal(GEMM_ROWS, case.D, dtype=case.x_dtype), weight_ND
    x_MD, w_ND = (draw.normal(GPU_GEMM, case.D, dtype=case.x_dtype) for _ in range(2))
    return x_MD, w_ND


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def rotate(case: Case, device: str, streams: Tensors, ceiling: Tensors) -> tuple[Tensor | None, list[Tensors]]:
    """Return the bytes of all streams in one buffer (None for a case that is not cold), and the sets of views of it.

    Cold: as many sets as make the ceiling's own weights exceed twice the last-level cache, in at most 4 GiB.
    """
    if not case.is_cold:
        return None, [streams | ceiling]
    wanted = -(-2 * last_level_cache_bytes(device) // num_bytes(ceiling))
    count = max(1, min(wanted, MAX_ROTATION_BYTES // num_bytes(streams | ceiling)))
    buffer, sets = make_rotation(streams, count)
    _, ceilings = make_rotation(ceiling, count)
    return buffer, [own | plain for own, plain in zip(sets, ceilings, strict=True)]


def make_rotation(tensors: Mapping[str, Tensor], count: int) -> tuple[Tensor, list[Tensors]]:
    """Copy named tensors `count` times into one flat buffer; return its bytes and the sets of views.

    One buffer, so that a read of the whole rotation is one call of a read kernel.
    """
    sizes = {name: -(-t.numel() * t.element_size() // 64) * 64 for name, t in tensors.items()}
    device = next(iter(tensors.values())).device
    buffer = torch.zeros(count * sum(sizes.values()), dtype=torch.uint8, device=device)
    sets, begin = [], 0
    for _ in range(count):
        views = {}
        for name, tensor in tensors.items():
            part = buffer[begin : begin + tensor.numel() * tensor.element_size()]
            views[name] = part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
            begin += sizes[name]
        sets.append(views)
    return buffer, sets
