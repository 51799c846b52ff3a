"""The two limits that every figure is set beside, measured in the same rounds: a read of memory and torch's GEMM."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import last_level_cache_bytes

READ_ROW = 4096
LARGE_READ_BYTES = 2**30  # a quarter of a millisecond of a large GPU's memory


def read_kernels(streams: Tensor) -> dict[str, Callable[[], object]]:
    """Reads of a byte buffer with torch's threads; the fastest in a run is its read bandwidth.

    Neither is bound by arithmetic: on 2 Zen 3 cores (128 MiB, AVX2) sum reads 30 GB/s, as int64 and int8 maxima do,
    mv 22; on one core 19 and 21. A plain AVX2 loop in C read 26 and 18 there. On a GPU a kernel that does nothing else
    is beside them.
    """
    floats = streams[: streams.numel() // (4 * READ_ROW) * 4 * READ_ROW].view(torch.float32)
    if floats.numel() == 0:
        return {"read-sum": streams.sum}
    ones = torch.ones(READ_ROW, device=streams.device)
    found: dict[str, Callable[[], object]] = {
        "read-sum": floats.sum,
        "read-mv": lambda: torch.mv(floats.view(-1, READ_ROW), ones),
    }
    if streams.is_cuda:
        from bench.read_kernel import add_up, make_sums

        if len(sums := make_sums(floats)):
            found["read-kernel"] = lambda: add_up(floats, sums)
    return found


def reads_in_turn(buffer: Tensor, parts: int, times: int) -> dict[str, Callable[[], object]]:
    """Reads of `parts` equal parts of a byte buffer, one call for each, `times` over."""
    by_part = [read_kernels(part) for part in buffer.view(parts, -1)] * times

    def in_turn(name: str) -> Callable[[], object]:
        return lambda: [part[name]() for part in by_part]

    return {name: in_turn(name) for name in by_part[0]}


@functools.cache
def cold_buffer(device: str) -> Tensor:
    """Twice the last-level cache and more, for the read bandwidth of cases whose own weights are fewer."""
    num_bytes = max(2 * last_level_cache_bytes(device), LARGE_READ_BYTES if device == "cuda" else 0)
    return torch.ones(num_bytes // 4, device=device).view(torch.uint8)


def gemm(x_MD: Tensor, w_ND: Tensor) -> Callable[[], object]:
    """torch's GEMM, whose rate stands for the arithmetic limit."""
    return lambda: F.linear(x_MD, w_ND)
