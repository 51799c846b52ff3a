#!/usr/bin/env python3
"""Compares two JSON files of this suite: has any case become slower relative to its ceiling?

Both files should come from one machine, each from its own `make bench`. A case's figure is its time divided by that of
plain F.linear in the same interleaved rounds, so clocks and neighbours cancel to first order. Exit status: 0 no case is
past the threshold (green); 1 some are, or cases of the first file are missing in the second (red); 2 not comparable.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def ratios(path: Path, loaded: Mapping[str, Any]) -> dict[str, float]:
    """Each case's time over its ceiling's.

    Raises:
        ValueError: not a file of this suite.
    """
    found = {}
    for entry in loaded.get("benchmarks", ()):
        ratio = entry["extra_info"].get("ratio_to_ceiling", {}).get("ours")
        if ratio is None:
            raise ValueError(f"{path}: {entry['name']} has no ratio_to_ceiling of ours; run this suite's cases")
        found[f"{entry['group']}/{entry['name']}"] = float(ratio)
    return found


def compare(before: Mapping[str, float], after: Mapping[str, float], threshold: float) -> tuple[list[str], list[str]]:
    """Return a line for each case that passes, and one for each that fails."""
    passed, failed = [], []
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            failed.append(f"MISSING  {name}: in the first file only")
        elif name not in before:
            passed.append(f"new      {name}: {after[name]:.3f}x its ceiling")
        else:
            change = after[name] / before[name]
            line = f"{name}: {before[name]:.3f}x -> {after[name]:.3f}x its ceiling, a factor of {change:.3f}"
            if change > threshold:
                failed.append(f"SLOWER   {line}")
            else:
                passed.append(f"ok       {line}")
    return passed, failed


def machine(loaded: Mapping[str, Any]) -> dict[str, Any]:
    info = loaded["machine_info"]
    return {"processor": info["cpu"].get("model"), "threads": info["cpu"].get("threads"), "torch": info.get("torch")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=1.10, help="largest factor that passes (default: 1.10)")
    options = parser.parse_args(arguments)
    paths = (options.before, options.after)
    try:
        loaded = [json.loads(path.read_text()) for path in paths]
        before, after = (ratios(path, content) for path, content in zip(paths, loaded, strict=True))
        if not before.keys() & after.keys():
            raise ValueError(f"{options.before} and {options.after} have no case in common")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    old, new = (machine(content) for content in loaded)
    for key in (key for key in old if old[key] != new[key]):
        print(f"warning: {key} was {old[key]}, is {new[key]}: compare on one machine", file=sys.stderr)
    passed, failed = compare(before, after, options.threshold)
    print("\n".join(passed + failed))
    color = "red" if failed else "green"
    print(f"gate: {color}, {len(failed)} of {len(before | after)} cases, threshold {options.threshold:.2f}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
