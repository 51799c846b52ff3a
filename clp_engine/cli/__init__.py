"""The command line: `clp COMMAND ...`. Commands parse and call; what they call lives in the library."""

from __future__ import annotations

import importlib
import keyword
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "train, sweep and compare on the embedded model and data; writes runs/demo",
    "train": "train a steerable model from flags or a YAML file",
    "sweep": "evaluate a steerable model over a grid of weightings; writes front.json and front.png",
    "generate": "complete prompts under one weighting or several",
    "inspect": "verify a steerable model's folder and list what it holds",
    "collapse": "write the ordinary model of one weighting",
    "export": "write a steerable model as an ordinary model or as PEFT adapters",
    "import": "make a steerable model of PEFT adapters or fine-tunes of one base, without training",
    "env": "print versions, devices and kernel back-ends; --tune measures kernels on a GPU",
}

_HELP = """usage: clp COMMAND [options]

One language model, steered by reward weights.

commands:
{commands}

examples:
  clp demo
  clp train --model_name_or_path smollm2 --dataset_name docstrings --reward_funcs closeness brevity \\
      --output_dir runs/mine
  clp generate runs/mine --prompt "some text" --weights closeness=.7 brevity=.3
  clp sweep runs/mine --dataset_name docstrings --reward_funcs closeness brevity \\
      --output_dir runs/mine/sweep
  clp collapse runs/mine --weights closeness=.7 brevity=.3 --output_dir runs/plain

`clp COMMAND --help` explains a command. CLP_TRACEBACK=1 shows where an error came from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the arguments after `clp`; None takes `sys.argv`.

    Returns:
        0, or 2 after a user's error, which is printed as one line, or 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
        print(_HELP.format(commands=commands))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("clp_engine"))
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        return _report(f"unknown command {command!r}; commands are {', '.join(COMMANDS)}")
    try:
        # A command's libraries are imported with it: `clp --help` must not wait for torch.
        module = f"{command}_" if keyword.iskeyword(command) else command
        importlib.import_module(f"clp_engine.cli.{module}").run(rest)
    except (ValueError, ImportError, OSError, NotImplementedError) as error:
        if os.environ.get("CLP_TRACEBACK") == "1":
            raise
        return _report(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        print("clp: interrupted", file=sys.stderr)
        return 130
    return 0


def _report(message: str) -> int:
    print(f"clp: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
