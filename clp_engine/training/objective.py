"""The paper's objective and its policy gradient, as pure functions of tensors.

    max_pi  E_{(x, w) ~ Q, y ~ pi(.|x; w)} [ (1 - alpha) w . R(x, y) - alpha KL(pi(.|x; w) || pi_ref(.|x)) ]

(CLP, arXiv 2407.15762, section 2; R standardised by the reference policy's mean and deviation). Estimator: REINFORCE
with a leave-one-out baseline over the samples of one (prompt, weighting).

Legend: B sequences in groups of n (one prompt under one weighting), L completion tokens, R rewards.
"""

from __future__ import annotations

import torch


def scalarise(w_BR: torch.Tensor, rewards_BR: torch.Tensor) -> torch.Tensor:
    """Weighted reward of each row, `(w * rewards).nansum(dim=1)`; a NaN reward does not apply to its row.

    Returns:
        scalar_B: NaN where no reward applies to the row.
    """
    scalar_B = (w_BR * rewards_BR).nansum(dim=1)
    return scalar_B.masked_fill(rewards_BR.isnan().all(dim=1), float("nan"))


def regularised_return(scalar_B: torch.Tensor, kl_B: torch.Tensor, kl_weight: float) -> torch.Tensor:
    """Return of each row, `(1 - alpha) * scalar - alpha * kl`, kl = log pi(y|x) - log pi_ref(y|x) in nats."""
    return (1 - kl_weight) * scalar_B - kl_weight * kl_B


def leave_one_out_advantages(returns_B: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Advantage of each row over the mean of its group's other rows.

    Equivalent to `n / (n - 1) * (returns.view(-1, n) - returns.view(-1, n).mean(1, keepdim=True))` without NaN. A row
    whose return is NaN (no reward applies) is left out of its group's baselines and gets advantage 0; so does a row
    that is alone in its group.

    Args:
        returns_B: rows of one (prompt, weighting) next to each other.
        num_generations: n.

    Returns:
        advantages_B: finite.

    Raises:
        ValueError: B is no multiple of n.
    """
    if returns_B.numel() % num_generations:
        raise ValueError(f"{returns_B.numel()} returns do not split into groups of num_generations {num_generations}")
    groups = returns_B.view(-1, num_generations)
    scored = ~groups.isnan()
    values = groups.nan_to_num(0.0)
    others = scored.sum(dim=1, keepdim=True) - scored.long()
    baseline = (values.sum(dim=1, keepdim=True) - values) / others.clamp(min=1)
    return torch.where(scored & (others > 0), values - baseline, 0.0).view(-1)


def reinforce_loss(logprobs_BL: torch.Tensor, advantages_B: torch.Tensor) -> torch.Tensor:
    """Policy-gradient loss, `-(advantages * logprobs.sum(1)).mean()`.

    The denominator is the number of sequences: the expectation is over answers, and a long answer is one answer.

    Args:
        logprobs_BL: log-probabilities of the sampled tokens, 0 after the end; the end-of-sequence token counts.
        advantages_B: without gradient.
    """
    return -(advantages_B.detach() * logprobs_BL.sum(dim=1)).mean()
