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
    invariance = KERNELS[kernel].invariance
    sees_rows = invariance is Invariance.NEVER or (invariance is Invariance.ASKED and not batch_invariant)
    call = (kernel, rows.dtype, deltas.dtype, *sizes, bucket_of(rows.shape[0]) if sees_rows else None)
    tile = _find(rows.device, *call) or heuristic()
    if _observed is not None:
        _observed[_key(*call)] = tile
    return tile


@functools.lru_cache(maxsize=4096)
def _find(
    device: torch.device,
    kernel: str,
    dtype: torch.dtype,
    deltas_dtype: torch.dtype,
    K: int,
    N: int,
    D: int,
    max_rows: int | None,
) -> Tile | None:
    key = _key(kernel, dtype, deltas_dtype, K, N, D, max_rows)
    if _forced is not None and key == _forced[0]:
        return _forced[1]
    name = device_name(device)
    return None if name is None else _tiles(name).get(key)


def _key(
    kernel: str, dtype: torch.dtype, deltas_dtype: torch.dtype, K: int, N: int, D: int, max_rows: int | None
) -> Key:
    dtypes = (str(one).removeprefix("torch.") for one in (dtype, deltas_dtype))
    return Key(kernel, *dtypes, K, N, D, max_rows)


def device_name(device: torch.device) -> str | None:
    """Return the name by which tables know a device; None for one that has none: what is not a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.cache
def _tiles(name: str) -> dict[Key, Tile]:
    from clp_kernels import launch_tables

    return launch_tables.tiles_for(name)


def forget() -> None:
    """Drop what was read of tables, so that the next launch reads them again: a new one was written."""
    _tiles.cache_clear()
    _find.cache_clear()


# For tuning and tests, which set them around launches of their own: a key with its tile, and what launches asked for.
_forced: tuple[Key, Tile | None] | None = None
_observed: dict[Key, Tile] | None = None


@contextmanager
def forced(key: Key, tile: Tile | None) -> Iterator[None]:
    """Launch `key` with `tile` inside the block, whatever tables say; None is the heuristic's."""
    global _forced
    outer, _forced = _forced, (key, tile)
    _find.cache_clear()
    try:
        yield
    finally:
        _forced = outer
        _find.cache_clear()


@contextmanager
def observed() -> Iterator[dict[Key, Tile]]:
    """Collect what launches inside the block looked up, and the tile that each took; a block around it has them too."""
    global _observed
    outer = _observed
    _observed = found = {}
    try:
        yield found
    finally:
        if outer is not None:
            outer.update(found)
        _observed = outer
