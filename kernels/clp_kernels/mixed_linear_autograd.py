"""The gradients of mixed_linear: for the registered operator, and for eager calls of the compiled one.

Saved for backward are references to the layer's own parameters, input, coefficients and row map; never c (x) x, a mix,
or one output per copy. Shapes: M rows, D in, N out, K copies, S distinct weightings.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from clp_kernels.arguments import check_main_grad, flatten_rows
from clp_kernels.mixed_linear_ops import accumulate_deltas_op, backward_deltas_op, backward_x_op, compiled_op, library


class _Call(NamedTuple):
    """What the backward of one call needs, in normal form."""

    x_MD: Tensor
    base_ND: Tensor | None
    deltas_NKD: Tensor
    c_SK: Tensor
    row_map_M: Tensor
    bias_dtype: torch.dtype | None
    bias_deltas_NK: Tensor | None
    main_grad_NKD: Tensor | None
    backend: str
    batch_invariant: bool
    exact_delta: bool


class _Gradients(NamedTuple):
    """One gradient for each differentiable input, None where none was asked for."""

    x_MD: Tensor | None
    base_ND: Tensor | None
    deltas_NKD: Tensor | None
    c_SK: Tensor | None
    bias_N: Tensor | None
    bias_deltas_NK: Tensor | None


def _gradients(call: _Call, needs: tuple[bool, ...], dy_MN: Tensor) -> _Gradients:
    """Return the gradients that `needs` asks for, in the order x, base, deltas, c, row_map, bias, bias_deltas."""
    needs_x, needs_base, needs_deltas, needs_c, _, needs_bias, needs_bias_deltas = needs
    how = (call.backend, call.batch_invariant)
    weights = (call.base_ND, call.deltas_NKD, call.c_SK, call.row_map_M)
    dx = d_base = d_deltas = d_c = d_bias = d_bias_deltas = None
    if needs_x:
        dx = backward_x_op(dy_MN, *weights, *how, call.exact_delta)
    if needs_deltas or needs_c:
        d_deltas, d_c = _deltas_gradients(call, needs_deltas, needs_c, dy_MN)
    if needs_base:
        assert call.base_ND is not None
        d_base = (dy_MN.T @ call.x_MD).to(call.base_ND.dtype)
    # The bias terms are small reductions over rows, in plain torch for every back-end.
    if needs_bias:
        d_bias = dy_MN.to(call.c_SK.dtype).sum(0).to(call.bias_dtype)
    if call.bias_deltas_NK is not None and (needs_bias_deltas or needs_c):
        # The bias deltas are the deltas of an input that is one in every row.
        ones_M1, deltas_NK1 = dy_MN.new_ones(dy_MN.shape[0], 1), call.bias_deltas_NK[:, :, None]
        d_bias_deltas, bias_d_c = backward_deltas_op(
            dy_MN, ones_M1, deltas_NK1, call.c_SK, call.row_map_M, needs_bias_deltas, needs_c, "reference"
        )
        d_bias_deltas = d_bias_deltas.squeeze(2) if needs_bias_deltas else None
        d_c = d_c + bias_d_c if d_c is not None else None
    return _Gradients(dx, d_base, d_deltas, d_c, d_bias, d_bias_deltas)


def _deltas_gradients(
    call: _Call, needs_deltas: bool, needs_c: bool, dy_MN: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    arguments = (dy_MN, call.x_MD, call.deltas_NKD, call.c_SK, call.row_map_M)
    how = (call.backend, call.batch_invariant)
    if needs_deltas and call.main_grad_NKD is not None:
        d_c = accumulate_deltas_op(*arguments, call.main_grad_NKD, needs_c, *how)
        return None, d_c if needs_c else None
    d_deltas, d_c = backward_deltas_op(*arguments, needs_deltas, needs_c, *how)
    return d_deltas if needs_deltas else None, d_c if needs_c else None


class CompiledMixedLinear(torch.autograd.Function):
    """The autograd of back-end "cpp" for eager calls, on arguments of any rank.

    The registered operator computes the same; `register_autograd` puts several times the Python around each call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        deltas: Tensor,
        c: Tensor,
        row_map: Tensor | None,
        bias: Tensor | None,
        bias_deltas: Tensor | None,
        batch_invariant: bool,
        exact_delta: bool,
    ) -> Tensor:
        """Return y [..., N]."""
        ctx.save_for_backward(x, base, deltas, c, row_map, bias_deltas)
        # Not saved by save_for_backward: others add to it before this call's backward, which is no error.
        ctx.call = (None if bias is None else bias.dtype, check_main_grad(deltas), batch_invariant, exact_delta)
        if exact_delta and not batch_invariant:
            return compiled_op(x, base, deltas, c, row_map, bias, bias_deltas)
        return compiled_op(x, base, deltas, c, row_map, bias, bias_deltas, batch_invariant, exact_delta)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `forward`'s arguments."""
        x, base, deltas, c, row_map, bias_deltas = ctx.saved_tensors
        bias_dtype, main_grad, *how = ctx.call
        rows = flatten_rows(x, base, deltas, c, None, bias_deltas, row_map)
        arguments = (rows.x_MD, base, deltas, rows.c_SK, rows.row_map_M, bias_dtype, bias_deltas)
        call = _Call(*arguments, main_grad, "cpp", *how)
        dy_MN = dy.reshape(rows.x_MD.shape[0], deltas.shape[0]).contiguous()
        g = _gradients(call, ctx.needs_input_grad[:7], dy_MN)
        dx = None if g.x_MD is None else g.x_MD.view(x.shape)
        d_c = None if g.c_SK is None else g.c_SK.view(c.shape)
        return dx, g.base_ND, g.deltas_NKD, d_c, None, g.bias_N, g.bias_deltas_NK, None, None


# Function.apply without its Python for torch.func's transforms, which have no rule for custom operators: they raise.
compiled_with_autograd = super(torch.autograd.Function, CompiledMixedLinear).apply


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, base, deltas, c, row_map, bias, bias_deltas, backend, batch_invariant, exact_delta, main_grad = inputs
    ctx.save_for_backward(x, base, deltas, c, row_map, bias_deltas)
    ctx.call = (None if bias is None else bias.dtype, main_grad, backend, batch_invariant, exact_delta)


def _backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, ...]:
    x, base, deltas, c, row_map, bias_deltas = ctx.saved_tensors
    bias_dtype, *how = ctx.call
    call = _Call(x, base, deltas, c, row_map, bias_dtype, bias_deltas, *how)
    g = _gradients(call, ctx.needs_input_grad[:7], dy_MN.contiguous())
    return g.x_MD, g.base_ND, g.deltas_NKD, g.c_SK, None, g.bias_N, g.bias_deltas_NK, None, None, None, None


def _double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "clp_kernels.mixed_linear has no second derivative; call mixed_linear_ref, which plain autograd "
        "differentiates twice"
    )


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


torch.library.register_autograd("clp::mixed_linear", _backward, setup_context=_setup_context, lib=library)
for _name in ("clp::mixed_linear_backward_x", "clp::mixed_linear_backward_deltas"):
    torch.library.register_autograd(_name, _double_backward, setup_context=_no_context, lib=library)
