"""mixed_linear as registered operators: schemas, fakes for torch.compile, and the way to each back-end's launcher.

Operators whose kernel is Python are declared here, those whose kernel is compiled in csrc/registration.cpp; each
schema is written once. Their autograd is in mixed_linear_autograd.py. Shapes: M rows, D in, N out, K copies, S distinct
weightings.
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
_INPUTS = "Tensor x, Tensor? base, Tensor deltas, Tensor c, Tensor row_map, Tensor? bias, Tensor? bias_deltas"
_WEIGHTS = "Tensor? base, Tensor deltas, Tensor c, Tensor row_map"
_HOW = "str backend, bool batch_invariant=False"
_ROUNDING = "bool exact_delta=True"
# `main_grad` is the buffer that backward adds the gradient of the deltas to; the forward neither reads nor writes it.
library.define(f"mixed_linear({_INPUTS}, {_HOW}, {_ROUNDING}, Tensor? main_grad=None) -> Tensor")
library.define(f"mixed_linear_fwd({_INPUTS}, {_HOW}, {_ROUNDING}) -> Tensor")
library.define(f"mixed_linear_backward_x(Tensor dy, {_WEIGHTS}, {_HOW}, {_ROUNDING}) -> Tensor")
library.define(
    "mixed_linear_backward_deltas(Tensor dy, Tensor x, Tensor deltas, Tensor c, Tensor row_map, bool needs_deltas, "
    f"bool needs_coefficients, {_HOW}) -> (Tensor, Tensor)"
)
library.define(
    "mixed_linear_backward_deltas_(Tensor dy, Tensor x, Tensor deltas, Tensor c, Tensor row_map, "
    f"Tensor(a!) main_grad, bool needs_coefficients, {_HOW}) -> Tensor"
)

mixed_linear_op = torch.ops.clp.mixed_linear.default  # with autograd
mixed_linear_fwd_op = torch.ops.clp.mixed_linear_fwd.default  # the same values, no autograd key
backward_x_op = torch.ops.clp.mixed_linear_backward_x.default
backward_deltas_op = torch.ops.clp.mixed_linear_backward_deltas.default
accumulate_deltas_op = torch.ops.clp.mixed_linear_backward_deltas_.default


@functools.cache
def _launcher(backend: str) -> ModuleType:
    """Return a back-end's module with `forward`, `backward_x` and `backward_deltas`, imported at its first call."""
    return importlib.import_module(f"clp_kernels.mixed_linear_{backend}")


@torch.library.impl(library, "mixed_linear", "CompositeExplicitAutograd")
def _forward_with_autograd(
    x: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    bias: Tensor | None,
    bias_deltas: Tensor | None,
    backend: str,
    batch_invariant: bool = False,
    exact_delta: bool = True,
    main_grad: Tensor | None = None,
) -> Tensor:
    return _forward(x, base, deltas, c, row_map, bias, bias_deltas, backend, batch_invariant, exact_delta)


@torch.library.impl(library, "mixed_linear_fwd", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    bias: Tensor | None,
    bias_deltas: Tensor | None,
    backend: str,
    batch_invariant: bool = False,
    exact_delta: bool = True,
) -> Tensor:
    how = {"batch_invariant": batch_invariant, "exact_delta": exact_delta}
    return _launcher(backend).forward(x, base, deltas, c, row_map, bias, bias_deltas, **how)


@torch.library.impl(library, "mixed_linear_backward_x", "CompositeExplicitAutograd")
def _backward_x(
    dy: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    backend: str,
    batch_invariant: bool = False,
    exact_delta: bool = True,
) -> Tensor:
    how = {"batch_invariant": batch_invariant, "exact_delta": exact_delta}
    return _launcher(backend).backward_x(dy, base, deltas, c, row_map, **how)


