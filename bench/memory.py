"""Peak memory of one call above what it returns: by torch's allocator, and by the resident set."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
_BLOCK = 2**16  # bytes from which on glibc is told to map a block by itself, and to unmap it when it is freed
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # glibc's numbers


def measure_peak(call: Callable[[], dict[str, Tensor]], device: str) -> dict[str, float]:
    """Run `call` once; return its peak in MiB above the memory before it and above what it returns.

    "allocator": from the allocator's own events (CUDA: its statistics). "resident": from the kernel's high-water mark
    of the resident set, which also sees what bypasses torch; on a CPU, where the mark can be reset.
    """
    gc.collect()
    if device == "cuda":
        return {"allocator": _measure_cuda(call)}
    _return_blocks()
    with _filled_heap():
        can_reset = _reset_high_water()
        before = _resident_bytes("VmRSS")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = call()
        high_water, returned = _resident_bytes("VmHWM"), _num_bytes(result)
    peaks = {"allocator": (_peak_of_events(profiler) - returned) / MIB}
    return peaks | ({"resident": (high_water - before - returned) / MIB} if can_reset else {})


def _num_bytes(result: dict[str, Tensor]) -> int:
    return sum(value.untyped_storage().nbytes() for value in result.values())


def _measure_cuda(call: Callable[[], dict[str, Tensor]]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - _num_bytes(result)) / MIB


def _peak_of_events(profiler: profile) -> int:
    """The largest running sum of allocations and (negative) frees, in time's order."""
    recorded: Any = profiler.profiler
    events = recorded.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    total = peak = 0
    for _, num_bytes in sorted(changes, key=lambda change: change[0]):
        total += num_bytes
        peak = max(peak, total)
    return peak


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    return libc if hasattr(libc, "mallopt") else None


@contextlib.contextmanager
def kept_pages() -> Iterator[None]:
    """Memory that is freed meanwhile stays with the process, where the C library is glibc.

    By itself it returns large blocks at once, and the next ones are new pages. What those cost is the system's affair:
    some virtual machines hand freed pages back to their host, and fetch one MiB of them in 2 to 3 ms, more than any
    kernel takes for it.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _return_blocks()


def _return_blocks() -> None:
    """Return free heap pages to the system, where the C library is glibc, and from now on freed blocks at once.

    Reused pages would not count as new; and by itself glibc keeps more of what is freed the larger blocks it has seen,
    some MiB that a call no longer holds.
    """
    libc = _glibc()
    if libc is None:
        return
    libc.mallopt(_M_MMAP_MAX, 1 << 16)
    libc.mallopt(_M_MMAP_THRESHOLD, _BLOCK)
    libc.mallopt(_M_TRIM_THRESHOLD, _BLOCK)
    libc.malloc_trim(0)


@contextlib.contextmanager
def _filled_heap() -> Iterator[None]:
    """Take all free room of glibc's heap that is as large as a block of its own, so that such blocks are mapped.

    Freed, one in the heap stays resident unless nothing lies above it.
    """
    libc = _glibc()
    blocks: list[int] = []
    if libc is not None:
        libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
        while not blocks or blocks[-1] < libc.sbrk(0):  # the last one is mapped
            blocks.append(libc.malloc(_BLOCK))
    try:
        yield
    finally:
        for block in blocks:
            libc.free(ctypes.c_void_p(block))  # type: ignore[union-attr]


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_bytes(field: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)
