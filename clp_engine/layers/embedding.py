"""Embeddings with K differences beside their frozen table.

Legend: B sequences, T positions, V vocabulary, D width, K copies, Q query and J key positions, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from clp_engine.layers.conditioned import CLPLayer, DeltaLayer, LayerContext, added_up, condition, widened, zero_copies
from clp_kernels import mixed_embedding


class _Embedding(DeltaLayer, nn.Embedding):
    """A table and its copies, `deltas` [V, K, D] float32, zero at first."""

    operator = "mixed_embedding"

    @classmethod
    def bases(cls, plain: type) -> tuple[type, ...]:
        """A subclass's own forward (scaling, an offset of positions) stays in front: its lookup is this one."""
        return (cls,) if plain is nn.Embedding else (plain, cls)

    @classmethod
    def adopt(cls, embedding: nn.Embedding, context: LayerContext, deltas: nn.Parameter | None = None) -> _Embedding:
        """Condition `embedding` in place, with the given copies of a tied weight or new ones."""
        layer: _Embedding = condition(embedding, cls, context)  # type: ignore[assignment]
        rows, width = embedding.weight.shape
        shape = (rows, len(context.copy_names), width)
        layer.deltas = zero_copies(shape, embedding.weight) if deltas is None else deltas
        return layer

    def collapsed(self, c_K: torch.Tensor, lambda_1: torch.Tensor) -> dict[str, torch.Tensor]:
        """`weight + einsum("k,vkd->vd", c, deltas)`."""
        deltas = widened(self.deltas)
        delta_VD = torch.einsum("k,vkd->vd", c_K.to(deltas), deltas)
        return {"weight": added_up(self.weight, delta_VD)}


class DeltaEmbedding(_Embedding):
    """An embedding of tokens or positions under each sequence's own average of the copies.

    Equivalent to `F.embedding(ids, weight + einsum("k,vkd->vd", c, deltas))`. One row of ids for the whole batch
    (positions) gives one row of embeddings for each sequence.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up ids [B, T] or [1, T]."""
        record = self.record(input.device)
        if record.is_reference:
            return super().forward(input)
        ids = record.for_every_sequence(input)
        return mixed_embedding(
            ids,
            self.weight,
            self.deltas,
            record.columns(self.clp.shared),
            row_map=record.row_map(ids.shape),
            padding_idx=self.padding_idx,
            backend=record.backend,
            batch_invariant=record.batch_invariant,
        )


class RelativeBiasEmbedding(_Embedding):
    """T5's table of relative position biases: looked up once for all sequences, so every sequence's own is made here.

    Its attention permutes what it returns to [1, H, Q, J]; `PerSequenceBias` then splits the sequences from the heads.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up buckets [Q, J]; [Q, J, B * H] with sequences outermost, [Q, J, H] where all are the reference."""
        record = self.record(input.device)
        if record.is_reference:
            return super().forward(input)
        shape = len(self.weight), len(record.rows_B)  # a table of few buckets: mixed whole for each sequence
        mixed_VBH = mixed_embedding(
            torch.arange(shape[0], device=input.device)[:, None].expand(shape),
            self.weight,
            self.deltas,
            record.columns(self.clp.shared),
            row_map=record.rows_B.expand(shape),
            backend=record.backend,
            batch_invariant=record.batch_invariant,
        )
        return F.embedding(input, mixed_VBH.flatten(1))


class PerSequenceBias(CLPLayer):
    """The attention that owns a `RelativeBiasEmbedding`: its bias gets a row for each sequence."""

    def compute_bias(self, *args: object, **kwargs: object) -> torch.Tensor:
        """The plain bias [1, H, Q, J], or one for each sequence, [B, H, Q, J]."""
        bias = super().compute_bias(*args, **kwargs)  # type: ignore[misc]
        return bias.view(-1, self.n_heads, *bias.shape[2:])

    def copies(self, parameters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """None of its own."""
        return {}

    def collapsed(self, c_K: torch.Tensor, lambda_1: torch.Tensor) -> dict[str, torch.Tensor]:
        """Nothing of its own."""
        return {}
