#!/usr/bin/env python3
"""Joins what `--records FILE` wrote, a line of JSON after every case, into one file as pytest-benchmark's.

`bench/records.py FILE RESULT.json`. A run that was stopped leaves every case that it finished. Cases that failed are in
`failed` by name, with what they raised; the figures of one whose peer alone was wrong are there too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def start(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the first line: what all cases share, also those of modules that run later."""
    _append(path, {"datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(), **facts})


def add_case(path: Path, benchmark: Any, name: str, error: str | None) -> None:
    """Append one case: what it measured, if anything, and what it raised, if anything."""
    entry = {"group": benchmark.group, "name": name, "extra_info": dict(benchmark.extra_info)}
    if benchmark.stats is not None:
        stats = benchmark.stats.stats
        entry["stats"] = {"rounds": stats.rounds, "median": stats.median, "iqr": stats.iqr}
    _append(path, entry if error is None else entry | {"error": error})


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def join(path: Path) -> dict[str, Any]:
    """The whole of a file; a last line that was cut off is left out.

    Raises:
        ValueError: the file has no first line.
    """
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not records:
        raise ValueError(f"{path} holds no record: no case was reached")
    facts, *entries = records
    failed = {f"{entry['group']}/{entry['name']}": entry["error"] for entry in entries if "error" in entry}
    measured = [entry for entry in entries if entry["extra_info"]]
    return {**facts, "failed": failed, "benchmarks": measured}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("json", type=Path)
    options = parser.parse_args(arguments)
    try:
        joined = join(options.records)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options.json.write_text(json.dumps(joined, indent=1) + "\n")
    print(f"{options.json}: {len(joined['benchmarks'])} cases measured, {len(joined['failed'])} failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
