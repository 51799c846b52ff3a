"""Tables of measured tiles as JSON files, one for each device: the packaged ones, and the user's own over them.

`<device>.json` lies in `tables/` of this package and in `launch_tables/` of the cache folder. A table holds for the
Triton that it was measured with: another one compiles other code, and leaves the table out, as `clp env` says. What is
wrong in a file is an error that names the file, the field and the remedy.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clp_kernels.cache_folder import default_cache_dir
from clp_kernels.launch_configs import FEWEST_ROWS, KERNELS, MOST_ROWS, Invariance, Key, Tile

FORMAT_VERSION = 1
PACKAGED = Path(__file__).parent / "tables"
_DTYPES = ("float32", "bfloat16", "float16")
_TABLE = {"format_version": int, "device": str, "date": str, "torch": str, "triton": str, "entries": list}
_MEASURED = {"microseconds": float, "heuristic_microseconds": float}
_ENTRY = {"kernel": str, "dtype": str, "deltas_dtype": str, "K": int, "N": int, "D": int, "tile": dict, **_MEASURED}
_NAMES = {int: "an integer", str: "a string", float: "a number", list: "a list", dict: "an object"}


class LaunchTableError(ValueError):
    """A table that cannot be used: the message names the file, the field and the remedy."""


@dataclass(frozen=True)
class Entry:
    """The tile of one key, the time of the call that it was measured in, and that call's with the heuristic's tile."""

    tile: Tile
    microseconds: float
    heuristic_microseconds: float


@dataclass(frozen=True)
class Table:
    """What was measured on one device: its name, the day, the versions, and the entries by key."""

    device: str
    date: str
    torch: str
    triton: str
    entries: Mapping[Key, Entry]


def file_name(device: str) -> str:
    """Return the file name of a device's table: "NVIDIA H200" has nvidia-h200.json."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def user_path(device: str) -> Path:
    """Return where the user's own table of a device lies, whether or not it is there."""
    return default_cache_dir() / "launch_tables" / file_name(device)


def triton_version() -> str:
    """Return the installed Triton's version without importing it, "none" where there is none."""
    for name in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def tiles_for(device: str) -> dict[Key, Tile]:
    """Read both tables of a device: the tiles of those that hold for this Triton, the user's over the packaged ones.

    Raises:
        LaunchTableError: a table that cannot be used.
    """
    tiles: dict[Key, Tile] = {}
    for path in (PACKAGED / file_name(device), user_path(device)):
        table = read(path, device)
        if table is not None and table.triton == triton_version():
            tiles |= {key: entry.tile for key, entry in table.entries.items()}
    return tiles


def describe(device: str) -> str:
    """Say in a line which tables launches on a device use, for `clp env`; of a bad one, what is wrong."""
    found = []
    for path in (user_path(device), PACKAGED / file_name(device)):
        try:
            table = read(path, device)
        except LaunchTableError as error:
            found.append(str(error))
            continue
        if table is None:
            continue
        use = f"{len(table.entries)} measured tiles of {table.date}, {path}"
        if table.triton != triton_version():
            use = f"not used, measured with triton {table.triton}: {path}; measure again with `clp env --tune`"
        found.append(use)
    return "; ".join(found) or "the launchers' own tiles; `clp env --tune` measures others"


