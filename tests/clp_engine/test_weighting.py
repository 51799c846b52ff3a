from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clp_engine.weighting import kl_coefficient, kl_coefficients, num_rows, reward_weights_tensor, simplex_grid

NAMES = ["long", "short"]


@pytest.mark.parametrize(
    "weights",
    [
        {"short": 0.75, "long": 0.25},
        [{"long": 0.25, "short": 0.75}] * 3,
        [0.25, 0.75],
        torch.tensor([0.25, 0.75]),
        torch.tensor([[0.25, 0.75]] * 3, dtype=torch.float64),
        np.array([[0.25, 0.75]] * 3),
        [torch.tensor([0.25, 0.75])] * 3,
        [np.float32(0.25), torch.tensor(0.75)],
        ({"long": torch.tensor(0.25), "short": np.float64(0.75)},) * 3,
    ],
)
def test_every_form_gives_the_same_tensor(weights):
    w = reward_weights_tensor(weights, NAMES, 3)
    assert w.dtype == torch.float32
    assert torch.equal(w, torch.tensor([[0.25, 0.75]] * 3))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"long": 1.0}, ["missing", "short"]),
        ({"long": 0.5, "short": 0.5, "shrt": 0.0}, ["unknown", "shrt"]),
        ([{"long": 1.0, "short": 0.0}] * 2, ["2 rows", "3 sequences"]),
        ([{"long": 1.0, "short": 0.0}, [0.5, 0.5], [0.5, 0.5]], ["[1]", "dict"]),
        ([1.0, 0.0, 0.0], ["[3, 3]", "[2]"]),
        (torch.zeros(2, 2), ["2 rows", "3 sequences"]),
        ({"long": float("nan"), "short": 1.0}, ["finite", "row 0"]),
        ([-0.5, 1.5], [">= 0", "-0.5"]),
        ([0.5, 0.6], ["sum to 1", "1.1"]),
        (torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.4]]), ["row 2", "0.9"]),
        ({"long": [1.0, 0.2, 0.5], "short": [0.0, 0.8, 0.5]}, ["'long'", "a list of dicts"]),
        ("long=1", ["a str", "a dict"]),
        (({"long": 1.0, "short": 0.0} for _ in range(3)), ["a generator", "a list of dicts"]),
    ],
)
def test_bad_weights_name_the_row_and_the_values(weights, words):
    with pytest.raises(ValueError, match="reward_weights") as error:
        reward_weights_tensor(weights, NAMES, 3)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("kl_weight", ["0.5", [0.5, None]])
def test_kl_weights_that_are_no_numbers_are_named(kl_weight):
    for call in (lambda: kl_coefficients(kl_weight, 2, 0.01), lambda: num_rows(None, kl_weight)):
        with pytest.raises(ValueError, match=r"kl_weight is .* expected a number"):
            call()


def test_free_domain_takes_any_finite_weights_and_no_others():
    assert torch.equal(reward_weights_tensor([-1.0, 3.0], NAMES, 1, "free"), torch.tensor([[-1.0, 3.0]]))
    with pytest.raises(ValueError, match="finite"):
        reward_weights_tensor([float("inf"), 0.0], NAMES, 1, "free")


def test_kl_coefficient_is_one_at_the_trained_policy_and_zero_at_the_reference():
    assert kl_coefficient(0.01, 0.01) == 1
    assert kl_coefficient(1.0, 0.01) == 0
    # DeRa's coefficients at alpha_min = 0.01, to three digits.
    expected = torch.tensor([0.495, 0.192, 0.091, 0.040, 0.010])
    assert torch.allclose(kl_coefficient(torch.tensor([0.02, 0.05, 0.1, 0.2, 0.5]), 0.01), expected, atol=6e-4)
    # A float32 alpha_min is a little off its float64 value, and still the end of the range.
    assert kl_coefficient(torch.tensor(0.01), 0.01) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.009, 1.1, math.nan])
def test_kl_weight_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"kl_weight .* \[0.01, 1\]"):
        kl_coefficient(alpha, 0.01)


def test_linear_interpolation_meets_the_same_ends():
    alpha = torch.tensor([0.2, 0.6, 1.0])
    assert torch.allclose(kl_coefficient(alpha, 0.2, "linear"), torch.tensor([1.0, 0.5, 0.0]))


def test_kl_coefficients_are_one_per_row():
    assert torch.equal(kl_coefficients(None, 2, 0.01), torch.ones(2))
    assert torch.allclose(kl_coefficients(torch.tensor([1.0, 0.01]), 2, 0.01), torch.tensor([0.0, 1.0]))
    assert torch.equal(kl_coefficients(1.0, 3, 0.01), torch.zeros(3))
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        kl_coefficients(torch.tensor([0.5, 0.5, 0.5]), 2, 0.01)


def test_simplex_grid():
    assert np.allclose(simplex_grid(2, 3), [[1, 0], [0.5, 0.5], [0, 1]])
    lattice = simplex_grid(3, 5)
    assert len(lattice) == 15
    assert np.allclose(lattice.sum(axis=1), 1)
    assert len({tuple(row) for row in lattice}) == 15
    with pytest.raises(ValueError, match="at least 2"):
        simplex_grid(1, 5)
