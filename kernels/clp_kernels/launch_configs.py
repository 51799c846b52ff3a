"""The tile of a Triton launch: what a table of measurements on this device says, else the launcher's own heuristic.

Nothing is measured here, and nothing at a launch. The tables (`launch_tables`) of a device are read at its first launch
and never again in a process; an entry holds for the exact sizes that it was measured at, and for rows up to a power of
two. `clp env --tune` (`tuning`) writes a user's own.

Where the result of a call may not depend on the number of rows M, M has no part in the choice either: the key of such a
call has no rows (None), so that one tile, and with it one order of each sum, serves every M. `KERNELS` says for which
kernels that is every call, and for which the calls with `batch_invariant`.

Legend: M rows, D in, N out, K copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch

FEWEST_ROWS, MOST_ROWS = 16, 65536  # the buckets of M: powers of two


@dataclass(frozen=True)
class Tile:
    """The block sizes of one launch: rows, outputs and reduced elements of a program, its warps and pipeline depth.

    What a kernel has not (`Kernel.fields`) is 1.
    """

    rows: int = 1
    outs: int = 1
    reduced: int = 1
    num_warps: int = 1
    num_stages: int = 1


class Invariance(Enum):
    """Which calls of a kernel give a row the same bits whatever M is, and so have one tile for every M."""

    NEVER = "none"
    ASKED = "those with batch_invariant"
    ALWAYS = "all"


@dataclass(frozen=True)
class Kernel:
    """What a table may say of one kernel.

    Attributes:
        fields: the fields of `Tile` that it has, and the smallest and the largest value of each.
        invariance: which of its calls may not see M.
    """

    fields: Mapping[str, tuple[int, int]]
    invariance: Invariance = Invariance.NEVER


_WARPS, _STAGES = (1, 16), (1, 8)
_BLOCKS = dict.fromkeys(("rows", "outs", "reduced"), (16, 256))  # tl.dot takes 16 and more
_PRODUCT: Mapping[str, tuple[int, int]] = {**_BLOCKS, "num_warps": _WARPS, "num_stages": _STAGES}
_ELEMENTS = (16, 4096)
KERNELS: Mapping[str, Kernel] = {
    "mixed_linear.streams": Kernel(_PRODUCT, Invariance.ASKED),
    "mixed_linear.streams.dx": Kernel(_PRODUCT, Invariance.ASKED),
    "mixed_linear.streams.d_deltas": Kernel(_PRODUCT),
    "mixed_linear.segments": Kernel(_PRODUCT),
    "mixed_linear.segments.dx": Kernel(_PRODUCT),
    "mixed_linear.segments.d_deltas": Kernel(_PRODUCT),
    "mixed_linear.panels": Kernel({"reduced": _ELEMENTS, "num_warps": _WARPS}, Invariance.ALWAYS),
    "mixed_linear.panels.dx": Kernel({"reduced": _ELEMENTS, "num_warps": _WARPS}, Invariance.ALWAYS),
    "low_rank_linear.shrink": Kernel(_PRODUCT, Invariance.ASKED),
    "low_rank_linear.shrink.dx": Kernel(_PRODUCT, Invariance.ASKED),
    "low_rank_linear.expand": Kernel(_PRODUCT, Invariance.ASKED),
    "low_rank_linear.expand.dx": Kernel(_PRODUCT, Invariance.ASKED),
    "mixed_linear_logprob": Kernel(_PRODUCT),
    "mixed_linear_logprob.backward": Kernel(_PRODUCT),
    "mixed_embedding": Kernel({"rows": (1, 64), "reduced": _ELEMENTS, "num_warps": _WARPS}, Invariance.ALWAYS),
    "mixed_norm": Kernel({"rows": (1, 64), "reduced": _ELEMENTS, "num_warps": _WARPS}, Invariance.ALWAYS),
}


# The values of batch_invariant under which a call of each kernel may not see M.
_BLIND = {
    name: {Invariance.NEVER: (), Invariance.ASKED: (True,), Invariance.ALWAYS: (True, False)}[kernel.invariance]
    for name, kernel in KERNELS.items()
}


class Key(NamedTuple):
    """What an entry of a table holds for.

    dtype and deltas_dtype: of the rows (and the base) and of the copies or their gradient, as "bfloat16". K, N, D: of
    the layer, whatever the pass; K ranks for `low_rank_linear`, N the vocabulary for heads and embeddings, 1 for norms.
    max_rows: the bucket of M, or None for calls that may not see it.
    """

    kernel: str
    dtype: str
    deltas_dtype: str
    K: int
    N: int
    D: int
    max_rows: int | None


_Call = tuple[str, torch.dtype, torch.dtype, int, int, int, int | None]  # a Key, with torch's own dtypes


def bucket_of(num_rows: int) -> int:
    """Return the bucket of M: the next power of two, at least 16 and at most 65536."""
    return min(MOST_ROWS, max(FEWEST_ROWS, 1 << (num_rows - 1).bit_length()))


def choose(
    kernel: str,
    rows: torch.Tensor,
    deltas: torch.Tensor,
    sizes: tuple[int, int, int],
    heuristic: Callable[[], Tile],
    *,
    batch_invariant: bool = False,
) -> Tile:
    """Return the tile of one launch: the table's for this device, these dtypes and sizes, else the heuristic's.

    Args:
        kernel: one of `KERNELS`.
        rows: what the kernel multiplies or reads row by row, [M, ...].
        deltas: the copies.
        sizes: K, N, D.
        heuristic: the launcher's own choice, called where no table has an entry.
        batch_invariant: whether M must have no part in it.
    """
    tiles = _tiles_on(rows.device)
    if not tiles and _forced is None and _observed is None:
        return heuristic()
    sees_rows = batch_invariant not in _BLIND[kernel]
    call = (kernel, rows.dtype, deltas.dtype, *sizes, bucket_of(rows.shape[0]) if sees_rows else None)
    tile = tiles.get(call)
    if _forced is not None and _key(call) == _forced[0]:
        tile = _forced[1]
    if tile is None:
        tile = heuristic()
    if _observed is not None:
        _observed[_key(call)] = tile
    return tile


def _key(call: _Call) -> Key:
    kernel, dtype, deltas_dtype = call[:3]
    return Key(kernel, str(dtype).removeprefix("torch."), str(deltas_dtype).removeprefix("torch."), *call[3:])


def device_name(device: torch.device) -> str | None:
    """Return the name by which tables know a device; None for one that has none: what is not a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.cache
