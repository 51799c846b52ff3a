"""low_rank_linear as registered operators: fakes for torch.compile, and the way to each back-end's launcher.

The compiled operators are declared in csrc/registration.cpp. Their autograd is in low_rank_linear_autograd.py. Shapes:
M rows, D in, N out, R ranks, S weightings.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clp_kernels import extension

library = torch.library.Library("clp", "FRAGMENT")
_HOW = "str backend, bool batch_invariant=False"
_INPUTS = f"Tensor x, Tensor? base, Tensor down, Tensor up, Tensor gates, Tensor row_map, Tensor? bias, {_HOW}"
library.define(f"low_rank_linear({_INPUTS}) -> (Tensor y, Tensor shrink)")
library.define(f"low_rank_linear_fwd({_INPUTS}) -> Tensor")
library.define(
    "low_rank_linear_backward(Tensor dy, Tensor shrink, Tensor x, Tensor? base, Tensor down, Tensor up, Tensor gates, "
    f"Tensor row_map, bool needs_x, bool needs_base, bool needs_down, bool needs_up, bool needs_gates, {_HOW}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)

low_rank_linear_op = torch.ops.clp.low_rank_linear.default  # with autograd; also returns x @ down.T
low_rank_linear_fwd_op = torch.ops.clp.low_rank_linear_fwd.default  # the same values, no autograd key
backward_op = torch.ops.clp.low_rank_linear_backward.default


@functools.cache
def _launcher(backend: str) -> ModuleType:
    """Return a back-end's module with `forward` and `backward`, imported at its first call."""
    return importlib.import_module(f"clp_kernels.low_rank_linear_{backend}")


@torch.library.impl(library, "low_rank_linear", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    gates: Tensor,
    row_map: Tensor,
    bias: Tensor | None,
    backend: str,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    return _launcher(backend).forward(x, base, down, up, gates, row_map, bias, True, batch_invariant=batch_invariant)


@torch.library.impl(library, "low_rank_linear_fwd", "CompositeExplicitAutograd")
def _forward_only(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    gates: Tensor,
    row_map: Tensor,
    bias: Tensor | None,
    backend: str,
    batch_invariant: bool = False,
) -> Tensor:
    arguments = (x, base, down, up, gates, row_map, bias, False)
    return _launcher(backend).forward(*arguments, batch_invariant=batch_invariant)[0]


@torch.library.impl(library, "low_rank_linear_backward", "CompositeExplicitAutograd")
def _backward_op(
    dy: Tensor,
    shrink: Tensor,
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    gates: Tensor,
    row_map: Tensor,
    needs_x: bool,
    needs_base: bool,
    needs_down: bool,
    needs_up: bool,
    needs_gates: bool,
    backend: str,
    batch_invariant: bool = False,
) -> tuple[Tensor, ...]:
    needs = (needs_x, needs_base, needs_down, needs_up, needs_gates)
    arguments = (dy, shrink, x, base, down, up, gates, row_map, needs)
    gradients = _launcher(backend).backward(*arguments, batch_invariant=batch_invariant)
    # A schema cannot return Tensor?: an empty tensor stands for "not asked for".
    inputs = (x, x if base is None else base, down, up, gates)
    return tuple(t.new_empty(0) if g is None else g for g, t in zip(gradients, inputs, strict=True))


@torch.library.register_fake("clp::low_rank_linear", lib=library)
def _forward_fake(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    gates: Tensor,
    row_map: Tensor,
    bias: Tensor | None,
    backend: str,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], up.shape[0]), gates.new_empty(x.shape[0], down.shape[0])


@torch.library.register_fake("clp::low_rank_linear_fwd", lib=library)
def _forward_only_fake(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    gates: Tensor,
    row_map: Tensor,
    bias: Tensor | None,
    backend: str,
    batch_invariant: bool = False,
) -> Tensor:
    return x.new_empty(x.shape[0], up.shape[0])


def _compiled_forward_fake(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    gates: Tensor,
    row_map: Tensor | None,
    bias: Tensor | None,
    keep_shrink: bool,
) -> tuple[Tensor, Tensor]:
    # A tensor on "meta" among others on the CPU comes here too, and must not pass for a result.
    for tensor in (base, down, up, gates, row_map, bias):
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"low_rank_linear (cpp): tensors on {x.device} and {tensor.device}")
    M, R = x.shape[:-1].numel(), down.shape[0]
    return x.new_empty(*x.shape[:-1], up.shape[0]), gates.new_empty((M, R) if keep_shrink else (0,))


compiled_op: Any = None
if extension.missing_reason("cpu") is None:
    torch.library.register_fake("clp::low_rank_linear_cpu_fwd", _compiled_forward_fake, lib=library)
    # Its autograd is CompiledLowRankLinear; torch's fallback for operators without one costs a second dispatch.
    library.impl("low_rank_linear_cpu_fwd", torch.library.fallthrough_kernel, "Autograd")
    # As OpOverload.__call__ calls it: that is 0.35 us of Python.
    compiled_op = torch.ops.clp.low_rank_linear_cpu_fwd.default._op


@torch.library.register_fake("clp::low_rank_linear_backward", lib=library)
def _backward_fake(
    dy: Tensor,
    shrink: Tensor,
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    gates: Tensor,
    row_map: Tensor,
    needs_x: bool,
    needs_base: bool,
    needs_down: bool,
    needs_up: bool,
    needs_gates: bool,
    backend: str,
    batch_invariant: bool = False,
) -> tuple[Tensor, ...]:
    inputs = (x, x if base is None else base, down, up, gates)
    needs = (needs_x, needs_base, needs_down, needs_up, needs_gates)
    return tuple(t.new_empty(t.shape if needed else (0,)) for t, needed in zip(inputs, needs, strict=True))
