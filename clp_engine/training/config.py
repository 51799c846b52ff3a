"""CLPTrainingConfig: transformers' TrainingArguments and what the conditional policy gradient adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from clp_engine.training.weighting_sampler import SAMPLERS


@dataclass
class CLPTrainingConfig(TrainingArguments):
    """Arguments of `CLPTrainer`; everything of transformers' TrainingArguments, with TRL's names for what TRL has.

    `per_device_train_batch_size` counts completions, as in TRL: it is the number of prompts of a step times
    `num_generations`. Defaults that differ from TrainingArguments: `learning_rate` 1e-4, `per_device_train_batch_size`
    16, `lr_scheduler_type` "constant", `logging_steps` 1, `remove_unused_columns` False, and `max_grad_norm` 0 (no
    clipping: a joint clip would let one reward's copy scale another's gradient, and Adam normalises each anyway).

    Raises:
        ValueError: a field out of range, with the values and the remedy.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Completions per device and step: prompts times num_generations."}
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate schedule."})
    logging_steps: float = field(default=1, metadata={"help": "Log every this many steps."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 switches it off."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep False: the reward functions read the data set's other columns."}
    )
    num_generations: int = field(
        default=4, metadata={"help": "Completions per (prompt, weighting); the leave-one-out baseline needs 2 or more."}
    )
    max_prompt_length: int | None = field(default=512, metadata={"help": "Keep the last tokens of longer prompts."})
    max_completion_length: int = field(default=64, metadata={"help": "New tokens of a completion at most."})
    temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature of the trained policy, softmax(logits / temperature): samples, log-probs, KL."},
    )
    adam_power: float = field(
        default=0.5,
        metadata={
            "help": "Power of Adam's second moment: 0.5 is AdamW; less is Padam: noisy entries move less, no epsilon."
        },
    )
    kl_weight: float = field(
        default=0.01, metadata={"help": "alpha of the objective (1 - alpha) w.R - alpha KL, in [0, 1)."}
    )
    weighting_sampler: str = field(
        default="dirichlet",
        metadata={
            "help": f"Where a prompt's weighting comes from: {' or '.join(SAMPLERS)} (corners is Rewarded Soups)."
        },
    )
    dirichlet_concentration: float = field(
        default=0.5, metadata={"help": "Concentration of the Dirichlet sampler: 1 is uniform, less favours corners."}
    )
    num_reference_samples: int = field(
        default=64, metadata={"help": "Completions of the reference policy that fix each reward's mean and deviation."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2:
            raise ValueError(f"num_generations is {self.num_generations}: the leave-one-out baseline needs at least 2")
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size {self.per_device_train_batch_size} counts completions and must be a "
                f"multiple of num_generations {self.num_generations}"
            )
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length is {self.max_completion_length}, it must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, it must be positive")
        if not 0 <= self.adam_power <= 0.5:
            raise ValueError(f"adam_power is {self.adam_power}, it must lie in [0, 0.5]: 0.5 is AdamW")
        optim = str(getattr(self.optim, "value", self.optim))
        if self.adam_power != 0.5 and not optim.startswith("adamw_torch"):
            raise ValueError(f"adam_power is {self.adam_power}, but optim {optim} is not AdamW: leave one of them out")
        if not 0 <= self.kl_weight < 1:
            raise ValueError(f"kl_weight is {self.kl_weight}, it must lie in [0, 1)")
        if self.weighting_sampler not in SAMPLERS:
            raise ValueError(f"weighting_sampler is {self.weighting_sampler!r}, expected one of {sorted(SAMPLERS)}")
        if self.dirichlet_concentration <= 0:
            raise ValueError(f"dirichlet_concentration is {self.dirichlet_concentration}, it must be positive")
        if self.num_reference_samples < 2:
            raise ValueError(f"num_reference_samples is {self.num_reference_samples}: a deviation needs at least 2")
