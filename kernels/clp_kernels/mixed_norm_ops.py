"""mixed_norm as registered operators: fakes for torch.compile, autograd, and the way to each back-end's launcher.

Shapes: M rows, D width, K copies, S distinct weightings.
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
    "Tensor x, Tensor? weight, Tensor weight_deltas, Tensor c, Tensor row_map, Tensor? bias, Tensor? bias_deltas, "
    "float eps, bool is_centered, float offset, bool cast_before_scale, str backend"
)
_library.define(f"mixed_norm({_INPUTS}) -> Tensor")
_library.define(f"mixed_norm_fwd({_INPUTS}) -> Tensor")
_library.define(
    "mixed_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor weight_deltas, Tensor c, Tensor row_map, "
    "Tensor? bias_deltas, float eps, bool is_centered, float offset, bool cast_before_scale, bool needs_x, "
    "bool needs_weight, bool needs_weight_deltas, bool needs_bias, bool needs_bias_deltas, bool needs_coefficients, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

mixed_norm_op = torch.ops.clp.mixed_norm.default  # with autograd
mixed_norm_fwd_op = torch.ops.clp.mixed_norm_fwd.default  # the same values, no autograd key


@functools.cache
def _launcher(backend: str) -> ModuleType:
    """Return a back-end's module with `forward` and `backward`, imported at its first call."""
    return importlib.import_module(f"clp_kernels.mixed_norm_{backend}")


@torch.library.impl(_library, "mixed_norm_fwd", "CompositeExplicitAutograd")
@torch.library.impl(_library, "mixed_norm", "CompositeExplicitAutograd")
def _forward(x: Tensor, *arguments: Any) -> Tensor:
    *others, backend = arguments
    return _launcher(backend).forward(x, *others)


@torch.library.impl(_library, "mixed_norm_backward", "CompositeExplicitAutograd")
def _backward_gradients(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *others, backend = arguments
    # A schema cannot return Tensor?: an empty tensor stands for "not asked for".
    return tuple(dy.new_empty(0) if g is None else g for g in _launcher(backend).backward(dy, *others))


@torch.library.register_fake("clp::mixed_norm_fwd", lib=_library)
@torch.library.register_fake("clp::mixed_norm", lib=_library)
def _forward_fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape)


if extension.missing_reason("cpu") is None:
    torch.library.register_fake("clp::mixed_norm_cpu_fwd", _forward_fake, lib=_library)


@torch.library.register_fake("clp::mixed_norm_backward", lib=_library)
def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, weight_deltas: Tensor, c: Tensor, row_map: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    needs = arguments[-7:-1]
    shapes = (x.shape, x.shape[1:], weight_deltas.shape, x.shape[1:], weight_deltas.shape, c.shape)
    dtypes = (x.dtype, *(c.dtype,) * 5)
    return tuple(
        x.new_empty(shape, dtype=dtype) if needed else dy.new_empty(0)
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, weight_deltas, c, row_map, bias, bias_deltas, *ctx.settings, ctx.backend = inputs
    # References to the module's own parameters and input; never a mixed scale, and no statistics: a backward reads x
    # anyway, and forms them again while the row is in cache.
    ctx.save_for_backward(x, weight, weight_deltas, c, row_map, bias_deltas)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, weight_deltas, bias, bias_deltas, c)]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, weight_deltas, c, row_map, bias_deltas = ctx.saved_tensors
    needs_x, needs_weight, needs_weight_deltas, needs_c, _, needs_bias, needs_bias_deltas, *_ = ctx.needs_input_grad
    needs = (needs_x, needs_weight, needs_weight_deltas, needs_bias, needs_bias_deltas, needs_c)
    gradients = torch.ops.clp.mixed_norm_backward(
        dy.contiguous(), x, weight, weight_deltas, c, row_map, bias_deltas, *ctx.settings, *needs, ctx.backend
    )
    dx, d_weight, d_weight_deltas, d_bias, d_bias_deltas, d_c = (
        gradient.to(dtype) if needed else None
        for gradient, needed, dtype in zip(gradients, needs, ctx.dtypes, strict=True)
    )
    return (dx, d_weight, d_weight_deltas, d_c, None, d_bias, d_bias_deltas, *(None,) * 5)


def _double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "clp_kernels.mixed_norm has no second derivative; call mixed_norm_ref, which plain autograd differentiates "
        "twice"
    )


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


torch.library.register_autograd("clp::mixed_norm", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("clp::mixed_norm_backward", _double_backward, setup_context=_no_context, lib=_library)
