"""`clp export`: a steerable model as an ordinary model or as PEFT adapters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clp_engine.cli import arguments, collapse, loading

_DESCRIPTION = """Write a steerable model in a form that other libraries load.

--format hf    the ordinary model of one weighting, as `clp collapse` writes it
--format peft  LoRA adapters for the base model, loaded by peft's PeftModel.from_pretrained: with --weights one for that
               weighting, in DIR itself; without, one per copy, in DIR/<copy name>. Exact unless --rank truncates them.
               Copies of norms, embeddings and biases are no LoRA: use --format hf.

examples:
  clp export runs/demo/model --format peft --output_dir runs/adapters
  clp export runs/demo/model --format peft --rank 16 --weights closeness=.7 brevity=.3 --output_dir runs/adapter
  clp export runs/demo/model --format hf --weights closeness=.7 brevity=.3 --output_dir runs/plain"""


def run(argv: Sequence[str]) -> None:
    """Parse `argv` and write the model or its adapters."""
    options = arguments.parse(_parser(), argv)
    if options.model is None:
        raise ValueError("no model given: name its folder first, as in `clp export runs/demo/model --format peft ...`")
    loading.check_new_folder(options.output_dir)
    if options.format == "hf":
        if options.rank is not None:
            raise ValueError("--rank is an adapter's: it goes with --format peft")
        return collapse.write(options)
    from clp_engine.adapters import export_peft

    model = loading.load_model(options.model)
    for folder in export_peft(model, options.output_dir, options.weights, options.kl_weight, options.rank):
        print(f"wrote {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "clp export", description=_DESCRIPTION, formatter_class=arguments.HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub id of a steerable model")
    arguments.add_config_flag(parser)
    parser.add_argument("--format", required=True, choices=("hf", "peft"), help="an ordinary model, or PEFT adapters")
    parser.add_argument("--rank", type=int, help="largest rank of an adapter (default: exact)")
    arguments.add_weighting_flags(parser, "hf: the model's own; peft: every copy by itself")
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", required=True, metavar="DIR", help="a new folder")
    return parser
