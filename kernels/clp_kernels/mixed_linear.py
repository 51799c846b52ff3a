"""The public mixed_linear: a linear layer whose weight is a base plus a per-row weighted sum of K deltas.

Shapes: M rows, D in, N out, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.arguments import Rows, autocast, check_main_grad, flatten_rows
from clp_kernels.mixed_linear_autograd import compiled_with_autograd
from clp_kernels.mixed_linear_ops import compiled_op, mixed_linear_fwd_op, mixed_linear_op
from clp_kernels.select import Problem, resolve, runs_compiled


def mixed_linear(
    x: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    coefficients: Tensor,
    bias: Tensor | None = None,
    *,
    bias_deltas: Tensor | None = None,
    row_map: Tensor | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
    exact_delta: bool = True,
) -> Tensor:
    """Compute a linear layer under each row's own mix of K deltas over a frozen base.

    y = F.linear(x, base + einsum("k,nkd->nd", c, deltas), bias + bias_deltas @ c)  # c: the row's coefficients

    Args:
        x: [..., D] float32, bfloat16 or float16. Under autocast x alone is cast. float64 (every argument then) runs on
            the reference back-end.
        base: [N, D], or None for a layer that is the mix of its copies alone. x's dtype, or another of the three.
        deltas: [N, K, D], the base's dtype, or float32 over a 16-bit base. Where the tensor has an attribute
            `main_grad` ([N, K, D], contiguous, float32; Megatron's convention) the backward adds the gradient to that
            buffer and returns none: `deltas.grad` stays as it is.
        coefficients: float32. [K], or one row per leading index of x: [B, K], [B, T, K]; their leading sizes are a
            prefix of x's. With `row_map`: [S, K].
        bias: [N] or None.
        bias_deltas: [N, K] or None.
        row_map: int32 of shape x.shape[:-1], row of `coefficients` for each row of x; an expanded view will do.
        backend: "reference", "cpp", "triton", "cuda" or "auto"; None takes the surrounding `backend(...)` block's, else
            "auto".
        batch_invariant: True gives a row's y and gradient the same bits whatever else is in the batch, and all results
            the same bits for any number of threads; at some cost. The reference back-end refuses it.
        exact_delta: True keeps base and deltas apart: a delta of any size keeps its effect beside a 16-bit base. Where
            many bfloat16 rows share a weighting, a GPU and a processor with AMX round the mix of deltas by itself.
            False lets both round their sum as one 16-bit weight there, as a premixed checkpoint does, for half the
            products: half the effect of deltas a thousandth of the base's size is lost.

    Returns:
        [..., N] in x's dtype, accumulated in float32. Gradients for every floating argument, in its dtype, reduced in
        float32.

    Raises:
        ValueError: an argument that does not fit, by name, with the remedy; a back-end that does not take such ones.
        RuntimeError: a back-end asked for by name that this process lacks.

    Reference: arXiv 2407.15762, section 3 (parameter averaging; here of differences to the reference model).
    """
    if torch._C._is_any_autocast_enabled():  # asked for a device by name it takes 0.15 us more
        x = autocast(x)
    needs_grad = torch.is_grad_enabled() and (
        deltas.requires_grad
        or x.requires_grad
        or any(t is not None and t.requires_grad for t in (base, coefficients, bias, bias_deltas))
    )
    if runs_compiled(x, backend):
        arguments = (x, base, deltas, coefficients, row_map, bias, bias_deltas)
        try:
            if needs_grad:
                return compiled_with_autograd(*arguments, batch_invariant, exact_delta)
            # Two arguments less are 0.35 us less.
            if exact_delta and not batch_invariant:
                return compiled_op(*arguments)
            return compiled_op(*arguments, batch_invariant, exact_delta)
        except RuntimeError:
            # The compiled operator checks what it is given. What it does not take goes the long way,
            # where the culprit gets its name and remedy, or the call another back-end.
            pass
    rows = flatten_rows(x, base, deltas, coefficients, bias, bias_deltas, row_map)
    name = _resolve(backend, rows, base, deltas, batch_invariant)
    how = (name, batch_invariant, exact_delta)
    inputs = (rows.x_MD, base, deltas, rows.c_SK, rows.row_map_M, bias, bias_deltas)
    # An op with an autograd key costs more, also where nothing needs a gradient.
    y_MN = mixed_linear_op(*inputs, *how, check_main_grad(deltas)) if needs_grad else mixed_linear_fwd_op(*inputs, *how)
    return y_MN.view(*x.shape[:-1], deltas.shape[0])


def backend_for(
    x: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    coefficients: Tensor,
    bias: Tensor | None = None,
    *,
    bias_deltas: Tensor | None = None,
    row_map: Tensor | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> str:
    """Return the name of the back-end that `mixed_linear` would run for the same arguments, without running it.

    Raises:
        ValueError, RuntimeError: as `mixed_linear`.
    """
    rows = flatten_rows(autocast(x), base, deltas, coefficients, bias, bias_deltas, row_map)
    return _resolve(backend, rows, base, deltas, batch_invariant)


def _resolve(requested: str | None, rows: Rows, base: Tensor | None, deltas: Tensor, batch_invariant: bool) -> str:
    x_MD, c_SK = rows.x_MD, rows.c_SK
    N, K, D = deltas.shape
    problem = Problem(
        device_type=x_MD.device.type,
        x_dtype=x_MD.dtype,
        base_dtype=None if base is None else base.dtype,
        deltas_dtype=deltas.dtype,
        M=x_MD.shape[0],
        D=D,
        N=N,
        K=K,
        S=c_SK.shape[0],
        batch_invariant=batch_invariant,
    )
    return resolve(requested, problem)
