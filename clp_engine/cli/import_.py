"""`clp import`: a steerable model of PEFT adapters or of fine-tunes, without training (Rewarded Soups)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clp_engine.cli import arguments, loading

_DESCRIPTION = """Make a steerable model of existing checkpoints of one base model, without training (Rewarded Soups).

Each checkpoint becomes the copy of one reward, whose name the weights then have. The base model is referenced, not
copied.

examples:
  clp import --base_model BASE --peft helpful=adapters/helpful brief=adapters/brief --output_dir runs/soup
  clp import --base_model BASE --finetuned helpful=runs/helpful brief=runs/brief --output_dir runs/soup
  clp generate runs/soup --prompt "some text" --weights helpful=.7 brief=.3"""


def run(argv: Sequence[str]) -> None:
    """Parse `argv` and write the conditioned model."""
    options = arguments.parse(_parser(), argv)
    if bool(options.peft) == bool(options.finetuned):
        raise ValueError("give --peft reward=adapter ... or --finetuned reward=model ..., one of the two")
    sources = options.peft or options.finetuned
    places = dict(sources)
    if len(places) < len(sources):
        raise ValueError(f"a reward is given twice in {[name for name, _ in sources]}")
    loading.check_new_folder(options.output_dir)
    base = loading.find_base_model(options.base_model, "--base_model")
    for name, place in places.items():
        loading.check_path(place, name)
    from clp_engine.model import CLPModel

    build = CLPModel.from_peft if options.peft else CLPModel.from_finetuned
    build(base, places).save_pretrained(options.output_dir)
    loading.save_tokenizer(options.output_dir, base)
    print(f"wrote {options.output_dir}, steered by {', '.join(places)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "clp import", description=_DESCRIPTION, formatter_class=arguments.HelpFormatter, allow_abbrev=False
    )
    arguments.add_config_flag(parser)
    parser.add_argument("--base_model", required=True, metavar="MODEL", help="hub id, folder, or smollm2 (embedded)")
    for flag, what in (("--peft", "LoRA adapters of it"), ("--finetuned", "full fine-tunes of it")):
        parser.add_argument(
            flag,
            nargs="+",
            default=[],
            type=arguments.named_path,
            metavar="REWARD=PATH",
            help=f"{what}, folders or hub ids, by the reward that each was trained for",
        )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="a new folder for the steerable model")
    return parser
