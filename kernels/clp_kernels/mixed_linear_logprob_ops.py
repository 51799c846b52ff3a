"""The registered operator mixed_linear_logprob: fake, autograd, and the way to each back-end's launcher.

Shapes: M rows, D in, V vocabulary, K copies, S distinct weightings.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from clp_kernels.mixed_linear_logprob_arguments import Head, Logits, Needs, Targets, check_range
from clp_kernels.mixed_linear_ops import library

_INPUTS = (
    "Tensor hidden, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, Tensor? bias, Tensor? bias_deltas, "
    "Tensor targets, int ignore_index, float temperature, float logit_scale, float? softcap"
)
_NUM_TENSORS = 7  # of _INPUTS, before the targets
_NUM_FORWARD = _NUM_TENSORS + 9  # targets, four numbers, three flags, the back-end's name
_FLOATING = (0, 1, 2, 3, 5, 6)  # all of them but the row map: what may need a gradient, in the order of `Needs`
_DELTAS = Needs._fields.index("deltas")
# logprob [M], entropy [M], normalizer [M, 2], the gradient [M, D] of logprob by hidden; empty where not made.
_OUTPUTS = "(Tensor, Tensor, Tensor, Tensor)"
_FLAGS = "bool needs_entropy, bool differentiates_entropy, bool forms_gradient, str backend"
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"  # in the order of `Needs`; empty where not needed
_OF_OUTPUTS = "Tensor normalizer, Tensor? entropy, Tensor d_logprob, Tensor? d_entropy, bool[] needs, str backend"
# `main_grad` is the buffer that backward adds the gradient of the deltas to; the forward neither reads nor writes it.
library.define(f"mixed_linear_logprob({_INPUTS}, {_FLAGS}, Tensor? main_grad=None) -> {_OUTPUTS}")
library.define(f"mixed_linear_logprob_fwd({_INPUTS}, {_FLAGS}) -> {_OUTPUTS}")
library.define(f"mixed_linear_logprob_backward({_INPUTS}, {_OF_OUTPUTS}) -> {_GRADIENTS}")
library.define(f"mixed_linear_logprob_backward_({_INPUTS}, {_OF_OUTPUTS}, Tensor(a!) main_grad) -> {_GRADIENTS}")
library.define("mixed_linear_logprob_backward_formed(Tensor hidden, Tensor formed, Tensor d_logprob) -> Tensor")

mixed_linear_logprob_op = torch.ops.clp.mixed_linear_logprob.default  # with autograd
mixed_linear_logprob_fwd_op = torch.ops.clp.mixed_linear_logprob_fwd.default  # the same values, no autograd key


@functools.cache
def _launcher(backend: str) -> ModuleType:
    """Return a back-end's module with `forward` and `backward`, imported at its first call."""
    return importlib.import_module(f"clp_kernels.mixed_linear_logprob_{backend}")


def _grouped(inputs: tuple[Any, ...]) -> tuple[Tensor, Head, Targets, Logits]:
    """Return the arguments of _INPUTS as launchers take them."""
    hidden, base, deltas, c, row_map, bias, bias_deltas, ids, ignore_index, *logits = inputs
    return hidden, Head(base, deltas, c, row_map, bias, bias_deltas), Targets(ids, ignore_index), Logits(*logits)


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """A schema cannot return Tensor?: an empty tensor stands for "not asked for"."""
    return like.new_empty(0) if tensor is None else tensor


@torch.library.impl(library, "mixed_linear_logprob", "CompositeExplicitAutograd")
def _forward_with_autograd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(*arguments[:_NUM_FORWARD])


