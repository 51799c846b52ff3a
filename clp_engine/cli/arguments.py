"""Arguments shared by the commands: weightings, YAML files, and flags made from a dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_WEIGHT = re.compile(r"[A-Za-z_]\w*=\S*")
_REWARD = re.compile(r"[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that shows each flag once, with the kind of its value and the default where it says something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or isinstance(action.default, (bool, list))
        if action.help is None or not action.option_strings or says_nothing or action.default == argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.type is int:
            return "N"
        return "X" if action.type is float else "TEXT"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Leave out the hyphenated spelling that HfArgumentParser adds to each flag; it is accepted all the same."""
        spellings = action.option_strings
        shown = [flag for flag in spellings if flag.replace("-", "_").replace("__", "--", 1) not in spellings[:1]]
        short = argparse.Namespace(**vars(action))
        short.option_strings = [*spellings[:1], *(flag for flag in shown if flag != spellings[0])]
        return super()._format_action_invocation(short)  # type: ignore[arg-type]


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE`, which `parse` reads."""
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file whose keys are flags; flags given here override it"
    )


def add_weighting_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--weights` and `--kl_weight`, one weighting; `default` says what none means."""
    group = parser.add_argument_group("weighting")
    group.add_argument(
        "--weights",
        type=weighting,
        metavar="NAME=NUMBER ...",
        help=f"as in --weights rouge=.7 brevity=.3 (default: {default})",
    )
    group.add_argument("--kl_weight", type=float, help="KL weight alpha; 1 is the reference model")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`, with the flags of `--config`'s YAML file behind those that it does not give.

    Raises:
        FileNotFoundError: no such YAML file.
        ValueError: a YAML file that is not a mapping of known keys.
    """
    argv = pack_values(argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is not None:
        argv = [*argv, *_config_flags(parser, _read_yaml(Path(path)), argv)]
    return parser.parse_args(argv)


def pack_values(argv: Sequence[str]) -> list[str]:
    """Join the values of `--weights` and `--reward_funcs` to one argument each, so that neither swallows what follows.

    `--weights rouge=.7 brevity=.3 DIR` becomes `--weights=rouge=.7,brevity=.3 DIR`: values are the tokens of the form
    name=number (for rewards: a name or module:function), anything else is left where it is.
    """
    packed: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        pattern = {"--weights": _WEIGHT, "--reward_funcs": _REWARD, "--reward-funcs": _REWARD}.get(token)
        if pattern is None:
            packed.append(token)
            continue
        values = []
        while tokens and pattern.fullmatch(tokens[0].split(",")[0]):
            values.append(tokens.pop(0))
        packed.append(f"{token}={','.join(values)}" if values else token)
    return packed


def weighting(text: str) -> dict[str, float]:
    """Turn "rouge=.7,brevity=.3" into {"rouge": 0.7, "brevity": 0.3}.

    Raises:
        argparse.ArgumentTypeError: another form, or a name given twice.
    """
    weights: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form name=number, as in rouge=.7")
        if name in weights:
            raise argparse.ArgumentTypeError(f"{name!r} is given twice")
        weights[name] = number
    if not weights:
        raise argparse.ArgumentTypeError("no weights given, expected name=number for each reward")
    return weights


def named_path(text: str) -> tuple[str, str]:
    """Turn "helpful=adapters/one" into ("helpful", "adapters/one").

    Raises:
        argparse.ArgumentTypeError: another form.
    """
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form reward=path, as in helpful=runs/helpful")
    return name, path


def names(text: str) -> list[str]:
    """Turn "closeness,brevity" into its parts."""
    return [part for part in text.split(",") if part]


def dataclass_group(source: Any, fields: Iterable[str], title: str, shown: Iterable[str] | None = None) -> type:
    """Make a dataclass of some of `source`'s fields for HfArgumentParser, which shows it as one group of the help.

    Args:
        source: a dataclass whose fields have defaults.
        fields: names of the fields to take.
        title: the group's title.
        shown: the fields that the help lists; None lists all.
    """
    hints = typing.get_type_hints(source)
    wanted, listed = set(fields), None if shown is None else set(shown)
    taken = []
    for field in dataclasses.fields(source):
        if field.name not in wanted or not field.init:
            continue
        metadata = dict(field.metadata)
        if listed is not None and field.name not in listed:
            metadata["help"] = argparse.SUPPRESS
        copy: Any
        if field.default_factory is not dataclasses.MISSING:
            copy = dataclasses.field(default_factory=field.default_factory, metadata=metadata)
        else:
            copy = dataclasses.field(default=field.default, metadata=metadata)
        taken.append((field.name, hints[field.name], copy))
    return dataclasses.make_dataclass("Flags", taken, namespace={"_argument_group_name": title})


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"--config {path} must hold keys and values, found a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _config_flags(parser: argparse.ArgumentParser, content: dict[str, Any], argv: Sequence[str]) -> list[str]:
    """The file's keys as command-line tokens, for the flags that `argv` does not give."""
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:  # argparse has no public list of its arguments
        if action.dest not in ("help", "help_all", "config"):
            actions.setdefault(action.dest, action)
    given = {token.split("=")[0].lstrip("-").replace("-", "_") for token in argv if token.startswith("--")}
    tokens: list[str] = []
    for key, value in content.items():
        if key not in actions:
            close = difflib.get_close_matches(key, actions, n=1)
            raise ValueError(f"--config: unknown key {key!r}" + (f", did you mean {close[0]!r}?" if close else ""))
        action = actions[key]
        if not action.option_strings:
            parser.set_defaults(**{key: value})
        elif value is not None and not {key, f"no_{key}"} & given:
            tokens += _tokens(action, value)
    return tokens


def _tokens(action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    if action.nargs == 0:
        return [flag] if value else []
    if isinstance(value, bool):
        return [f"{flag}={str(value).lower()}"]
    if isinstance(value, Mapping):
        if action.type is weighting:
            return [f"{flag}={','.join(f'{name}={number}' for name, number in value.items())}"]
        if action.type is named_path:
            return [flag, *(f"{name}={path}" for name, path in value.items())]
        return [f"{flag}={json.dumps(value)}"]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if action.type is names:
            return [f"{flag}={','.join(map(str, value))}"]
        if isinstance(action, argparse._AppendAction):
            return [token for item in value for token in _tokens(action, item)]
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]
