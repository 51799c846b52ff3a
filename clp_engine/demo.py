"""The main job on embedded defaults: one steerable model and Rewarded Soups beside it, swept and compared.

SmolLM2-135M-Instruct says docstrings of the Python installation in fewer words, under two rewards in conflict:
`closeness` (keep the meaning of the text, in other words) and `brevity` (say it in few words).
"""

from __future__ import annotations

import json
import logging
import platform
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import clp_engine as clp
from clp_engine.data.docstrings import PROMPT_TEMPLATE, load_docstring_pairs
from clp_engine.data.smollm2 import ensure_smollm2
from clp_engine.evaluation import BasePolicy, Front, plot_fronts, results, side_by_side, sweep, table
from clp_engine.rewards import Brevity, Closeness
from clp_engine.training import CLPTrainer, CLPTrainingConfig, RewardStatistics

logger = logging.getLogger(__name__)

REWARDS = ["closeness", "brevity"]
SAMPLERS = {"clp": "dirichlet", "rewarded_soups": "corners"}
GRID = 11
OUTPUTS = ("model", "front.png", "results.json", "report.txt")


@dataclass(frozen=True)
class DemoSettings:
    """What the demo trains and evaluates with; both methods get the same.

    Attributes:
        max_steps: training steps of each method.
        prompts_per_step: prompts of a step, each under its own weighting.
        num_generations: completions per (prompt, weighting): they share the prompt's work, and the others are the
            baseline of each.
        max_completion_length: tokens of a completion at most.
        learning_rate: at its highest; it falls linearly to 0, so that the last steps settle.
        adam_power: of the optimizer's second moment. AdamW (0.5) moves every difference alike, and most gradients of so
            few samples are noise.
        warmup_steps: steps in which it rises from 0. The first step is as long whatever its gradient's noise; here the
            first gradients are gathered before anything moves.
        kl_weight: alpha of the objective.
        dirichlet_concentration: of CLP's weightings.
        num_reference_samples: completions of the base policy that standardise the rewards.
        num_prompts: held-out prompts of the sweeps.
        max_source_words: longer texts are left out; prompts are most of the time on a small machine.
        sweep_batch_size: completions of a sweep's batch.
    """

    max_steps: int = 20
    prompts_per_step: int = 6
    num_generations: int = 6
    max_completion_length: int = 24
    learning_rate: float = 1.8e-4
    adam_power: float = 0.25
    warmup_steps: int = 2
    kl_weight: float = 0.12
    dirichlet_concentration: float = 0.5
    num_reference_samples: int = 64
    num_prompts: int = 48
    max_source_words: int = 24
    sweep_batch_size: int = 88


