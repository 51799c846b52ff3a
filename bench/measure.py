"""One case's measurement: correctness, memory, then every contender and both limits in interleaved rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import rooflines
from bench.clock import capture, device_seconds, seconds_of
from bench.correctness import Answers, check
from bench.memory import kept_pages, measure_peak
from bench.report import describe_case
from bench.workload import CEILING, OURS, Contender, Workload, clear_gradients, run, synchronize

MIN_ROUND_S = 2e-4  # shorter rounds are mostly the clock's
MIN_GPU_ROUND_S = 1e-3  # by a call launched from Python; a graph's start and end then are a hundredth or less
MIN_ROUNDS, MAX_ROUNDS = 5, 100
# 3 rounds have to do where one of ours, ceiling and limits takes longer; of a peer that slow the first, and of that as
# many calls as take so long.
SLOW_S = 1.0
LONG_CALL_S = 2.0  # a first call this long is its own warm-up
HOPELESS = 4.0  # times ours: peers of a ceiling that long and this far behind are left out, they do more than it does


@dataclass
class Figures:
    """What was measured. Seconds of each round by contender or limit; the others by contender."""

    calls: int
    rounds: dict[str, list[float]]
    peaks_mib: dict[str, dict[str, float]]
    error_shares: dict[str, float]
    read_bytes: int

    def seconds(self, name: str) -> float:
        return statistics.median(self.rounds[name])


def measure(benchmark: Any, work: Workload, budget_s: float, with_compiled: bool) -> None:
    """Check, then time all contenders of `work`, and fill the benchmark's extra_info.

    pytest-benchmark's own statistics are those of rounds of ours, on the host's clock.

    Raises:
        AssertionError: an output is wrong; a peer's after everything else was measured.
    """
    wrong: list[AssertionError] = []
    expected = work.expected()
    costs, shares = {}, {}
    for name in sorted(work.contenders, key=lambda name: name not in (OURS, CEILING)):
        if name in work.mixing_peers and is_hopeless(costs):
            continue
        try:
            costs[name], shares[name] = _prove(work, name, work.contenders[name], expected)
        except Exception as error:
            if name in (OURS, CEILING):
                raise
            wrong += [error] if isinstance(error, AssertionError) else []
            work.note(name, error)
    left_out = [name for name in work.contenders if name not in costs and name not in work.notes]
    work.contenders = {name: work.contenders[name] for name in work.contenders if name in costs}
    peaks = {name: _peak(work, work.contenders[name]) for name in (OURS, CEILING)}
    if with_compiled:
        for name, contender in _compiled_peers(work, costs).items():
            try:
                _run_first(work, contender, work.gradients)  # compiles
                costs[name], shares[name] = _prove(work, name, contender, expected)
            except Exception as error:
                wrong += [error] if isinstance(error, AssertionError) else []
                work.note(name, error)
            else:
                work.contenders[name] = contender
    del expected
    shortest_s = MIN_GPU_ROUND_S if work.case.is_gpu else MIN_ROUND_S
    calls = work.calls or len(work.sets) * (int(shortest_s / costs[CEILING] / len(work.sets)) + 1)
    buffer = _read_buffer(work)
    reads = calls // len(work.sets) if work.case.is_gpu and buffer is work.streams else 1  # of the whole rotation
    with kept_pages():
        plan = _plan(work, calls, buffer, reads, costs, budget_s)
        order, ours_s = iter(range(plan.rounds)), plan.seconds.setdefault(OURS, [])
        ours, others = plan.functions[OURS], lambda: plan.run_others(next(order))
        benchmark.pedantic(lambda: ours_s.append(ours()), setup=others, rounds=plan.rounds)
    figures = Figures(calls, plan.seconds, peaks, shares, reads * buffer.numel() * buffer.element_size())
    benchmark.extra_info.update(describe_case(work, figures, left_out))
    if wrong:
        raise wrong[0]


def is_hopeless(costs: dict[str, float]) -> bool:
    """torch's bfloat16 GEMM without AVX-512 takes 100 times ours."""
    return costs[CEILING] > max(LONG_CALL_S, HOPELESS * costs[OURS])


def _run_first(work: Workload, contender: Contender, gradients: tuple[Tensor, ...] | None) -> dict[str, Tensor]:
    """One call, on the first weight set."""
    with work.mode():
        outputs = run(contender, work.sets[0], work.outputs, gradients)
    synchronize(work.device)
    return outputs


def _prove(work: Workload, name: str, contender: Contender, expected: Answers) -> tuple[float, float]:
    """Check one contender; return the seconds of a call, warm unless it is long, and its error over its budget."""
    start = time.perf_counter()
    outputs = _run_first(work, contender, work.check_gradients or work.gradients)
    cost = time.perf_counter() - start
    share = check(name, outputs, expected[contender.answers], work.case.x_dtype)
    del outputs
    if cost < LONG_CALL_S:
        cost = min(seconds_of(lambda: _run_first(work, contender, work.gradients)) for _ in range(2))
    clear_gradients(contender, work.sets)
    return cost, share


def _peak(work: Workload, contender: Contender) -> dict[str, float]:
    """The peak memory of a second call: the first one may set up caches that stay."""
    peak = measure_peak(lambda: _run_first(work, contender, work.gradients), work.device)
    clear_gradients(contender, work.sets)
    return peak


