"""Weightings: what a caller asks for (reward weights, KL weight), checked and turned into per-row coefficients.

    W(c) = W_0 + sum_k c_k Delta_k,    c = lambda(alpha) * w

Legend: B sequences, R rewards, P points of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch

RewardWeights: TypeAlias = Mapping[str, float] | Sequence[Mapping[str, float]] | Sequence[float] | torch.Tensor
KLWeight: TypeAlias = float | Sequence[float] | torch.Tensor

WEIGHT_DOMAINS = ("simplex", "free")
KL_INTERPOLATIONS = ("dera", "linear")
SUM_TOLERANCE = 1e-3


def reward_weights_tensor(
    reward_weights: RewardWeights, rewards: Sequence[str], batch_size: int, domain: str = "simplex"
) -> torch.Tensor:
    """Turn any accepted form of reward weights into one checked float32 tensor, one row per sequence.

    Equivalent to `torch.tensor([[w[name] for name in rewards] for w in reward_weights])`.

    Args:
        reward_weights: a dict name -> weight, a list of B such dicts, a tensor or list [K], or a tensor [B, K]; tensors
            follow the order of `rewards`.
        rewards: the reward names.
        batch_size: B, the number of sequences.
        domain: "simplex" (finite, >= 0, sum 1 within 1e-3) or "free" (finite).

    Returns:
        w_BR: [B, R] float32, on the tensor's own device (CPU for the other forms).

    Raises:
        ValueError: a wrong name, length or value; the message names the row, what was found and what is expected.
    """
    w_BR = _rows(reward_weights, rewards, batch_size)
    check_reward_weights(w_BR, rewards, domain)
    return w_BR


def _rows(reward_weights: RewardWeights, rewards: Sequence[str], batch_size: int) -> torch.Tensor:
    if isinstance(reward_weights, Mapping):
        weights_R = _named_row(reward_weights, rewards, "reward_weights")
        return torch.tensor([weights_R], dtype=torch.float32).repeat(batch_size, 1)
    _check_form(reward_weights)
    if not isinstance(reward_weights, torch.Tensor) and any(isinstance(row, Mapping) for row in reward_weights):
        rows: list[list[float]] = []
        for i, row in enumerate(reward_weights):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"reward_weights[{i}] is a {type(row).__name__} in a list of dicts: give a dict for every row"
                )
            rows.append(_named_row(row, rewards, f"reward_weights[{i}]"))
        weights = torch.tensor(rows, dtype=torch.float32)
    elif not isinstance(reward_weights, torch.Tensor) and any(isinstance(row, torch.Tensor) for row in reward_weights):
        weights = torch.stack([torch.as_tensor(row).to(torch.float32) for row in reward_weights])
    else:
        weights = torch.as_tensor(reward_weights).to(torch.float32)
    if weights.dim() == 1:
        weights = weights.unsqueeze(0).expand(batch_size, -1)
    if weights.dim() != 2 or weights.shape[1] != len(rewards):
        raise ValueError(
            f"reward_weights has shape {list(weights.shape)}, expected [{len(rewards)}] or "
            f"[{batch_size}, {len(rewards)}]: one weight per reward, in the order {list(rewards)}"
        )
    if weights.shape[0] != batch_size:
        raise ValueError(
            f"reward_weights has {weights.shape[0]} rows for a batch of {batch_size} sequences: "
            "give one row per sequence, or a single weighting for all of them (sequences packed into one row are "
            "counted where position_ids restart)"
        )
    return weights


def _check_form(reward_weights: object) -> None:
    if isinstance(reward_weights, str) or not hasattr(reward_weights, "__len__"):
        kind = type(reward_weights).__name__
        raise ValueError(f"reward_weights is a {kind}, expected a dict, a list of dicts, numbers or a tensor")


def _named_row(row: Mapping[str, float], rewards: Sequence[str], field: str) -> list[float]:
    if set(row) != set(rewards):
        missing, unknown = sorted(set(rewards) - set(row)), sorted(map(str, set(row) - set(rewards)))
        raise ValueError(
            f"{field} names {sorted(map(str, row))}, the model's rewards are {list(rewards)}"
            + (f"; missing: {missing}" if missing else "")
            + (f"; unknown: {unknown}" if unknown else "")
        )
    if several := [name for name in rewards if np.ndim(row[name]) > 0]:
        raise ValueError(
            f"{field}[{several[0]!r}] is {row[several[0]]}, expected one number: give a list of dicts, one for each row"
        )
    return [float(row[name]) for name in rewards]


def check_given_once(
    coefficients: torch.Tensor | None, reward_weights: RewardWeights | None, kl_weight: KLWeight | None
) -> None:
    """Refuse coefficients beside the weighting that they hold already.

    Raises:
        ValueError: both are given.
    """
    if coefficients is not None and (reward_weights is not None or kl_weight is not None):
        raise ValueError("coefficients already hold the weighting: give them, or reward_weights and kl_weight")


def num_rows(reward_weights: RewardWeights | None, kl_weight: KLWeight | None) -> int | None:
    """How many rows a weighting is given for (a list of dicts, [B, K], a KL weight [B]); None where once for all."""
    if reward_weights is not None and not isinstance(reward_weights, Mapping):
        _check_form(reward_weights)
        if isinstance(reward_weights, torch.Tensor):
            has_rows = reward_weights.dim() > 1
        else:
            has_rows = any(isinstance(row, (Mapping, Sequence)) or np.ndim(row) > 0 for row in reward_weights)
        if has_rows:
            return len(reward_weights)
    kl_weights = None if kl_weight is None else _kl_tensor(kl_weight)
    return None if kl_weights is None or kl_weights.dim() == 0 else len(kl_weights)


def _kl_tensor(kl_weight: KLWeight) -> torch.Tensor:
    try:
        return torch.as_tensor(kl_weight)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"kl_weight is {kl_weight!r}, expected a number or one for each row") from error


def check_reward_weights(w_BR: torch.Tensor, rewards: Sequence[str], domain: str) -> None:
    """Check the values of w_BR [B, R] against `domain`; one comparison of the whole batch, so one device sync.

    Raises:
        ValueError: a weight is not finite, negative on the simplex, or a row does not sum to 1 there.
    """
    if torch.compiler.is_compiling():  # a compiled graph cannot branch on values, nor name them
        fits = torch.isfinite(w_BR).all()
        if domain == "simplex":
            fits = fits & (w_BR >= 0).all() & ((w_BR.sum(dim=1) - 1).abs() <= SUM_TOLERANCE).all()
        torch._assert_async(fits, f"reward_weights are not finite or outside the domain {domain}")
        return
    w = w_BR.detach().to("cpu", torch.float64)
    bad = ~torch.isfinite(w).all(dim=1)
    reason = "must be finite"
    if domain == "simplex" and not bad.any():
        bad, reason = (w < 0).any(dim=1), "must be >= 0 on the simplex"
        if not bad.any():
            bad, reason = (
                (w.sum(dim=1) - 1).abs() > SUM_TOLERANCE,
                f"must sum to 1 within {SUM_TOLERANCE} on the simplex",
            )
    if bad.any():
        row = int(bad.nonzero()[0])
        values = {name: round(float(value), 6) for name, value in zip(rewards, w[row], strict=True)}
        hint = '; weight_domain="free" in CLPConfig allows any finite weights' if "finite" not in reason else ""
        raise ValueError(f"reward_weights of row {row}, {values} (sum {float(w[row].sum()):.6g}), {reason}{hint}")


def kl_coefficient(kl_weight: torch.Tensor | float, min_kl_weight: float, interpolation: str = "dera") -> torch.Tensor:
    """Interpolation coefficient lambda of a KL weight alpha: 1 at alpha_min, the trained policy, 0 at 1, the reference.

    "dera" is exact for the KL-regularised optima, whose logits satisfy z_alpha = z_ref + lambda (z_alpha_min - z_ref)
    (Liu et al. 2024, arXiv 2402.02992): `min_kl_weight * (1 - kl_weight) / (kl_weight * (1 - min_kl_weight))`. "linear"
    is `(1 - kl_weight) / (1 - min_kl_weight)`.

    Args:
        kl_weight: alpha, a float or a tensor of any shape, in [min_kl_weight, 1].
        min_kl_weight: alpha_min in (0, 1).
        interpolation: "dera" or "linear".

    Returns:
        lambda, float32, in alpha's shape.

    Raises:
        ValueError: alpha outside [min_kl_weight, 1].
    """
    alpha = torch.as_tensor(kl_weight, dtype=torch.float64)
    # float32 inputs carry a relative rounding of 6e-8: the ends are met within that and clamped.
    outside = ~((alpha >= min_kl_weight * (1 - 1e-6)) & (alpha <= 1 + 1e-6))
    if torch.compiler.is_compiling():
        torch._assert_async(~outside.any(), f"kl_weight lies outside [{min_kl_weight:g}, 1]")
    elif outside.any():
        value = float(alpha[outside].flatten()[0]) if alpha.dim() else float(alpha)
        raise ValueError(f"kl_weight is {value:g}, outside [min_kl_weight, 1] = [{min_kl_weight:g}, 1]")
    alpha = alpha.clamp(min_kl_weight, 1.0)
    linear = (1 - alpha) / (1 - min_kl_weight)
    return (linear if interpolation == "linear" else min_kl_weight / alpha * linear).to(torch.float32)


def kl_coefficients(
    kl_weight: KLWeight | None, batch_size: int, min_kl_weight: float, interpolation: str = "dera"
) -> torch.Tensor:
    """Coefficients lambda(alpha) of a batch, [B] float32; ones without a KL weight, the trained policy.

    Args:
        kl_weight: a float for all rows, or [B].
        batch_size: B.
        min_kl_weight: alpha_min.
        interpolation: as in `kl_coefficient`.

    Raises:
        ValueError: a KL weight outside [min_kl_weight, 1], or not one per sequence.
    """
    if kl_weight is None:
        return torch.ones(batch_size)
    lambda_B = kl_coefficient(_kl_tensor(kl_weight), min_kl_weight, interpolation)
    if lambda_B.dim() == 0:
        lambda_B = lambda_B.expand(batch_size)
    if lambda_B.shape != (batch_size,):
        raise ValueError(
            f"kl_weight has shape {list(lambda_B.shape)}, expected a float or [{batch_size}], one per sequence"
        )
    return lambda_B


def simplex_grid(num_rewards: int, points_per_edge: int) -> np.ndarray:
    """All weightings whose entries are multiples of 1 / (points_per_edge - 1).

    Two rewards give `points_per_edge` points, w_1 falling from 1 to 0; three give a triangular lattice.

    Returns:
        w_PR: [P, R] float64, P = C(points_per_edge - 2 + R, R - 1), corners included.

    Raises:
        ValueError: fewer than two rewards or two points per edge.
    """
    if num_rewards < 2 or points_per_edge < 2:
        raise ValueError(
            f"a simplex grid needs at least 2 rewards and 2 points, got {num_rewards} and {points_per_edge}"
        )
    steps = points_per_edge - 1

    def compositions(total: int, parts: int) -> list[list[int]]:
        if parts == 1:
            return [[total]]
        return [[head, *tail] for head in range(total, -1, -1) for tail in compositions(total - head, parts - 1)]

    grid = np.array(compositions(steps, num_rewards), dtype=np.float64) / steps
    assert len(grid) == math.comb(steps + num_rewards - 1, num_rewards - 1)
    return grid