def read(path: Path, device: str) -> Table | None:
    """Read a table; None where there is no such file.

    Raises:
        LaunchTableError: not JSON, another format version or device, an unknown, missing or mistyped field, an unknown
            kernel, a tile that the kernel cannot have, or a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchTableError(f"{path} cannot be read ({error}); {_remedy(path)}") from error
    try:
        return _table(json.loads(text), device)
    except (ValueError, OverflowError, RecursionError) as error:
        raise LaunchTableError(f"{path}: {error}; {_remedy(path)}") from error


def write(path: Path, table: Table) -> None:
    """Write a table in one step: a kill at any moment leaves the old file or the new one."""
    entries = [_values(key, entry) for key, entry in sorted(table.entries.items(), key=_order)]
    about = {"device": table.device, "date": table.date, "torch": table.torch, "triton": table.triton}
    text = json.dumps({"format_version": FORMAT_VERSION, **about, "entries": entries}, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _order(item: tuple[Key, Entry]) -> tuple[Any, ...]:
    *rest, max_rows = item[0]
    return (*rest, max_rows or 0)


def _values(key: Key, entry: Entry) -> dict[str, Any]:
    values = {**key._asdict(), **asdict(entry)}
    values["tile"] = {name: values["tile"][name] for name in KERNELS[key.kernel].fields}
    return {name: value for name, value in values.items() if value is not None}


def _remedy(path: Path) -> str:
    if path.parent == PACKAGED:
        return "install the package again"
    return "remove the file, and measure again with `clp env --tune`"


def _table(value: Any, device: str) -> Table:
    if isinstance(value, dict) and value.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"format_version is {value.get('format_version')!r}, this version reads {FORMAT_VERSION}")
    _check_fields(value, _TABLE, "the table")
    if value["device"] != device:
        raise ValueError(f"device is {value['device']!r}, its place is that of {device!r}")
    entries: dict[Key, Entry] = {}
    for index, item in enumerate(value["entries"]):
        key, entry = _entry(item, f"entries[{index}]")
        if key in entries:
            raise ValueError(f"entries[{index}] holds for the same as an earlier one: {key}")
        entries[key] = entry
    return Table(value["device"], value["date"], value["torch"], value["triton"], entries)


def _entry(value: Any, place: str) -> tuple[Key, Entry]:
    has_rows = isinstance(value, dict) and "max_rows" in value
    _check_fields(value, _ENTRY | ({"max_rows": int} if has_rows else {}), place)
    name, max_rows = value["kernel"], value.get("max_rows")
    if name not in KERNELS:
        raise ValueError(f"{place}.kernel is {name!r}, known are {', '.join(KERNELS)}")
    for field in ("dtype", "deltas_dtype"):
        _check_one_of(value[field], _DTYPES, f"{place}.{field}")
    for field in ("K", "N", "D"):
        _check_within(value[field], (1, 2**63), f"{place}.{field}")
    for field in _MEASURED:
        if not (0 < value[field] < math.inf):
            raise ValueError(f"{place}.{field} is {value[field]}, expected a time above 0")
    _check_rows(name, max_rows, place)
    key = Key(name, value["dtype"], value["deltas_dtype"], value["K"], value["N"], value["D"], max_rows)
    tile = _tile(value["tile"], name, f"{place}.tile")
    return key, Entry(tile, *(float(value[field]) for field in _MEASURED))


def _check_rows(kernel: str, max_rows: int | None, place: str) -> None:
    """Refuse a choice by M where the result may not depend on M, and a key that no launch asks for."""
    invariance = KERNELS[kernel].invariance
    if max_rows is None:
        if invariance is Invariance.NEVER:
            raise ValueError(f"{place} lacks the field 'max_rows'")
        return
    if invariance is Invariance.ALWAYS:
        raise ValueError(f"{place}.max_rows is {max_rows}, but {kernel} has one tile for any number of rows")
    _check_within(max_rows, (FEWEST_ROWS, MOST_ROWS), f"{place}.max_rows")
    _check_power_of_two(max_rows, f"{place}.max_rows")


def _tile(value: Any, kernel: str, place: str) -> Tile:
    limits = KERNELS[kernel].fields
    _check_fields(value, dict.fromkeys(limits, int), place)
    for field, number in value.items():
        _check_within(number, limits[field], f"{place}.{field}")
        if field != "num_stages":
            _check_power_of_two(number, f"{place}.{field}")
    return Tile(**value)


def _check_fields(value: Any, types: Mapping[str, type], place: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {value!r:.80}, expected an object")
    for field in value:
        _check_one_of(field, types, f"a field of {place}")
    for field, kind in types.items():
        if field not in value:
            raise ValueError(f"{place} lacks the field {field!r}")
        found = value[field]
        if type(found) is not kind and not (kind is float and type(found) is int):  # bool is an int to isinstance
            raise ValueError(f"{place}.{field} is {found!r:.80}, expected {_NAMES[kind]}")


def _check_one_of(value: str, known: Iterable[str], place: str) -> None:
    if value not in known:
        raise ValueError(f"{place} is {value!r:.80}, known are {', '.join(known)}")


def _check_within(number: int, limits: tuple[int, int], place: str) -> None:
    if not limits[0] <= number <= limits[1]:
        raise ValueError(f"{place} is {number}, expected {limits[0]} to {limits[1]}")


def _check_power_of_two(number: int, place: str) -> None:
    if number & (number - 1):
        raise ValueError(f"{place} is {number}, expected a power of two")