def _tiles_on(device: torch.device) -> dict[_Call, Tile]:
    """Read the tables of a device, once; from then on a launch costs one or two look-ups in dicts."""
    if (name := device_name(device)) is None:
        return {}
    from clp_kernels import launch_tables

    return {
        (key.kernel, getattr(torch, key.dtype), getattr(torch, key.deltas_dtype), *key[3:]): tile
        for key, tile in launch_tables.tiles_for(name).items()
    }


def forget() -> None:
    """Drop what was read of tables, so that the next launch reads them again: a new one was written."""
    _tiles_on.cache_clear()


# For tuning and tests, which set them around launches of their own: a key with its tile, and what launches asked for.
_forced: tuple[Key, Tile | None] | None = None
_observed: dict[Key, Tile] | None = None


@contextmanager
def forced(key: Key, tile: Tile | None) -> Iterator[None]:
    """Launch `key` with `tile` inside the block, whatever tables say; None is the heuristic's."""
    global _forced
    outer, _forced = _forced, (key, tile)
    try:
        yield
    finally:
        _forced = outer


@contextmanager
def observed() -> Iterator[dict[Key, Tile]]:
    """Collect what launches inside the block looked up, and the tile that each took; a block around it has them too."""
    global _observed
    outer = _observed
    found: dict[Key, Tile] = {}
    _observed = found
    try:
        yield found
    finally:
        if outer is not None:
            outer.update(found)
        _observed = outer
