"""A comparison of fronts in words and figures: the console table, the content of results.json, outputs side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clp_engine.evaluation.front import Front, mean_hypervolume_difference
from clp_engine.evaluation.text_measures import MEASURES, user_text

WIDTH = 120
# Column heading, decimals and factor per measure; the shares are shown in per cent.
_COLUMNS = {
    "mean_words": ("words", 1, 1),
    "empty_share": ("empty%", 1, 100),
    "distinct_2": ("dist-2", 2, 1),
    "copied_4gram_share": ("copied%", 1, 100),
    "base_perplexity": ("ppl", 2, 1),
    "kl": ("KL", 2, 1),
    "ended_share": ("ended%", 1, 100),
}


def table(fronts: Mapping[str, Front]) -> str:
    """Return the comparison as plain text, at most 120 columns for up to four rewards.

    One block per method: a line per weighting (weights, mean rewards, text measures), then hypervolume, Kendall's tau
    and spread. The base model comes first. `ppl` is the perplexity under the base, `KL` nats per sequence.

    Raises:
        ValueError: there is no front.
    """
    if not fronts:
        raise ValueError("table needs at least one front, got 0")
    first = next(iter(fronts.values()))
    width = max(6, min(10, (WIDTH - 8 * len(MEASURES) - 8) // (2 * len(first.reward_names))))
    blank = [""] * len(first.reward_names)
    lines = [
        _row(
            "",
            [f"w {name}" for name in first.reward_names] + first.reward_names,
            [h for h, _, _ in _COLUMNS.values()],
            width,
        ),
        _row("base", blank + [f"{r:.3f}" for r in first.base.rewards], _cells(first.base.measures), width),
        _row("  std", blank + [f"{s:.3f}" for s in first.base.std], [""] * len(MEASURES), width),
    ]
    for method, front in fronts.items():
        lines += ["", method]
        for weights, rewards, measures in zip(front.reward_weights, front.rewards, front.measures, strict=True):
            numbers = [f"{w:.2f}" for w in weights] + [f"{r:.3f}" for r in rewards]
            lines.append(_row("", numbers, _cells(measures), width))
        lines += textwrap.wrap(_summary(front, first), WIDTH, initial_indent="  ", subsequent_indent="    ")
    note = "no hypervolume: the base policy's rewards do not all vary, so they give no unit"
    if first.has_unit:
        point = ", ".join(f"{n} {value:.3f}" for n, value in zip(first.reward_names, first.reference()[0], strict=True))
        note = f"hypervolume in base standard deviations above the reference point base mean - 1 std ({point})"
    return "\n".join([*lines, "", *textwrap.wrap(note, WIDTH)])


def _row(label: str, numbers: Sequence[str], measures: Sequence[str], width: int) -> str:
    cells = "".join(f"{text[: width - 1]:>{width}}" for text in numbers)
    return (f"{label[:6]:<6}" + cells + " " + "".join(f"{text:>8}" for text in measures)).rstrip()


def _cells(measures: Mapping[str, float | None]) -> list[str]:
    values = ((measures.get(name), decimals, factor) for name, (_, decimals, factor) in _COLUMNS.items())
    return ["-" if value is None else f"{value * factor:.{decimals}f}" for value, decimals, factor in values]


def _summary(front: Front, first: Front) -> str:
    tau = ", ".join(f"{name} {value:.2f}" for name, value in front.kendall_tau().items())
    parts = [f"Kendall tau: {tau}", f"{front.seconds:.0f} s"]
    if first.has_unit:
        spread = ", ".join(f"{name} {value:.2f}" for name, value in _spread(front, first).items())
        parts.insert(0, f"hypervolume {front.hypervolume(*first.reference()):.3f}")
        parts.insert(2, f"ends apart (base std): {spread}")
    return " | ".join(parts)


def results(
    fronts: Mapping[str, Front], training: Mapping[str, Mapping[str, float]] | None = None, num_resamples: int = 2000
) -> dict[str, Any]:
    """Return the content of results.json: one entry per method, ready for `json.dumps(..., allow_nan=False)`.

    Each method holds `reward_names`, `reward_weights`, `rewards` (mean per weighting), `hypervolume` with
    `hypervolume_reference` and `hypervolume_unit` (those of the first method's base policy, for all methods),
    `kendall_tau` and `spread` per reward, `measures` per weighting, `base_rewards`, `base_std`, `base_measures`,
    `seconds` and `samples` of training (null where `training` does not give them), `sweep_seconds` and
    `sweep_samples` of the sweep, base policy included. From the second method on, `hypervolume_difference` is the
    first method's hypervolume minus its own with a paired bootstrap interval over prompts. Where the base policy's
    rewards do not all vary, what is counted in its standard deviations is null.

    Args:
        fronts: method name -> front.
        training: method name -> {"seconds": ..., "samples": ...} that training took.
        num_resamples: bootstrap resamples.

    Raises:
        ValueError: there is no front, or `training` names a method that has none.
    """
    if not fronts:
        raise ValueError("results needs at least one front, got 0")
    training = training or {}
    if unknown := sorted(set(training) - set(fronts)):
        raise ValueError(f"training names methods {unknown} that have no front; fronts: {sorted(fronts)}")
    first = next(iter(fronts.values()))
    content = {}
    for method, front in fronts.items():
        content[method] = _method_results(front, first, training.get(method, {}))
        if front is not first and first.has_unit:
            content[method]["hypervolume_difference"] = mean_hypervolume_difference([(first, front)], num_resamples)
    return content


def _method_results(front: Front, first: Front, training: Mapping[str, float]) -> dict[str, Any]:
    reference, unit = first.reference() if first.has_unit else (None, None)
    num_samples = len(front.samples) + len(front.base.samples)
    return {
        "reward_names": front.reward_names,
        "reward_weights": front.reward_weights.tolist(),
        "kl_weights": None if front.kl_weights is None else front.kl_weights.tolist(),
        "rewards": front.rewards.tolist(),
        "hypervolume": front.hypervolume(reference, unit) if first.has_unit else None,
        "hypervolume_reference": _by_name(front, reference),
        "hypervolume_unit": _by_name(front, unit),
        "hypervolume_note": "unit: the base policy's standard deviation; reference point: base mean - 1 of it",
        "kendall_tau": {name: None if math.isnan(tau) else tau for name, tau in front.kendall_tau().items()},
        "spread": _spread(front, first) if first.has_unit else None,
        "measures": front.measures,
        "base_rewards": _by_name(front, front.base.rewards),
        "base_std": _by_name(front, front.base.std),
        "base_measures": front.base.measures,
        "seconds": training.get("seconds"),
        "samples": training.get("samples"),
        "sweep_seconds": front.seconds,
        "sweep_samples": num_samples,
    }


def _spread(front: Front, first: Front) -> dict[str, float]:
    """Return the front's spread in the unit of the comparison, the first method's base standard deviation."""
    return replace(front, base=first.base).spread()


def _by_name(front: Front, values: np.ndarray | None) -> dict[str, float] | None:
    return None if values is None else dict(zip(front.reward_names, values.tolist(), strict=True))


def side_by_side(front: Front, num_prompts: int = 3, weightings: Sequence[Sequence[float]] | None = None) -> str:
    """Return, for some prompts, the outputs under a few weightings below each other, wrapped to 120 columns.

    Args:
        front: a front with samples.
        num_prompts: how many prompts, spread evenly over those of the sweep.
        weightings: weights [?, R], each shown by the sweep point nearest to it; None: corners and centre in between,
            for two rewards (1, 0), (.5, .5), (0, 1).
    """
    names = front.reward_names
    if weightings is None:
        corners = np.eye(len(names)).tolist()
        weightings = [corners[0], [1 / len(names)] * len(names), *corners[1:]]
    points = [int(((front.reward_weights - np.asarray(w)) ** 2).sum(1).argmin()) for w in weightings]
    total = 1 + max((sample["prompt_index"] for sample in front.samples), default=-1)
    chosen = np.unique(np.linspace(0, total - 1, min(num_prompts, total)).round().astype(int))
    first: dict[tuple[int | None, int], Mapping[str, Any]] = {}
    for sample in [*front.samples, *front.base.samples]:
        first.setdefault((sample["point"], sample["prompt_index"]), sample)
    lines = []
    for prompt in map(int, chosen):
        lines += [*_wrapped("prompt", user_text(first[(points[0], prompt)]["prompt"])), ""]
        if (None, prompt) in first:
            lines += _wrapped("base", first[(None, prompt)]["completion"])
        for point in dict.fromkeys(points):
            weights = front.reward_weights[point]
            label = " ".join(f"{name}={weight:.2g}" for name, weight in zip(names, weights, strict=True))
            lines += _wrapped(label, first[(point, prompt)]["completion"])
        lines.append("-" * 40)
    return "\n".join(lines)


def _wrapped(label: str, text: str) -> list[str]:
    body = textwrap.wrap(" ".join(text.split()), WIDTH - 4) or ["(empty)"]
    return [f"[{label}]", *(f"    {line}" for line in body)]
