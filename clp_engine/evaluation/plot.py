"""Fronts as figures: one colour and marker per method, weights beside the points, the base model marked.

Figures are drawn through matplotlib's object interface: no pyplot, no global state, no display.
Shapes: P sweep points, R rewards.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clp_engine.evaluation.front import Front
from clp_engine.extras import require

# Okabe and Ito's palette: told apart in every common form of colour blindness, and by lightness in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
_DIRECTIONS = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1.3, 0), (0, 1.3), (-1.3, 0), (0, -1.3))
_OFFSETS = tuple((x * r, y * r) for r in (9, 12, 20) for x, y in _DIRECTIONS)  # in printer's points
_NEAR = 2 * len(_DIRECTIONS)  # offsets so near that a label cannot be taken for a neighbour's
MAX_REWARDS = 4


def plot_fronts(fronts: Mapping[str, Front], path: str | Path, title: str | None = None) -> None:
    """Draw the fronts of several methods into one image file; the suffix of `path` chooses the format.

    Each method is a line through its weightings in the order of w_1 (two rewards; per KL weight), filled markers for
    the points that no other point of the same method dominates, hollow ones for the others, and thin bars of one
    standard error over prompts. The label at a point is w_1 for two rewards, all weights for more; labels that would
    overlap are left out, the ends' never. The base model is a black star. More than two rewards: one panel per pair.

    Raises:
        ValueError: no front, fronts of different rewards, fewer than two or more than four rewards, or NaN rewards.
        ImportError: matplotlib is missing.
    """
    names = _checked_names(fronts)
    pairs = list(itertools.combinations(range(len(names)), 2))
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = require("matplotlib.figure", extra="eval").Figure(
        figsize=(7.2 if len(pairs) == 1 else 5.2 * columns, 5.0 * rows), dpi=200, layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for number, panel in enumerate(panels):
        if number < len(pairs):
            _draw_panel(panel, fronts, *pairs[number])
        else:
            panel.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=12)
    figure.savefig(Path(path), facecolor="white")


def _checked_names(fronts: Mapping[str, Front]) -> list[str]:
    if not fronts:
        raise ValueError("plot_fronts needs at least one front, got 0")
    names = next(iter(fronts.values())).reward_names
    if not 2 <= len(names) <= MAX_REWARDS:
        raise ValueError(f"a front of {len(names)} rewards cannot be drawn: plots take 2 to {MAX_REWARDS} rewards")
    for method, front in fronts.items():
        if front.reward_names != names:
            raise ValueError(f"front {method!r} has rewards {front.reward_names}, the first one has {names}")
        bad = np.flatnonzero(np.isnan(front.rewards).any(1))
        if bad.size:
            raise ValueError(f"front {method!r}: points {bad.tolist()} of {len(front.rewards)} have a NaN reward")
    return names


def _draw_panel(axes: Any, fronts: Mapping[str, Front], i: int, j: int) -> None:
    first = next(iter(fronts.values()))
    labels: list[tuple[int, float, float, str, str]] = []
    for number, (method, front) in enumerate(fronts.items()):
        colour = COLOURS[number % len(COLOURS)]
        _draw_front(axes, method, front, (i, j), colour, MARKERS[number % len(MARKERS)])
        labels += _labels(front, (i, j), colour)
    base = first.base.rewards
    axes.plot(base[i], base[j], "*", color="black", markersize=13, zorder=5, linestyle="none", label="base model")
    for axis, k in ((axes.xaxis, i), (axes.yaxis, j)):
        axis.set_label_text(f"{first.reward_names[k]}, mean reward (1 base std = {first.base.std[k]:.3g})")
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.1)
    shown = f"weight of {first.reward_names[0]}" if len(first.reward_names) == 2 else "weights"
    note = f"labels: {shown}\nhollow: dominated, bars: 1 std. error"
    axes.legend(title=note, frameon=True, framealpha=0.85, edgecolor="0.8", fontsize=9, title_fontsize=7)
    _place_labels(axes, labels, _obstacles(fronts, i, j))


def _obstacles(fronts: Mapping[str, Front], i: int, j: int) -> list[tuple[np.ndarray, float]]:
    """Return what labels must not cover, as points [M, 2] in data units and half a width in printer's points."""
    base = next(iter(fronts.values())).base.rewards[[i, j]]
    obstacles = [(base[None], 7.0)]
    for front in fronts.values():
        points_P2 = front.rewards[:, [i, j]]
        obstacles.append((points_P2, 5.0))
        for line in _lines(front) if len(front.reward_names) == 2 else []:
            ends = points_P2[line]
            steps = np.linspace(0, 1, 25)[:, None, None]
            obstacles.append(((ends[:-1] + steps * (ends[1:] - ends[:-1])).reshape(-1, 2), 1.0))
    return obstacles


