"""Operators whose weights are a base plus a per-row weighted sum of deltas; in torch, C++, Triton and CUDA."""

from clp_kernels.backend import available_backends, backend
from clp_kernels.mixed_linear import backend_for, mixed_linear
from clp_kernels.mixed_linear_reference import mixed_linear_ref

__all__ = ["available_backends", "backend", "backend_for", "mixed_linear", "mixed_linear_ref"]
