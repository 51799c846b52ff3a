"""Weight grids, dominance, hypervolume and rank agreement against hand-made values and slow oracles."""

import itertools
import math

import numpy as np
import pytest

from clp_engine.evaluation.pareto import hypervolume, is_non_dominated, kendall_tau_b, sweep_grid


def hypervolume_2d(points, ref):
    """Area under the staircase, in ten lines of numpy."""
    points = np.asarray([p for p in points if (np.asarray(p) > ref).all()], dtype=float)
    if len(points) == 0:
        return 0.0
    area, y = 0.0, ref[1]
    for px, py in points[np.lexsort((-points[:, 1], -points[:, 0]))]:
        if py > y:
            area += (px - ref[0]) * (py - y)
            y = py
    return area


def test_two_rewards_get_an_even_grid_from_the_second_corner_to_the_first():
    grid = sweep_grid(2, 11)
    np.testing.assert_allclose(grid[:, 0], np.linspace(0, 1, 11), atol=1e-15)
    np.testing.assert_allclose(grid.sum(1), 1, atol=1e-15)
    assert grid[0].tolist() == [0, 1]
    assert grid[-1].tolist() == [1, 0]


@pytest.mark.parametrize(("rewards", "grid", "points"), [(1, 11, 1), (3, 11, 10), (3, 13, 13), (3, 3, 3), (4, 11, 10)])
def test_grids_of_other_sizes(rewards, grid, points):
    w = sweep_grid(rewards, grid)
    assert w.shape == (points, rewards)
    assert len(np.unique(w.round(12), axis=0)) == points
    np.testing.assert_allclose(w.sum(1), 1, atol=1e-12)
    assert (w >= 0).all()
    for corner in np.eye(rewards):
        assert (w == corner).all(1).any()


def test_thirteen_points_of_three_rewards_are_thirds_and_inner_points():
    w = {tuple(row) for row in sweep_grid(3, 13).round(6)}
    assert {tuple(np.round(p, 6)) for p in set(itertools.permutations((2 / 3, 1 / 6, 1 / 6)))} <= w
    assert (0.333333, 0.333333, 0.333333) in w


def test_a_grid_too_small_for_the_corners_is_refused():
    with pytest.raises(ValueError, match=r"grid=2 .* 3 corners"):
        sweep_grid(3, 2)


def test_non_dominated_by_hand():
    points = [[0, 3], [1, 2], [1, 1], [2, 2], [3, 0], [3, 0], [0, 0]]
    assert is_non_dominated(points).tolist() == [True, False, False, True, True, True, False]


@pytest.mark.parametrize("seed", range(4))
def test_hypervolume_equals_the_staircase(seed):
    rng = np.random.default_rng(seed)
    points, ref, unit = rng.normal(size=(9, 2)), np.array([-0.5, -0.7]), np.array([0.3, 2.5])
    expected = hypervolume_2d(points, ref) / unit.prod()
    assert hypervolume(points, ref, unit) == pytest.approx(expected, rel=1e-12)


def test_hypervolume_by_hand():
    assert hypervolume([[1, 2], [2, 1], [-5, 9]], 0.0) == pytest.approx(3)  # the third point is below the reference
    assert hypervolume([[2, 2, 2], [3, 1, 1]], 0.0) == pytest.approx(9)
    assert hypervolume([[4.0], [2.0]], 1.0, 2.0) == pytest.approx(1.5)
    assert hypervolume([[-1, 5]], 0.0) == 0


def test_hypervolume_names_nan_points_and_refuses_a_unit_of_zero():
    with pytest.raises(ValueError, match=r"points \[1\] of 3"):
        hypervolume([[1, 1], [np.nan, 1], [1, 1]], 0.0)
    with pytest.raises(ValueError, match="unit must be positive"):
        hypervolume([[1, 1]], 0.0, [1.0, 0.0])


def test_kendall_tau_by_hand():
    assert kendall_tau_b([0, 1, 2, 3], [5, 6, 7, 8]) == 1
    assert kendall_tau_b([0, 1, 2, 3], [8, 7, 6, 5]) == -1
    assert kendall_tau_b([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    # 6 pairs, one tied in b: 5 concordant, so 5 / sqrt(6 * 5)
    assert kendall_tau_b([1, 2, 3, 4], [1, 2, 2, 4]) == pytest.approx(5 / math.sqrt(30))
    assert math.isnan(kendall_tau_b([1, 2, 3], [4, 4, 4]))


def test_kendall_tau_refuses_nan_and_other_lengths():
    with pytest.raises(ValueError, match=r"points \[1\] of 2 are NaN"):
        kendall_tau_b([0, 1], [0, float("nan")])
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        kendall_tau_b([0, 1], [0, 1, 2])
