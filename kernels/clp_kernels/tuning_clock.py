"""The clock of `tuning`: seconds of a call on the GPU between two events, L2 flushed; medians of interleaved rounds.

The host runs ahead: the fill of L2 and a pause of the GPU give it the time to launch what is measured, so that no gap
of its own is in there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

FEWEST_ROUNDS, MOST_ROUNDS = 9, 60
BUDGET_S = 0.5  # of measured time for one comparison, within these rounds
CYCLES_AHEAD = 400_000  # 0.2 ms at 2 GHz
Name = TypeVar("Name", bound=Hashable)


def interleaved_medians(
    runs: Mapping[Name, Callable[[], object]], seconds_of: Callable[[Callable[[], object]], float]
) -> dict[Name, float]:
    """Time all of `runs` in each round, starting with another one each time; return the median of each.

    The first round, in which a run may still compile, sets the number of rounds and does not count.
    """
    names = list(runs)
    for run in runs.values():
        run()
    first_s = sum(seconds_of(run) for run in runs.values())
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(BUDGET_S / first_s)))
    found: dict[Name, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        begin = index % len(names)
        for name in names[begin:] + names[:begin]:
            found[name].append(seconds_of(runs[name]))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


class GPUClock:
    """Measures on one GPU, as `tuning.tune` asks for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = max(64 * 2**20, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.flushing = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, runs: Mapping[Name, Callable[[], object]]) -> dict[Name, float]:
        """Return the median seconds of each run."""
        with torch.cuda.device(self.device):
            return interleaved_medians(runs, self._seconds)

    def _seconds(self, run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushing.zero_()
        torch.cuda._sleep(CYCLES_AHEAD)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
