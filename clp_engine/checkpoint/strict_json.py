"""JSON that may come from anywhere: read without surprises, and turned into dataclasses field by field."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import reprlib
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

MAX_BYTES = 100_000_000  # safetensors' own limit for a header
_SCALARS = (str, int, float, bool, type(None))

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 120
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # the last: halves of pairs, which nothing encodes
_hints = functools.cache(typing.get_type_hints)
shown = _short.repr  # a value as an error message shows it, never at its full length


def read_object(path: Path) -> dict[str, Any]:
    """Parse the file `path`, which must hold one JSON object.

    Raises:
        FileNotFoundError: there is no such regular file.
        ValueError: too long, not UTF-8, not JSON, a key twice, NaN or infinity, or something else than an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or no regular file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than the {MAX_BYTES} that such a file may have")
    try:
        text = path.read_bytes().decode("utf-8")
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {shown(value)}, expected a JSON object")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {shown(key)} is there twice")
        values[key] = value
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def decode(value: Any, hint: Any, field: str, prose: Collection[str] = ()) -> Any:
    """Turn a parsed JSON value into what the type `hint` says: a dataclass, list, dict, union or scalar.

    A dataclass must get all the fields that have no default and no others; its own checks run. An int passes for a
    float. Strings must be free of control characters, since they end up in messages and on terminals.

    Args:
        value: from `read_object`.
        hint: as `typing.get_type_hints` gives it. What is none of the above is left to the dataclass's own checks.
        field: the name that error messages use.
        prose: keys of dicts whose strings may have any characters here: the dataclass around them checks those.

    Raises:
        ValueError: another type, an unknown or missing field, or a value that the dataclass refuses.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _decode_union(value, hint, field, prose)
    kind = _json_type(hint)
    if kind is None:
        return value
    if kind is float:
        return _decode_float(value, field)
    found: type = type(value)
    if found is not kind:  # bool is an int to isinstance
        raise ValueError(f"{field} is {shown(value)}, expected {_name(hint)}")
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(value, hint, field, prose)
    if kind is list:
        (item_hint,) = typing.get_args(hint)
        return [decode(item, item_hint, f"{field}[{i}]", prose) for i, item in enumerate(value)]
    if kind is dict:
        _, entry_hint = typing.get_args(hint)
        return {
            decode(k, str, f"a key of {field}"): v
            if k in prose and type(v) is entry_hint is str
            else decode(v, entry_hint, f"{field}[{shown(k)}]", prose)
            for k, v in value.items()
        }
    if kind is str and _CONTROLS.search(value):
        raise ValueError(f"{field} is {shown(value)}, which holds control characters")
    return value


def _json_type(hint: Any) -> type | None:
    """What JSON has for `hint`; None for a hint that is not checked here."""
    if dataclasses.is_dataclass(hint):
        return dict
    if (origin := typing.get_origin(hint)) in (list, dict):
        return origin
    return hint if hint in _SCALARS else None


def _name(hint: Any) -> str:
    return "an object" if dataclasses.is_dataclass(hint) else str(getattr(hint, "__name__", hint))


def _decode_union(value: Any, hint: Any, field: str, prose: Collection[str]) -> Any:
    for option in typing.get_args(hint):
        kind = _json_type(option)
        if kind is None or type(value) is kind or (kind is float and type(value) is int):
            return decode(value, option, field, prose)
    raise ValueError(f"{field} is {shown(value)}, expected {hint}")


def _decode_float(value: Any, field: str) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{field} is {shown(value)}, expected a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{field} is {shown(value)}, too large a number") from error


def _decode_dataclass(values: dict[str, Any], kind: Any, field: str, prose: Collection[str]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{field} has the unknown field {shown(unknown[0])}; known fields are {sorted(fields)}")
    optional = {name for name, f in fields.items() if _has_default(f)}
    if missing := sorted(set(fields) - set(values) - optional):
        raise ValueError(f"{field} lacks the field {missing[0]!r}")
    hints = _hints(kind)
    decoded = {name: decode(value, hints[name], f"{field}.{name}", prose) for name, value in values.items()}
    try:
        return kind.from_dict(decoded) if hasattr(kind, "from_dict") else kind(**decoded)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{field}: {error}") from error


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
