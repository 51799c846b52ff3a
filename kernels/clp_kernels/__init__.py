"""Operators whose weights are a base plus a per-row weighted sum of deltas; in torch, C++, Triton and CUDA."""

from clp_kernels.backend import available_backends, backend
from clp_kernels.low_rank_linear import low_rank_linear
from clp_kernels.low_rank_linear_reference import low_rank_linear_ref
from clp_kernels.mixed_embedding import mixed_embedding
from clp_kernels.mixed_embedding_reference import mixed_embedding_ref
from clp_kernels.mixed_linear import backend_for, mixed_linear
from clp_kernels.mixed_linear_logprob import mixed_linear_logprob
from clp_kernels.mixed_linear_logprob_reference import mixed_linear_logprob_ref
from clp_kernels.mixed_linear_reference import mixed_linear_ref
from clp_kernels.mixed_norm import mixed_norm
from clp_kernels.mixed_norm_reference import mixed_norm_ref
from clp_kernels.mixed_qkv import mixed_qkv
from clp_kernels.mixed_qkv_arguments import Projection
from clp_kernels.mixed_qkv_reference import mixed_qkv_ref

__all__ = [
    "Projection",
    "available_backends",
    "backend",
    "backend_for",
    "low_rank_linear",
    "low_rank_linear_ref",
    "mixed_embedding",
    "mixed_embedding_ref",
    "mixed_linear",
    "mixed_linear_logprob",
    "mixed_linear_logprob_ref",
    "mixed_linear_ref",
    "mixed_norm",
    "mixed_norm_ref",
    "mixed_qkv",
    "mixed_qkv_ref",
]
