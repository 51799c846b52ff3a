"""The weightings of a sweep: which reward weights and KL weights its points have, checked before anything runs.

Shapes: P sweep points, Q KL weights, R rewards, G groups (a prompt under a weighting).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clp_engine.evaluation.pareto import Array, sweep_grid
from clp_engine.weighting import check_reward_weights, kl_coefficient

BASE_POINT = -1  # the reference policy's place in the work list


@dataclass(frozen=True)
class SweepPoints:
    """The points of a sweep.

    Attributes:
        weights_PR: reward weights.
        kl_P: KL weights; None: the trained policy itself.
        names: the rewards.
        min_kl_weight: the policy's least KL weight.
    """

    weights_PR: Array
    kl_P: Array | None
    names: list[str]
    min_kl_weight: float

    def batch(self, points: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 reward weights [G, R] and KL weights [G]; the base point is KL weight 1."""
        centre = np.full(len(self.names), 1.0 / len(self.names))
        weights = [centre if p == BASE_POINT else self.weights_PR[p] for p in points]
        return torch.tensor(np.array(weights), dtype=torch.float32), torch.tensor([self.kl(p) for p in points])

    def kl(self, point: int) -> float:
        """Return the KL weight of a point; the least one, at which lambda is 1, where none was asked for."""
        if point == BASE_POINT:
            return 1.0
        return self.min_kl_weight if self.kl_P is None else float(self.kl_P[point])


def sweep_points(config: Any, grid: int | npt.ArrayLike, kl_weights: float | Sequence[float] | None) -> SweepPoints:
    """Return the points of a sweep: the grid, taken at each of the KL weights.

    Args:
        config: the policy's `rewards`, `min_kl_weight` and `weight_domain`.
        grid: number of points (see `sweep_grid`), or the weights themselves [P, R].
        kl_weights: a number, several, or None for the trained policy.

    Raises:
        ValueError: weights of a wrong shape or outside the policy's domain, or KL weights out of range.
    """
    names = list(config.rewards)
    if isinstance(grid, (int, np.integer)):
        weights_PR = sweep_grid(len(names), int(grid))
    else:
        weights_PR = np.asarray(grid, dtype=np.float64)
        if weights_PR.ndim != 2 or weights_PR.shape[1] != len(names) or len(weights_PR) == 0:
            raise ValueError(f"grid has shape {list(weights_PR.shape)}, expected [P, {len(names)}] for rewards {names}")
        check_reward_weights(torch.tensor(weights_PR), names, getattr(config, "weight_domain", "simplex"))
    if kl_weights is None:
        return SweepPoints(weights_PR, None, names, config.min_kl_weight)
    kl_Q = np.atleast_1d(np.asarray(kl_weights, dtype=np.float64))
    if kl_Q.ndim != 1 or len(kl_Q) == 0:
        raise ValueError(f"kl_weights has shape {list(kl_Q.shape)}, expected a number or a list of numbers")
    kl_coefficient(torch.tensor(kl_Q), config.min_kl_weight)
    weights, kl = np.tile(weights_PR, (len(kl_Q), 1)), np.repeat(kl_Q, len(weights_PR))
    return SweepPoints(weights, kl, names, config.min_kl_weight)
