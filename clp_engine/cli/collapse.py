"""`clp collapse`: the ordinary model of one weighting."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clp_engine.cli import arguments, loading

_DESCRIPTION = """Write the ordinary model that a steerable model is at one weighting, with its tokenizer.

The folder is a plain Hugging Face checkpoint: AutoModelForCausalLM.from_pretrained loads it, and this package is not
needed. It no longer takes weights.

examples:
  clp collapse runs/demo/model --weights closeness=.7 brevity=.3 --output_dir runs/plain
  clp collapse runs/demo/model --weights closeness=.5 brevity=.5 --kl_weight .1 --output_dir runs/careful"""


def run(argv: Sequence[str]) -> None:
    """Parse `argv` and write the checkpoint."""
    options = arguments.parse(_parser(), argv)
    if options.model is None:
        raise ValueError("no model given: name its folder first, as in `clp collapse runs/demo/model --weights ...`")
    loading.check_new_folder(options.output_dir)
    write(options)


def write(options: argparse.Namespace) -> None:
    """Write the model of `options`' weighting, and a tokenizer where there is one."""
    model = loading.load_model(options.model)
    model.collapse(options.weights, options.kl_weight).save_pretrained(options.output_dir)
    loading.save_tokenizer(options.output_dir, options.model, model.config._name_or_path)
    print(f"wrote {options.output_dir}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "clp collapse", description=_DESCRIPTION, formatter_class=arguments.HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub id of a steerable model")
    arguments.add_config_flag(parser)
    arguments.add_weighting_flags(parser, "the model's own")
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", required=True, metavar="DIR", help="a new folder for the checkpoint")
    return parser
