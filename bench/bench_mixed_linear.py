"""mixed_linear against everything that a user would write instead, forward and forward + backward.

Legend: x_MD rows, base_ND, deltas_NKD, c_SK, row_map_M; M rows, D in, N out, K copies, S distinct weightings.

Every benchmark first compares its own output with float64 (`check` states the budget). One round is `calls_per_round`
calls, over weight sets that together exceed twice the last-level cache where the regime is memory-bound. Before each
round one round of plain F.linear on one premixed weight is timed: `ratio_to_plain` is the quotient of the two medians
of the same run, 1.0 the ceiling of any method that reads one weight only.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clp_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K = 2
SECONDS_PER_BENCHMARK = 0.5
MAX_WEIGHT_BYTES = 2**30
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One workload. `rows`: M; `weightings`: S, in contiguous segments of M / S rows; `timing`: eager or graph."""

    regime: str
    rows: int
    weightings: int
    size: tuple[int, int]
    x: torch.dtype
    deltas: torch.dtype
    backward: bool
    timing: str

    def __str__(self) -> str:
        passes = "forward+backward" if self.backward else "forward"
        dtypes = f"{self.x}/{self.deltas}".replace("torch.", "")
        return f"{self.regime} M={self.rows} S={self.weightings} N,D={self.size} {dtypes} {passes} {self.timing}"


def list_cases() -> list[Case]:
    dtypes = [(F32, F32)] if DEVICE == "cpu" else [(BF16, BF16), (BF16, F32), (F32, F32)]
    regimes = [("decode", 1, 1, False), ("decode", 16, 16, False), ("training", 1024, 4, False)]
    regimes.append(("training", 1024, 4, True))
    return [
        Case(name, rows, weightings, size, x, deltas, backward, timing)
        for x, deltas in dtypes
        for size in ((576, 576), (2048, 2048))
        for name, rows, weightings, backward in regimes
        for timing in (("eager", "graph") if DEVICE == "cuda" and not backward else ("eager",))
    ]


@dataclass
class Weights:
    """One layer's parameters, and one weight premixed by the first weighting for the plain product."""

    base_ND: Tensor
    deltas_NKD: Tensor
    premixed_ND: Tensor


@dataclass
class Workload:
    case: Case
    x_MD: Tensor
    c_SK: Tensor
    row_map_M: Tensor
    dy_MN: Tensor
    sets: list[Weights]


def last_level_cache_bytes() -> int:
    if DEVICE == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    units = {"K": 2**10, "M": 2**20}
    texts = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(text[:-1]) * units[text[-1]] for text in texts), default=32 * 2**20)


def set_bytes(case: Case) -> int:
    return case.size[0] * case.size[1] * (case.x.itemsize + K * case.deltas.itemsize)


