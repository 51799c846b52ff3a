"""Speed and memory goals, shown beside what a run measured. Nothing fails by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Info = Mapping[str, Any]  # a benchmark's extra_info


@dataclass(frozen=True)
class Target:
    """value at most (or, `at_least`, at least) limit."""

    text: str
    value: Callable[[Info], float]
    limit: Callable[[Info], float]
    at_least: bool = False

    def judge(self, info: Info) -> dict[str, Any]:
        try:
            value, limit = self.value(info), self.limit(info)
        except KeyError as missing:
            return {"text": self.text, "verdict": f"NOT MEASURED ({missing.args[0]} is not there)"}
        verdict = "PASS" if (value >= limit if self.at_least else value <= limit) else "MISS"
        return {"text": self.text, "value": value, "limit": limit, "at_least": self.at_least, "verdict": verdict}


def format_verdict(verdict: Info) -> str:
    if "value" not in verdict:
        return f"{verdict['verdict']}  {verdict['text']}"
    sign = ">=" if verdict["at_least"] else "<="
    return f"{verdict['verdict']}  {verdict['text']}: {verdict['value']:.3g}, wanted {sign} {verdict['limit']:.3g}"


def _ours_s(info: Info) -> float:
    return info["median_us"]["ours"] / 1e6


def _read_s(info: Info, num_bytes: int) -> float:
    return num_bytes / info["read_gigabytes_per_s"] / 1e9


def reads_at(share: float) -> Target:
    """Share of the read bandwidth."""
    rate = "GB/s / same-bytes read's"
    return Target(rate, lambda i: i["gigabytes_per_s"] / i["read_gigabytes_per_s"], lambda _: share, at_least=True)


# Peers are charged the same bytes, so this implies a lead of 0.95 x (0.90 read bandwidth / theirs) over each of them.
READS_AT_BANDWIDTH = reads_at(0.90)


def at_most_times_plain(factor: float) -> Target:
    return Target("time / plain", lambda i: i["ratio_to_ceiling"]["ours"], lambda _: factor)


def faster_than(peer: str, factor: float) -> Target:
    return Target(f"{peer} time / ours", lambda i: i["peer_time_over_ours"][peer], lambda _: factor, at_least=True)


def faster_than_every(kind: str, factor: float) -> Target:
    """The same against the fastest of the peers whose names hold `kind`."""

    def lead(info: Info) -> float:
        leads = [lead for name, lead in info["peer_time_over_ours"].items() if kind in name]
        if not leads:
            raise KeyError(kind)
        return min(leads)

    return Target(f"fastest {kind} time / ours", lead, lambda _: factor, at_least=True)


def faster_than_best_peer(factor: float) -> Target:
    best = "best peer's time / ours"
    return Target(best, lambda i: min(i["peer_time_over_ours"].values()), lambda _: factor, at_least=True)


def near_binding_floor(gemm_flops: int, factor: float = 1.2) -> Target:
    """Time at most `factor` times the larger of reading every stream once and doing every product at torch's rate."""

    def floor_s(info: Info) -> float:
        return max(_read_s(info, info["stream_bytes"]), gemm_flops / info["gemm_gigaflops_per_s"] / 1e9)

    return Target("time / max(read, GEMM) floor", lambda i: _ours_s(i) / floor_s(i), lambda _: factor)


def plain_and_extra_bytes(extra_bytes: int, plain: float = 1.06, extra: float = 1.1, of: str = "ours") -> Target:
    """Time of a contender in ms: `plain` times a plain layer's + `extra` times the reading of what that does not
    touch."""
    return Target(
        f"ms of {of} against {plain} plain + {extra} extra bytes",
        lambda i: i["median_us"][of] / 1e3,
        lambda i: 1e3 * (plain * i["median_us"]["plain"] / 1e6 + extra * _read_s(i, extra_bytes)),
    )


def hidden_share(extra_bytes: int) -> Callable[[Info], float]:
    """How much of the time that the extra bytes take by themselves lies behind the arithmetic: 1 all, 0 nothing."""
    return lambda i: 1 - (_ours_s(i) - i["median_us"]["plain"] / 1e6) / _read_s(i, extra_bytes)


def level_over_weightings(limit: float) -> Target:
    """Largest over smallest time among ours under different numbers of weightings (`ours`, `ours-S<number>`)."""

    def spread(info: Info) -> float:
        times = [us for name, us in info["median_us"].items() if name == "ours" or name.startswith("ours-S")]
        return max(times) / min(times)

    return Target("max / min time over weightings", spread, lambda _: limit)


def products_at_rate(flops: int, share: float) -> Target:
    """Share of torch's GEMM rate, for the operations that the method makes."""
    return Target(
        "FLOP/s / GEMM's",
        lambda i: flops / _ours_s(i) / 1e9 / i["gemm_gigaflops_per_s"],
        lambda _: share,
        at_least=True,
    )


def peak_at_most(mib: float) -> Target:
    return Target("peak extra MiB", lambda i: max(i["peak_mib_above_results"]["ours"].values()), lambda _: mib)


def overhead_at_most(microseconds: float) -> Target:
    return Target("us above plain", lambda i: i["median_us"]["ours"] - i["median_us"]["plain"], lambda _: microseconds)
