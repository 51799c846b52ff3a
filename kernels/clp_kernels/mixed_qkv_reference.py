"""mixed_qkv in plain torch: the definition, the fallback on any device, and in float64 the tests' oracle.

Shapes: M rows, D width, E size of a head, H heads, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels import mixed_linear_reference
from clp_kernels.mixed_qkv_arguments import Projection, flatten_qkv


def mixed_qkv_ref(
    x: Tensor,
    norm_weight: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    coefficients: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    row_map: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `mixed_qkv` layer by layer, differentiable by plain autograd.

    Arguments, shapes and errors are those of `mixed_qkv`. The bits are those of LlamaRMSNorm, `mixed_linear_ref` and
    transformers' apply_rotary_pos_emb one after the other. Computes in float32 (float64 for float64 input).
    """
    rows = flatten_qkv(x, norm_weight, {"q": q, "k": k, "v": v}, coefficients, cos, sin, q_norm, k_norm, row_map)
    x_MD, c_SK, row_map_M, cos_ME, sin_ME = rows
    heads = forward(x_MD, norm_weight, *q, *k, *v, c_SK, row_map_M, cos_ME, sin_ME, q_norm, k_norm, eps, False)
    query, key, value = (t.view(*x.shape[:-1], *t.shape[1:]) for t in heads)
    return query, key, value


def forward(
    x_MD: Tensor,
    norm_weight_D: Tensor,
    q_base_ND: Tensor,
    q_deltas_NKD: Tensor,
    q_bias_N: Tensor | None,
    q_bias_deltas_NK: Tensor | None,
    k_base_ND: Tensor,
    k_deltas_NKD: Tensor,
    k_bias_N: Tensor | None,
    k_bias_deltas_NK: Tensor | None,
    v_base_ND: Tensor,
    v_deltas_NKD: Tensor,
    v_bias_N: Tensor | None,
    v_bias_deltas_NK: Tensor | None,
    c_SK: Tensor,
    row_map_M: Tensor,
    cos_ME: Tensor,
    sin_ME: Tensor,
    q_norm_E: Tensor | None,
    k_norm_E: Tensor | None,
    eps: float,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values [M, H, E] in x's dtype."""
    E = cos_ME.shape[1]

    def project(base: Tensor, deltas: Tensor, bias: Tensor | None, bias_deltas: Tensor | None) -> Tensor:
        how = {"batch_invariant": batch_invariant}
        y_MN = mixed_linear_reference.forward(n_MD, base, deltas, c_SK, row_map_M, bias, bias_deltas, **how)
        return y_MN.view(len(y_MN), y_MN.shape[1] // E, E)

    with torch.autocast(x_MD.device.type, enabled=False):
        n_MD = _rms_norm(x_MD, norm_weight_D, eps)
        q_MHE = project(q_base_ND, q_deltas_NKD, q_bias_N, q_bias_deltas_NK)
        k_MHE = project(k_base_ND, k_deltas_NKD, k_bias_N, k_bias_deltas_NK)
        v_MHE = project(v_base_ND, v_deltas_NKD, v_bias_N, v_bias_deltas_NK)
        if q_norm_E is not None:
            q_MHE = _rms_norm(q_MHE, q_norm_E, eps)
        if k_norm_E is not None:
            k_MHE = _rms_norm(k_MHE, k_norm_E, eps)
        tables = (table.to(x_MD.dtype)[:, None] for table in (cos_ME, sin_ME))
        cos_M1E, sin_M1E = tables
        return _rotate(q_MHE, cos_M1E, sin_M1E), _rotate(k_MHE, cos_M1E, sin_M1E), v_MHE


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (weight * normalised).to(x.dtype)


def _rotate(heads_MHE: Tensor, cos_M1E: Tensor, sin_M1E: Tensor) -> Tensor:
    low, high = heads_MHE.chunk(2, dim=-1)
    return heads_MHE * cos_M1E + torch.cat((-high, low), dim=-1) * sin_M1E
