"""The conditioning of one model forward: the record that every conditioned layer reads, and where it is kept.

The record is found once per model forward, where the weightings enter; no layer sorts, dedupes or syncs. Layers hand
the record's tensors and back-end to the operator as inputs, so a backward pass needs nothing from here. What runs
layers again later (gradient checkpointing) binds the record of its own forward, see `ActiveConditioning.bind`.

Legend: B sequences, S distinct weightings, K copies, C = K coefficients, or K + 1 with lambda behind them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
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
        lambda_S1: what drives the parts that all weightings share, None where the model has none.
    """

    coefficients_SK: torch.Tensor
    rows_B: torch.Tensor
    backend: str = "auto"
    is_reference: bool = False
    lambda_S1: torch.Tensor | None = None
    _derived: dict[Hashable, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_rows(cls, c_BC: torch.Tensor, backend: str, num_copies: int) -> Conditioning:
        """Build the record of a batch from one coefficient row per sequence, c_BC [B, K] or [B, K + 1] float32.

        Equal rows are merged on the host, where the values lie there; on a GPU that would wait for the device.
        """
        if c_BC.device.type != "cpu" or c_BC.requires_grad or torch.compiler.is_compiling():
            rows_B = torch.arange(c_BC.shape[0], dtype=torch.int32, device=c_BC.device)
            return cls._of(c_BC, rows_B, backend, False, num_copies)
        index: dict[tuple[float, ...], int] = {}
        rows = [index.setdefault(tuple(row), len(index)) for row in c_BC.tolist()]
        is_reference = all(c == 0 for row in index for c in row)
        distinct = torch.tensor(list(index), dtype=c_BC.dtype).view(-1, c_BC.shape[1])
        return cls._of(distinct, torch.tensor(rows, dtype=torch.int32), backend, is_reference, num_copies)

    @classmethod
    def _of(
        cls, c_SC: torch.Tensor, rows_B: torch.Tensor, backend: str, is_reference: bool, num_copies: int
    ) -> Conditioning:
        lambda_S1 = c_SC[:, num_copies:].contiguous() if c_SC.shape[1] > num_copies else None
        return cls(c_SC[:, :num_copies].contiguous(), rows_B, backend, is_reference, lambda_S1)

    def to(self, device: torch.device) -> Conditioning:
        """The record on `device`; itself where it is there already."""
        if self.coefficients_SK.device == device:
            return self
        moved = self.coefficients_SK.to(device, non_blocking=True), self.rows_B.to(device, non_blocking=True)
        lambda_S1 = None if self.lambda_S1 is None else self.lambda_S1.to(device, non_blocking=True)
        return Conditioning(*moved, self.backend, self.is_reference, lambda_S1)

    def columns(self, shared: bool) -> torch.Tensor:
        """Coefficients [S, K] of the copies, or lambda [S, 1] for what all weightings share."""
        if not shared:
            return self.coefficients_SK
        if self.lambda_S1 is None:
            raise RuntimeError("shared parts need a lambda: give coefficients [B, K + 1], lambda behind the copies'")
        return self.lambda_S1

    def derived(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`make()`, computed once for all layers of the forward that ask with the same key."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def for_every_sequence(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids` [1, T] that a model looks up once for the whole batch (positions), repeated for each sequence."""
        num_rows = self.rows_B.shape[0]
        return ids.expand(num_rows, *ids.shape[1:]) if ids.shape[0] == 1 and num_rows > 1 else ids

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
        rows = self.rows_B.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        return rows if torch.compiler.is_compiling() else self.derived(shape, rows.contiguous)


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