class StageClock:
    """Wall-clock seconds of each named stage of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's seconds to the stage `name` and say that it started."""
        print(f"[demo] {name} ...", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def main(
    output_dir: str | Path = "runs/demo",
    seed: int = 0,
    max_steps: int | None = None,
    num_prompts: int | None = None,
) -> dict[str, Any]:
    """Run the demo and write front.png, results.json, samples and the steerable model to `output_dir`.

    Args:
        output_dir: a new folder, or one that an earlier demo filled (its files are replaced).
        seed: of training and sampling; the prompts are the same for every seed.
        max_steps: training steps of each method instead of the default.
        num_prompts: held-out prompts instead of the default.

    Returns:
        The content of results.json.

    Raises:
        FileExistsError: the folder holds something else.
        FileNotFoundError: the embedded model is not installed; the message names the command.
    """
    overrides = {"max_steps": max_steps, "num_prompts": num_prompts}
    settings = DemoSettings(**{name: value for name, value in overrides.items() if value is not None})
    folder = _fresh_folder(Path(output_dir))
    clock = StageClock()
    with clock.stage("data and model"):
        base = ensure_smollm2()
        train_rows = _short_rows("train", settings.max_steps * settings.prompts_per_step, settings)
        test_rows = _short_rows("test", settings.num_prompts, settings)
        reward_funcs = {"closeness": Closeness(), "brevity": Brevity()}
    statistics: RewardStatistics | None = None
    fronts: dict[str, Front] = {}
    training: dict[str, dict[str, float]] = {}
    for method, sampler in SAMPLERS.items():
        trainer = _trainer(base, folder / method, sampler, settings, seed, train_rows, reward_funcs, statistics)
        if statistics is None:
            with clock.stage("reference statistics"), torch.random.fork_rng():
                torch.manual_seed(0)  # of the reference policy alone: seeds must not differ by the rewards' scales
                statistics = trainer.reward_statistics = trainer.measure_reference()
        with clock.stage(f"train {method}"):
            trainer.train()
        samples = settings.max_steps * settings.prompts_per_step * settings.num_generations
        training[method] = {"seconds": clock.seconds[f"train {method}"], "samples": samples}
        with clock.stage(f"sweep {method}"):
            base_policy = fronts["clp"].base if fronts else None
            fronts[method] = _sweep(trainer, test_rows, reward_funcs, settings, seed, base_policy)
        if method == "clp":
            trainer.save_model(str(folder / "model"))
    with clock.stage("report"):
        report = _write_report(folder, fronts, training, clock, settings, seed)
    print(f"\n[demo] {sum(clock.seconds.values()):.0f} s in all; everything is in {folder}")
    steer = f'clp generate {folder / "model"} --prompt "some text" --weights closeness=.7 brevity=.3'
    print(f"[demo] steer the model: {steer}")
    return report


def _short_rows(split: Literal["train", "test"], count: int, settings: DemoSettings) -> list[dict[str, Any]]:
    """The first `count` rows of a split whose text is short, looked for among four times as many."""
    rows = load_docstring_pairs(split, limit=None if split == "test" else 4 * count, min_pairs=count)
    short = [row for row in rows if len(row["source"].split()) <= settings.max_source_words][:count]
    if len(short) < count:
        raise ValueError(
            f"{len(short)} {split} texts of at most {settings.max_source_words} words found among {len(rows)}, "
            f"{count} needed: ask for fewer with --num_prompts or --max_steps"
        )
    return short


def _trainer(
    base: Path,
    folder: Path,
    sampler: str,
    settings: DemoSettings,
    seed: int,
    rows: Sequence[Any],
    reward_funcs: dict[str, Any],
    statistics: RewardStatistics | None,
) -> CLPTrainer:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = clp.CLPConfig(rewards=REWARDS, min_kl_weight=settings.kl_weight)
    model = clp.get_clp_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.prompt_template = PROMPT_TEMPLATE
    args = CLPTrainingConfig(
        output_dir=str(folder),
        seed=seed,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.prompts_per_step * settings.num_generations,
        num_generations=settings.num_generations,
        max_completion_length=settings.max_completion_length,
        learning_rate=settings.learning_rate,
        adam_power=settings.adam_power,
        lr_scheduler_type="linear",
        warmup_steps=min(settings.warmup_steps, settings.max_steps - 1),
        kl_weight=settings.kl_weight,
        weighting_sampler=sampler,
        dirichlet_concentration=settings.dirichlet_concentration,
        num_reference_samples=settings.num_reference_samples,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    return CLPTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        reward_funcs=reward_funcs,
        reward_statistics=statistics,
    )


def _sweep(
    trainer: CLPTrainer,
    rows: Sequence[Any],
    reward_funcs: dict[str, Any],
    settings: DemoSettings,
    seed: int,
    base_policy: BasePolicy | None,
) -> Front:
    return sweep(
        trainer.model,
        rows,
        reward_funcs,
        processing_class=trainer.processing_class,
        grid=GRID,
        max_completion_length=settings.max_completion_length,
        batch_size=settings.sweep_batch_size,
        seed=seed,
        base=base_policy,
    )


def _write_report(
    folder: Path,
    fronts: dict[str, Front],
    training: dict[str, dict[str, float]],
    clock: StageClock,
    settings: DemoSettings,
    seed: int,
) -> dict[str, Any]:
    plot_fronts(fronts, folder / "front.png", title="SmolLM2-135M-Instruct, docstrings in fewer words")
    for method, front in fronts.items():
        (folder / f"front_{method}.json").write_text(front.to_json())
    text = f"{table(fronts)}\n\n{side_by_side(fronts['clp'])}\n"
    (folder / "report.txt").write_text(text)
    print(f"\n{text}")
    report = {
        **results(fronts, training),
        "seed": seed,
        "settings": vars(settings),
        "stage_seconds": {name: round(seconds, 1) for name, seconds in clock.seconds.items()},
        "environment": _environment(),
    }
    (folder / "results.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return report


def _environment() -> dict[str, Any]:
    import transformers

    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),  # Linux counts in kB
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _fresh_folder(folder: Path) -> Path:
    """The output folder, emptied of an earlier demo's files.

    Raises:
        FileExistsError: it holds something that no demo wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {*SAMPLERS, *(f"front_{method}.json" for method in SAMPLERS), *OUTPUTS}
    if foreign := sorted(entry.name for entry in folder.iterdir() if entry.name not in own):
        raise FileExistsError(f"{folder} holds {foreign[0]}, which no demo wrote: choose another --output_dir")
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return folder
