"""The conditioning of one model forward: the record that every conditioned layer reads, and where it is kept.

The record is found once per model forward, where the weightings enter; no layer sorts, dedupes or syncs. Layers hand
the record's tensors and back-end to the operator as inputs, so a backward pass needs nothing from here. What runs
layers again later (gradient checkpointing) binds the record of its own forward, see `ActiveConditioning.bind`.

Legend: B sequences, T tokens, L tokens whose logits are asked for, S distinct weightings, K copies, C coefficients: K,
or K + 1 with lambda behind them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
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
        batch_invariant: handed to them too: a row's bits may not depend on the rest of the batch.
        exact_delta: handed to linear layers: base and copies may not be rounded as one 16-bit weight.
        is_reference: every coefficient is known on the host to be zero: layers skip their copies.
        lambda_S1: what drives the parts that all weightings share, None where the model has none.
        kept_rows_1L: beside rows [1, T] those of the tokens whose logits are asked for, which are all that a head sees.
    """

    coefficients_SK: torch.Tensor
    rows_B: torch.Tensor
    backend: str = "auto"
    batch_invariant: bool = False
    exact_delta: bool = True
    is_reference: bool = False
    lambda_S1: torch.Tensor | None = None
    kept_rows_1L: torch.Tensor | None = None
    _derived: dict[Hashable, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    _moved: dict[torch.device, Conditioning] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_rows(
        cls,
        c_BC: torch.Tensor,
        backend: str,
        num_copies: int,
        batch_invariant: bool = False,
        exact_delta: bool = True,
    ) -> Conditioning:
        """Build the record of a batch from one coefficient row per sequence, c_BC [B, K] or [B, K + 1] float32.

        Equal rows are merged on the host, where the values lie there; on a GPU that would wait for the device.
        """
        how = {"backend": backend, "batch_invariant": batch_invariant, "exact_delta": exact_delta}
        if c_BC.device.type != "cpu" or c_BC.requires_grad or torch.compiler.is_compiling():
            rows_B = torch.arange(c_BC.shape[0], dtype=torch.int32, device=c_BC.device)
            return cls._of(c_BC, rows_B, num_copies, **how)
        index: dict[tuple[float, ...], int] = {}
        rows = [index.setdefault(tuple(row), len(index)) for row in c_BC.tolist()]
        # Batch-invariant, a row of the reference is computed as it is beside others.
        is_reference = not batch_invariant and all(c == 0 for row in index for c in row)
        distinct = torch.tensor(list(index), dtype=c_BC.dtype).view(-1, c_BC.shape[1])
        rows_B = torch.tensor(rows, dtype=torch.int32)
        return cls._of(distinct, rows_B, num_copies, is_reference=is_reference, **how)

    @classmethod
    def _of(cls, c_SC: torch.Tensor, rows_B: torch.Tensor, num_copies: int, **fields: Any) -> Conditioning:
        lambda_S1 = c_SC[:, num_copies:].contiguous() if c_SC.shape[1] > num_copies else None
        return cls(c_SC[:, :num_copies].contiguous(), rows_B, lambda_S1=lambda_S1, **fields)

    def packed(self, sequence_1T: torch.Tensor, logits_to_keep: int | torch.Tensor = 0) -> Conditioning:
        """The record of a batch of one row that holds this record's sequences one after the other.

        Args:
            sequence_1T: the sequence of each token.
            logits_to_keep: as in transformers: the last so many tokens, or the indices of those whose logits are asked
                for; 0 keeps all.
        """
        rows_1T = self.rows_B.to(sequence_1T.device)[sequence_1T.long()]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return replace(self, rows_B=rows_1T, kept_rows_1L=rows_1T[:, kept], _derived={}, _moved={})

    def to(self, device: torch.device) -> Conditioning:
        """The record on `device`; itself where it is there already."""
        if self.coefficients_SK.device == device and self.rows_B.device == device:
            return self
        if device not in self._moved:
            tensors = {name: getattr(self, name) for name in ("coefficients_SK", "rows_B", "lambda_S1", "kept_rows_1L")}
            moved: Any = {name: None if t is None else t.to(device, non_blocking=True) for name, t in tensors.items()}
            self._moved[device] = replace(self, **moved, _derived={}, _moved={})
        return self._moved[device]

    def columns(self, shared: bool) -> torch.Tensor:
        """Coefficients [S, K] of the copies, or lambda [S, 1] for what all weightings share."""
        if not shared:
            return self.coefficients_SK
        if self.lambda_S1 is None:
            raise RuntimeError("shared parts need a lambda: give coefficients [B, K + 1], lambda behind the copies'")
        return self.lambda_S1

    def derived(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`make()`, computed once for all layers of the forward that ask with the same key."""
        # Coefficients with gradients: a checkpointed block must make its own, in the forward and in the recompute.
        if torch.compiler.is_compiling() or self.coefficients_SK.requires_grad:
            return make()
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def for_every_sequence(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids` [1, T] that a model looks up once for the whole batch (positions), repeated for each sequence."""
        if self.rows_B.dim() == 1 and ids.shape[0] == 1:
            return ids.expand(self.rows_B.shape[0], *ids.shape[1:])
        return ids

    def row_map(self, shape: torch.Size) -> torch.Tensor:
        """The coefficient row of each position of a layer input, int32 in `shape` (its leading dimensions).

        Raises:
            ValueError: the input does not hold one entry per sequence, or per token of a packed row.
        """
        if torch.compiler.is_compiling():
            return self._rows_in(shape)
        return self.derived(shape, lambda: self._rows_in(shape).contiguous())

    def _rows_in(self, shape: torch.Size) -> torch.Tensor:
        rows = self.rows_B
        if rows.dim() == 2 and rows.shape[1] in shape[2:]:
            raise ValueError(
                f"a conditioned layer got an input of leading sizes {list(shape)} in a packed row of {rows.shape[1]} "
                "tokens: which of them are the tokens cannot be told; pad the row by one token"
            )
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
