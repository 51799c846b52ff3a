"""A sweep: one policy under a grid of weightings on the same prompts, every batch mixing weightings.

Shapes: P sweep points, R rewards, N prompts, G groups of n completions (a prompt under a weighting).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clp_engine.evaluation.base_scoring import score_against_base
from clp_engine.evaluation.front import BasePolicy, Front, mean_rewards, std_rewards
from clp_engine.evaluation.plot import MAX_REWARDS
from clp_engine.evaluation.points import BASE_POINT, SweepPoints, sweep_points
from clp_engine.evaluation.text_measures import point_measures, text_record
from clp_engine.rewards import resolve, score
from clp_engine.rollout import Rollout, as_completion, encode_prompts, rollout

_NOT_FOR_REWARDS = ("prompt", "reward_weights", "kl_weight")


def sweep(
    model: Any,
    eval_ds: Iterable[Mapping[str, Any]],
    reward_funcs: Mapping[str, Callable[..., Any]] | Sequence[Callable[..., Any]],
    processing_class: Any = None,
    grid: int | npt.ArrayLike = 11,
    kl_weights: float | Sequence[float] | None = None,
    num_generations: int = 1,
    max_completion_length: int = 64,
    batch_size: int = 32,
    do_sample: bool = False,
    seed: int = 0,
    measures: bool = True,
    max_prompt_length: int | None = None,
    progress: bool = True,
    base: BasePolicy | None = None,
) -> Front:
    """Generate under every weighting of a grid, score the completions, and return the front.

    The work list is prompts x points, the reference policy being one more point, sorted by prompt length and cut into
    batches, so that a batch holds the same few prompts under all weightings.

    Args:
        model: a text policy: `clp_config.rewards`, `clp_config.min_kl_weight` and `generate` with `reward_weights` and
            `kl_weight`, as `CLPModel` and the baselines have. Its train or eval mode is left as it was.
        eval_ds: rows (a list of dicts or a `datasets.Dataset`) with a `prompt`, a string or messages; other columns
            reach the rewards.
        reward_funcs: name -> function, or a list matched to `clp_config.rewards` by `__name__`.
        processing_class: the tokenizer; None loads it from the model's name or path.
        grid: number of points (`sweep_grid`), or the weights themselves [P, R].
        kl_weights: None for the trained policy; a number for all points; several: the grid is taken at each of them.
        num_generations: n, completions per prompt and point; above 1 needs `do_sample`.
        max_completion_length: tokens per completion at most.
        batch_size: completions per batch.
        do_sample: True samples at temperature 1, False decodes greedily.
        seed: of the sampling; the global random state is left as it was.
        measures: True also takes log-probabilities and KL, which needs the model to be callable.
        max_prompt_length: keep the last tokens of longer prompts.
        progress: show a progress bar.
        base: the reference policy's part of an earlier sweep over the same prompts, instead of running it again.

    Raises:
        ValueError: an empty data set, a row without a prompt, weights or sizes out of range, reward functions that do
            not fit the policy's rewards: all before anything is generated; and what the reward functions' results
            raise in `clp_engine.rewards.score`.
    """
    started = time.perf_counter()
    rows, names = _checked_rows(eval_ds), list(model.clp_config.rewards)
    funcs = resolve(reward_funcs, names)
    points = sweep_points(model.clp_config, grid, kl_weights)
    _check_sizes(num_generations, max_completion_length, batch_size, do_sample)
    processing_class = processing_class if processing_class is not None else _load_tokenizer(model)
    options: dict[str, Any] = {
        "max_new_tokens": max_completion_length,
        "max_prompt_length": max_prompt_length,
        "num_generations": num_generations,
        "do_sample": do_sample,
        "return_logits": measures and callable(model),
    }
    prompts = [row["prompt"] for row in rows]
    _check_base(base, prompts, names)
    swept = [*([BASE_POINT] if base is None else []), *range(len(points.weights_PR))]
    jobs = _work_list(encode_prompts(processing_class, prompts, max_prompt_length)[1], swept)
    size = max(1, batch_size // num_generations)
    records: list[dict[str, Any]] = []
    bar = _progress_bar(len(jobs) * num_generations, progress)
    with bar, _evaluating(model), _seeded(model, seed):
        for start in range(0, len(jobs), size):
            # Rows of one weighting side by side: the kernels take them as they lie instead of gathering them.
            batch = sorted(jobs[start : start + size], key=lambda job: job[1])
            weights_GR, kl_G = points.batch([point for _, point in batch])
            asked = [prompts[i] for i, _ in batch]
            out = rollout(model, processing_class, asked, reward_weights=weights_GR, kl_weight=kl_G, **options)
            records += _records(model, out, batch, prompts, points)
            bar.update(len(out.texts))
    _add_rewards(records, rows, funcs)
    return _front(records, points, base, time.perf_counter() - started)


def _work_list(prompt_mask_NP: torch.Tensor, points: Sequence[int]) -> list[tuple[int, int]]:
    """Return (prompt, point) for every prompt under every point, by prompt length."""
    by_length = prompt_mask_NP.sum(dim=1).argsort(stable=True).tolist()
    return [(i, point) for i in by_length for point in points]


def _check_base(base: BasePolicy | None, prompts: Sequence[Any], names: Sequence[str]) -> None:
    if base is None:
        return
    seen = {sample["prompt_index"]: sample["prompt"] for sample in base.samples}
    if seen != dict(enumerate(prompts)):
        raise ValueError(
            f"base holds the reference policy's answers to {len(seen)} prompts, eval_ds has {len(prompts)} and they "
            "are not the same: leave base out to run the reference policy on these"
        )
    if any(set(sample["rewards"]) != set(names) for sample in base.samples):
        raise ValueError(f"base was scored by other rewards than {list(names)}: leave it out")


def _checked_rows(eval_ds: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    rows = list(eval_ds)
    if not rows:
        raise ValueError("eval_ds is empty: a sweep needs at least one row with a prompt")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"eval_ds row {i} is a {type(row).__name__}: rows are dicts with a 'prompt'")
        if not row.get("prompt"):
            raise ValueError(f"eval_ds row {i} has no prompt; its columns are {sorted(row)}")
        if set(row) != set(rows[0]):
            raise ValueError(f"eval_ds row {i} has columns {sorted(row)}, row 0 has {sorted(rows[0])}")
    return rows


def _check_sizes(num_generations: int, max_completion_length: int, batch_size: int, do_sample: bool) -> None:
    sizes = {
        "num_generations": num_generations,
        "max_completion_length": max_completion_length,
        "batch_size": batch_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, it must be at least 1")
    if num_generations > 1 and not do_sample:
        raise ValueError(f"num_generations is {num_generations} with greedy decoding, which repeats one completion: "
                         "pass do_sample=True")  # fmt: skip


def _load_tokenizer(model: Any) -> Any:
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise ValueError("processing_class is None and the model has no name or path to load it from: pass a tokenizer")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"processing_class is None and {name!r} holds no tokenizer: pass one") from error


def _progress_bar(total: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="sweep", unit="completion", disable=not progress)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Put the model in eval mode within the block, then every module back in its own."""
    modules = [m for m in model.modules() if m.training] if isinstance(model, torch.nn.Module) else []
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextmanager
def _seeded(model: Any, seed: int) -> Iterator[None]:
    device = torch.device(getattr(model, "device", "cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _records(
    model: Any, out: Rollout, batch: Sequence[tuple[int, int]], prompts: Sequence[Any], points: SweepPoints
) -> list[dict[str, Any]]:
    """Return one sample record per completion, rewards still missing."""
    scores = score_against_base(model, out) if out.policy_logits_BLV is not None else None
    ids, ended = out.completion_id_lists(), out.ended_B.tolist()
    records = []
    for row, text in enumerate(out.texts):
        prompt_index, point = batch[row // out.num_generations]
        is_base = point == BASE_POINT
        weights = None if is_base else dict(zip(points.names, points.weights_PR[point].tolist(), strict=True))
        records.append({
            "point": None if is_base else point,
            "prompt_index": prompt_index,
            "prompt": prompts[prompt_index],
            "reward_weights": weights,
            "kl_weight": None if points.kl_P is None and not is_base else points.kl(point),
            "completion": text,
            "completion_ids": ids[row],
            "num_tokens": len(ids[row]),
            "ended": bool(ended[row]),
            "policy_logprob": None if scores is None else float(scores.policy_logprob_B[row]),
            "base_logprob": None if scores is None else float(scores.base_logprob_B[row]),
            "kl": None if scores is None else float(scores.kl_B[row]),
            **text_record(text, prompts[prompt_index]),
        })  # fmt: skip
    return records


def _add_rewards(
    records: list[dict[str, Any]], rows: Sequence[Mapping[str, Any]], funcs: Mapping[str, Callable[..., Any]]
) -> None:
    """Score all completions in one call per reward function, in an order that no batch size changes."""
    records.sort(key=lambda r: (-1 if r["point"] is None else r["point"], r["prompt_index"]))
    sources = [rows[r["prompt_index"]] for r in records]
    columns = {name: [row[name] for row in sources] for name in rows[0] if name not in _NOT_FOR_REWARDS}
    completions = [as_completion(r["prompt"], r["completion"]) for r in records]
    ids = [r.pop("completion_ids") for r in records]
    rewards_BR = score(funcs, [r["prompt"] for r in records], completions, ids, columns)
    for record, values in zip(records, rewards_BR.tolist(), strict=True):
        record["rewards"] = {n: None if np.isnan(v) else v for n, v in zip(funcs, values, strict=True)}


def _front(records: Sequence[dict[str, Any]], points: SweepPoints, base: BasePolicy | None, seconds: float) -> Front:
    names = points.names
    samples = [record for record in records if record["point"] is not None]
    base_samples = [record for record in records if record["point"] is None]
    if base is None:
        base = BasePolicy(
            mean_rewards(base_samples, names),
            std_rewards(base_samples, names),
            base_samples,
            point_measures(base_samples),
        )
    groups: list[list[dict[str, Any]]] = [[] for _ in points.weights_PR]
    for sample in samples:
        groups[sample["point"]].append(sample)
    return Front(
        reward_names=names,
        reward_weights=points.weights_PR,
        kl_weights=points.kl_P,
        rewards=np.stack([mean_rewards(group, names) for group in groups]),
        samples=samples,
        measures=[point_measures(group) for group in groups],
        base=base,
        seconds=seconds,
    )


def write(front: Front, path: str | Path) -> list[Path]:
    """Write `front.json` and, for two to four rewards, `front.png` into the folder `path`, made where missing.

    Returns:
        The files written. Each appears whole or not at all.

    Raises:
        ImportError: matplotlib is missing; `front.json` is there by then.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "front.json"]
    partial = folder / ".front.json.partial"
    partial.write_text(front.to_json(), encoding="utf-8")
    os.replace(partial, written[0])
    if 2 <= len(front.reward_names) <= MAX_REWARDS and not np.isnan(front.rewards).any():
        drawing = folder / ".front.partial.png"
        front.plot(drawing)
        os.replace(drawing, folder / "front.png")
        written.append(folder / "front.png")
    return written