def _draw_front(axes: Any, method: str, front: Front, pair: tuple[int, int], colour: str, marker: str) -> None:
    x_P, y_P = front.rewards[:, pair[0]], front.rewards[:, pair[1]]
    if len(front.reward_names) == 2:
        for line in _lines(front):
            axes.plot(x_P[line], y_P[line], color=colour, linewidth=1.5, zorder=2)
    x_error, y_error = _standard_errors(front)[:, pair].T
    axes.errorbar(x_P, y_P, y_error, x_error, fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.35, zorder=1)
    kept = front.non_dominated()
    style = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 6.5, "markeredgewidth": 1.3}
    axes.plot(x_P[~kept], y_P[~kept], markerfacecolor="white", zorder=3, **style)
    axes.plot(x_P[kept], y_P[kept], zorder=4, label=method, **style)


def _lines(front: Front) -> list[list[int]]:
    """Return the points of each KL weight in the order of w_1."""
    kl = np.zeros(len(front.rewards)) if front.kl_weights is None else front.kl_weights
    order = np.argsort(front.reward_weights[:, 0], kind="stable")
    return [[int(p) for p in order if kl[p] == value] for value in np.unique(kl)]


def _standard_errors(front: Front) -> np.ndarray:
    """Return the standard error over prompts of each point's mean [P, R]; 0 where there are fewer than two."""
    sums_PNR, counts_PNR = front.prompt_totals()
    if sums_PNR.shape[1] == 0:
        return np.zeros_like(front.rewards)
    applies = counts_PNR > 0
    means_PNR = np.divide(sums_PNR, counts_PNR, out=np.zeros_like(sums_PNR), where=applies)
    count_PR = applies.sum(1)
    centre_PR = means_PNR.sum(1) / np.maximum(count_PR, 1)
    squares_PR = np.where(applies, (means_PNR - centre_PR[:, None]) ** 2, 0.0).sum(1)
    return np.sqrt(squares_PR / np.maximum((count_PR - 1) * count_PR, 1))


def _labels(front: Front, pair: tuple[int, int], colour: str) -> list[tuple[int, float, float, str, str]]:
    """Return (rank, x, y, text, colour) per point; rank 0 is an end, whose label is never left out."""
    labels = []
    for weights, rewards in zip(front.reward_weights, front.rewards, strict=True):
        shown: Sequence[float] = weights[:1] if len(weights) == 2 else weights
        text = ", ".join(f"{weight:.2g}" for weight in shown)
        rank = 0 if (weights == weights.max()).sum() == 1 and np.count_nonzero(weights) == 1 else 1
        labels.append((rank, float(rewards[pair[0]]), float(rewards[pair[1]]), text, colour))
    return labels


def _place_labels(
    axes: Any, labels: list[tuple[int, float, float, str, str]], obstacles: list[tuple[np.ndarray, float]]
) -> None:
    """Write the labels, ends first, each at the nearest offset where it covers no obstacle and no earlier label.

    A label that fits nowhere is left out, an end's label is put where it covers least.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # fixes the layout, so that display coordinates hold
    taken = [np.array(axes.get_legend().get_window_extent().extents)]
    for points, half in obstacles:
        margin = half * figure.dpi / 72
        taken += [
            np.array([x - margin, y - margin, x + margin, y + margin]) for x, y in axes.transData.transform(points)
        ]
    style = {"textcoords": "offset points", "fontsize": 8, "ha": "center", "va": "center"}
    for rank, x, y, text, colour in sorted(labels, key=lambda label: label[0]):
        note = axes.annotate(text, (x, y), xytext=(0, 0), color=colour, **style)
        scored = []
        for offset in _OFFSETS if rank == 0 else _OFFSETS[:_NEAR]:
            note.set_position(offset)
            box = np.array(note.get_window_extent().extents)
            scored.append((_overlap(box, taken) + _outside(box, figure.bbox), offset, box))
        covered, offset, box = min(scored, key=lambda choice: choice[0])
        if covered > 0 and rank > 0:
            note.remove()
            continue
        note.set_position(offset)
        taken.append(box)


def _overlap(box: np.ndarray, others: list[np.ndarray]) -> float:
    """Return the area of `box` (x0, y0, x1, y1) that the others cover, counted once per other box."""
    lower, upper = np.maximum(box[:2], np.array(others)[:, :2]), np.minimum(box[2:], np.array(others)[:, 2:])
    return float(np.prod(np.clip(upper - lower, 0, None), axis=1).sum())


def _outside(box: np.ndarray, page: Any) -> float:
    """Return the area of `box` that lies beyond the page."""
    inside = np.clip(np.minimum(box[2:], [page.x1, page.y1]) - np.maximum(box[:2], [page.x0, page.y0]), 0, None)
    return float(np.prod(box[2:] - box[:2]) - np.prod(inside))