@functools.lru_cache(maxsize=1)  # cases are grouped by workload: one at a time keeps memory bounded
def make_workload(case: Case) -> Workload:
    generator = torch.Generator().manual_seed(0)
    N, D = case.size
    segment = case.rows // case.weightings

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    num_sets = 1
    if case.regime == "decode":
        wanted = -(-2 * last_level_cache_bytes() // (N * D * case.x.itemsize))
        num_sets = max(1, min(wanted, MAX_WEIGHT_BYTES // set_bytes(case)))
    c_SK = torch.rand((case.weightings, K), generator=generator).to(DEVICE)
    base, deltas = normal(N, D).div(D**0.5), normal(N, K, D).div(D**0.5)
    sets = []
    for _ in range(num_sets):
        premixed = base + torch.einsum("k,nkd->nd", c_SK[0], deltas)
        weights = Weights(base.to(case.x, copy=True), deltas.to(case.deltas, copy=True), premixed.to(case.x))
        weights.deltas_NKD.requires_grad_(case.backward)
        weights.premixed_ND.requires_grad_(case.backward)
        sets.append(weights)
    row_map_M = torch.arange(case.weightings, dtype=torch.int32, device=DEVICE).repeat_interleave(segment)
    x_MD = normal(case.rows, D).to(case.x).requires_grad_(case.backward)
    return Workload(case, x_MD, c_SK, row_map_M, normal(case.rows, N).to(case.x), sets)


def streams(work: Workload, weights: Weights) -> Tensor:
    """F.linear per stream, then the weighted sum."""
    c_MK = work.c_SK[work.row_map_M].to(work.x_MD.dtype)
    y_MN = F.linear(work.x_MD, weights.base_ND)
    for k in range(K):
        y_MN = y_MN + c_MK[:, k : k + 1] * F.linear(work.x_MD, weights.deltas_NKD[:, k].to(work.x_MD.dtype))
    return y_MN


def premix(work: Workload, weights: Weights) -> Tensor:
    """One mixed weight per weighting, made in every call, then F.linear on its segment of rows."""
    segments = work.x_MD.chunk(work.case.weightings)
    outputs = []
    for x_segment, c_K in zip(segments, work.c_SK, strict=True):
        mixed_ND = weights.base_ND + torch.einsum("k,nkd->nd", c_K, weights.deltas_NKD.float()).to(work.x_MD.dtype)
        outputs.append(F.linear(x_segment, mixed_ND))
    return torch.cat(outputs)


def concat(work: Workload, weights: Weights) -> Tensor:
    """The K-concatenated GEMM on c (x) x."""
    c_MK = work.c_SK[work.row_map_M].to(work.x_MD.dtype)
    wide_x = (c_MK[:, :, None] * work.x_MD[:, None, :]).flatten(1)
    wide_weight = weights.deltas_NKD.flatten(1).to(work.x_MD.dtype)
    return F.linear(work.x_MD, weights.base_ND) + F.linear(wide_x, wide_weight)


def plain(work: Workload, weights: Weights) -> Tensor:
    """F.linear on one premixed weight: another result, the ceiling of the speed."""
    return F.linear(work.x_MD, weights.premixed_ND)


def by_backend(name: str) -> Callable[[Workload, Weights], Tensor]:
    def mixed_linear(work: Workload, weights: Weights) -> Tensor:
        arguments = (work.x_MD, weights.base_ND, weights.deltas_NKD, work.c_SK)
        return clp_kernels.mixed_linear(*arguments, row_map=work.row_map_M, backend=name)

    return mixed_linear


def list_contenders() -> dict[str, Callable[[Workload, Weights], Tensor]]:
    names = [name for name, missing in clp_kernels.available_backends().items() if missing is None]
    ours = [name for name in names if name not in (("cpp",) if DEVICE == "cuda" else ("triton", "cuda"))]
    peers = {"plain": plain, "streams": streams, "premix": premix, "concat": concat}
    return {**peers, **{f"mixed_linear-{name}": by_backend(name) for name in ours}}


CONTENDERS = list_contenders()


def run(contender: Callable[[Workload, Weights], Tensor], work: Workload, weights: Weights) -> dict[str, Tensor]:
    """Runs one call and, in a backward case, the gradients to x and to the trained weight."""
    y_MN = contender(work, weights)
    if not work.case.backward:
        return {"y": y_MN}
    trained = weights.premixed_ND if contender is plain else weights.deltas_NKD
    dx_MD, d_trained = torch.autograd.grad(y_MN, (work.x_MD, trained), work.dy_MN)
    return {"y": y_MN.detach(), "dx": dx_MD, "d_trained": d_trained}


def in_float64(work: Workload) -> Workload:
    def widen(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    first = work.sets[0]
    sets = [Weights(widen(first.base_ND), widen(first.deltas_NKD), widen(first.premixed_ND))]
    return Workload(work.case, widen(work.x_MD), work.c_SK.double(), work.row_map_M, work.dy_MN.double(), sets)


@functools.lru_cache(maxsize=2)
def exact_and_own_error(case: Case, is_plain: bool) -> dict[str, tuple[Tensor, float]]:
    """float64 results and the error that torch's own composition makes in the case's dtype."""
    work = make_workload(case)
    contender = plain if is_plain else streams
    wide = in_float64(work)
    exact, own = run(contender, wide, wide.sets[0]), run(contender, work, work.sets[0])
    return {name: (value, (own[name].double() - value).abs().max().item()) for name, value in exact.items()}


def check(name: str, work: Workload) -> None:
    """Asserts at most twice torch's own error and one unit in the last place of the largest result."""
    expected = exact_and_own_error(work.case, name == "plain")
    for output, value in run(CONTENDERS[name], work, work.sets[0]).items():
        exact, own = expected[output]
        error = (value.double() - exact).abs().max().item()
        budget = 2 * own + torch.finfo(value.dtype).eps * exact.abs().max().item()
        assert error <= budget, f"{name} {output}: error {error:.3e}, budget {budget:.3e}"


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def make_round(name: str, work: Workload, calls: int) -> Callable[[], None]:
    """Returns a function that makes `calls` calls over the weight sets in turn and waits for the device."""

    def round_of_calls() -> None:
        for index in range(calls):
            run(CONTENDERS[name], work, work.sets[index % len(work.sets)])

    issue: Callable[[], None] = round_of_calls
    if work.case.timing == "graph":
        with torch.no_grad():
            round_of_calls()  # compiles and allocates outside of the capture
            synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                round_of_calls()
        issue = graph.replay

    def timed() -> None:
        issue()
        synchronize()

    return timed


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("case", list_cases(), ids=str)
def test_mixed_linear(benchmark: Any, case: Case, name: str) -> None:
    benchmark.group, benchmark.name = f"mixed_linear {case}", name
    work = make_workload(case)
    check(name, work)
    calls = max(len(work.sets), 20 if DEVICE == "cuda" else 1)
    contender, plain_round = make_round(name, work, calls), make_round("plain", work, calls)
    synchronize()
    cost = seconds(contender) + seconds(plain_round)  # the warm-up of both
    plain_times: list[float] = []
    benchmark.pedantic(
        contender,
        setup=lambda: plain_times.append(seconds(plain_round)),
        rounds=max(3, min(50, int(SECONDS_PER_BENCHMARK / cost))),
    )
    median = benchmark.stats.stats.median
    per_call = median / calls
    M, (N, D) = case.rows, case.size
    weight_bytes = N * D * case.x.itemsize if name == "plain" else set_bytes(case)
    bytes_moved = weight_bytes + M * (N + D) * case.x.itemsize
    flops = 2 * M * N * D * (3 if case.backward else 1)
    benchmark.extra_info.update(
        calls_per_round=calls,
        time_us=1e6 * per_call,
        ratio_to_plain=median / statistics.median(plain_times),
        bytes=bytes_moved,
        gigabytes_per_s=bytes_moved / per_call / 1e9 if not case.backward else None,
        flops=flops,  # of the product with one mixed weight: what the task needs, whatever the method spends
        gigaflops_per_s=flops / per_call / 1e9,
        weight_sets=len(work.sets),
        cache_resident=N * D * case.x.itemsize * len(work.sets) < 2 * last_level_cache_bytes(),
    )
