"""`clp train`: condition a causal language model on rewards and train it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clp_engine.cli import arguments, loading

if TYPE_CHECKING:
    from clp_engine.config import CLPConfig
    from clp_engine.training import CLPTrainingConfig

_DESCRIPTION = """Train one model to follow any weighting of its rewards.

examples:
  clp train --model_name_or_path smollm2 --dataset_name docstrings --reward_funcs closeness brevity \\
      --max_steps 24 --output_dir runs/mine
  clp train --model_name_or_path PATH --dataset_name prompts.jsonl --reward_funcs my_rewards:politeness brevity \\
      --kl_weight .05 --output_dir runs/mine
  clp train --config train.yaml --learning_rate 5e-5

A reward is a built-in name or module:function with TRL's signature. Flags have TRL's names where TRL has them."""

# The flags of transformers.TrainingArguments that --help lists; --help_all lists every one.
_COMMON = (
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "max_grad_norm",
    "bf16",
    "use_cpu",
    "seed",
    "logging_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "report_to",
    "run_name",
    "resume_from_checkpoint",
)


def run(argv: Sequence[str]) -> None:
    """Parse `argv`, train, and save the model and its tokenizer to `--output_dir`."""
    options = arguments.parse(_parser(show_all="--help_all" in argv), argv)
    # What is cheap to check comes first: rewards, configuration and rows before the model and any training.
    reward_funcs = loading.load_reward_funcs(options.reward_funcs)
    training = _training_config(options)
    if options.min_kl_weight is None and training.kl_weight > 0:
        options.min_kl_weight = training.kl_weight  # the trained policy then answers to its own KL weight
    config = _clp_config(options, list(reward_funcs))
    from clp_engine.data import load_dataset_rows, prompt_template
    from clp_engine.model import get_clp_model
    from clp_engine.training import CLPTrainer
    from clp_engine.training.trainer import check_output_dir

    if not training.resume_from_checkpoint:
        check_output_dir(options.output_dir)
    rows = load_dataset_rows(options.dataset_name, options.dataset_train_split)
    model, tokenizer = loading.load_base_model(options.model_name_or_path, options.dtype)
    model = get_clp_model(model, config)
    model.prompt_template = prompt_template(options.dataset_name)
    model.print_trainable_parameters()
    trainer = CLPTrainer(
        model=model, args=training, train_dataset=rows, processing_class=tokenizer, reward_funcs=reward_funcs
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    print(f"saved to {training.output_dir}")


def _parser(show_all: bool) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser, TrainingArguments

    from clp_engine.training import CLPTrainingConfig

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(CLPTrainingConfig)} - inherited
    parser = HfArgumentParser(
        (),
        prog="clp train",
        usage="clp train --model_name_or_path MODEL --dataset_name DATA --reward_funcs REWARD ... --output_dir DIR ...",
        description=_DESCRIPTION,
        formatter_class=arguments.HelpFormatter,
        allow_abbrev=False,
    )
    arguments.add_config_flag(parser)
    parser.add_argument("--help_all", action="store_true", help="this help with every flag of TrainingArguments")
    _add_data_flags(parser)
    _add_conditioning_flags(parser)
    groups: Any = (
        arguments.dataclass_group(CLPTrainingConfig, own, "conditional policy gradient (CLPTrainingConfig)"),
        arguments.dataclass_group(
            CLPTrainingConfig,
            inherited,
            "training (transformers.TrainingArguments; --help_all lists them all)",
            shown=None if show_all else _COMMON,
        ),
    )
    for group in groups:
        parser._add_dataclass_arguments(group)
    if show_all:
        parser.print_help()
        parser.exit()
    return parser


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model, data and rewards")
    group.add_argument(
        "--model_name_or_path", required=True, metavar="MODEL", help="hub id, folder, or smollm2 (embedded)"
    )
    group.add_argument("--dtype", help="the base model's dtype, as in --dtype bfloat16 (default: the checkpoint's)")
    group.add_argument(
        "--dataset_name",
        required=True,
        metavar="DATA",
        help="hub id, a JSONL or CSV file with a prompt column, or docstrings (embedded)",
    )
    group.add_argument("--dataset_train_split", default="train", help="split to train on")
    group.add_argument(
        "--reward_funcs",
        required=True,
        type=arguments.names,
        metavar="REWARD ...",
        help="built-in names or module:function; their names are those of the weights",
    )


def _add_conditioning_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is conditioned (CLPConfig)")
    group.add_argument(
        "--rewards", type=arguments.names, metavar="NAME,...", help="order of the weights (default: of --reward_funcs)"
    )
    group.add_argument("--variant", choices=("full", "attn", "logit"), help="layers that carry copies (default: attn)")
    group.add_argument(
        "--target_modules", nargs="+", help="instead of a variant: name suffixes, one regular expression, or all-linear"
    )
    forms = ("delta", "lora", "svd", "pblora", "soft_tokens")
    group.add_argument("--parameterization", default="delta", choices=forms, help="form of the copies (default: delta)")
    group.add_argument("--r", type=int, help="rank of low-rank copies (default: 8)")
    group.add_argument("--lora_alpha", type=float, help="a LoRA copy's scaling is lora_alpha / r (default: 8)")
    group.add_argument("--num_virtual_tokens", type=int, help="soft tokens of an attention block (default: 8)")
    group.add_argument("--train_shared", action="store_true", help="train the other parameters too, one copy for all")
    group.add_argument(
        "--min_kl_weight",
        type=float,
        help="KL weight at which the trained policy itself answers (default: --kl_weight)",
    )
    group.add_argument(
        "--copies",
        type=json.loads,
        metavar="JSON",
        help="""copies that are mixes of rewards, as in '{"middle": {"a": 0.5, "b": 0.5}}' (default: one per reward)""",
    )
    group.add_argument(
        "--kl_interpolation", default="dera", choices=("dera", "linear"), help="lambda of a KL weight (default: dera)"
    )
    group.add_argument("--weight_domain", default="simplex", choices=("simplex", "free"), help="weights allowed")
    group.add_argument(
        "--default_reward_weights",
        type=arguments.weighting,
        metavar="NAME=NUMBER,...",
        help="used when a call gives none (default: equal weights)",
    )


def _clp_config(options: argparse.Namespace, reward_names: list[str]) -> CLPConfig:
    from clp_engine.config import CLPConfig

    flags = [field.name for field in dataclasses.fields(CLPConfig) if field.name != "folded"]  # fold's own
    given = {name: getattr(options, name) for name in flags}
    given["rewards"] = options.rewards or reward_names
    if isinstance(given["target_modules"], list) and len(given["target_modules"]) == 1:
        given["target_modules"] = _regex_or_suffixes(given["target_modules"][0])
    return CLPConfig(**{name: value for name, value in given.items() if value is not None})


def _regex_or_suffixes(target: str) -> list[str] | str:
    """One target is a module name suffix if it reads like one, else PEFT's string form: a regex or "all-linear"."""
    return [target] if target.replace("_", "").replace(".", "").isalnum() and target != "all-linear" else target


def _training_config(options: argparse.Namespace) -> CLPTrainingConfig:
    from clp_engine.training import CLPTrainingConfig

    if options.output_dir is None:
        raise ValueError("--output_dir is needed: the folder that the trained model is saved to")
    values: dict[str, Any] = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(CLPTrainingConfig) if field.init
    }
    return CLPTrainingConfig(**values)
