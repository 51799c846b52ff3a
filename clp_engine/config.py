"""CLPConfig: what is conditioned, on which rewards, and how."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from clp_engine.weighting import KL_INTERPOLATIONS, WEIGHT_DOMAINS, reward_weights_tensor

VARIANTS = ("full", "attn", "logit")
PARAMETERIZATIONS = ("delta", "lora", "svd", "pblora", "soft_tokens")


@dataclass(frozen=True)
class CLPConfig:
    """What a conditioned model is conditioned on, and which of its parameters carry copies.

    Args:
        rewards: reward names; their order is the order of every weight tensor. Copy k is reward k's unless `copies`
            says otherwise.
        variant: "full" (every parameter: linear layers with their biases, embeddings, norms), "attn" (the weights of
            the linear layers of every attention module) or "logit" (the output head). None where `target_modules` is
            given; "attn" where neither is.
        target_modules: PEFT's grammar instead of a variant: a list of module name suffixes, a regular expression that
            matches the whole module path, or "all-linear" (every linear layer except the output head).
        parameterization: "delta": copy k is a full difference Delta_k beside the frozen weight. Linear layers alone:
            "lora" (an adapter per copy), "svd" (Panacea: shared singular values beside one per copy), "pblora" (PARM: a
            small matrix per copy between shared factors). "soft_tokens": every attention block also attends to tokens
            whose values are averaged.
        train_shared: True trains the modules outside the variant too, one copy for all weightings; what else a chosen
            module holds (its bias) stays frozen.
        min_kl_weight: alpha_min in (0, 1), the KL weight at which lambda = 1.
        kl_interpolation: lambda(alpha) between them: "dera" (exact for the KL-regularised optima's logits) or "linear"
            ((1 - alpha) / (1 - alpha_min)).
        weight_domain: "simplex" (weights >= 0 that sum to 1 within 1e-3) or "free" (any finite weights).
        default_reward_weights: used when a call gives none; None means the centre, 1 / number of rewards each.
        copies: name -> {reward: factor}: copies that are not one per reward. The coefficient of a copy is lambda times
            the sum of factor * weight over its rewards (Bone Soups' backbones are such mixes).
        r: rank of a low-rank copy; for "lora" also a dict copy name -> rank.
        lora_alpha: a LoRA copy's scaling is lora_alpha / r; a number, or a dict copy name -> number.
        num_virtual_tokens: soft tokens of an attention block.
        folded: set by `CLPModel.fold`: the copy that its base has taken in.

    Raises:
        ValueError: a field out of range; the message names the field, the value and what is allowed.
    """

    rewards: list[str]
    variant: str | None = None
    target_modules: list[str] | str | None = None
    parameterization: str = "delta"
    train_shared: bool = False
    min_kl_weight: float = 0.01
    weight_domain: str = "simplex"
    default_reward_weights: dict[str, float] | None = None
    kl_interpolation: str = "dera"
    copies: dict[str, dict[str, float]] | None = None
    r: int | dict[str, int] = 8
    lora_alpha: float | dict[str, float] = 8
    num_virtual_tokens: int = 8
    folded: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rewards, (str, set, frozenset)):
            raise ValueError(f"rewards is {self.rewards!r}, expected a list: its order is that of every weight tensor")
        object.__setattr__(self, "rewards", list(self.rewards))
        if isinstance(self.target_modules, (tuple, set, frozenset)):  # JSON has lists
            object.__setattr__(self, "target_modules", sorted(self.target_modules))
        _check_names("rewards", self.rewards)
        self._check_copies()
        self._check_choices()
        self._check_sizes()
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
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(f"target_modules={self.target_modules!r} is no regular expression: {error}") from error
        if self.variant is None and self.target_modules is None:
            object.__setattr__(self, "variant", "attn")
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}, expected one of {VARIANTS}, or target_modules")
        if self.parameterization not in PARAMETERIZATIONS:
            raise ValueError(f"parameterization is {self.parameterization!r}, expected one of {PARAMETERIZATIONS}")
        if self.parameterization != "delta" and self.variant == "full":
            raise ValueError(
                f'variant="full" with parameterization={self.parameterization!r}: full-CLP copies whole parameters; '
                'target_modules="all-linear" gives every linear layer low-rank copies'
            )
        if self.parameterization == "soft_tokens" and self.variant != "attn":
            raise ValueError('parameterization="soft_tokens" conditions attention blocks: use variant="attn"')
        if self.kl_interpolation not in KL_INTERPOLATIONS:
            raise ValueError(f"kl_interpolation is {self.kl_interpolation!r}, expected one of {KL_INTERPOLATIONS}")
        if self.weight_domain not in WEIGHT_DOMAINS:
            raise ValueError(f"weight_domain is {self.weight_domain!r}, expected one of {WEIGHT_DOMAINS}")

    def _check_copies(self) -> None:
        if self.copies is None:
            return
        copies = {name: dict(factors) for name, factors in self.copies.items()}
        object.__setattr__(self, "copies", copies)
        _check_names("copies", list(copies))
        for name, factors in copies.items():
            if unknown := sorted(set(factors) - set(self.rewards)):
                raise ValueError(f"copies[{name!r}] names {unknown}, the rewards are {self.rewards}")
            if not all(math.isfinite(factor) for factor in factors.values()):
                raise ValueError(f"copies[{name!r}] must have finite factors, got {factors}")

    def _check_sizes(self) -> None:
        for field, allowed in (("r", int), ("lora_alpha", (int, float))):
            value = getattr(self, field)
            if isinstance(value, dict):
                if self.parameterization != "lora" or set(value) != set(self.copy_names):
                    raise ValueError(f'{field}={value}: a dict must name the copies {self.copy_names} of "lora"')
                object.__setattr__(self, field, dict(value))
            for number in value.values() if isinstance(value, dict) else [value]:
                if isinstance(number, bool) or not isinstance(number, allowed) or number <= 0:
                    kind = "a positive integer" if allowed is int else "positive"
                    raise ValueError(f"{field} must be {kind}, got {value!r}")
        if self.num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens must be at least 1, got {self.num_virtual_tokens}")

    @property
    def copy_names(self) -> tuple[str, ...]:
        """Names of the copies of each conditioned parameter, in the order of the coefficients."""
        return tuple(self.rewards if self.copies is None else self.copies)

    @property
    def num_copies(self) -> int:
        """K, the number of copies of each conditioned parameter."""
        return len(self.copy_names)

    @property
    def has_shared(self) -> bool:
        """Whether something is trained for all weightings at once: then lambda is a coefficient of its own."""
        return self.train_shared or self.parameterization in ("svd", "pblora")

    @property
    def num_coefficients(self) -> int:
        """C, the length of a coefficient row: K, and lambda behind them where there is a shared part."""
        return self.num_copies + self.has_shared

    @property
    def rank(self) -> int:
        """The rank of the forms that have one for all copies."""
        return self.ranks[0]

    @property
    def ranks(self) -> list[int]:
        """Rank of each copy."""
        return [self.r[name] if isinstance(self.r, dict) else self.r for name in self.copy_names]

    @property
    def scalings(self) -> list[float]:
        """The factor lora_alpha / r of each copy."""
        alphas = [self.lora_alpha[n] if isinstance(self.lora_alpha, dict) else self.lora_alpha for n in self.copy_names]
        return [alpha / rank for alpha, rank in zip(alphas, self.ranks, strict=True)]

    def mixing_matrix(self) -> torch.Tensor | None:
        """Matrix [K, R] from reward weights to copies, float32; None where copy k is reward k's."""
        if self.copies is None:
            return None
        return torch.tensor([[factors.get(reward, 0.0) for reward in self.rewards] for factors in self.copies.values()])

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


def _check_names(field: str, names: list[str]) -> None:
    if not names or any(not isinstance(name, str) or not name for name in names):
        raise ValueError(f"{field} must be one or more names, got {names!r}")
    if len(set(names)) != len(names) or any("." in name for name in names):
        raise ValueError(f"{field} must be distinct names without dots (they name tensors on disk), got {names}")
    if "shared" in names:
        raise ValueError(f'{field} holds "shared", which names what all weightings share: choose another')
