"""mixed_qkv as a registered operator: a fake for torch.compile, and the way to each back-end's launcher.

It has no autograd: the public function refuses arguments that need a gradient. Shapes: M rows, D width, N outputs of a
projection, E size of a head, H heads.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clp_kernels import extension

_library = torch.library.Library("clp", "FRAGMENT")
_PROJECTIONS = ", ".join(
    f"Tensor {name}_base, Tensor {name}_deltas, Tensor? {name}_bias, Tensor? {name}_bias_deltas" for name in "qkv"
)
_library.define(
    f"mixed_qkv(Tensor x, Tensor norm_weight, {_PROJECTIONS}, Tensor c, Tensor row_map, Tensor cos, Tensor sin, "
    "Tensor? q_norm, Tensor? k_norm, float eps, bool batch_invariant, str backend) -> (Tensor, Tensor, Tensor)"
)
mixed_qkv_op = torch.ops.clp.mixed_qkv.default


@functools.cache
def _launcher(backend: str) -> ModuleType:
    """Return a back-end's module with `forward`, imported at its first call."""
    return importlib.import_module(f"clp_kernels.mixed_qkv_{backend}")


@torch.library.impl(_library, "mixed_qkv", "CompositeExplicitAutograd")
def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *others, backend = arguments
    return _launcher(backend).forward(x, *others)


@torch.library.register_fake("clp::mixed_qkv", lib=_library)
def _forward_fake(x: Tensor, norm_weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q_deltas, k_deltas, v_deltas, cos = arguments[1], arguments[5], arguments[9], arguments[14]
    E = cos.shape[-1]
    query, key, value = (
        x.new_empty(*x.shape[:-1], deltas.shape[0] // E, E) for deltas in (q_deltas, k_deltas, v_deltas)
    )
    return query, key, value


def _compiled_forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    # A tensor on "meta" among others on the CPU comes here too, and must not pass for a result.
    for tensor in arguments:
        if isinstance(tensor, Tensor) and tensor.device != x.device:
            raise RuntimeError(f"mixed_qkv (cpp): tensors on {x.device} and {tensor.device}")
    return _forward_fake(x, *arguments)


compiled_op: Any = None
if extension.missing_reason("cpu") is None:
    torch.library.register_fake("clp::mixed_qkv_cpu_fwd", _compiled_forward_fake, lib=_library)
    compiled_op = torch.ops.clp.mixed_qkv_cpu_fwd.default
