#!/usr/bin/env python3
"""Makes the README's short table from a JSON file of this suite.

`bench/table.py bench/results/FILE.json` prints it; `--write README.md` puts it between that file's two bench markers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS = {
    "decode-f32-K2-M1": "decode, 1 row",
    "decode-f32-K4-M4": "decode, 4 rows, 4 weightings, K = 4",
    "decode-bf16-K2-M4": "decode, 4 rows, 4 weightings, bfloat16",
    "rows-f32-K2-M16": "16 rows, 16 weightings",
    "rows-f32-K2-M64": "64 rows, 64 weightings",
    "train-f32-K2-M2048-N2048": "training, 2048 rows, one weighting",
    "train-bf16-K2-M512-N2048": "training, 512 rows, one weighting, bfloat16",
    "sequences-f32-K2-M1024": "training, 8 sequences, 8 weightings",
    "lowrank-f32-K4-M64-S64": "low rank, 64 rows, 64 weightings",
    "head-frozen-f32-K2": "head, frozen, 512 tokens, 131072 words",
    "head-trained-f32-K2": "head, trained, 512 tokens, 131072 words",
}
MARKED = re.compile(r"(<!-- bench:begin)[^>]*(-->\n).*?(<!-- bench:end -->)", re.DOTALL)


def make_table(loaded: Mapping[str, Any]) -> str:
    """Markdown: where it was measured, and a row for each case of ROWS that the file holds; on a GPU, for each case."""
    if loaded["machine_info"].get("device") == "cuda":
        return _make_gpu_table(loaded)
    entries = {entry["name"]: entry["extra_info"] for entry in loaded["benchmarks"]}
    cpu = loaded["machine_info"]["cpu"]
    commit = loaded.get("commit_info", {}).get("id") or "unknown"
    lines = [
        f"{cpu['model']}, {cpu['threads']} threads, {' '.join(cpu['flags'])}, "
        f"{', '.join(f'{name} {size}' for name, size in cpu['caches'].items())}; "
        f"torch {loaded['machine_info']['torch']}; {loaded['datetime'][:10]}, commit {commit[:10]}. "
        "float32 and K = 2 where nothing else is said.",
        "",
        "| case | time | plain F.linear | best peer | GB/s, of a read's | GFLOP/s, of a GEMM's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(label, entries[name]) for name, label in ROWS.items() if name in entries]
    return "\n".join(lines)


def _make_gpu_table(loaded: Mapping[str, Any]) -> str:
    machine = loaded["machine_info"]
    gpu, commit = machine["gpu"] or {}, loaded.get("commit_info", {}).get("id") or "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{gpu.get('name')}, compute capability {gpu.get('capability')}, L2 {gpu.get('l2_bytes', 0) / 2**20:.0f} MiB, "
        f"driver and clocks {gpu.get('driver_and_clocks')}; {versions}; {loaded['datetime'][:10]}, "
        f"commit {commit[:10]}.",
        "",
        "| case | time | plain | best peer | GB/s, of a read's | TFLOP/s, of a GEMM's | peak MiB | goals |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_gpu_row(entry["name"], entry["extra_info"]) for entry in loaded["benchmarks"]]
    return "\n".join([*lines, *(f"\nFailed: {name}: {why}" for name, why in loaded.get("failed", {}).items())])


def _gpu_row(name: str, info: Mapping[str, Any]) -> str:
    ours_us, peers, gemm = info["median_us"]["ours"], info["peer_time_over_ours"], info["gemm_gigaflops_per_s"]
    best = min(peers, key=peers.__getitem__) if peers else None
    goals = [format_goal(goal) for goal in info["targets"]] + [f"{k}: {v:.3g}" for k, v in info["derived"].items()]
    cells = (
        name,
        format_us(ours_us),
        format_us(info["median_us"]["plain"]),
        "-" if best is None else f"{format_us(peers[best] * ours_us)} ({best})",
        f"{info['gigabytes_per_s']:.4g}, {info['read_gigabytes_per_s']:.4g}",
        "-" if gemm is None else f"{info['gigaflops_per_s'] / 1e3:.3g}, {gemm / 1e3:.3g}",
        f"{max(info['peak_mib_above_results']['ours'].values()):.1f}",
        "; ".join(goals),
    )
    return f"| {' | '.join(cells)} |"


def format_goal(goal: Mapping[str, Any]) -> str:
    """One goal in a cell."""
    if "value" not in goal:
        return f"{goal['verdict']}: {goal['text']}"
    sign = ">=" if goal["at_least"] else "<="
    return f"{goal['verdict']} {goal['text']} {goal['value']:.3g} ({sign} {goal['limit']:.3g})"


def _row(label: str, info: Mapping[str, Any]) -> str:
    ours_us = info["median_us"]["ours"]
    peers = info["peer_time_over_ours"]
    best = min(peers, key=peers.__getitem__) if peers else None
    gemm = info["gemm_gigaflops_per_s"]
    cells = (
        label,
        format_us(ours_us),
        format_us(info["median_us"]["plain"]),
        "-" if best is None else f"{format_us(peers[best] * ours_us)} ({best})",
        f"{info['gigabytes_per_s']:.3g}, {info['read_gigabytes_per_s']:.3g}",
        "-" if gemm is None else f"{info['gigaflops_per_s']:.3g}, {gemm:.3g}",
    )
    return f"| {' | '.join(cells)} |"


def format_us(microseconds: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} us"


def insert(text: str, source: str, table: str) -> str:
    """Return `text` with the table between its markers; the first marker then names the table's source.

    Raises:
        ValueError: no markers.
    """
    if not MARKED.search(text):
        raise ValueError("no '<!-- bench:begin -->' line followed by '<!-- bench:end -->'; add the two markers")
    return MARKED.sub(lambda match: f"{match[1]} {source} {match[2]}{table}\n{match[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--write", type=Path, metavar="README", help="the file whose marked part is replaced")
    options = parser.parse_args(arguments)
    table = make_table(json.loads(options.json.read_text()))
    if options.write is None:
        print(table)
    else:
        options.write.write_text(insert(options.write.read_text(), options.json.as_posix(), table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
