"""The conditioning of one model forward: the record that every conditioned layer reads, and where it is kept.

The record is found once per model forward, where the weightings enter; no layer sorts, dedupes or syncs. Layers hand
the record's tensors and back-end to the operator as inputs, so a backward pass needs nothing from here. What runs
layers again later (gradient checkpointing) binds the record of its own forward, see `ActiveConditioning.bind`.

Legend: B sequences, S distinct weightings, K copies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Conditioning:
    """What the layers of one forward need: coefficients [S, K] float32, the sequences' rows in them, the back-end.

    Args:
        coefficients_SK: distinct coefficient rows.
        rows_B: int32 [B], the coefficient row of each sequence.
        backend: name handed to the operators.
        is_reference: every coefficient is known on the host to be zero: layers skip their copies.
    """

    coefficients_SK: torch.Tensor
    rows_B: torch.Tensor
    backend: str = "auto"
    is_reference: bool = False
    _row_maps: dict[tuple[torch.Size, torch.device], torch.Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def from_rows(cls, c_BK: torch.Tensor, backend: str) -> Conditioning:
        """Build the record of a batch from one coefficient row per sequence, c_BK [B, K] float32.

        Equal rows are merged on the host, where the values lie there; on a GPU that would wait for the device.
        """
        num_rows = c_BK.shape[0]
        if c_BK.device.type != "cpu" or c_BK.requires_grad or torch.compiler.is_compiling():
            return cls(c_BK, torch.arange(num_rows, dtype=torch.int32, device=c_BK.device), backend)
        index: dict[tuple[float, ...], int] = {}
        rows = [index.setdefault(tuple(row), len(index)) for row in c_BK.tolist()]
        is_reference = all(c == 0 for row in index for c in row)
        distinct = torch.tensor(list(index), dtype=c_BK.dtype).view(-1, c_BK.shape[1])
        return cls(distinct, torch.tensor(rows, dtype=torch.int32), backend, is_reference)

    def to(self, device: torch.device) -> Conditioning:
        """The record on `device`; itself where it is there already."""
        if self.coefficients_SK.device == device:
            return self
        moved = self.coefficients_SK.to(device, non_blocking=True), self.rows_B.to(device, non_blocking=True)
        return Conditioning(*moved, self.backend, self.is_reference)

    def row_map(self, shape: torch.Size) -> torch.Tensor:
        """The coefficient row of each position of a layer input, int32 in `shape` (its leading dimensions).

        Raises:
            ValueError: the input does not hold one entry per sequence (packed rows need a row map of their own).
        """
        if shape[0] != self.rows_B.shape[0]:
            raise ValueError(
                f"a conditioned layer got an input of leading size {shape[0]} in a forward of {self.rows_B.shape[0]} "
                "weighted sequences: packed or flattened batches would mix weightings; pad the batch instead"
            )
        if torch.compiler.is_compiling():
            return self.rows_B.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        key = (shape, self.rows_B.device)
        if key not in self._row_maps:
            self._row_maps[key] = self.rows_B.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
        return self._row_maps[key]


class ActiveConditioning:
    """The record of the forward that the current thread is in; one object per model, shared by its layers.

    Threads that run the same model at once do not see each other's record. A copy of the model gets its own.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def record(self) -> Conditioning | None:
        """The active record, None outside the conditioned model's forward."""
        return getattr(self._local, "record", None)

    @contextmanager
    def use(self, record: Conditioning | None) -> Iterator[None]:
        """Make `record` the active one within the block, in this thread."""
        previous = self.record
        self._local.record = record
        try:
            yield
        finally:
            self._local.record = previous

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` tied to the record that is active now, whenever and in whichever thread it runs."""
        record = self.record

        def bound(*args: Any, **kwargs: Any) -> Any:
            with self.use(record):
                return function(*args, **kwargs)

        return bound

    def __deepcopy__(self, memo: dict[int, Any]) -> ActiveConditioning:
        memo[id(self)] = copy = ActiveConditioning()
        return copy

    def __reduce__(self) -> tuple[type[ActiveConditioning], tuple[()]]:
        return ActiveConditioning, ()