@torch.library.impl(library, "mixed_linear_backward_deltas", "CompositeExplicitAutograd")
def _backward_deltas(
    dy: Tensor,
    x: Tensor,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    needs_deltas: bool,
    needs_coefficients: bool,
    backend: str,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    d_deltas, d_c = _launcher(backend).backward_deltas(
        dy, x, deltas, c, row_map, needs_deltas, needs_coefficients, batch_invariant=batch_invariant
    )
    # A schema cannot return Tensor?: an empty tensor stands for "not asked for".
    return deltas.new_empty(0) if d_deltas is None else d_deltas, c.new_empty(0) if d_c is None else d_c


@torch.library.impl(library, "mixed_linear_backward_deltas_", "CompositeExplicitAutograd")
def _accumulate_deltas(
    dy: Tensor,
    x: Tensor,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    main_grad: Tensor,
    needs_coefficients: bool,
    backend: str,
    batch_invariant: bool = False,
) -> Tensor:
    """Add the gradient of the deltas to `main_grad`; return that of the coefficients."""
    _, d_c = _launcher(backend).backward_deltas(
        dy, x, deltas, c, row_map, True, needs_coefficients, main_grad=main_grad, batch_invariant=batch_invariant
    )
    return c.new_empty(0) if d_c is None else d_c


@torch.library.register_fake("clp::mixed_linear_fwd", lib=library)
@torch.library.register_fake("clp::mixed_linear", lib=library)
def _forward_fake(x: Tensor, base: Tensor | None, deltas: Tensor, *rest: object, **options: object) -> Tensor:
    return x.new_empty(x.shape[0], deltas.shape[0])


def _compiled_forward_fake(
    x: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor | None,
    bias: Tensor | None,
    bias_deltas: Tensor | None,
    batch_invariant: bool = False,
    exact_delta: bool = True,
) -> Tensor:
    # A tensor on "meta" among others on the CPU comes here too, and must not pass for a result.
    for tensor in (base, deltas, c, row_map, bias, bias_deltas):
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"mixed_linear (cpp): tensors on {x.device} and {tensor.device}")
    return x.new_empty(*x.shape[:-1], deltas.shape[0])


compiled_op: Any = None
if extension.missing_reason("cpu") is None:  # it declares the operators of the CUDA part too
    for _name in ("clp::mixed_linear_cpu_fwd", "clp::mixed_linear_cuda_fwd"):
        torch.library.register_fake(_name, _compiled_forward_fake, lib=library)
    # Its autograd is CompiledMixedLinear; torch's fallback for operators without one costs a second dispatch.
    library.impl("mixed_linear_cpu_fwd", torch.library.fallthrough_kernel, "Autograd")
    # As OpOverload.__call__ calls it: that is 0.35 us of Python.
    compiled_op = torch.ops.clp.mixed_linear_cpu_fwd.default._op


@torch.library.register_fake("clp::mixed_linear_backward_x", lib=library)
def _backward_x_fake(dy: Tensor, base: Tensor | None, deltas: Tensor, *rest: object, **options: object) -> Tensor:
    return dy.new_empty(dy.shape[0], deltas.shape[2])


@torch.library.register_fake("clp::mixed_linear_backward_deltas", lib=library)
def _backward_deltas_fake(
    dy: Tensor,
    x: Tensor,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    needs_deltas: bool,
    needs_coefficients: bool,
    backend: str,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    d_deltas = deltas.new_empty(deltas.shape if needs_deltas else (0,))
    return d_deltas, c.new_empty(c.shape if needs_coefficients else (0,))


@torch.library.register_fake("clp::mixed_linear_backward_deltas_", lib=library)
def _accumulate_deltas_fake(
    dy: Tensor,
    x: Tensor,
    deltas: Tensor,
    c: Tensor,
    row_map: Tensor,
    main_grad: Tensor,
    needs_coefficients: bool,
    backend: str,
    batch_invariant: bool = False,
) -> Tensor:
    return c.new_empty(c.shape if needs_coefficients else (0,))
