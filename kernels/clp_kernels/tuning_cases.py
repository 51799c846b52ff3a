"""What `tuning` measures: calls of each operator's Triton launchers at given sizes, and the reference of each.

Legend: M rows, D in, N out, K copies, S distinct weightings, R ranks.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clp_kernels.mixed_linear_logprob_arguments import Head, Logits, Needs, Targets
from clp_kernels.select import select_form

TRAINED_ROWS = 64  # passes back to the inputs are measured from here on: fewer rows are decoded
ROWS_EACH = 512  # rows of a weighting, where many share one
DELTA_SIZE = 0.1  # of the deltas beside the base: below it the check would not see a wrong one


@dataclass(frozen=True)
class OperatorShape:
    """One layer's operator and sizes; K are the ranks of `low_rank_linear`, N is 1 for `mixed_norm`."""

    operator: str
    dtype: torch.dtype
    deltas_dtype: torch.dtype
    K: int
    N: int
    D: int


@dataclass(frozen=True)
class Case:
    """One call: `run` launches it, `reference` computes it in torch, in a wider dtype where one is given.

    dtype: of the rows. num_terms: the length of its longest sum.
    """

    name: str
    dtype: torch.dtype
    num_terms: int
    run: Callable[[], Tensor]
    reference: Callable[[torch.dtype | None], Tensor]


def cases(shape: OperatorShape, row_counts: Sequence[int], device: torch.device) -> Iterator[Case]:
    """Make the calls of one shape at each number of rows, with random values that are the same in every run.

    Raises:
        ValueError: an operator that has no Triton launcher.
    """
    if shape.operator not in _CASES:
        raise ValueError(f"operator is {shape.operator!r}, known are {', '.join(_CASES)}")
    draw = _Draw(shape, device)
    for num_rows in row_counts:
        yield from _CASES[shape.operator](draw, num_rows)


