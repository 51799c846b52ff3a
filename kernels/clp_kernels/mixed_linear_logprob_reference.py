"""mixed_linear_logprob in plain torch: the definition, and the chunked fallback on any device.

Shapes: M rows, D in, V vocabulary, C tokens of one chunk of it, K copies, S distinct weightings.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clp_kernels import mixed_linear_reference
from clp_kernels.mixed_linear_logprob_arguments import (
    Head,
    Logits,
    Needs,
    Targets,
    check_logits,
    check_range,
    check_targets,
)
from clp_kernels.mixed_linear_reference import mixed_linear_ref

# Logits of a chunk: 1 MiB of float32, a few hundred tokens of the vocabulary for some hundred rows.
_CHUNK_LOGITS = 2**18
_SMALLEST_CHUNK = 64


def mixed_linear_logprob_ref(
    hidden: Tensor,
    base: Tensor | None,
    deltas: Tensor | None,
    coefficients: Tensor | None,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    bias_deltas: Tensor | None = None,
    row_map: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute `mixed_linear_logprob` from the whole [..., V] tensor of logits, differentiable by plain autograd.

    logprobs = logits.log_softmax(-1)
    logprob = logprobs.gather(-1, targets[..., None]).squeeze(-1); entropy = -(logprobs.exp() * logprobs).sum(-1)

    Arguments, shapes and errors are those of `mixed_linear_logprob`. Logits are float32 (float64 for float64 input).
    """
    logits_by = Logits(temperature, logit_scale, softcap)
    check_logits(logits_by)
    check_targets(hidden, targets)
    base, deltas, coefficients = one_copy_where_plain(hidden, base, deltas, coefficients)
    check_range(Targets(targets.reshape(-1), ignore_index), deltas.shape[0])
    accumulator = torch.promote_types(hidden.dtype, torch.float32)
    is_kept = targets != ignore_index
    rows = torch.where(is_kept[..., None], hidden.to(accumulator), 0.0)
    wide_base, wide_bias, wide_bias_deltas = (
        None if t is None else t.to(accumulator) for t in (base, bias, bias_deltas)
    )
    with torch.autocast(hidden.device.type, enabled=False):
        y = mixed_linear_ref(
            rows,
            wide_base,
            deltas.to(accumulator),
            coefficients.to(accumulator),
            wide_bias,
            bias_deltas=wide_bias_deltas,
            row_map=row_map,
        )
    logprobs = _logits_and_slope(y, logits_by)[0].log_softmax(-1)
    picked = logprobs.gather(-1, torch.where(is_kept, targets, 0).long()[..., None]).squeeze(-1)
    logprob = torch.where(is_kept, picked, 0.0)
    if not return_entropy:
        return logprob, None
    # A token of logit -inf adds 0, to the sum and (as a factor of 0 * inf would not) to its gradient.
    finite = torch.where(logprobs == -torch.inf, 0.0, logprobs)
    return logprob, torch.where(is_kept, -(logprobs.exp() * finite).sum(-1), 0.0)


