"""Seconds of a round, on the host's clock or between two events of the GPU; rounds captured in a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# 0.2 ms at 2 GHz, in which the host fills the queue: a graph's launch, or a row of eager ones, is outside of it.
CYCLES_AHEAD = 400_000


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds that `function` takes on the host; it waits for the device itself, where it should."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def device_seconds(function: Callable[[], object], device: str) -> float:
    """Seconds that the device spends on what `function` issues."""
    if device != "cuda":
        return seconds_of(function)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(CYCLES_AHEAD)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def capture(issue: Callable[[], object]) -> Callable[[], None]:
    """Return the replay of what `issue` does on the GPU, which it must have done once before: it compiles there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # autograd's nodes remember the stream; the default one cannot be captured
        issue()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        issue()
    return graph.replay
