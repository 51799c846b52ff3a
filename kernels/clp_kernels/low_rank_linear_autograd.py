"""The gradients of low_rank_linear: for the registered operator, and for eager calls of the compiled one.

Saved for backward are references to the layer's own parameters, input, gates and row map, and `x @ down.T`; never the
low-rank part of y. Shapes: M rows, D in, N out, R ranks, S weightings.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from clp_kernels.arguments import flatten_low_rank_rows
from clp_kernels.low_rank_linear_ops import backward_op, compiled_op, library


class CompiledLowRankLinear(torch.autograd.Function):
    """The autograd of back-end "cpp" for eager calls, on arguments of any rank.

    The registered operator computes the same; `register_autograd` puts several times the Python around each call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        down: Tensor,
        up: Tensor,
        gates: Tensor,
        row_map: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Return y [..., N]."""
        y, shrink_MR = compiled_op(x, base, down, up, gates, row_map, bias, True)
        ctx.save_for_backward(shrink_MR, x, base, down, up, gates, row_map)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `forward`'s arguments."""
        shrink_MR, x, base, down, up, gates, row_map = ctx.saved_tensors
        rows = flatten_low_rank_rows(x, base, down, up, gates, None, row_map)
        dy_MN = dy.reshape(rows.x_MD.shape[0], up.shape[0])
        saved = (shrink_MR, rows.x_MD, base, down, up, rows.c_SK, rows.row_map_M)
        dx, d_base, d_down, d_up, d_gates, d_bias = _gradients(
            dy_MN, saved, ctx.needs_input_grad, ctx.bias_dtype, ("cpp", False)
        )
        dx = None if dx is None else dx.view(x.shape)
        d_gates = None if d_gates is None else d_gates.view(gates.shape)
        return dx, d_base, d_down, d_up, d_gates, None, d_bias


# Function.apply without its Python for torch.func's transforms, which have no rule for custom operators: they raise.
compiled_with_autograd = super(torch.autograd.Function, CompiledLowRankLinear).apply


def _gradients(
    dy_MN: Tensor,
    saved: tuple[Tensor, ...],
    needs_input_grad: tuple[bool, ...],
    bias_dtype: torch.dtype | None,
    how: tuple[str, bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, base, down, up, gates and bias that are asked for, else None."""
    needs, needs_bias = needs_input_grad[:5], needs_input_grad[6]
    dy_MN = dy_MN.contiguous()
    gradients: tuple[Tensor | None, ...] = (None,) * 5
    if any(needs):
        found = backward_op(dy_MN, *saved, *needs, *how)
        gradients = tuple(g if needed else None for g, needed in zip(found, needs, strict=True))
    gates_SR = saved[5]
    d_bias = dy_MN.sum(0, dtype=gates_SR.dtype).to(bias_dtype) if needs_bias else None
    return *gradients, d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, base, down, up, gates, row_map, bias, backend, batch_invariant = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], x, base, down, up, gates, row_map)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.how = (backend, batch_invariant)


def _backward(ctx: Any, dy: Tensor | None, d_shrink: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    *gradients, d_bias = _gradients(dy, ctx.saved_tensors, ctx.needs_input_grad, ctx.bias_dtype, ctx.how)
    return *gradients, None, d_bias, None, None


def _double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "clp_kernels.low_rank_linear has no second derivative; call low_rank_linear_ref, which plain autograd "
        "differentiates twice"
    )


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


torch.library.register_autograd("clp::low_rank_linear", _backward, setup_context=_setup_context, lib=library)
torch.library.register_autograd(
    "clp::low_rank_linear_backward", _double_backward, setup_context=_no_context, lib=library
)
