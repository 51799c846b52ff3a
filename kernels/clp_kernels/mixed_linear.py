"""The public mixed_linear: a linear layer whose weight is a base plus a per-row weighted sum of K deltas.

Shapes: M rows, D in, N out, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.arguments import Rows, autocast, flatten_rows
from clp_kernels.mixed_linear_ops import mixed_linear_fwd_op, mixed_linear_op
from clp_kernels.select import Problem, resolve


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
) -> Tensor:
    """Compute a linear layer under each row's own mix of K deltas over a frozen base.

    y = F.linear(x, base + einsum("k,nkd->nd", c, deltas), bias + bias_deltas @ c)  # c: the row's coefficients

    Args:
        x: [..., D] float32, bfloat16 or float16. Under autocast x alone is cast. float64 (every argument then) runs on
            the reference back-end.
        base: [N, D], or None for a layer that is the mix of its copies alone. x's dtype, or another of the three.
        deltas: [N, K, D], the base's dtype, or float32 over a 16-bit base.
        coefficients: float32. [K], or one row per leading index of x: [B, K], [B, T, K]; their leading sizes are a
            prefix of x's. With `row_map`: [S, K].
        bias: [N] or None.
        bias_deltas: [N, K] or None.
        row_map: int32 of shape x.shape[:-1], row of `coefficients` for each row of x; an expanded view will do.
        backend: "reference", "cpp", "triton", "cuda" or "auto"; None takes the surrounding `backend(...)` block's, else
            "auto".

    Returns:
        [..., N] in x's dtype, accumulated in float32. Gradients for every floating argument, in its dtype, reduced in
        float32.

    Raises:
        ValueError: an argument that does not fit, by name, with the remedy; a back-end that does not take such ones.
        RuntimeError: a back-end asked for by name that this process lacks.

    Reference: arXiv 2407.15762, section 3 (parameter averaging; here of differences to the reference model).
    """
    x = autocast(x)
    rows = flatten_rows(x, base, deltas, coefficients, bias, bias_deltas, row_map)
    name = _resolve(backend, rows, base, deltas)
    tensors = (x, base, deltas, coefficients, bias, bias_deltas)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    arguments = (rows.x_MD, base, deltas, rows.c_SK, rows.row_map_M, bias, bias_deltas)
    # An op with an autograd key costs 5 us a call even where nothing needs a gradient (F.linear: 1.7 us), one with a
    # Python kernel 8 us more than the compiled one that it would call.
    if needs_grad:
        y_MN = mixed_linear_op(*arguments, name)
    elif name == "cpp":
        y_MN = torch.ops.clp.mixed_linear_cpu_fwd.default(*arguments)
    else:
        y_MN = mixed_linear_fwd_op(*arguments, name)
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
) -> str:
    """Return the name of the back-end that `mixed_linear` would run for the same arguments, without running it.

    Raises:
        ValueError, RuntimeError: as `mixed_linear`.
    """
    return _resolve(
        backend, flatten_rows(autocast(x), base, deltas, coefficients, bias, bias_deltas, row_map), base, deltas
    )


def _resolve(requested: str | None, rows: Rows, base: Tensor | None, deltas: Tensor) -> str:
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
    )
    return resolve(requested, problem)
