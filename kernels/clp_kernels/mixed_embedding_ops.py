"""mixed_embedding as registered operators: fakes for torch.compile, autograd, and the way to each back-end's launcher.

Shapes: M token positions, V vocabulary, D width, K copies, S distinct weightings.
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
# `main_grad` is the buffer that backward adds the gradient of the deltas to; the forward neither reads nor writes it.
_library.define(
    "mixed_embedding(Tensor ids, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, int padding_idx, str backend, "
    "Tensor? main_grad=None) -> Tensor"
)
_library.define(
    "mixed_embedding_fwd(Tensor ids, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, str backend) -> Tensor"
)
_library.define(
    "mixed_embedding_backward(Tensor dy, Tensor ids, Tensor deltas, Tensor c, Tensor row_map, int padding_idx, "
    "bool needs_base, bool needs_deltas, bool needs_coefficients, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "mixed_embedding_backward_(Tensor dy, Tensor ids, Tensor deltas, Tensor c, Tensor row_map, int padding_idx, "
    "bool needs_base, Tensor(a!) main_grad, bool needs_coefficients, str backend) -> (Tensor, Tensor)"
)

mixed_embedding_op = torch.ops.clp.mixed_embedding.default  # with autograd
mixed_embedding_fwd_op = torch.ops.clp.mixed_embedding_fwd.default  # the same values, no autograd key


@functools.cache
def _launcher(backend: str) -> ModuleType:
    """Return a back-end's module with `forward` and `backward`, imported at its first call."""
    return importlib.import_module(f"clp_kernels.mixed_embedding_{backend}")


@torch.library.impl(_library, "mixed_embedding_fwd", "CompositeExplicitAutograd")
def _forward(ids: Tensor, base: Tensor | None, deltas: Tensor, c: Tensor, row_map: Tensor, backend: str) -> Tensor:
    return _launcher(backend).forward(ids, base, deltas, c, row_map)


@torch.library.impl(_library, "mixed_embedding", "CompositeExplicitAutograd")
def _forward_for_backward(
    ids: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    padding_idx: int,
    backend: str,
    main_grad: Tensor | None = None,
) -> Tensor:
    return _forward(ids, base, deltas, c, row_map, backend)


@torch.library.impl(_library, "mixed_embedding_backward", "CompositeExplicitAutograd")
def _backward_gradients(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *others, backend = arguments
    # A schema cannot return Tensor?: an empty tensor stands for "not asked for".
    return tuple(dy.new_empty(0) if g is None else g for g in _launcher(backend).backward(dy, *others))


@torch.library.impl(_library, "mixed_embedding_backward_", "CompositeExplicitAutograd")
def _accumulate_gradients(
    dy: Tensor,
    ids: Tensor,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    padding_idx: int,
    needs_base: bool,
    main_grad: Tensor,
    needs_coefficients: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the deltas to `main_grad`; return those of base and coefficients."""
    d_base, _, d_c = _launcher(backend).backward(
        dy, ids, deltas, c, row_map, padding_idx, needs_base, True, needs_coefficients, main_grad
    )
    return dy.new_empty(0) if d_base is None else d_base, c.new_empty(0) if d_c is None else d_c


def _forward_fake(ids: Tensor, base: Tensor | None, deltas: Tensor, *arguments: Any) -> Tensor:
    return (deltas if base is None else base).new_empty(ids.shape[0], deltas.shape[2])


torch.library.register_fake("clp::mixed_embedding_fwd", _forward_fake, lib=_library)
torch.library.register_fake("clp::mixed_embedding", _forward_fake, lib=_library)
if extension.missing_reason("cpu") is None:
    torch.library.register_fake("clp::mixed_embedding_cpu_fwd", _forward_fake, lib=_library)


@torch.library.register_fake("clp::mixed_embedding_backward", lib=_library)
def _backward_fake(
    dy: Tensor,
    ids: Tensor,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    padding_idx: int,
    needs_base: bool,
    needs_deltas: bool,
    needs_coefficients: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    V, _, D = deltas.shape
    return (
        dy.new_empty(V, D) if needs_base else dy.new_empty(0),
        deltas.new_empty(deltas.shape) if needs_deltas else dy.new_empty(0),
        c.new_empty(c.shape) if needs_coefficients else dy.new_empty(0),
    )


@torch.library.register_fake("clp::mixed_embedding_backward_", lib=_library)
def _accumulate_fake(
    dy: Tensor,
    ids: Tensor,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    padding_idx: int,
    needs_base: bool,
    main_grad: Tensor,
    needs_coefficients: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    d_base = dy.new_empty((deltas.shape[0], deltas.shape[2]) if needs_base else (0,))
    return d_base, c.new_empty(c.shape if needs_coefficients else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, _, deltas, c, row_map, ctx.padding_idx, ctx.backend, ctx.main_grad = inputs
    # References; never a row that was looked up. main_grad is not among them: others add to it before this call's
    # backward, which is no error.
    ctx.save_for_backward(ids, deltas, c, row_map)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, needs_base, needs_deltas, needs_c, *_ = ctx.needs_input_grad
    arguments, d_deltas = (dy.contiguous(), *ctx.saved_tensors, ctx.padding_idx, needs_base), None
    if needs_deltas and ctx.main_grad is not None:
        if torch.is_grad_enabled():  # the operator below writes to its argument and can have no autograd of its own
            _double_backward(ctx)
        d_base, d_c = torch.ops.clp.mixed_embedding_backward_(*arguments, ctx.main_grad, needs_c, ctx.backend)
    else:
        d_base, d_deltas, d_c = torch.ops.clp.mixed_embedding_backward(*arguments, needs_deltas, needs_c, ctx.backend)
        d_deltas = d_deltas if needs_deltas else None
    return (None, d_base if needs_base else None, d_deltas, d_c if needs_c else None, None, None, None, None)


def _double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "clp_kernels.mixed_embedding has no second derivative; call mixed_embedding_ref, which plain autograd "
        "differentiates twice"
    )


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


torch.library.register_autograd("clp::mixed_embedding", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(
    "clp::mixed_embedding_backward", _double_backward, setup_context=_no_context, lib=_library
)
