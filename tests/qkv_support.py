"""What the tests of mixed_qkv share: random arguments, and the error budget against float64.

Shapes: B sequences of T rows, D width, H_q and H_k heads of size E, K copies.
"""

from __future__ import annotations

import torch
from rows_support import row_map
from triton_support import assert_within_budget

from clp_kernels import Projection, mixed_qkv, mixed_qkv_ref


def problem(
    B, T, D, H_q, H_k, E, K, dtype=torch.float32, deltas_dtype=torch.float32, rows="segments", bias=True, norms=True
):
    generator = torch.Generator().manual_seed(B * 7 + E)

    def randn(*shape, std=1.0):
        return std * torch.randn(shape, generator=generator)

    def projection(H):
        biases = (randn(H * E).to(dtype), randn(H * E, K, std=0.3).to(deltas_dtype)) if bias else ()
        weights = randn(H * E, D, std=D**-0.5).to(dtype), randn(H * E, K, D, std=0.3 * D**-0.5).to(deltas_dtype)
        return Projection(*weights, *biases)

    rows_M = row_map(B * T, rows)
    angles = randn(B, T, E // 2)
    return {
        "x": (3 * randn(B, T, D)).to(dtype),
        "norm_weight": (1 + randn(D, std=0.2)).to(dtype),
        **{name: projection(H) for name, H in (("q", H_q), ("k", H_k), ("v", H_k))},
        "coefficients": randn(int(rows_M.max()) + 1, K),
        "cos": torch.cat((angles, angles), dim=-1).cos().to(dtype),
        "sin": torch.cat((angles, angles), dim=-1).sin().to(dtype),
        "q_norm": (1 + randn(E, std=0.2)).to(dtype) if norms else None,
        "k_norm": (1 + randn(E, std=0.2)).to(dtype) if norms else None,
        "row_map": rows_M.view(B, T),
    }


def converted(value, convert):
    if isinstance(value, Projection):
        return Projection(*(converted(t, convert) for t in value))
    return convert(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def named(heads):
    return dict(zip(("query", "key", "value"), heads, strict=True))


def check(a, cut=0.0, **settings):
    exact = named(mixed_qkv_ref(**{name: converted(value, torch.Tensor.double) for name, value in a.items()}))
    ours, torchs = named(mixed_qkv(**a, **settings)), named(mixed_qkv_ref(**a))
    terms = a["x"].shape[-1] * (1 + a["coefficients"].shape[-1])
    assert_within_budget(ours, torchs, exact, terms, cut)
