"""One kind of case for every operator, and the product of them all."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
COPIES = (2, 3, 4, 8)
ROWS = (1, 4, 16, 64, 512, 1024, 2048, 4096)
SEQUENCES = 8
_WIDTHS = {  # hidden, key/value, MLP
    "smollm2-135m": (576, 192, 1536),
    "0.5b": (896, 128, 4864),
    "1.5b": (1536, 256, 8960),
    "7b": (4096, 1024, 11008),
}
HIDDEN = {model: hidden for model, (hidden, _, _) in _WIDTHS.items()}
# (N, D) of attention out, key/value, MLP up, MLP down; and the square of the named cases.
LAYERS = {
    model: ((hidden, hidden), (key_value, hidden), (mlp, hidden), (hidden, mlp))
    for model, (hidden, key_value, mlp) in _WIDTHS.items()
} | {"square": ((2048, 2048),)}


@dataclass(frozen=True)
class Case:
    """M rows under S weightings in contiguous segments; N out (the head's and the embedding's words), D in, K copies.

    dtype: of x and base. deltas: of what is trained, "" for the same. rank: of each copy that is low-rank.
    gradients: "none" (forward alone), "x", or "all" (x and what is trained).
    is_cold: rotates over more weights than the last-level cache holds. is_graph: replayed from a CUDA graph.
    is_gpu: of the suite for GPUs, with its goals, peers and limits.
    counts: other numbers of weightings that the same rows are also timed under, in the same rounds.
    """

    M: int
    N: int
    D: int
    K: int
    S: int
    dtype: str = "f32"
    deltas: str = ""
    gradients: str = "none"
    rank: int = 0
    has_base: bool = True
    has_entropy: bool = False
    is_cold: bool = False
    is_graph: bool = False
    is_gpu: bool = False
    counts: tuple[int, ...] = ()

    @property
    def x_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def deltas_dtype(self) -> torch.dtype:
        return DTYPES[self.deltas or self.dtype]

    @property
    def segments(self) -> list[slice]:
        """The rows of each weighting."""
        bounds = [s * self.M // self.S for s in range(self.S + 1)]
        return [slice(*pair) for pair in itertools.pairwise(bounds)]

    def trained(self, *names: str) -> tuple[str, ...]:
        """Of the tensors that a full backward differentiates, those that this case does."""
        return {"none": (), "x": tuple(name for name in names if name == "x"), "all": names}[self.gradients]


def shrunk(cases: Mapping[str, Case]) -> dict[str, Case]:
    """The kinds among `cases`, in sizes that take no time: a test of what else would run on a GPU alone."""
    found: dict[Case, str] = {}
    for name, case in cases.items():
        S = 12 if case.S == case.M else min(case.S, 4)
        sizes = {"M": 12, "N": 64, "D": 40, "K": 2, "S": S, "rank": min(case.rank, 4), "counts": case.counts[:2]}
        # Not cold: of such weights thousands of sets would fill a cache.
        found.setdefault(replace(case, **sizes, is_cold=False, is_graph=False), f"tiny-{name}")
    return {name: case for case, name in found.items()}


def weightings(M: int) -> dict[str, int]:
    """Distinct weightings of M rows: one, one per sequence, all different; those that differ from each other."""
    kinds = {"one": 1}
    if M > SEQUENCES:
        kinds["sequences"] = SEQUENCES
    if M > 1:
        kinds["rows"] = M
    return kinds


def product(
    layers: Mapping[str, Sequence[tuple[int, int]]] = LAYERS,
    rows: Sequence[int] = ROWS,
    gradients: Sequence[str] = ("none", "all"),
    rank: int = 0,
    has_entropy: bool = False,
) -> dict[str, Case]:
    """Every combination, by name. Few rows forward are cold: bound by memory; the rest, by arithmetic, use one set."""
    found = {}
    for model, shapes in layers.items():
        for (N, D), K, M, dtype, backward in itertools.product(shapes, COPIES, rows, DTYPES, gradients):
            for kind, S in weightings(M).items():
                passes = {"none": "forward", "x": "frozen", "all": "backward"}[backward]
                case = Case(M, N, D, K, S, dtype, gradients=backward, rank=rank, has_entropy=has_entropy)
                is_cold = M <= 64 and backward == "none"
                found[f"{model}-{dtype}-K{K}-M{M}-{kind}-{N}x{D}-{passes}"] = replace(case, is_cold=is_cold)
    return found