@torch.library.impl(library, "mixed_linear_logprob_fwd", "CompositeExplicitAutograd")
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, needs_entropy, _, forms_gradient, backend = arguments
    hidden, head, targets, logits = _grouped(tuple(inputs))
    check_range(targets, head.deltas.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        outputs = _launcher(backend).forward(hidden, head, targets, logits, needs_entropy, forms_gradient)
    logprob, entropy, normalizer, formed = outputs
    return logprob, _or_empty(entropy, logprob), normalizer, _or_empty(formed, logprob)


@torch.library.impl(library, "mixed_linear_logprob_backward", "CompositeExplicitAutograd")
def _backward_impl(*arguments: Any, main_grad: Tensor | None = None) -> tuple[Tensor, ...]:
    *inputs, normalizer, entropy, d_logprob, d_entropy, needs, backend = arguments
    hidden, head, targets, logits = _grouped(tuple(inputs))
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = _launcher(backend).backward(
            hidden, head, targets, logits, normalizer, entropy, d_logprob, d_entropy, Needs(*needs), main_grad
        )
    return tuple(_or_empty(gradient, hidden) for gradient in gradients)


@torch.library.impl(library, "mixed_linear_logprob_backward_", "CompositeExplicitAutograd")
def _accumulate_impl(*arguments: Any) -> tuple[Tensor, ...]:
    """Add the gradient of the deltas to the last argument; return the others."""
    return _backward_impl(*arguments[:-1], main_grad=arguments[-1])


@torch.library.impl(library, "mixed_linear_logprob_backward_formed", "CompositeExplicitAutograd")
def _backward_formed(hidden: Tensor, formed: Tensor, d_logprob: Tensor) -> Tensor:
    return (formed * d_logprob[:, None]).to(hidden.dtype)


@torch.library.register_fake("clp::mixed_linear_logprob_fwd", lib=library)
@torch.library.register_fake("clp::mixed_linear_logprob", lib=library)
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, c = arguments[0], arguments[3]
    needs_entropy, _, forms_gradient, _ = arguments[_NUM_FORWARD - 4 : _NUM_FORWARD]
    M = hidden.shape[0]
    entropy = c.new_empty(M if needs_entropy else 0)
    return c.new_empty(M), entropy, c.new_empty(M, 2), c.new_empty(hidden.shape if forms_gradient else (0,))


@torch.library.register_fake("clp::mixed_linear_logprob_backward_", lib=library)
@torch.library.register_fake("clp::mixed_linear_logprob_backward", lib=library)
def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, base, deltas, c, _, bias, bias_deltas = arguments[:_NUM_TENSORS]
    inputs = (hidden, base, deltas, c, bias, bias_deltas)
    needs = next(argument for argument in reversed(arguments) if isinstance(argument, list | tuple))
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed and t is not None else hidden.new_empty(0)
        for t, needed in zip(inputs, needs, strict=True)
    )


@torch.library.register_fake("clp::mixed_linear_logprob_backward_formed", lib=library)
def _backward_formed_fake(hidden: Tensor, formed: Tensor, d_logprob: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, entropy, normalizer, formed = output
    *_, needs_entropy, differentiates_entropy, forms_gradient, backend, main_grad = inputs
    ctx.set_materialize_grads(False)
    fixed = (normalizer, formed) if needs_entropy and differentiates_entropy else (entropy, normalizer, formed)
    ctx.mark_non_differentiable(*fixed)
    # main_grad is not saved by save_for_backward: others add to it before this call's backward, which is no error.
    ctx.forms_gradient, ctx.backend, ctx.main_grad = forms_gradient, backend, main_grad
    ctx.numbers = inputs[_NUM_TENSORS + 1 : _NUM_TENSORS + 5]
    # References to the head's own parameters and input, and three numbers a row: never logits.
    tensors = (inputs[0], formed) if forms_gradient else (*inputs[: _NUM_TENSORS + 1], normalizer, entropy)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_logprob: Tensor | None, d_entropy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    num_others = _NUM_FORWARD - _NUM_TENSORS + 1  # and main_grad
    if ctx.forms_gradient:
        hidden, formed = ctx.saved_tensors
        d_hidden = None
        if d_logprob is not None:
            d_hidden = torch.ops.clp.mixed_linear_logprob_backward_formed(hidden, formed, d_logprob)
        return (d_hidden, *[None] * (_NUM_TENSORS - 1 + num_others))
    *inputs, normalizer, entropy = ctx.saved_tensors
    needs = [bool(ctx.needs_input_grad[index]) for index in _FLOATING]
    if d_logprob is None and d_entropy is None:
        return (None,) * (_NUM_TENSORS + num_others)
    d_logprob = torch.zeros_like(normalizer[:, 0]) if d_logprob is None else d_logprob.contiguous()
    d_entropy = None if d_entropy is None else d_entropy.contiguous()
    arguments = (*inputs, *ctx.numbers, normalizer, None if d_entropy is None else entropy, d_logprob, d_entropy)
    if needs[_DELTAS] and ctx.main_grad is not None:
        if torch.is_grad_enabled():  # the operator below writes to its argument and can have no autograd of its own
            _double_backward(ctx)
        needs[_DELTAS] = False
        gradients = torch.ops.clp.mixed_linear_logprob_backward_(*arguments, needs, ctx.backend, ctx.main_grad)
    else:
        gradients = torch.ops.clp.mixed_linear_logprob_backward(*arguments, needs, ctx.backend)
    d_hidden, d_base, d_deltas, d_c, d_bias, d_bias_deltas = (
        gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
    )
    return (d_hidden, d_base, d_deltas, d_c, None, d_bias, d_bias_deltas, *[None] * num_others)


def _double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "clp_kernels.mixed_linear_logprob has no second derivative; call mixed_linear_logprob_ref, which plain "
        "autograd differentiates twice"
    )


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


torch.library.register_autograd("clp::mixed_linear_logprob", _backward, setup_context=_setup_context, lib=library)
for _name in ("clp::mixed_linear_logprob_backward", "clp::mixed_linear_logprob_backward_formed"):
    torch.library.register_autograd(_name, _double_backward, setup_context=_no_context, lib=library)
