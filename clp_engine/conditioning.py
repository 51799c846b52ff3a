"""The conditioning of one model forward: the record that every conditioned layer reads, and where it is kept.

The record is found once per model forward, where the weightings enter; no layer sorts, dedupes or syncs. Layers hand
the record's tensors and back-end to the operator as inputs, so a backward pass needs nothing from here. What runs
layers again later (gradient checkpointing) binds the record of its own forward, see `ActiveConditioning.bind`.

Legend: B sequences, T tokens, L tokens whose logits are asked for, S distinct weightings, K copies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Conditioning:
    """What the layers of one forward need: coefficients [S, K] float32, the sequences' rows in them, the back-end.

    Args:
        coefficients_SK: distinct coefficient rows.
        rows_B: int32 [B], the coefficient row of each sequence; [1, T], that of each token, where one row of the batch
            holds several sequences.
        backend: name handed to the operators.
        is_reference: every coefficient is known on the host to be zero: layers skip their copies.
        kept_rows_1L: beside rows [1, T] those of the tokens whose logits are asked for, which are all that a head sees.
    """

    coefficients_SK: torch.Tensor
    rows_B: torch.Tensor
    backend: str = "auto"
    is_reference: bool = False
    kept_rows_1L: torch.Tensor | None = None
    _row_maps: dict[torch.Size, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    _moved: dict[torch.device, Conditioning] = field(default_factory=dict, repr=False, compare=False)

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

    def packed(self, sequence_1T: torch.Tensor, logits_to_keep: int | torch.Tensor = 0) -> Conditioning:
        """The record of a batch of one row that holds this record's sequences one after the other.

        Args:
            sequence_1T: the sequence of each token.
            logits_to_keep: as in transformers: the last so many tokens, or the indices of those whose logits are asked
                for; 0 keeps all.
        """
        rows_1T = self.rows_B.to(sequence_1T.device)[sequence_1T.long()]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return replace(self, rows_B=rows_1T, kept_rows_1L=rows_1T[:, kept], _row_maps={}, _moved={})

    def to(self, device: torch.device) -> Conditioning:
        """The record on `device`; itself where it is there already."""
        if self.coefficients_SK.device == device and self.rows_B.device == device:
            return self
        if device not in self._moved:
            self._moved[device] = replace(
                self,
                coefficients_SK=self.coefficients_SK.to(device, non_blocking=True),
                rows_B=self.rows_B.to(device, non_blocking=True),
                kept_rows_1L=self.kept_rows_1L if self.kept_rows_1L is None else self.kept_rows_1L.to(device),
                _row_maps={},
                _moved={},
            )
        return self._moved[device]

    def row_map(self, shape: torch.Size) -> torch.Tensor:
        """The coefficient row of each position of a layer input, int32 in `shape` (its leading dimensions).

        Raises:
            ValueError: the input does not hold one entry per sequence, or per token of a packed row.
        """
        if torch.compiler.is_compiling():
            return self._rows_in(shape)
        if shape not in self._row_maps:
            self._row_maps[shape] = self._rows_in(shape).contiguous()
        return self._row_maps[shape]

    def _rows_in(self, shape: torch.Size) -> torch.Tensor:
        rows = self.rows_B
        if self.kept_rows_1L is not None and shape[: rows.dim()] != rows.shape:
            rows = rows.flatten() if shape == (rows.numel(),) else self.kept_rows_1L
        if shape[: rows.dim()] != rows.shape:
            raise ValueError(
                f"a conditioned layer got an input of leading sizes {list(shape)} in a forward of {list(rows.shape)} "
                "weighted rows: flattened batches, and packed ones whose sequences are unknown, would mix weightings; "
                "give position_ids that restart at each sequence of a packed row, or pad the batch"
            )
        return rows.view(*rows.shape, *[1] * (len(shape) - rows.dim())).expand(shape)


class _PerThread(threading.local):
    """One record for each thread; every thread starts with None, so that a compiled forward finds it set in all."""

    def __init__(self) -> None:
        self.record: Conditioning | None = None


class ActiveConditioning:
    """The record of the forward that the current thread is in; one object per model, shared by its layers.

    Threads that run the same model at once do not see each other's record. A copy of the model gets its own.
    """

    def __init__(self) -> None:
        self._local = _PerThread()

    @property
    def record(self) -> Conditioning | None:
        """The active record, None outside the conditioned model's forward."""
        return self._local.record

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


@dataclass(frozen=True)
class ConditionedCheckpoint:
    """A checkpoint function whose recompute runs under the record of its own forward.

    An object, not a closure: copies and pickles of a model take their own `active` along.
    """

    active: ActiveConditioning
    checkpoint: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run `checkpoint(function, ...)` with `function` bound to the active record."""
        return self.checkpoint(self.active.bind(function), *args, **options)