def one_copy_where_plain(
    hidden: Tensor, base: Tensor | None, deltas: Tensor | None, coefficients: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return base, deltas and coefficients; a plain head, without deltas, is one copy of coefficient 1 (a view).

    Raises:
        ValueError: deltas without coefficients or the other way round, or nothing at all.
    """
    if (deltas is None) != (coefficients is None):
        raise ValueError("deltas and coefficients come together; a head that is not conditioned has None for both")
    if deltas is not None and coefficients is not None:
        return base, deltas, coefficients
    if base is None or base.dim() != 2:
        raise ValueError(f"a head without deltas needs base [V, D], got {None if base is None else list(base.shape)}")
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return None, base[:, None, :], torch.ones(1, dtype=dtype, device=hidden.device)


def _logits_and_slope(y: Tensor, by: Logits) -> tuple[Tensor, Tensor | float]:
    """Return capped(logit_scale * y) / temperature and its derivative by y."""
    slope = by.logit_scale / by.temperature
    if by.softcap is None:
        return y * slope, slope
    bent = torch.tanh(y * (by.logit_scale / by.softcap))
    return bent * (by.softcap / by.temperature), (1.0 - bent * bent) * slope


class _Chunk:
    """The tokens [begin, end) of the vocabulary: their part of the head and, for M rows, their logits."""

    def __init__(self, rows_MD: Tensor, head: Head, by: Logits, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.head = head.columns(begin, end)
        y_MC = mixed_linear_reference.forward(rows_MD, *self.head)
        self.logits_MC, self.slope_MC = _logits_and_slope(y_MC, by)

    def is_target(self, targets_M: Tensor) -> Tensor:
        """Return a mask [M, C] of each row's target, where it is one of these tokens."""
        return torch.arange(self.begin, self.end, device=targets_M.device) == targets_M[:, None]


def _chunks(rows_MD: Tensor, head: Head, by: Logits) -> Iterator[_Chunk]:
    V = head.deltas.shape[0]
    size = max(_SMALLEST_CHUNK, _CHUNK_LOGITS // max(rows_MD.shape[0], 1))
    for begin in range(0, V, size):
        yield _Chunk(rows_MD, head, by, begin, min(begin + size, V))


def _kept_rows(hidden_MD: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return the mask of rows that have a target, and all rows in the accumulator's dtype with the others zero."""
    is_kept_M = targets.ids != targets.ignore_index
    accumulator = torch.promote_types(hidden_MD.dtype, torch.float32)
    return is_kept_M, torch.where(is_kept_M[:, None], hidden_MD.to(accumulator), 0.0)


def forward(
    hidden_MD: Tensor, head: Head, targets: Targets, by: Logits, needs_entropy: bool, forms_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor, None]:
    """Return logprob_M, entropy_M or None, normalizer_M2 (largest logit, log of the sum of exp over it), None.

    The gradient of hidden is never formed here: backward makes the logits again.
    """
    is_kept_M, rows_MD = _kept_rows(hidden_MD, targets)
    # A finite start: chunks of -inf logits alone then need no case of their own.
    max_M = rows_MD.new_full((rows_MD.shape[0],), torch.finfo(rows_MD.dtype).min)
    sum_M, weighted_M, picked_M = (torch.zeros_like(max_M) for _ in range(3))
    for chunk in _chunks(rows_MD, head, by):
        logits_MC = chunk.logits_MC
        old_max_M, max_M = max_M, torch.maximum(max_M, logits_MC.amax(1))
        rescale_M = (old_max_M - max_M).exp()
        below_MC = logits_MC - max_M[:, None]
        exp_MC = below_MC.exp()
        if needs_entropy:
            # sum of exp(z - max) (z - max), so that entropy does not cancel where logits are large.
            weighted_M = rescale_M * (weighted_M + (old_max_M - max_M) * sum_M)
            weighted_M = weighted_M + torch.where(exp_MC == 0, 0.0, exp_MC * below_MC).sum(1)
        sum_M = sum_M * rescale_M + exp_MC.sum(1)
        picked_M = picked_M + torch.where(chunk.is_target(targets.ids), logits_MC, 0.0).sum(1)
    log_sum_M = sum_M.log()
    logprob_M = torch.where(is_kept_M, picked_M - max_M - log_sum_M, 0.0)
    entropy_M = torch.where(is_kept_M, log_sum_M - weighted_M / sum_M, 0.0) if needs_entropy else None
    return logprob_M, entropy_M, torch.stack((max_M, log_sum_M), 1), None


def backward(
    hidden_MD: Tensor,
    head: Head,
    targets: Targets,
    by: Logits,
    normalizer_M2: Tensor,
    entropy_M: Tensor | None,
    d_logprob_M: Tensor,
    d_entropy_M: Tensor | None,
    needs: Needs,
    main_grad: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden, base, deltas, c, bias and bias_deltas, None where not needed.

    d_logits = d_logprob (onehot - p) - d_entropy p (log p + entropy); the rest are those of mixed_linear, by chunks.
    The gradient of the deltas is added to `main_grad` [V, K, D] where that is given, and not returned.
    """
    is_kept_M, rows_MD = _kept_rows(hidden_MD, targets)
    d_logprob_M = torch.where(is_kept_M, d_logprob_M, 0.0)
    d_entropy_M = None if d_entropy_M is None else torch.where(is_kept_M, d_entropy_M, 0.0)
    d_hidden_MD = torch.zeros_like(rows_MD) if needs.hidden else None
    d_c_SK = torch.zeros_like(head.c) if needs.c else None
    wide_needs = (needs.base, needs.deltas, needs.bias, needs.bias_deltas)
    parameters = (head.base, head.deltas, head.bias, head.bias_deltas)
    d_base, d_deltas, d_bias, d_bias_deltas = (
        torch.empty_like(t) if needed and t is not None else None
        for needed, t in zip(wide_needs, parameters, strict=True)
    )
    ones_M1 = rows_MD.new_ones(rows_MD.shape[0], 1)
    for chunk in _chunks(rows_MD, head, by):
        dy_MC = _d_output(chunk, targets, normalizer_M2, entropy_M, d_logprob_M, d_entropy_M)
        part, at = chunk.head, slice(chunk.begin, chunk.end)
        products = (part.c, part.row_map)
        if d_hidden_MD is not None:
            d_hidden_MD += mixed_linear_reference.backward_x(dy_MC, part.base, part.deltas, *products)
        if d_base is not None:
            d_base[at] = dy_MC.T @ rows_MD
        if d_bias is not None:
            d_bias[at] = dy_MC.sum(0)
        gradients = mixed_linear_reference.backward_deltas
        if needs.deltas or needs.c or main_grad is not None:
            adds_to = None if main_grad is None else main_grad[at]
            wanted = (needs.deltas or main_grad is not None, needs.c)
            d_part, d_c_part = gradients(dy_MC, rows_MD, part.deltas, *products, *wanted, main_grad=adds_to)
            _store(d_deltas, at, d_part)
            _add(d_c_SK, d_c_part)
        if part.bias_deltas is not None and (needs.bias_deltas or needs.c):
            # The bias deltas are the deltas of an input that is one in every row.
            deltas_CK1 = part.bias_deltas[:, :, None]
            d_part, d_c_part = gradients(dy_MC, ones_M1, deltas_CK1, *products, needs.bias_deltas, needs.c)
            _store(d_bias_deltas, at, None if d_part is None else d_part.squeeze(2))
            _add(d_c_SK, d_c_part)
    d_hidden = None if d_hidden_MD is None else d_hidden_MD.to(hidden_MD.dtype)
    return d_hidden, d_base, d_deltas, d_c_SK, d_bias, d_bias_deltas


def _d_output(
    chunk: _Chunk,
    targets: Targets,
    normalizer_M2: Tensor,
    entropy_M: Tensor | None,
    d_logprob_M: Tensor,
    d_entropy_M: Tensor | None,
) -> Tensor:
    """Return the gradient [M, C] of the head's output, 0 in rows without a target."""
    logprobs_MC = chunk.logits_MC - normalizer_M2[:, :1] - normalizer_M2[:, 1:]
    p_MC = logprobs_MC.exp()
    d_logits_MC = chunk.is_target(targets.ids) * d_logprob_M[:, None] - d_logprob_M[:, None] * p_MC
    if d_entropy_M is not None and entropy_M is not None:
        terms_MC = torch.where(p_MC == 0, 0.0, p_MC * (logprobs_MC + entropy_M[:, None]))
        d_logits_MC = d_logits_MC - d_entropy_M[:, None] * terms_MC
    return d_logits_MC * chunk.slope_MC


def _store(gradient: Tensor | None, at: slice, part: Tensor | None) -> None:
    if gradient is not None and part is not None:
        gradient[at] = part


def _add(gradient: Tensor | None, part: Tensor | None) -> None:
    if gradient is not None and part is not None:
        gradient += part
