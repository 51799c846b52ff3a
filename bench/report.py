"""What a case leaves in the JSON, and the lines that a run prints for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bench.table import format_us
from bench.targets import format_verdict
from bench.workload import CEILING, OURS, Workload

if TYPE_CHECKING:
    from bench.measure import Figures


def describe_case(work: Workload, figures: Figures, left_out: Sequence[str]) -> dict[str, Any]:
    """Return the benchmark's `extra_info`; every figure in it is of this run."""
    seconds = {name: figures.seconds(name) / figures.calls for name in work.contenders}
    ours_s = seconds[OURS]
    moved = work.stream_bytes + work.row_bytes
    read_s = min(figures.seconds(name) for name in figures.rounds if name.startswith("read-"))
    info: dict[str, Any] = {
        "case": asdict(work.case),
        "median_us": {name: 1e6 * s for name, s in seconds.items()},
        "ratio_to_ceiling": {name: s / seconds[CEILING] for name, s in seconds.items()},
        "peer_time_over_ours": {name: seconds[name] / ours_s for name in work.mixing_peers},
        "rounds": {name: len(times) for name, times in figures.rounds.items()},
        "calls_per_round": figures.calls,
        "error_over_budget": figures.error_shares,
        "weight_sets": len(work.sets),
        "cache_resident": work.is_cache_resident,
        "stream_bytes": work.stream_bytes,
        "bytes": moved,
        "gigabytes_per_s": moved / ours_s / 1e9,
        "read_gigabytes_per_s": figures.read_bytes / read_s / 1e9,
        "flops": work.flops,
        "gigaflops_per_s": work.flops / ours_s / 1e9,
        "gemm_gigaflops_per_s": None,
        "peak_mib_above_results": figures.peaks_mib,
        "left_out": list(left_out),
        "notes": work.notes,
    }
    if work.gemm is not None:
        (M, D), N = work.gemm[0].shape, work.gemm[1].shape[0]
        info["gemm_gigaflops_per_s"] = 2 * M * D * N / figures.seconds("gemm") / 1e9
    info["derived"] = {name: of(info) for name, of in work.derived.items()}
    return info | {"targets": [target.judge(info) for target in work.targets]}


def format_case(name: str, info: Mapping[str, Any]) -> list[str]:
    """Return the lines printed for one case: ours against the ceiling and the limits, the peers, the targets."""
    resident = " (cache-resident)" if info["cache_resident"] else ""
    limits = [f"{info['gigabytes_per_s']:.3g} of {info['read_gigabytes_per_s']:.3g} GB/s read{resident}"]
    if info["gemm_gigaflops_per_s"] is not None:
        limits.append(f"{info['gigaflops_per_s']:.3g} of {info['gemm_gigaflops_per_s']:.3g} GFLOP/s")
    peak = ", ".join(f"{source} {mib:.1f}" for source, mib in info["peak_mib_above_results"][OURS].items())
    lines = [
        f"{name}: {format_us(info['median_us'][OURS])}, {info['ratio_to_ceiling'][OURS]:.3g}x {CEILING}; "
        f"{'; '.join(limits)}; peak MiB {peak}"
    ]
    others = {key: us / info["median_us"][OURS] for key, us in info["median_us"].items() if key not in (OURS, CEILING)}
    if others:
        times = sorted(others.items(), key=lambda item: item[1])
        lines.append("    time / ours: " + ", ".join(f"{key} {ratio:.3g}x" for key, ratio in times))
    if info["left_out"]:
        lines.append(f"    left out, the ceiling alone being so slow: {', '.join(info['left_out'])}")
    lines += [f"    {what}: {value:.3g}" for what, value in info["derived"].items()]
    lines += [f"    not measured: {what}: {why}" for what, why in info["notes"].items()]
    return lines + [f"    {format_verdict(verdict)}" for verdict in info["targets"]]