def _compiled_peers(work: Workload, costs: dict[str, float]) -> dict[str, Contender]:
    """torch.compile of the two fastest peers, each new in dynamo's eyes."""
    torch.compiler.reset()
    best = sorted(work.mixing_peers, key=lambda name: costs[name])[:2]
    peers = {name: work.contenders[name] for name in best}
    return {
        f"compiled-{name}": Contender(torch.compile(peer.call, dynamic=False), peer.trained, peer.answers)
        for name, peer in peers.items()
    }


@dataclass
class Plan:
    """What is timed: functions that make a round and return its seconds; a slow one takes part in every
    `strides[name]`-th only.

    clear: frees the gradients that a round left, outside of its time. Two sets of a head's would not fit.
    """

    rounds: int
    functions: dict[str, Callable[[], float]]
    strides: dict[str, int]
    clear: Callable[[str], None] = lambda _: None
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run_others(self, index: int) -> None:
        """Time round `index` of everything but ours, in an order that rotates."""
        names = [name for name in self.functions if name != OURS]
        self.clear(OURS)
        begin = index % max(1, len(names))
        for name in names[begin:] + names[:begin]:
            if index % self.strides[name] == 0:
                self.seconds.setdefault(name, []).append(self.functions[name]())
                self.clear(name)


def _plan(work: Workload, calls: int, buffer: Tensor, reads: int, costs: dict[str, float], budget_s: float) -> Plan:
    """Half of the time for ours, the ceiling and the reads, which take part in every round; half for the others."""
    costs = {name: calls * cost for name, cost in costs.items()}
    functions = _limit_rounds(work, buffer, reads)
    for name, made in calls_made({name: costs[name] for name in work.contenders}, calls).items():
        functions[name] = _make_round(work, name, made, calls / len(made))

    def clear(name: str) -> None:
        if name in work.contenders:
            clear_gradients(work.contenders[name], work.sets)

    timed = set(costs) if calls == 1 else set()
    for name, function in functions.items():
        if costs.get(name, 0.0) < LONG_CALL_S:  # a round touches every weight set: on fewer they were in the cache
            costs[name] = function()
            timed.add(name)
            clear(name)
    always = [name for name in functions if name in (OURS, CEILING) or name.startswith("read-")]
    if is_hopeless(costs):
        always.remove(CEILING)
    round_s = sum(costs[name] for name in always)
    rounds = 3 if round_s > SLOW_S else max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_s / 2 / round_s)))
    others_share_s = budget_s / 2 / max(1, len(functions) - len(always))
    strides = dict.fromkeys(functions, 1)
    for name in functions.keys() - always:
        wanted = int(costs[name] * rounds / others_share_s) + 1
        strides[name] = rounds if costs[name] > SLOW_S else min(wanted, max(1, rounds // 3))
    once = {name: [costs[name]] for name in functions.keys() - always if costs[name] > SLOW_S and name in timed}
    return Plan(rounds, {name: functions[name] for name in functions if name not in once}, strides, clear, once)


def calls_made(costs: Mapping[str, float], calls: int) -> dict[str, range]:
    """Return which calls of a round, counted along the rotation, each contender makes; `costs`: seconds of all.

    All of them, but of a slow peer as many as take `SLOW_S`, which stand for the rest. Each begins where the slow one
    before it has stopped: a set that another has just read is in the cache.
    """
    found, place = {}, 0
    for name, cost in costs.items():
        if name in (OURS, CEILING) or cost <= SLOW_S:
            found[name] = range(calls)
        else:
            found[name] = range(place, place + min(calls, 1 + int(calls * SLOW_S / cost)))
            place = found[name].stop
    return found


def _make_round(work: Workload, name: str, calls: range, stand_for: float) -> Callable[[], float]:
    """Return a function that makes these calls, each on its weight set, and returns `stand_for` times their seconds."""
    contender, sets = work.contenders[name], work.sets
    outputs, gradients, mode = work.outputs, work.gradients, work.mode

    def issue() -> None:
        with mode():
            for index in calls:
                run(contender, sets[index % len(sets)], outputs, gradients)

    replay: Callable[[], object] = issue
    if work.replays_graphs and contender.is_capturable:
        try:
            replay = capture(issue)
        except Exception as error:  # timed as it is launched from Python then, and said so
            synchronize(work.device)
            work.note(f"CUDA graph of {name}", error)
    return lambda: stand_for * device_seconds(replay, work.device)


def _limit_rounds(work: Workload, buffer: Tensor, reads: int) -> dict[str, Callable[[], float]]:
    """One pass of each read kernel over the rotation, and one GEMM.

    On a GPU a launch has its own ramp and tail, and so has a graph: there are as many reads as calls, each of one
    weight set's bytes.
    """
    if work.case.is_gpu and buffer is work.streams:
        limits = rooflines.reads_in_turn(buffer, len(work.sets), reads)
    else:
        limits = rooflines.read_kernels(buffer)
    if work.gemm is not None:
        limits["gemm"] = rooflines.gemm(*work.gemm)

    def round_of(name: str, function: Callable[[], object]) -> Callable[[], float]:
        replay = function
        function()  # compiles
        if work.replays_graphs:
            try:
                replay = capture(function)
            except Exception as error:
                synchronize(work.device)
                work.note(f"CUDA graph of {name}", error)
        return lambda: device_seconds(replay, work.device)

    return {name: round_of(name, function) for name, function in limits.items()}


def _read_buffer(work: Workload) -> Tensor:
    if work.streams is None or work.is_cache_resident:
        return rooflines.cold_buffer(work.device)
    return work.streams
