"""`clp demo`: the main job on the embedded model and data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clp_engine.cli import arguments

_DESCRIPTION = """Train one steerable model and Rewarded Soups beside it, sweep both, and compare their fronts.

Embedded model (SmolLM2-135M-Instruct), embedded data (docstrings of this Python installation), two rewards in conflict.
Writes front.png, results.json and the steerable model (model/) to the output folder.

examples:
  clp demo
  clp demo --output_dir runs/seed1 --seed 1"""


def run(argv: Sequence[str]) -> None:
    """Parse `argv` and run the demo."""
    parser = argparse.ArgumentParser(
        "clp demo", description=_DESCRIPTION, formatter_class=arguments.HelpFormatter, allow_abbrev=False
    )
    arguments.add_config_flag(parser)
    parser.add_argument("--output_dir", default="runs/demo", help="where everything goes")
    parser.add_argument("--seed", type=int, default=0, help="of training and sampling")
    parser.add_argument("--max_steps", type=int, help="training steps (default: the demo's)")
    parser.add_argument("--num_prompts", type=int, help="held-out prompts of the sweeps (default: the demo's)")
    options = vars(arguments.parse(parser, argv))
    del options["config"]
    from clp_engine.demo import main

    main(**{name: value for name, value in options.items() if value is not None})
