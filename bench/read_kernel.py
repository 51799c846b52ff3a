"""A read of memory on a GPU and nothing else: each program adds up one contiguous part."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, STEPS = 4096, 8  # 128 KiB a program; 16-byte loads, four of each thread in flight


@triton.jit
def _add_up_kernel(values_ptr, sums_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for step in tl.static_range(STEPS):
        total += tl.load(values_ptr + offsets + step * BLOCK)
    tl.store(sums_ptr + program, tl.sum(total))


def add_up(values: Tensor, sums: Tensor) -> None:
    """Write the sum of each `BLOCK * STEPS` float32 values to `sums`; what is left over at the end is not read."""
    _add_up_kernel[(len(sums),)](values, sums, BLOCK, STEPS, num_warps=8)


def make_sums(values: Tensor) -> Tensor:
    """The buffer for the sums of `values`."""
    return torch.empty(values.numel() // (BLOCK * STEPS), device=values.device)
