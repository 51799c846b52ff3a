"""What the tests of mixed_linear_logprob share: problems, results with gradients, and the error budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import clp_kernels
from clp_kernels import mixed_linear_logprob, mixed_linear_logprob_ref

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
HAS_CPP = clp_kernels.available_backends()["cpp"] is None
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="the extension is not built")
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp)]
PARAMETERS = ("hidden", "base", "deltas", "coefficients", "bias", "bias_deltas")
PLAIN = {"temperature": 1.0, "logit_scale": 1.0, "softcap": None}
BENT = {"temperature": 0.7, "logit_scale": 1.3, "softcap": 4.0}

Arguments = dict[str, Any]


def problem(
    M: int,
    D: int,
    V: int,
    K: int,
    x_dtype: torch.dtype = F32,
    deltas_dtype: torch.dtype = F32,
    rows: str = "segments",
    with_base: bool = True,
    seed: int = 0,
    S: int = 3,
) -> Arguments:
    """Arguments of the operator; `rows`: how S weightings lie over rows. Every fourth row has no target."""
    generator = torch.Generator().manual_seed(M * 7 + K + seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    S = min(M, S)
    row_map = {
        "one": torch.zeros(M),
        "segments": torch.arange(M) * S // M,
        "shuffled": torch.randint(0, S, (M,), generator=generator),
        "different": torch.arange(M),
    }[rows].to(torch.int32)
    targets = torch.randint(0, V, (M,), generator=generator)
    targets[1::4] = -100
    scale = 1 / max(D, 1) ** 0.5
    return {
        "hidden": randn(M, D).to(x_dtype),
        "base": (scale * randn(V, D)).to(x_dtype) if with_base else None,
        "deltas": (0.5 * scale * randn(V, K, D)).to(deltas_dtype),
        "coefficients": randn(int(row_map.max()) + 1, K),
        "targets": targets,
        "bias": randn(V).to(x_dtype),
        "bias_deltas": randn(V, K).to(deltas_dtype),
        "row_map": row_map,
    }


def loss_weights(like_M: Tensor) -> Tensor:
    """Random weights [2, M] of the rows' log-probs and entropies in the loss, of one's dtype and device."""
    return torch.randn((2, len(like_M)), generator=torch.Generator().manual_seed(5)).to(like_M)


def values_and_gradients(
    op: Callable[..., tuple[Tensor, Tensor | None]],
    a: Arguments,
    dtype: torch.dtype | None = None,
    wanted: tuple[str, ...] = PARAMETERS,
    **kwargs: Any,
) -> dict[str, Tensor]:
    inputs = dict(a)
    for name in PARAMETERS:
        if a[name] is not None:
            inputs[name] = a[name].detach().to(dtype or a[name].dtype).clone().requires_grad_(name in wanted)
    logprob, entropy = op(**inputs, **kwargs)
    d_logprob, d_entropy = loss_weights(logprob)
    loss = (d_logprob * logprob).sum()
    if entropy is not None and entropy.requires_grad:
        loss = loss + (d_entropy * entropy).sum()
    loss.backward()
    results = {"logprob": logprob.detach()} | ({} if entropy is None else {"entropy": entropy.detach()})
    return results | {name: inputs[name].grad for name in wanted if inputs[name] is not None}


def magnitudes(
    a: Arguments, return_entropy: bool, temperature: float, logit_scale: float, softcap: float | None
) -> dict[str, Tensor]:
    """For each result the sum of its absolute terms in float64: a relative rounding of each moves it so far.

    A logit that moves by r moves p by p r, and log p by r + sum(p r): `noise`, with log p's own rounding, of which each
    result has its share.
    """
    hidden, base, deltas, c_SK, bias, bias_deltas = (None if a[n] is None else a[n].double() for n in PARAMETERS)
    rows = a["row_map"].long()
    base = torch.zeros_like(deltas[:, 0]) if base is None else base
    bias = torch.zeros_like(deltas[:, 0, 0]) if bias is None else bias
    bias_deltas = torch.zeros_like(deltas[..., 0]) if bias_deltas is None else bias_deltas

    def outputs(h: Tensor, w: Tensor, d: Tensor, c: Tensor, b: Tensor, bd: Tensor) -> Tensor:
        return h @ w.T + torch.einsum("mk,md,vkd->mv", c[rows], h, d) + b + c[rows] @ bd.T

    y = outputs(hidden, base, deltas, c_SK, bias, bias_deltas)
    hidden, base, deltas, c_SK, bias, bias_deltas = (t.abs() for t in (hidden, base, deltas, c_SK, bias, bias_deltas))
    slope = logit_scale / temperature
    size = torch.where(y.isinf(), 0.0, slope * outputs(hidden, base, deltas, c_SK, bias, bias_deltas))
    z = y * slope if softcap is None else torch.tanh(y * logit_scale / softcap) * softcap / temperature
    p = z.softmax(-1)
    log_p = torch.where(p == 0, 0.0, z.log_softmax(-1))
    entropy = -(p * log_p).sum(-1, keepdim=True)
    noise = 1 + log_p.abs() + size + (p * size).sum(-1, keepdim=True)
    is_kept = (a["targets"] != -100)[:, None]
    one_hot = torch.zeros_like(p).scatter_(1, a["targets"].clamp(min=0)[:, None], 1.0) * is_kept
    p = p * is_kept
    entropy_size = (p * (log_p.abs() + noise * (1 + (log_p + entropy).abs()))).sum(-1, keepdim=True)
    d_logprob, d_entropy = loss_weights(y[:, 0]).abs()[:, :, None]
    dy = d_logprob * (one_hot + p * (1 + noise))
    if return_entropy:
        dy = dy + d_entropy * p * ((log_p + entropy).abs() * (1 + noise) + noise + entropy_size)
    dy = dy * slope * (1.0 if softcap is None else 1 + size * temperature / softcap)
    products = torch.einsum("md,vkd->mvk", hidden, deltas) + bias_deltas
    return {
        "logprob": (one_hot * (noise + log_p.abs())).sum(-1),
        "entropy": entropy_size.squeeze(-1),
        "hidden": dy @ base + torch.einsum("mv,mk,vkd->md", dy, c_SK[rows], deltas),
        "base": dy.T @ hidden,
        "deltas": torch.einsum("mv,mk,md->vkd", dy, c_SK[rows], hidden),
        "coefficients": torch.zeros_like(c_SK).index_add_(0, rows, torch.einsum("mv,mvk->mk", dy, products)),
        "bias": dy.sum(0),
        "bias_deltas": dy.T @ c_SK[rows],
    }


def relative_error(value: Tensor, exact: Tensor, size: Tensor) -> float:
    error = (value.double() - exact).abs()
    return torch.where(error == 0, 0.0, error / size).max().item() if error.numel() else 0.0


def compare(
    a: Arguments,
    backend: str,
    wanted: tuple[str, ...] = PARAMETERS,
    return_entropy: bool = True,
    roundoff: float = 0.0,
    **how: Any,
) -> dict[str, Tensor]:
    """Asserts at most twice the reference's error in the same dtypes and one unit roundoff; returns the results.

    `roundoff` is that of the products, where it is larger than the result's (TF32).
    """
    kwargs = {**PLAIN, **how, "return_entropy": return_entropy}
    exact = values_and_gradients(mixed_linear_logprob_ref, a, F64, wanted, **kwargs)
    torchs = values_and_gradients(mixed_linear_logprob_ref, a, None, wanted, **kwargs)
    ours = values_and_gradients(mixed_linear_logprob, a, None, wanted, backend=backend, **kwargs)
    sizes = magnitudes(a, **kwargs)
    for name, expected in exact.items():
        assert ours[name].dtype == torchs[name].dtype, name
        error, own = (relative_error(value[name], expected, sizes[name]) for value in (ours, torchs))
        budget = 2 * own + max(torch.finfo(ours[name].dtype).eps / 2, roundoff)
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g} (reference {own:.3g})"
    return ours
