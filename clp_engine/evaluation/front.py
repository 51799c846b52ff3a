"""The outcome of a sweep: mean rewards per weighting, every sample, and the figures that are read off them.

Shapes: P sweep points, R rewards, N prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clp_engine.evaluation import pareto
from clp_engine.evaluation.pareto import Array

_FORMAT = 1


def mean_rewards(samples: Iterable[Mapping[str, Any]], reward_names: Sequence[str]) -> Array:
    """Return the mean reward per name [R] over the samples where it applies; NaN where it applies to none."""
    rows = [[_number(s["rewards"][name]) for name in reward_names] for s in samples]
    values_SR = np.array(rows, dtype=np.float64).reshape(-1, len(reward_names))
    applies = ~np.isnan(values_SR)
    total_R = np.where(applies, values_SR, 0.0).sum(0)
    return np.divide(total_R, applies.sum(0), out=np.full(len(reward_names), np.nan), where=applies.any(0))


def std_rewards(samples: Iterable[Mapping[str, Any]], reward_names: Sequence[str]) -> Array:
    """Return the standard deviation per reward [R] over single samples (`torch.std(..., correction=0)`), NaN-aware."""
    samples = list(samples)
    mean_R = mean_rewards(samples, reward_names)
    names = list(enumerate(reward_names))
    squared = [{"rewards": {n: (_number(s["rewards"][n]) - mean_R[i]) ** 2 for i, n in names}} for s in samples]
    return np.sqrt(mean_rewards(squared, reward_names))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


@dataclass(frozen=True, eq=False)
class BasePolicy:
    """What the reference policy (KL weight 1) does on the prompts of a sweep.

    Attributes:
        rewards: mean reward per name [R].
        std: standard deviation of the reward over single samples [R], the unit of the front's figures.
        samples: its records, one per completion.
        measures: its text measures.
    """

    rewards: Array
    std: Array
    samples: list[dict[str, Any]] = field(repr=False)
    measures: dict[str, float | None]


@dataclass(frozen=True, eq=False)
class Front:
    """Mean rewards of a steerable policy over a grid of weightings.

    Attributes:
        reward_names: names [R], the order of every reward axis.
        reward_weights: weights asked for [P, R].
        kl_weights: KL weight per point [P]; None: the policy's own default.
        rewards: mean reward per point [P, R], over the samples where it applies (NaN: none).
        samples: one record per completion: `point`, `prompt_index`, `prompt`, `reward_weights` by name, `kl_weight`,
            `completion`, `rewards` by name (None: does not apply), `num_tokens`, `num_words`, `ended`,
            `copied_4gram_share`, `policy_logprob`, `base_logprob` (sums over the tokens), `kl`.
        measures: text measures per point, see `text_measures.point_measures`.
        base: the same of the reference policy.
        seconds: wall-clock seconds that the sweep took.
    """

    reward_names: list[str]
    reward_weights: Array
    kl_weights: Array | None
    rewards: Array
    samples: list[dict[str, Any]] = field(repr=False)
    measures: list[dict[str, float | None]] = field(repr=False)
    base: BasePolicy
    seconds: float

    def __post_init__(self) -> None:
        num_rewards, num_points = len(self.reward_names), len(self.reward_weights)
        for name in ("reward_weights", "rewards"):
            shape = getattr(self, name).shape
            if shape != (num_points, num_rewards):
                raise ValueError(f"front.{name} has shape {shape}, expected [P, R] = {(num_points, num_rewards)}")
        if self.kl_weights is not None and self.kl_weights.shape != (num_points,):
            raise ValueError(f"front.kl_weights has shape {self.kl_weights.shape}, expected [P] = {(num_points,)}")

    @property
    def has_unit(self) -> bool:
        """Whether every reward of the base policy varies, so that figures in base standard deviations exist."""
        return bool((self.base.std > 0).all())

    def reference(self) -> tuple[Array, Array]:
        """Return the default reference point [R] and unit [R]: base mean - 1 base standard deviation, and that.

        Raises:
            ValueError: the base policy's reward does not vary or never applies, so it gives no unit.
        """
        for name, std in zip(self.reward_names, self.base.std, strict=True):
            if not std > 0:
                raise ValueError(
                    f"the base policy's reward {name!r} has standard deviation {std} over {len(self.base.samples)} "
                    "samples, so it gives no unit: sweep more prompts, or pass ref= and unit="
                )
        return self.base.rewards - self.base.std, self.base.std

    def hypervolume(self, ref: npt.ArrayLike | None = None, unit: npt.ArrayLike | None = None) -> float:
        """Return the hypervolume that the front dominates, every reward maximised.

        By default rewards are counted from the base policy's mean in units of its standard deviation over single
        samples on the same prompts, and the reference point is the base mean - 1 base standard deviation; the base
        policy itself dominates a volume of 1.

        Args:
            ref: reference point [R] or a number, in the rewards' own unit.
            unit: length of one unit per reward [R] or a number; with `ref` alone: the base standard deviation.

        Raises:
            ValueError: points with a NaN reward (named), or a base policy whose reward does not vary.
            ImportError: moocore is missing.
        """
        if ref is None or unit is None:
            default_ref, default_unit = self.reference()
            ref, unit = default_ref if ref is None else ref, default_unit if unit is None else unit
        return pareto.hypervolume(self.rewards, ref, unit)

    def kendall_tau(self) -> dict[str, float]:
        """Return, per reward, how well its weight orders its achieved mean: Kendall's tau-b over the points."""
        columns = zip(self.reward_names, self.reward_weights.T, self.rewards.T, strict=True)
        return {name: pareto.kendall_tau_b(weights, means) for name, weights, means in columns}

    def spread(self) -> dict[str, float]:
        """Return, per reward, how far apart its ends are, in base standard deviations.

        The ends are the points with the largest and the smallest weight of that reward (averaged where several tie);
        positive means that asking for the reward raises it.
        """
        _, unit_R = self.reference()
        ends = {}
        for i, name in enumerate(self.reward_names):
            weight_P, mean_P = self.reward_weights[:, i], self.rewards[:, i]
            high, low = mean_P[weight_P == weight_P.max()].mean(), mean_P[weight_P == weight_P.min()].mean()
            ends[name] = float((high - low) / unit_R[i])
        return ends

    def non_dominated(self) -> npt.NDArray[np.bool_]:
        """Return which points no other point of this front dominates, bool [P]."""
        return pareto.is_non_dominated(self.rewards)

    def prompt_totals(self) -> tuple[Array, Array]:
        """Return sums and counts [P, N, R] of the rewards of each point on each prompt, for resampling prompts."""
        num_prompts = 1 + max((s["prompt_index"] for s in self.samples), default=-1)
        sums_PNR = np.zeros((len(self.rewards), num_prompts, len(self.reward_names)))
        counts_PNR = np.zeros_like(sums_PNR)
        for sample in self.samples:
            for i, name in enumerate(self.reward_names):
                value = sample["rewards"][name]
                if value is not None:
                    sums_PNR[sample["point"], sample["prompt_index"], i] += value
                    counts_PNR[sample["point"], sample["prompt_index"], i] += 1
        return sums_PNR, counts_PNR

    def hypervolume_difference(self, other: Front, num_resamples: int = 2000, seed: int = 0) -> dict[str, float]:
        """Return this front's hypervolume minus the other's, with a paired bootstrap interval over prompts.

        See `mean_hypervolume_difference`, of which this is the case of one pair.
        """
        return mean_hypervolume_difference([(self, other)], num_resamples, seed)

    def plot(self, path: str | Path, title: str | None = None) -> None:
        """Draw this front into an image file; the suffix chooses the format."""
        from clp_engine.evaluation.plot import plot_fronts

        plot_fronts({"front": self}, path, title=title)

    def to_json(self) -> str:
        """Return the front as JSON text, without loss (`from_json` returns equal values); NaN becomes null."""
        base = self.base
        content = {
            "format": _FORMAT,
            "reward_names": self.reward_names,
            "reward_weights": self.reward_weights.tolist(),
            "kl_weights": None if self.kl_weights is None else self.kl_weights.tolist(),
            "rewards": _nullable(self.rewards),
            "measures": self.measures,
            "base": {
                "rewards": _nullable(base.rewards),
                "std": _nullable(base.std),
                "measures": base.measures,
                "samples": base.samples,
            },
            "seconds": self.seconds,
            "samples": self.samples,
        }
        return json.dumps(content, allow_nan=False)

    @classmethod
    def from_json(cls, source: str | Path) -> Front:
        """Return the front that `to_json` wrote.

        Args:
            source: the JSON text, or the `Path` of a file that holds it.

        Raises:
            ValueError: the format number is not the one that this version writes.
        """
        content = json.loads(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
        if content.get("format") != _FORMAT:
            raise ValueError(f"front format {content.get('format')!r} is unknown, this version reads {_FORMAT}")
        base, num_rewards = content["base"], len(content["reward_names"])
        return cls(
            reward_names=content["reward_names"],
            reward_weights=_array(content["reward_weights"]).reshape(-1, num_rewards),
            kl_weights=None if content["kl_weights"] is None else _array(content["kl_weights"]),
            rewards=_array(content["rewards"]).reshape(-1, num_rewards),
            samples=content["samples"],
            measures=content["measures"],
            base=BasePolicy(_array(base["rewards"]), _array(base["std"]), base["samples"], base["measures"]),
            seconds=content["seconds"],
        )


def _nullable(values: Array) -> Any:
    return (
        [_nullable(row) for row in values] if values.ndim > 1 else [None if np.isnan(v) else float(v) for v in values]
    )


def _array(values: Any) -> Array:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def _prompts(front: Front) -> dict[int, Any]:
    return {sample["prompt_index"]: sample["prompt"] for sample in front.samples}


def mean_hypervolume_difference(
    pairs: Sequence[tuple[Front, Front]], num_resamples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Return the mean over pairs (such as seeds) of hypervolume(first) - hypervolume(second), with an interval.

    Paired bootstrap: each resample draws prompts with replacement, the same ones for every front. Reference point and
    unit are those of the first front of a pair and stay fixed. A hypervolume of noisy means is biased upward; both
    fronts of a pair share that.

    Returns:
        `difference` as observed; `mean`, `low`, `high`: mean and 2.5 % and 97.5 % quantiles over resamples;
        `share_positive`: share of resamples above 0.

    Raises:
        ValueError: no pair, other rewards or other prompts among the fronts, or NaN rewards.
    """
    if not pairs:
        raise ValueError("mean_hypervolume_difference needs at least one pair of fronts, got 0")
    prompts = _prompts(pairs[0][0])
    if not prompts:
        raise ValueError("the fronts carry no samples, which resampling their prompts needs")
    for front in (front for pair in pairs for front in pair):
        if front.reward_names != pairs[0][0].reward_names:
            raise ValueError(f"the fronts have other rewards: {front.reward_names}, {pairs[0][0].reward_names}")
        if _prompts(front) != prompts:
            raise ValueError("the fronts were taken on other prompts: a paired comparison needs the same ones")
    rng = np.random.default_rng(seed)
    num_prompts = 1 + max(prompts)
    draws_ZN = rng.multinomial(num_prompts, np.full(num_prompts, 1.0 / num_prompts), size=num_resamples)
    observed, resampled_Z = 0.0, np.zeros(num_resamples)
    for first, second in pairs:
        ref_R, unit_R = first.reference()
        for front, sign in ((first, 1.0), (second, -1.0)):
            observed += sign * front.hypervolume(ref_R, unit_R) / len(pairs)
            volumes_Z = pareto.resampled_hypervolumes(*front.prompt_totals(), draws_ZN, ref_R, unit_R)
            resampled_Z += sign * volumes_Z / len(pairs)
    low, high = np.quantile(resampled_Z, [0.025, 0.975])
    return {
        "difference": observed,
        "mean": float(resampled_Z.mean()),
        "low": float(low),
        "high": float(high),
        "share_positive": float((resampled_Z > 0).mean()),
    }
