"""What a set of points in reward space is worth: weight grids, dominance, hypervolume, rank agreement.

Shapes: P sweep points, R rewards (= K copies on the simplex), N prompts, Z bootstrap resamples.
Every reward is maximised.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from clp_engine.extras import require
from clp_engine.weighting import simplex_grid

Array = npt.NDArray[np.float64]


def sweep_grid(num_rewards: int, grid: int = 11) -> Array:
    """Return reward weights [P, R] spread over the simplex, at most `grid` of them.

    One reward: the single point (1). Two rewards: exactly `grid` evenly spaced points, w_1 from 0 to 1
    (`torch.linspace(0, 1, grid)` and its complement). Three and more: the finest regular lattice {i / m} that has at
    most `grid` points, and, where there is room for them, the midpoints between each corner and the centre. For three
    rewards, 13 gives the lattice of thirds (3 corners, 6 edge points, the centre) and the 3 points
    (2/3, 1/6, 1/6) in each order; 11 gives the 10 points of the lattice alone.

    Args:
        num_rewards: R, at least 1.
        grid: largest number of points; at least R (the corners).

    Raises:
        ValueError: no reward, or a grid too small to hold the corners.
    """
    if num_rewards < 1:
        raise ValueError(f"num_rewards must be at least 1, got {num_rewards}")
    if grid < num_rewards:
        raise ValueError(f"grid={grid} cannot hold the {num_rewards} corners of the simplex: use grid >= {num_rewards}")
    if num_rewards == 1:
        return np.ones((1, 1))
    steps = 1
    while math.comb(steps + num_rewards, num_rewards - 1) <= grid:
        steps += 1
    points_PR = simplex_grid(num_rewards, steps + 1)[::-1]
    if num_rewards > 2 and steps > 1 and len(points_PR) + num_rewards <= grid:
        inner_RR = 0.5 * np.eye(num_rewards) + 0.5 / num_rewards
        points_PR = np.concatenate([points_PR, inner_RR])
    return np.ascontiguousarray(points_PR)


def is_non_dominated(points_PR: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Return which points no other point dominates, bool [P].

    A point is dominated where another is at least as good in every reward and better in one; equal points do not
    dominate each other. The torch line: `~((x[None] >= x[:, None]).all(-1) & (x[None] > x[:, None]).any(-1)).any(1)`.
    """
    x_PR = np.asarray(points_PR, dtype=np.float64)
    at_least_PP = np.all(x_PR[None] >= x_PR[:, None], axis=-1)
    better_PP = np.any(x_PR[None] > x_PR[:, None], axis=-1)
    dominated_P: npt.NDArray[np.bool_] = np.any(at_least_PP & better_PP, axis=1)
    return ~dominated_P


def hypervolume(points_PR: npt.ArrayLike, ref_R: npt.ArrayLike, unit_R: npt.ArrayLike = 1.0) -> float:
    """Return the volume that the points dominate above `ref`, in units of `unit` per reward.

    Points that are not above the reference point in every reward add nothing.

    Args:
        points_PR: mean rewards [P, R], finite.
        ref_R: reference point [R] or a number, in the rewards' own unit.
        unit_R: length of one unit per reward [R] or a number, positive.

    Raises:
        ValueError: points that are not finite (named), or a unit that is not positive.
        ImportError: moocore is missing.
    """
    x_PR = np.atleast_2d(np.asarray(points_PR, dtype=np.float64))
    unit = np.broadcast_to(np.asarray(unit_R, dtype=np.float64), x_PR.shape[1:])
    ref = np.broadcast_to(np.asarray(ref_R, dtype=np.float64), x_PR.shape[1:])
    bad = np.flatnonzero(~np.isfinite(x_PR).all(1))
    if bad.size:
        raise ValueError(f"hypervolume: points {bad.tolist()} of {len(x_PR)} have a reward that is NaN or infinite")
    if not (np.isfinite(unit) & (unit > 0)).all():
        raise ValueError(f"hypervolume: unit must be positive per reward, got {unit.tolist()}: pass ref= and unit=")
    if not np.isfinite(ref).all():
        raise ValueError(f"hypervolume: ref must be finite per reward, got {ref.tolist()}: pass ref=")
    return _hypervolume_above_zero((x_PR - ref) / unit)


def _hypervolume_above_zero(points_PR: Array) -> float:
    inside = points_PR[(points_PR > 0).all(1)]
    if len(inside) == 0:
        return 0.0
    if points_PR.shape[1] == 1:
        return float(inside.max())
    moocore = require("moocore", extra="eval")
    return float(moocore.hypervolume(inside, ref=np.zeros(points_PR.shape[1]), maximise=True))


def kendall_tau_b(a_P: npt.ArrayLike, b_P: npt.ArrayLike) -> float:
    """Return Kendall's rank correlation tau-b of two sequences: 1 same order, -1 reversed, ties corrected.

    tau_b = (concordant - discordant) / sqrt(pairs untied in a * pairs untied in b); NaN where either is constant.

    Raises:
        ValueError: the lengths differ, or a value is NaN.
    """
    a, b = np.asarray(a_P, dtype=np.float64), np.asarray(b_P, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"kendall_tau_b needs two sequences of one length, got shapes {a.shape} and {b.shape}")
    bad = np.flatnonzero(np.isnan(a) | np.isnan(b))
    if bad.size:
        raise ValueError(f"kendall_tau_b: points {bad.tolist()} of {len(a)} are NaN")
    upper = np.triu_indices(len(a), k=1)
    sign_a = np.sign(a[:, None] - a[None])[upper]
    sign_b = np.sign(b[:, None] - b[None])[upper]
    untied = float(np.count_nonzero(sign_a)) * float(np.count_nonzero(sign_b))
    return float((sign_a * sign_b).sum() / math.sqrt(untied)) if untied else math.nan


def resampled_hypervolumes(
    sums_PNR: Array, counts_PNR: Array, draws_ZN: npt.NDArray[np.int64], ref_R: Array, unit_R: Array
) -> Array:
    """Return one hypervolume per bootstrap resample of the prompts, [Z].

    A resample's mean at a point is sum(draws * sums) / sum(draws * counts); a point whose reward applies to none of
    the drawn prompts adds nothing.

    Args:
        sums_PNR: sum of the rewards of point p on prompt n (samples where the reward applies).
        counts_PNR: how many samples that sum holds.
        draws_ZN: how often resample z holds prompt n.
        ref_R: reference point in the rewards' own unit.
        unit_R: length of one unit per reward.
    """
    draws = draws_ZN.astype(np.float64)
    total_ZPR = np.einsum("zn,pnr->zpr", draws, sums_PNR)
    count_ZPR = np.einsum("zn,pnr->zpr", draws, counts_PNR)
    mean_ZPR = np.divide(total_ZPR, count_ZPR, out=np.full_like(total_ZPR, -np.inf), where=count_ZPR > 0)
    above_ZPR = (mean_ZPR - ref_R) / unit_R
    return np.array([_hypervolume_above_zero(above_PR) for above_PR in above_ZPR])
