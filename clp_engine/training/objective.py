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


def regularised_returns(scalar_B: torch.Tensor, kl_BL: torch.Tensor, kl_weight: float) -> torch.Tensor:
    """Return of each token, `(1 - alpha) * scalar - alpha * (kl of this token and of those after it)`.

    Equivalent to `(1 - alpha) * scalar[:, None] - alpha * kl.flip(1).cumsum(1).flip(1)`; its first column is the
    return of the whole answer. What the tokens before have cost is no consequence of this one: left in, it would add
    noise to the gradient and nothing to its expectation.

    Args:
        scalar_B: weighted reward of the whole answer.
        kl_BL: log pi(token) - log pi_ref(token) in nats, 0 after the end.
        kl_weight: alpha.

    Returns:
        returns_BL.
    """
    kl_to_go_BL = kl_BL.flip(1).cumsum(dim=1).flip(1)
    return (1 - kl_weight) * scalar_B[:, None] - kl_weight * kl_to_go_BL


def leave_one_out_advantages(returns_BL: torch.Tensor, num_generations: int, mask_BL: torch.Tensor) -> torch.Tensor:
    """Advantage of each token over what its group's other rows that are still being written there return.

    With a_t the other rows that reach position t, the baseline is `(returns[a_t].sum() + others.mean()) / (len(a_t) +
    1)`: a row that has ended says little about what going on is worth, and the mean over all others steadies it where
    few are left. The decision to end is so compared with going on, not with the whole group; no baseline depends on the
    row's own token, so the gradient's expectation is the same. Where all rows are of one length it is the mean of the
    others, the advantages `n / (n - 1) * (groups - groups.mean(1, keepdim=True))`.

    A row whose return is NaN (no reward applies) is left out of its group's baselines and gets advantage 0; so does a
    row that is alone in its group.

    Args:
        returns_BL: rows of one (prompt, weighting) next to each other.
        num_generations: n.
        mask_BL: 1 up to and including the end of a row.

    Returns:
        advantages_BL: finite.

    Raises:
        ValueError: B is no multiple of n.
    """
    if len(returns_BL) % num_generations:
        raise ValueError(f"{len(returns_BL)} returns do not split into groups of num_generations {num_generations}")
    groups_GnL = returns_BL.view(-1, num_generations, returns_BL.shape[1])
    scored_GnL = ~groups_GnL.isnan()
    values_GnL = groups_GnL.nan_to_num(0.0)

    def others(of_GnL: torch.Tensor) -> torch.Tensor:
        return of_GnL.sum(dim=1, keepdim=True) - of_GnL

    num_others_GnL = others(scored_GnL.long())
    mean_GnL = others(values_GnL) / num_others_GnL.clamp(min=1)
    writing_GnL = scored_GnL & mask_BL.view_as(groups_GnL).bool()
    baseline_GnL = (others(values_GnL * writing_GnL) + mean_GnL) / (others(writing_GnL.long()) + 1)
    advantages_GnL = torch.where(scored_GnL & (num_others_GnL > 0), values_GnL - baseline_GnL, 0.0)
    return advantages_GnL.view_as(returns_BL)


def reinforce_loss(logprobs_BL: torch.Tensor, advantages_BL: torch.Tensor) -> torch.Tensor:
    """Policy-gradient loss, `-(advantages * logprobs).sum(1).mean()`.

    The denominator is the number of sequences: the expectation is over answers, and a long answer is one answer.

    Args:
        logprobs_BL: log-probabilities of the sampled tokens, 0 after the end; the end-of-sequence token counts.
        advantages_BL: without gradient.
    """
    return -(advantages_BL.detach() * logprobs_BL).sum(dim=1).mean()
