from __future__ import annotations

import math

import pytest
import torch

from clp_engine.training.objective import leave_one_out_advantages, regularised_return, reinforce_loss, scalarise
from clp_engine.training.reward_statistics import RewardStatistics
from clp_engine.training.weighting_sampler import WeightingSampler

NAN = math.nan


def test_scalarise_leaves_out_what_does_not_apply():
    w = torch.tensor([[0.25, 0.75]] * 3)
    rewards = torch.tensor([[4.0, 8.0], [NAN, 8.0], [NAN, NAN]])
    got = scalarise(w, rewards)
    assert torch.equal(got[:2], torch.tensor([7.0, 6.0]))
    assert got[2].isnan()


def test_regularised_return_is_the_papers_objective():
    got = regularised_return(torch.tensor([2.0, -1.0]), torch.tensor([10.0, 0.5]), 0.05)
    assert torch.allclose(got, torch.tensor([0.95 * 2 - 0.5, -0.95 - 0.025]))


def test_leave_one_out_compares_within_a_group_only():
    returns = torch.tensor([1.0, 2.0, 6.0, 100.0, 100.0, 100.0])
    expected = torch.tensor([1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5, 0.0, 0.0, 0.0])
    assert torch.allclose(leave_one_out_advantages(returns, 3), expected)
    # The closed form with the group's mean, n / (n - 1) times the centred return.
    groups = returns.view(-1, 3)
    centred = groups - groups.mean(1, keepdim=True)
    assert torch.allclose(leave_one_out_advantages(returns, 3).view(-1, 3), 1.5 * centred)


def test_rows_without_a_return_are_out_of_baselines_and_gradients():
    got = leave_one_out_advantages(torch.tensor([1.0, NAN, 3.0, NAN, 5.0, NAN]), 3)
    assert torch.equal(got, torch.tensor([-2.0, 0.0, 2.0, 0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match=r"5 returns .* num_generations 3"):
        leave_one_out_advantages(torch.zeros(5), 3)


def test_reinforce_gradient_is_the_objectives_gradient():
    """On a bandit of three answers the estimator's expectation is the exact gradient of E[R] - alpha KL."""
    alpha, rewards = 0.3, torch.tensor([1.0, -0.5, 2.0])
    logits = torch.tensor([0.2, -0.3, 0.1], requires_grad=True)
    reference = torch.tensor([0.5, 0.3, 0.2]).log()

    def returns(logp):
        return regularised_return(rewards, (logp - reference).detach(), alpha)

    logp = logits.log_softmax(0)
    exact = (logp.exp() * ((1 - alpha) * rewards - alpha * (logp - reference))).sum()
    (expected,) = torch.autograd.grad(exact, logits)
    total = torch.zeros(3)
    for i in range(3):  # every pair of samples, with its probability
        for j in range(3):
            logp = logits.log_softmax(0)
            pair = torch.tensor([i, j])
            advantages = leave_one_out_advantages(returns(logp)[pair], 2)
            (gradient,) = torch.autograd.grad(reinforce_loss(logp[pair].unsqueeze(1), advantages), logits)
            total -= (logp[i] + logp[j]).exp().item() * gradient
    assert torch.allclose(total, expected, atol=1e-6)


def test_statistics_standardise_and_refuse_what_has_none():
    import numpy as np

    rewards = np.array([[1.0, 5.0], [3.0, 5.0], [NAN, 5.0]])
    statistics = RewardStatistics.of(["a", "b"], rewards)
    assert statistics.mean == [2.0, 5.0]
    assert statistics.std == pytest.approx([math.sqrt(2), 1.0])  # the constant reward is not rescaled
    standard = statistics.standardise(torch.tensor(rewards))
    assert torch.allclose(standard[0], torch.tensor([-1 / math.sqrt(2), 0.0]))
    assert standard[2, 0].isnan()
    with pytest.raises(ValueError, match="'a' gave a number for 1 of 2"):
        RewardStatistics.of(["a"], np.array([[1.0], [NAN]]))


def test_dirichlet_sampler_is_on_the_simplex_and_seeded():
    w = WeightingSampler("dirichlet", 3, 0.5, seed=3).sample(4000)
    assert torch.allclose(w.sum(1), torch.ones(4000), atol=1e-6)
    assert torch.allclose(w.mean(0), torch.full((3,), 1 / 3), atol=0.02)
    # The variance of one entry of Dirichlet(a, a, a) is (1/3)(2/3) / (3 a + 1).
    assert torch.allclose(w.var(0), torch.full((3,), 2 / 9 / 2.5), atol=0.01)
    torch.manual_seed(0)
    assert torch.equal(w, WeightingSampler("dirichlet", 3, 0.5, seed=3).sample(4000))


def test_dirichlet_draws_come_with_their_rotations_so_every_step_weights_the_rewards_alike():
    sampler = WeightingSampler("dirichlet", 3, 0.5, seed=1)
    w = torch.cat([sampler.sample(2), sampler.sample(4)])  # a draw's rotations go on in the next step
    for draw in (w[:3], w[3:]):
        assert torch.equal(draw, torch.stack([draw[0].roll(turn) for turn in range(3)]))
    assert not torch.equal(w[0], w[3])


def test_corner_sampler_takes_turns_across_steps():
    sampler = WeightingSampler("corners", 3)
    rows = torch.cat([sampler.sample(2), sampler.sample(4)])
    assert torch.equal(rows, torch.eye(3).repeat(2, 1))
    with pytest.raises(ValueError, match="edges"):
        WeightingSampler("edges", 3)
