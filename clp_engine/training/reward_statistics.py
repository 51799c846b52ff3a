"""Fixed statistics of the rewards under the reference policy: what makes weights mean the same for every reward scale.

Legend: R rewards.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clp_engine.rewards import score
from clp_engine.rollout import as_completion, rollout

logger = logging.getLogger(__name__)

MIN_STD = 1e-4
NOT_FOR_REWARDS = ("prompt", "reward_weights", "kl_weight")  # columns that reward functions do not get


@dataclass(frozen=True)
class RewardStatistics:
    """Mean and standard deviation of each reward over samples of the reference policy.

    Attributes:
        names: reward names.
        mean: [R], in each reward's own unit.
        std: [R], likewise; 1 where the reward was constant.
        num_samples: completions that they rest on.
    """

    names: list[str]
    mean: list[float]
    std: list[float]
    num_samples: int

    @classmethod
    def of(cls, names: Sequence[str], rewards_BR: np.ndarray) -> RewardStatistics:
        """Statistics of rewards [B, R]; NaN entries (the reward does not apply) are left out.

        Raises:
            ValueError: a reward applies to fewer than two samples.
        """
        applies = np.isfinite(rewards_BR).sum(axis=0)
        if (applies < 2).any():
            name = names[int(np.argmin(applies))]
            raise ValueError(
                f"reward {name!r} gave a number for {applies.min()} of {len(rewards_BR)} reference samples: its mean "
                "and deviation need at least 2; check the reward function, or raise num_reference_samples"
            )
        mean, std = np.nanmean(rewards_BR, axis=0), np.nanstd(rewards_BR, axis=0, ddof=1)
        for name, deviation in zip(names, std, strict=True):
            if deviation < MIN_STD:
                logger.warning(
                    "reward %r is constant over the reference samples (std %.2g): not rescaled", name, deviation
                )
        return cls(list(names), mean.tolist(), np.where(std < MIN_STD, 1.0, std).tolist(), len(rewards_BR))

    def standardise(self, rewards_BR: torch.Tensor) -> torch.Tensor:
        """`(rewards - mean) / std`, float32, NaN kept."""
        return ((rewards_BR - torch.tensor(self.mean)) / torch.tensor(self.std)).float()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return dataclasses.asdict(self)


def measure_reference(
    model: Any,
    processing_class: Any,
    rows: Sequence[Mapping[str, Any]],
    reward_funcs: Mapping[str, Any],
    *,
    num_samples: int,
    batch_size: int,
    max_prompt_length: int | None,
    max_completion_length: int,
    temperature: float = 1.0,
) -> RewardStatistics:
    """Score `num_samples` sampled completions of the reference policy (KL weight 1), one per row, rows in turn.

    Raises:
        ValueError: from the reward functions' checks (wrong length, all NaN), before any training.
    """
    picked = [rows[i % len(rows)] for i in range(num_samples)]
    scored = []
    for start in range(0, num_samples, batch_size):
        batch = picked[start : start + batch_size]
        completions = rollout(
            model,
            processing_class,
            [row["prompt"] for row in batch],
            kl_weight=1.0,
            max_new_tokens=max_completion_length,
            max_prompt_length=max_prompt_length,
            do_sample=True,
            temperature=temperature,
        )
        scored.append(score_rollout(reward_funcs, batch, completions))
    return RewardStatistics.of(list(reward_funcs), np.concatenate(scored))


def score_rollout(reward_funcs: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], completions: Any) -> np.ndarray:
    """Rewards [B, R] of a rollout whose groups are `rows`; the rows' other columns reach the reward functions."""
    repeated = [row for row in rows for _ in range(completions.num_generations)]
    columns = {name: [row.get(name) for row in repeated] for name in rows[0] if name not in NOT_FOR_REWARDS}
    prompts = [row["prompt"] for row in repeated]
    texts = [as_completion(prompt, text) for prompt, text in zip(prompts, completions.texts, strict=True)]
    return score(reward_funcs, prompts, texts, completions.completion_id_lists(), columns)