class _Draw:
    """The parameters of one shape, and rows and weightings for it."""

    def __init__(self, shape: OperatorShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(0)
        K, N, D = shape.K, shape.N, shape.D
        operator = shape.operator
        scale = 1.0 if operator in ("mixed_embedding", "mixed_norm") else D**-0.5
        self.base = self.normal(N, D).mul_(scale).to(shape.dtype)
        if operator == "low_rank_linear":
            self.down = self.normal(K, D).mul_(scale).to(shape.deltas_dtype)
            self.up = self.normal(N, K).mul_(DELTA_SIZE).to(shape.deltas_dtype)
        elif operator == "mixed_norm":
            self.deltas = self.normal(D, K).mul_(DELTA_SIZE).to(shape.deltas_dtype)
        else:
            self.deltas = self.normal(N, K, D).mul_(DELTA_SIZE * scale).to(shape.deltas_dtype)

    def case(
        self, name: str, M: int, run: Callable[[], Tensor], reference: Callable[[torch.dtype | None], Tensor]
    ) -> Case:
        return Case(name, self.shape.dtype, max(M, self.shape.N, self.shape.D, self.shape.K), run, reference)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device)

    def rows(self, *size: int) -> Tensor:
        return self.normal(*size).to(self.shape.dtype)

    def weightings(self, num_rows: int, S: int) -> tuple[Tensor, Tensor]:
        """Coefficients [S, K] and the map of rows to them, those of one side by side."""
        c_SK = torch.rand(S, self.shape.K, generator=self.generator, device=self.device)
        rows = torch.arange(num_rows, device=self.device)
        return c_SK, (rows * S // num_rows).int()

    def ids(self, num_rows: int) -> Tensor:
        return torch.randint(self.shape.N, (num_rows,), generator=self.generator, device=self.device)


def _in(dtype: torch.dtype | None, *values: Any) -> tuple[Any, ...]:
    """Return the values with each floating tensor in `dtype`."""
    return tuple(
        value.to(dtype) if dtype is not None and isinstance(value, Tensor) and value.is_floating_point() else value
        for value in values
    )


def _modules(operator: str) -> tuple[Any, Any]:
    """Return an operator's Triton launchers, which import Triton, and its reference."""
    return tuple(importlib.import_module(f"clp_kernels.{operator}_{form}") for form in ("triton", "reference"))  # type: ignore[return-value]


def _mixed_linear(draw: _Draw, M: int) -> Iterator[Case]:
    """Each form at what `select_form` gives it: a weighting per row, one per some hundred rows, one for all."""
    shape = draw.shape
    yield from _mixed_linear_calls(draw, M, M, {})
    yield from _mixed_linear_calls(draw, M, M, {"batch_invariant": True})
    dtypes = (shape.dtype, shape.dtype)
    if select_form(M, S := max(1, M // ROWS_EACH), dtypes, False, False) == "segments":
        yield from _mixed_linear_calls(draw, M, S, {})
    if select_form(M, 1, dtypes, False, True) == "panels":
        yield from _mixed_linear_calls(draw, M, 1, {"exact_delta": False})


def _mixed_linear_calls(draw: _Draw, M: int, S: int, how: dict[str, bool]) -> Iterator[Case]:
    launchers, reference = _modules("mixed_linear")

    x, dy, weighting = draw.rows(M, draw.shape.D), draw.rows(M, draw.shape.N), draw.weightings(M, S)
    weights = (draw.base, draw.deltas, *weighting)
    about = f"mixed_linear, {M} rows of {S} weightings{''.join(f', {name}={value}' for name, value in how.items())}"
    yield draw.case(
        f"{about}: forward",
        M,
        lambda: launchers.forward(x, *weights, None, None, **how),
        lambda dtype: reference.forward(*_in(dtype, x, *weights, None, None)),
    )
    if M < TRAINED_ROWS:
        return
    yield draw.case(
        f"{about}: dx",
        M,
        lambda: launchers.backward_x(dy, *weights, **how),
        lambda dtype: reference.backward_x(*_in(dtype, dy, *weights)),
    )
    if how:
        return
    products = (dy, x, draw.deltas, *weighting)
    yield draw.case(
        f"{about}: d_deltas",
        M,
        lambda: launchers.backward_deltas(*products, True, False)[0],
        lambda dtype: reference.backward_deltas(*_in(dtype, *products, True, False))[0],
    )


def _low_rank_linear(draw: _Draw, M: int) -> Iterator[Case]:
    launchers, reference = _modules("low_rank_linear")

    x, dy = draw.rows(M, draw.shape.D), draw.rows(M, draw.shape.N)
    weights = (draw.base, draw.down, draw.up, *draw.weightings(M, M))
    shrink, dx_alone = x.new_empty(0), (True, False, False, False, False)
    for invariant in (False, True):
        about = f"low_rank_linear, {M} rows{', batch_invariant' if invariant else ''}"
        run = functools.partial(launchers.forward, x, *weights, None, False, batch_invariant=invariant)
        yield draw.case(
            f"{about}: forward",
            M,
            lambda run=run: run()[0],  # type: ignore[misc]
            lambda dtype: reference.forward(*_in(dtype, x, *weights, None, False))[0],
        )
        if M >= TRAINED_ROWS:
            run = functools.partial(launchers.backward, dy, shrink, x, *weights, dx_alone, batch_invariant=invariant)
            yield draw.case(
                f"{about}: dx",
                M,
                lambda run=run: run()[0],  # type: ignore[misc]
                lambda dtype: reference.backward(*_in(dtype, dy, shrink, x, *weights, dx_alone))[0],
            )


def _mixed_linear_logprob(draw: _Draw, M: int) -> Iterator[Case]:
    launchers, reference = _modules("mixed_linear_logprob")

    x, weights = draw.rows(M, draw.shape.D), (draw.base, draw.deltas, *draw.weightings(M, M), None, None)
    given, d_logprob_M = (Targets(draw.ids(M), -100), Logits(1.0, 1.0, None)), draw.normal(M)
    needs = Needs(True, False, False, False, False, False)

    def expected(dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        rows, *head = _in(dtype, x, *weights)
        logprob, entropy, normalizer, _ = reference.forward(rows, Head(*head), *given, True, False)
        rest = (normalizer, entropy, *_in(dtype, d_logprob_M), None, needs)
        return logprob, reference.backward(rows, Head(*head), *given, *rest)[0]

    yield draw.case(
        f"mixed_linear_logprob, {M} rows: forward",
        M,
        lambda: launchers.forward(x, Head(*weights), *given, True, False)[0],
        lambda dtype: expected(dtype)[0],
    )
    if M >= TRAINED_ROWS:
        _, entropy, normalizer, _ = reference.forward(x, Head(*weights), *given, True, False)
        rest = (normalizer, entropy, d_logprob_M, None)
        yield draw.case(
            f"mixed_linear_logprob, {M} rows: dx",
            M,
            lambda: launchers.backward(x, Head(*weights), *given, *rest, needs)[0],
            lambda dtype: expected(dtype)[1],
        )


def _mixed_embedding(draw: _Draw, M: int) -> Iterator[Case]:
    launchers, reference = _modules("mixed_embedding")

    arguments = (draw.ids(M), draw.base, draw.deltas, *draw.weightings(M, M))
    yield draw.case(
        f"mixed_embedding, {M} rows: forward",
        M,
        lambda: launchers.forward(*arguments),
        lambda dtype: reference.forward(*_in(dtype, *arguments)),
    )


def _mixed_norm(draw: _Draw, M: int) -> Iterator[Case]:
    """As conditioned layers call it: the copies' part of an RMSNorm, whose own scale the layer applies itself."""
    launchers, reference = _modules("mixed_norm")

    arguments = (draw.rows(M, draw.shape.D), None, draw.deltas, *draw.weightings(M, M), None, None)
    settings = (1e-6, False, 0.0, False)
    yield draw.case(
        f"mixed_norm, {M} rows: forward",
        M,
        lambda: launchers.forward(*arguments, *settings),
        lambda dtype: reference.forward(*_in(dtype, *arguments, *settings)),
    )


_CASES: dict[str, Callable[[_Draw, int], Iterator[Case]]] = {
    "mixed_linear": _mixed_linear,
    "low_rank_linear": _low_rank_linear,
    "mixed_linear_logprob": _mixed_linear_logprob,
    "mixed_embedding": _mixed_embedding,
    "mixed_norm": _mixed_norm,
}
