"""CLPConfig: what is conditioned, on which rewards, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from clp_engine.weighting import WEIGHT_DOMAINS, reward_weights_tensor

VARIANTS = ("attn", "logit")
PARAMETERIZATIONS = ("delta",)


@dataclass(frozen=True)
class CLPConfig:
    """What a conditioned model is conditioned on, and which of its parameters carry copies.

    Args:
        rewards: reward names; their order is the order of every weight tensor, and copy k is reward k's.
        variant: "attn" (the linear layers of every attention module) or "logit" (the output head). None where
            `target_modules` is given; "attn" where neither is.
        target_modules: PEFT's grammar instead of a variant: a list of module name suffixes, a regular expression that
            matches the whole module path, or "all-linear" (every linear layer except the output head).
        parameterization: "delta": copy k is a full difference Delta_k beside the frozen weight.
        train_shared: True trains the parameters outside the variant too, one copy for all weightings.
        min_kl_weight: alpha_min in (0, 1), the KL weight at which lambda = 1.
        weight_domain: "simplex" (weights >= 0 that sum to 1 within 1e-3) or "free" (any finite weights).
        default_reward_weights: used when a call gives none; None means the centre, 1 / number of rewards each.

    Raises:
        ValueError: a field out of range; the message names the field, the value and what is allowed.
        NotImplementedError: a choice of the paper that is not built yet, by name.
    """

    rewards: list[str]
    variant: str | None = None
    target_modules: list[str] | str | None = None
    parameterization: str = "delta"
    train_shared: bool = False
    min_kl_weight: float = 0.01
    weight_domain: str = "simplex"
    default_reward_weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rewards", list(self.rewards))
        if isinstance(self.target_modules, (tuple, set, frozenset)):  # JSON has lists
            object.__setattr__(self, "target_modules", sorted(self.target_modules))
        if not self.rewards or any(not isinstance(name, str) or not name for name in self.rewards):
            raise ValueError(f"rewards must be a list of one or more names, got {self.rewards!r}")
        if len(set(self.rewards)) != len(self.rewards) or any("." in name for name in self.rewards):
            raise ValueError(
                f"rewards must be distinct names without dots (they name tensors on disk), got {self.rewards}"
            )
        self._check_choices()
        if not 0 < self.min_kl_weight < 1:
            raise ValueError(f"min_kl_weight is {self.min_kl_weight}, it must lie strictly between 0 and 1")
        if self.default_reward_weights is not None:
            object.__setattr__(self, "default_reward_weights", dict(self.default_reward_weights))
            reward_weights_tensor(self.default_reward_weights, self.rewards, 1, self.weight_domain)

    def _check_choices(self) -> None:
        if self.variant is not None and self.target_modules is not None:
            raise ValueError(
                f"variant={self.variant!r} and target_modules={self.target_modules!r} are both given: choose one"
            )
        if self.variant is None and self.target_modules is None:
            object.__setattr__(self, "variant", "attn")
        if self.variant == "full":
            raise NotImplementedError('variant="full" is not built yet: use "attn", "logit" or target_modules')
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}, expected one of {VARIANTS}, or target_modules")
        if self.parameterization in ("lora", "svd", "pblora", "soft_tokens"):
            raise NotImplementedError(f'parameterization="{self.parameterization}" is not built yet: use "delta"')
        if self.parameterization not in PARAMETERIZATIONS:
            raise ValueError(f"parameterization is {self.parameterization!r}, expected one of {PARAMETERIZATIONS}")
        if self.train_shared:
            raise NotImplementedError("train_shared=True is not built yet: parameters outside the variant stay frozen")
        if self.weight_domain not in WEIGHT_DOMAINS:
            raise ValueError(f"weight_domain is {self.weight_domain!r}, expected one of {WEIGHT_DOMAINS}")

    @property
    def num_copies(self) -> int:
        """K, the number of copies of each conditioned parameter: one per reward."""
        return len(self.rewards)

    def default_weights(self, batch_size: int) -> torch.Tensor:
        """Reward weights [B, R] float32 of a call that gives none."""
        if self.default_reward_weights is None:
            return torch.full((batch_size, len(self.rewards)), 1.0 / len(self.rewards))
        return reward_weights_tensor(self.default_reward_weights, self.rewards, batch_size, self.weight_domain)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLPConfig:
        """Rebuild a config from `to_dict`'s values.

        Raises:
            ValueError: an unknown field.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown CLPConfig fields {unknown}; known fields are {sorted(known)}")
        return cls(**values)
