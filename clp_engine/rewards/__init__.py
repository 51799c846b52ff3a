"""Reward functions with TRL's signature, and how they are matched to weights and called."""

from __future__ import annotations

from collections.abc import Callable

from clp_engine.rewards.length import Brevity
from clp_engine.rewards.scoring import RewardFunction, Rewards, resolve, score
from clp_engine.rewards.similarity import Closeness, RougeL

BUILTIN_REWARDS: dict[str, Callable[[], RewardFunction]] = {
    "brevity": Brevity,
    "closeness": Closeness,
    "rouge_l": RougeL,
}

__all__ = ["BUILTIN_REWARDS", "Brevity", "Closeness", "RewardFunction", "Rewards", "RougeL", "resolve", "score"]
