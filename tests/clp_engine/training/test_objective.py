from __future__ import annotations

import math

import pytest
import torch

from clp_engine.training.objective import leave_one_out_advantages, regularised_returns, reinforce_loss, scalarise
from clp_engine.training.reward_statistics import RewardStatistics
from clp_engine.training.weighting_sampler import WeightingSampler

NAN = math.nan


def test_scalarise_leaves_out_what_does_not_apply():
    w = torch.tensor([[0.25, 0.75]] * 3)
    rewards = torch.tensor([[4.0, 8.0], [NAN, 8.0], [NAN, NAN]])
    got = scalarise(w, rewards)
    assert torch.equal(got[:2], torch.tensor([7.0, 6.0]))
    assert got[2].isnan()


def test_the_first_return_is_the_papers_objective_and_later_ones_leave_out_what_was_paid():
    kl_BL = torch.tensor([[10.0, -2.0, 1.0], [0.5, 0.25, 0.0]])
    got = regularised_returns(torch.tensor([2.0, -1.0]), kl_BL, 0.05)
    rewards, to_go = torch.tensor([[1.9], [-0.95]]), torch.tensor([[9.0, -1.0, 1.0], [0.75, 0.25, 0.0]])
    assert torch.allclose(got, rewards - 0.05 * to_go)


def test_leave_one_out_compares_within_a_group_and_a_position_only():
    returns = torch.tensor([[1.0, 2.0, 6.0, 100.0, 100.0, 100.0], [0.0, 3.0, 0.0, 5.0, 5.0, 8.0]]).T
    expected = torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5, 0, 0, 0], [-1.5, 3, -1.5, -1.5, -1.5, 3]]).T
    written = torch.ones(6, 2)
    assert torch.allclose(leave_one_out_advantages(returns, 3, written), expected)
    # The closed form with the group's mean, n / (n - 1) times the centred return.
    groups = returns.reshape(-1, 3, 2)
    centred = groups - groups.mean(1, keepdim=True)
    assert torch.allclose(leave_one_out_advantages(returns, 3, written).view(-1, 3, 2), 1.5 * centred)


def test_rows_that_have_ended_count_once_together_beside_each_that_goes_on():
    returns = torch.tensor([[9.0, 9.0], [1.0, 1.0], [3.0, 3.0]])
    mask = torch.tensor([[1, 0], [1, 1], [1, 1]])
    got = leave_one_out_advantages(returns, 3, mask)
    assert torch.allclose(got[:, 0], torch.tensor([9 - 2.0, 1 - 6.0, 3 - 5.0]))
    # Of the second row: (3 + (9 + 3) / 2) / 2; of the first, which has ended, nothing counts.
    assert torch.allclose(got[1:, 1], torch.tensor([1 - 4.5, 3 - 3.0]))


def test_rows_without_a_return_are_out_of_baselines_and_gradients():
    got = leave_one_out_advantages(torch.tensor([[1.0], [NAN], [3.0], [NAN], [5.0], [NAN]]), 3, torch.ones(6, 1))
    assert torch.equal(got.flatten(), torch.tensor([-2.0, 0.0, 2.0, 0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match=r"5 returns .* num_generations 3"):
        leave_one_out_advantages(torch.zeros(5, 2), 3, torch.ones(5, 2))


class TwoTokenPolicy:
    """Answers of one or two tokens out of three, with rewards and a reference; a first token 2 ends the answer.

    The answer that ends at once earns 3 less than the others, which differ by about 1: length decides.
    """

    alpha = 0.3

    def __init__(self):
        torch.manual_seed(2)
        self.parameters = torch.randn(3, 3, requires_grad=True)  # of the first token, and of the second after 0 and 1
        self.reference = torch.randn(3, 3).log_softmax(-1)
        self.answers = torch.tensor([[2, 0], *([first, second] for first in (0, 1) for second in range(3))])
        self.mask = torch.tensor([[1, 0], *[[1, 1]] * 6])
        self.rewards = torch.randn(7) + torch.tensor([-3.0, *[0.0] * 6])

    def logprobs(self, table):
        first, second = self.answers.T
        both = torch.stack([table[0, first], table[1 + first.clamp(max=1), second]], dim=1)
        return both * self.mask  # [7 answers, 2 tokens]

    def exact_gradient(self):
        logp = self.logprobs(self.parameters.log_softmax(-1))
        kl = (logp - self.logprobs(self.reference)).sum(1)
        value = (logp.sum(1).exp() * ((1 - self.alpha) * self.rewards - self.alpha * kl)).sum()
        return torch.autograd.grad(value, self.parameters)[0]

    def moments(self, to_go=True, masked=True, n=3):
        """Mean and total variance of the gradient of groups of n answers, over every group with its probability."""
        mean, square = torch.zeros(3, 3), torch.zeros(())
        for group in torch.cartesian_prod(*[torch.arange(7)] * n):
            logp = self.logprobs(self.parameters.log_softmax(-1))[group]
            kl = (logp - self.logprobs(self.reference)[group]).detach()
            returns = regularised_returns(self.rewards[group], kl, self.alpha)
            returns = returns if to_go else returns[:, :1].expand(-1, 2)
            mask = self.mask[group] if masked else torch.ones(n, 2)
            loss = reinforce_loss(logp, leave_one_out_advantages(returns.contiguous(), n, mask))
            gradient = -torch.autograd.grad(loss, self.parameters)[0]
            mean += logp.detach().sum().exp() * gradient
            square += logp.detach().sum().exp() * gradient.square().sum()
        return mean, square - mean.square().sum()


def test_reinforce_gradient_is_the_objectives_gradient_with_little_noise():
    """Every estimator is right in the mean; on this policy the trainer's varies least."""
    policy = TwoTokenPolicy()
    expected = policy.exact_gradient()
    mean, variance = policy.moments()
    assert torch.allclose(mean, expected, atol=1e-5)
    for others in ({"to_go": False}, {"masked": False}):
        mean_of_others, variance_of_others = policy.moments(**others)
        assert torch.allclose(mean_of_others, expected, atol=1e-5)
        assert variance < variance_of_others, others


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
