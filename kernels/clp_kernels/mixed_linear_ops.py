"""mixed_linear as registered operators: fakes for torch.compile, autograd, and the way to each back-end's launcher.

Operators whose kernel is Python are declared here, those whose kernel is compiled in csrc/registration.cpp; each
schema is written once. Shapes: M rows, D in, N out, K copies, S distinct weightings.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from clp_kernels import extension

_library = torch.library.Library("clp", "FRAGMENT")
_INPUTS = (
    "Tensor x, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, Tensor? bias, Tensor? bias_deltas, str backend"
)
_library.define(f"mixed_linear({_INPUTS}) -> Tensor")
_library.define(f"mixed_linear_fwd({_INPUTS}) -> Tensor")
_library.define(
    "mixed_linear_backward_x(Tensor dy, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, str backend) -> Tensor"
)
_library.define(
    "mixed_linear_backward_deltas(Tensor dy, Tensor x, Tensor deltas, Tensor c, Tensor row_map, bool needs_deltas, "
    "bool needs_coefficients, str backend) -> (Tensor, Tensor)"
)

mixed_linear_op = torch.ops.clp.mixed_linear.default  # with autograd
mixed_linear_fwd_op = torch.ops.clp.mixed_linear_fwd.default  # the same values, no autograd key


@functools.cache
def _launcher(backend: str) -> ModuleType:
    """Return a back-end's module with `forward`, `backward_x` and `backward_deltas`, imported at its first call."""
    return importlib.import_module(f"clp_kernels.mixed_linear_{backend}")


@torch.library.impl(_library, "mixed_linear_fwd", "CompositeExplicitAutograd")
@torch.library.impl(_library, "mixed_linear", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    bias: Tensor | None,
    bias_deltas: Tensor | None,
    backend: str,
) -> Tensor:
    return _launcher(backend).forward(x, base, deltas, c, row_map, bias, bias_deltas)


@torch.library.impl(_library, "mixed_linear_backward_x", "CompositeExplicitAutograd")
def _backward_x(dy: Tensor, base: Tensor | None, deltas: Tensor, c: Tensor, row_map: Tensor, backend: str) -> Tensor:
    return _launcher(backend).backward_x(dy, base, deltas, c, row_map)


@torch.library.impl(_library, "mixed_linear_backward_deltas", "CompositeExplicitAutograd")
def _backward_deltas(
    dy: Tensor,
    x: Tensor,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    needs_deltas: bool,
    needs_coefficients: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    d_deltas, d_c = _launcher(backend).backward_deltas(dy, x, deltas, c, row_map, needs_deltas, needs_coefficients)
    # A schema cannot return Tensor?: an empty tensor stands for "not asked for".
    return deltas.new_empty(0) if d_deltas is None else d_deltas, c.new_empty(0) if d_c is None else d_c


@torch.library.register_fake("clp::mixed_linear_fwd", lib=_library)
@torch.library.register_fake("clp::mixed_linear", lib=_library)
def _forward_fake(
    x: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    bias: Tensor | None,
    bias_deltas: Tensor | None,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape[0], deltas.shape[0])


def _compiled_forward_fake(
    x: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    bias: Tensor | None,
    bias_deltas: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], deltas.shape[0])


if extension.missing_reason("cpu") is None:  # it declares the operators of the CUDA part too
    for _name in ("clp::mixed_linear_cpu_fwd", "clp::mixed_linear_cuda_fwd"):
        torch.library.register_fake(_name, _compiled_forward_fake, lib=_library)


@torch.library.register_fake("clp::mixed_linear_backward_x", lib=_library)
def _backward_x_fake(
    dy: Tensor, base: Tensor | None, deltas: Tensor, c: Tensor, row_map: Tensor, backend: str
) -> Tensor:
    return dy.new_empty(dy.shape[0], deltas.shape[2])


@torch.library.register_fake("clp::mixed_linear_backward_deltas", lib=_library)
def _backward_deltas_fake(
    dy: Tensor,
    x: Tensor,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    needs_deltas: bool,
    needs_coefficients: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    d_deltas = deltas.new_empty(deltas.shape if needs_deltas else (0,))
    return d_deltas, c.new_empty(c.shape if needs_coefficients else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, base, deltas, c, row_map, bias, bias_deltas, backend = inputs
    # References to the layer's own parameters and input; never c (x) x, a mix, or one output per copy.
    ctx.save_for_backward(x, base, deltas, c, row_map, bias_deltas)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.backend = backend


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, base, deltas, c, row_map, bias_deltas = ctx.saved_tensors
    needs_x, needs_base, needs_deltas, needs_c, _, needs_bias, needs_bias_deltas, _ = ctx.needs_input_grad
    dy = dy.contiguous()
    dx = d_base = d_deltas = d_c = d_bias = d_bias_deltas = None
    if needs_x:
        dx = torch.ops.clp.mixed_linear_backward_x(dy, base, deltas, c, row_map, ctx.backend)
    if needs_deltas or needs_c:
        d_deltas, d_c = torch.ops.clp.mixed_linear_backward_deltas(
            dy, x, deltas, c, row_map, needs_deltas, needs_c, ctx.backend
        )
        d_deltas, d_c = d_deltas if needs_deltas else None, d_c if needs_c else None
    if needs_base:
        d_base = (dy.T @ x).to(base.dtype)
    # The bias terms are small reductions over rows, in plain torch for every back-end.
    if needs_bias:
        d_bias = dy.to(c.dtype).sum(0).to(ctx.bias_dtype)
    if bias_deltas is not None and (needs_bias_deltas or needs_c):
        # The bias deltas are the deltas of an input that is one in every row.
        d_bias_deltas, bias_d_c = torch.ops.clp.mixed_linear_backward_deltas(
            dy,
            dy.new_ones(dy.shape[0], 1),
            bias_deltas[:, :, None],
            c,
            row_map,
            needs_bias_deltas,
            needs_c,
            "reference",
        )
        d_bias_deltas = d_bias_deltas.squeeze(2) if needs_bias_deltas else None
        d_c = d_c + bias_d_c if needs_c else None
    return dx, d_base, d_deltas, d_c, None, d_bias, d_bias_deltas, None


def _double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "clp_kernels.mixed_linear has no second derivative; call mixed_linear_ref, which plain autograd "
        "differentiates twice"
    )


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


torch.library.register_autograd("clp::mixed_linear", _backward, setup_context=_setup_context, lib=_library)
for _name in ("clp::mixed_linear_backward_x", "clp::mixed_linear_backward_deltas"):
    torch.library.register_autograd(_name, _double_backward, setup_context=_no_context, lib=_library)
