"""`clp sweep`: evaluate a steerable model over a grid of weightings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from clp_engine.cli import arguments, loading

_DESCRIPTION = """Evaluate a steerable model over a grid of weightings and draw its Pareto front.

Writes front.json (weightings, mean rewards, every completion) and front.png to the output folder and prints a table.

examples:
  clp sweep runs/demo/model --dataset_name docstrings --reward_funcs closeness brevity --output_dir runs/sweep
  clp sweep runs/mine --dataset_name test.jsonl --reward_funcs my_rewards:politeness brevity --grid 5 \\
      --num_prompts 32 --output_dir runs/mine/sweep"""


def run(argv: Sequence[str]) -> None:
    """Parse `argv`, sweep, and write front.json and front.png."""
    options = arguments.parse(_parser(), argv)
    if options.model is None:
        raise ValueError("no model given: name its folder first, as in `clp sweep runs/demo/model --dataset_name ...`")
    reward_funcs = loading.load_reward_funcs(options.reward_funcs)
    from clp_engine.data import load_dataset_rows
    from clp_engine.evaluation import sweep
    from clp_engine.evaluation.report import table

    rows = load_dataset_rows(options.dataset_name, options.dataset_test_split, limit=options.num_prompts)
    model, tokenizer = loading.load_conditioned_model(options.model, options.backend)
    front = sweep(
        model,
        rows,
        reward_funcs=reward_funcs,
        processing_class=tokenizer,
        grid=options.grid,
        kl_weights=options.kl_weights,
        num_generations=options.num_generations,
        max_completion_length=options.max_completion_length,
        batch_size=options.batch_size,
        do_sample=options.do_sample,
        seed=options.seed,
    )
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "front.json").write_text(front.to_json())
    print(table({"clp": front}))
    front.plot(folder / "front.png")
    print(f"wrote {folder / 'front.json'} and {folder / 'front.png'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "clp sweep", description=_DESCRIPTION, formatter_class=arguments.HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub id of a steerable model")
    arguments.add_config_flag(parser)
    data = parser.add_argument_group("data and rewards")
    data.add_argument(
        "--dataset_name",
        required=True,
        metavar="DATA",
        help="hub id, a JSONL or CSV file with a prompt column, or docstrings (embedded)",
    )
    data.add_argument("--dataset_test_split", default="test", help="split to evaluate on")
    data.add_argument("--num_prompts", type=int, help="take the first prompts only (default: all)")
    data.add_argument(
        "--reward_funcs",
        required=True,
        type=arguments.names,
        metavar="REWARD ...",
        help="built-in names or module:function, one for each of the model's rewards",
    )
    grid = parser.add_argument_group("weightings")
    grid.add_argument("--grid", type=int, default=11, help="points of the grid over the simplex")
    grid.add_argument("--kl_weights", type=float, nargs="+", help="KL weights to cross the grid with")
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--num_generations", type=int, default=1, help="completions per prompt and weighting")
    decoding.add_argument("--max_completion_length", type=int, default=64, help="tokens of a completion at most")
    decoding.add_argument("--batch_size", type=int, default=32, help="completions per batch, of mixed weightings")
    decoding.add_argument("--do_sample", action="store_true", help="sample instead of taking the likeliest token")
    decoding.add_argument("--seed", type=int, default=0, help="of sampling")
    decoding.add_argument("--backend", default="auto", help="kernels: auto, reference, cpp, triton or cuda")
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", required=True, metavar="DIR", help="folder of front.json and front.png")
    return parser
