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
_library.define(
    "mixed_embedding(Tensor ids, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, int padding_idx, str backend) "
    "-> Tensor"
)
_library.define(
    "mixed_embedding_fwd(Tensor ids, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, str backend) -> Tensor"
)
_library.define(
    "mixed_embedding_backward(Tensor dy, Tensor ids, Tensor deltas, Tensor c, Tensor row_map, int padding_idx, "
    "bool needs_base, bool needs_deltas, bool needs_coefficients, str backend) -> (Tensor, Tensor, Tensor)"
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
    ids: Tensor, base: Tensor | None, deltas: Tensor, c: Tensor, row_map: Tensor, padding_idx: int, backend: str
) -> Tensor:
    return _forward(ids, base, deltas, c, row_map, backend)


@torch.library.impl(_library, "mixed_embedding_backward", "CompositeExplicitAutograd")
def _backward_gradients(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *others, backend = arguments
    # A schema cannot return Tensor?: an empty tensor stands for "not asked for".
    return tuple(dy.new_empty(0) if g is None else g for g in _launcher(backend).backward(dy, *others))


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, _, deltas, c, row_map, ctx.padding_idx, ctx.backend = inputs
    ctx.save_for_backward(ids, deltas, c, row_map)  # references; never a row that was looked up


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, needs_base, needs_deltas, needs_c, *_ = ctx.needs_input_grad
    d_base, d_deltas, d_c = torch.ops.clp.mixed_embedding_backward(
        dy.contiguous(), *ctx.saved_tensors, ctx.padding_idx, needs_base, needs_deltas, needs_c, ctx.backend
    )
    gradients = (d_base if needs_base else None, d_deltas if needs_deltas else None, d_c if needs_c else None)
    return (None, *gradients, None, None, None)


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
