"""CLPTrainer: policy gradient of one conditioned model over many weightings, one backward pass for the mixed batch.

Legend: G groups (a prompt under one weighting) of n completions, B = G * n sequences, L completion tokens, R rewards.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from clp_engine import checkpoint
from clp_engine.logprobs import shares_prompts_exactly, token_logprobs
from clp_engine.model import CLPModel
from clp_engine.rewards import resolve
from clp_engine.rollout import rollout
from clp_engine.training.config import CLPTrainingConfig
from clp_engine.training.objective import (
    leave_one_out_advantages,
    regularised_returns,
    reinforce_loss,
    scalarise,
)
from clp_engine.training.optimizer import Padam
from clp_engine.training.resumption import ResumedState
from clp_engine.training.reward_statistics import RewardStatistics, measure_reference, score_rollout
from clp_engine.training.weighting_sampler import WeightingSampler
from clp_engine.weighting import reward_weights_tensor

logger = logging.getLogger(__name__)


class CLPTrainer(Trainer):
    """Train a conditioned model on (1 - alpha) w.R - alpha KL with w ~ Q per prompt.

    A step takes prompts, draws a weighting for each, samples `num_generations` completions of each (prompt, weighting)
    in one mixed batch, scores them, standardises the rewards by fixed statistics of the reference policy, and takes one
    REINFORCE step with a leave-one-out baseline (arXiv 2407.15762, section 3). Everything else (schedules, logging,
    checkpoints, accelerate) is transformers' Trainer.

    Args:
        model: a conditioned model.
        args: the configuration.
        train_dataset: rows with a `prompt` (string or messages); optional `reward_weights` (a dict or list) overrides
            the sampler for its row; other columns reach the reward functions.
        eval_dataset: rows of the same form, for `evaluate`.
        processing_class: the tokenizer; None loads it from the model's name or path.
        reward_funcs: dict name -> function, or a list matched to the config's rewards by `__name__`.
        callbacks: transformers callbacks.
        reward_statistics: fixed statistics; None measures them on the reference policy when training starts, or takes
            those of the checkpoint that it resumes from.

    Raises:
        TypeError: the model is not conditioned.
        ValueError: an empty data set, rows without prompts, rewards that do not fit, an optimizer beside `adam_power`.
    """

    model: Any
    args: CLPTrainingConfig

    def __init__(
        self,
        model: Any,
        args: CLPTrainingConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_funcs: Mapping[str, Any] | Sequence[Any] = (),
        callbacks: list[TrainerCallback] | None = None,
        reward_statistics: RewardStatistics | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, CLPModel):
            raise TypeError(
                f"CLPTrainer trains a conditioned model, got {type(model).__name__}: call get_clp_model first"
            )
        if model.clp_config.folded is not None:
            raise ValueError(
                f"copy {model.clp_config.folded!r} is folded into this model's base: train the model it was folded from"
            )
        self.reward_names = list(model.clp_config.rewards)
        self.reward_funcs = resolve(reward_funcs, self.reward_names)
        for field, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                _check_dataset(dataset, field)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)  # type: ignore[attr-defined]
        self.reward_statistics = reward_statistics
        if args.adam_power != 0.5:
            if kwargs.get("optimizers", (None, None))[0] or kwargs.get("optimizer_cls_and_kwargs"):
                raise ValueError(f"adam_power is {args.adam_power}, but an optimizer was given: leave one of them out")
            betas = (args.adam_beta1, args.adam_beta2)
            padam = {"lr": args.learning_rate, "betas": betas, "power": args.adam_power}
            kwargs["optimizer_cls_and_kwargs"] = (Padam, padam)
        self._metrics: dict[str, list[float]] = defaultdict(list)
        super().__init__(
            model=model,  # type: ignore[arg-type]
            args=args,
            data_collator=_rows_as_they_are,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        self.loss_is_scaled_for_ga = False
        seed = args.seed + 1_000_003 * args.process_index  # every process draws its own weightings
        self._sampler = WeightingSampler(
            args.weighting_sampler, len(self.reward_names), args.dirichlet_concentration, seed
        )
        self._share_prompts = shares_prompts_exactly(model)
        if args.kl_weight != model.clp_config.min_kl_weight:
            logger.warning(
                "training at kl_weight %g while the config's min_kl_weight is %g: later calls with a kl_weight take "
                "the trained policy to be the latter's; set them equal to steer the KL weight too",
                args.kl_weight,
                model.clp_config.min_kl_weight,
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; the reference statistics are measured first where none were given.

        Raises:
            FileExistsError: output_dir holds another run and this is no resume.
            FileNotFoundError: there is no such checkpoint.
            ValueError: its clp_trainer_state.json is damaged.
        """
        if resume_from_checkpoint:
            self._resume(resume_from_checkpoint)
        else:
            check_output_dir(self.args.output_dir or ".")
        if self.reward_statistics is None:
            self.reward_statistics = self.measure_reference()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _resume(self, resume_from_checkpoint: str | bool) -> None:
        """Take over what the checkpoint says of the weightings drawn and of the rewards' statistics."""
        latest = resume_from_checkpoint is True
        found = get_last_checkpoint(self.args.output_dir) if latest else str(resume_from_checkpoint)
        if found is None or not (folder := Path(found)).is_dir():
            place = f"no checkpoint in {self.args.output_dir}" if latest else "no such folder"
            raise FileNotFoundError(f"resume_from_checkpoint={resume_from_checkpoint!r}: {place}")
        if state := ResumedState.read(folder, self.reward_names, self.args):
            self._sampler.resume(state.weighting_sampler)
            self.reward_statistics = self.reward_statistics or state.reward_statistics

    def measure_reference(self) -> RewardStatistics:
        """Mean and deviation of each reward over `num_reference_samples` completions of the reference policy."""
        return measure_reference(
            self.model,
            self.processing_class,
            _take(self.train_dataset, self.args.num_reference_samples),
            self.reward_funcs,
            num_samples=self.args.num_reference_samples,
            batch_size=self.args.per_device_train_batch_size,
            max_prompt_length=self.args.max_prompt_length,
            max_completion_length=self.args.max_completion_length,
            temperature=self.args.temperature,
        )

    def get_train_dataloader(self) -> Any:
        """Batches of prompts: a step's completions over `num_generations`."""
        return self._get_dataloader(
            dataset=self.train_dataset,  # type: ignore[arg-type]
            description="Training",
            batch_size=self._train_batch_size // self.args.num_generations,
            sampler_fn=self._get_train_sampler,  # type: ignore[arg-type]
            is_training=True,
        )

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """Turn a batch of data set rows into scored completions with advantages."""
        rows, n = inputs, self.args.num_generations
        model = self.accelerator.unwrap_model(self.model)
        w_GR = self._weightings(rows)
        completions = rollout(
            model,
            self.processing_class,
            [row["prompt"] for row in rows],
            reward_weights=w_GR,
            num_generations=n,
            max_new_tokens=self.args.max_completion_length,
            max_prompt_length=self.args.max_prompt_length,
            do_sample=True,
            temperature=self.args.temperature,
        )
        rewards_BR = torch.from_numpy(score_rollout(self.reward_funcs, rows, completions))
        if self.reward_statistics is None:
            raise RuntimeError("reward_statistics is None: call train(), or set trainer.reward_statistics first")
        standard_BR = self.reward_statistics.standardise(rewards_BR)
        scalar_B = scalarise(w_GR.repeat_interleave(n, dim=0), standard_BR).to(model.device)
        prepared = {
            "rollout": completions,
            "coefficients_GK": model.coefficients(len(rows), w_GR).to(model.device),
            "scalar_B": scalar_B,
            "reference_BL": self._reference_logprobs(model, completions),
        }
        self._record(rewards_BR, w_GR, completions, scalar_B)
        return prepared

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One differentiated forward of the whole mixed batch; the KL penalty enters through the return."""
        if return_outputs:
            raise NotImplementedError("CLPTrainer has no outputs to return: use evaluate() or clp_engine.evaluation")
        completions = inputs["rollout"]
        logprobs_BL = self._logprobs(model, completions, inputs["coefficients_GK"])
        kl_BL = logprobs_BL.detach() - inputs["reference_BL"]
        returns_BL = regularised_returns(inputs["scalar_B"], kl_BL, self.args.kl_weight)
        mask_BL = completions.completion_mask_BL
        advantages_BL = leave_one_out_advantages(returns_BL, completions.num_generations, mask_BL)
        self._metrics["kl"].append(kl_BL.sum(dim=1).mean().item())
        self._metrics["objective"].append(returns_BL[:, 0].nanmean().item())
        return reinforce_loss(logprobs_BL, advantages_BL)

    @torch.no_grad()
    def _reference_logprobs(self, model: Any, completions: Any) -> torch.Tensor:
        """Log-probabilities under the reference: the same model with zero coefficients, in a batch of its own."""
        groups = len(completions.texts) // completions.num_generations
        zeros_GK = torch.zeros(groups, model.clp_config.num_coefficients)
        return self._logprobs(model, completions, zeros_GK)

    def _logprobs(self, model: Any, completions: Any, coefficients_GK: torch.Tensor) -> torch.Tensor:
        return token_logprobs(
            model,
            completions,
            coefficients_GK,
            temperature=self.args.temperature,
            share_prompts=self._share_prompts,
        )

    def _weightings(self, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        w_GR = self._sampler.sample(len(rows))
        for i, row in enumerate(rows):
            if row.get("reward_weights") is not None:
                domain = self.model.clp_config.weight_domain
                w_GR[i] = reward_weights_tensor(row["reward_weights"], self.reward_names, 1, domain)[0]
        return w_GR

    def _record(self, rewards_BR: torch.Tensor, w_GR: torch.Tensor, completions: Any, scalar_B: torch.Tensor) -> None:
        """Collect the step's metrics, under TRL's names."""
        lengths = completions.completion_mask_BL.sum(dim=1).float()
        groups = scalar_B.view(-1, completions.num_generations)
        values = {
            "reward": scalar_B.nanmean(),
            "reward_std": groups.std(dim=1).nanmean(),
            "frac_reward_zero_std": (groups.std(dim=1) < 1e-8).float().mean(),
            "completions/mean_length": lengths.mean(),
            "completions/clipped_ratio": 1 - completions.ended_B.float().mean(),
        }
        for r, name in enumerate(self.reward_names):
            values[f"rewards/{name}/mean"] = rewards_BR[:, r].nanmean()
            values[f"rewards/{name}/std"] = rewards_BR[:, r][~rewards_BR[:, r].isnan()].std()
            values[f"weighting/{name}/mean"] = w_GR[:, r].mean()
        for key, value in values.items():
            self._metrics[key].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log transformers' values and the means of the metrics collected since the last call."""
        means = {key: sum(values) / len(values) for key, values in self._metrics.items()}
        self._metrics.clear()
        super().log({**logs, **means}, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero: a batch of prompts does not tell how much will be generated."""
        return 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_copies(self.model if model is None else model, Path(resume_from_checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.reward_statistics is not None:
            ResumedState(self._sampler.state(), self.reward_statistics).write(Path(output_dir), self.args)

    def _load_best_model(self) -> None:
        checkpoint.load_copies(self.model, Path(str(self.state.best_model_checkpoint)))


def check_output_dir(output_dir: str | Path) -> None:
    """Refuse an output folder that holds another run.

    Raises:
        FileExistsError: with the remedy.
    """
    folder = Path(output_dir)
    held = [folder / checkpoint.CONFIG_FILE, *folder.glob("checkpoint-*")] if folder.is_dir() else []
    if held := [entry for entry in held if entry.exists()]:
        raise FileExistsError(
            f"output_dir {folder} holds another run ({held[0].name}): choose another folder, remove it, or continue it "
            "with resume_from_checkpoint"
        )


def _check_dataset(dataset: Any, field: str) -> None:
    if hasattr(dataset, "__len__"):
        if len(dataset) == 0:
            raise ValueError(f"{field} is empty: it needs at least one row with a 'prompt'")
        if "prompt" not in dataset[0]:
            raise ValueError(f"{field} rows have the columns {sorted(dataset[0])}: a 'prompt' column is needed")


def _take(dataset: Any, count: int) -> list[Any]:
    return [dataset[i] for i in range(min(count, len(dataset)))]


def _rows_as_they_are(rows: list[Any]) -> Any:
    return rows
