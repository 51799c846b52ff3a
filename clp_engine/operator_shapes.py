"""The operators and sizes of a model's conditioned layers, which is what its kernels are tuned for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clp_engine import checkpoint
from clp_engine.config import CLPConfig
from clp_engine.layers import CLPLayer, DeltaEmbedding, DeltaLinear, DeltaNorm, SoftTokenAttention, conditioned_layers
from clp_engine.layers.low_rank import LowRankLinear
from clp_engine.model import get_clp_model
from clp_engine.pretrained import outline_by_name
from clp_kernels.tuning_cases import OperatorShape


def shapes_of_model(name_or_path: str) -> list[OperatorShape]:
    """List what the conditioned layers of a model call, each once; no weights are read.

    Args:
        name_or_path: a conditioned model's folder or hub id, or a plain model's: that one as `CLPConfig` conditions it
            by default, on two rewards.

    Raises:
        FileNotFoundError: no such model.
    """
    model = _outline(name_or_path)
    head, found = model.get_output_embeddings(), []
    for layer in conditioned_layers(model).values():
        found += _shapes_of(layer)
        if layer is head and isinstance(layer, DeltaLinear):
            N, K, D = layer.deltas.shape
            found.append(OperatorShape("mixed_linear_logprob", _dtype_of(layer), layer.deltas.dtype, K, N, D))
    return list(dict.fromkeys(found))


def _outline(name_or_path: str) -> Any:
    is_plain = Path(name_or_path).exists() and not checkpoint.is_conditioned(name_or_path)
    if not is_plain:
        try:
            return checkpoint.outline(checkpoint.find(name_or_path))
        except FileNotFoundError:
            if Path(name_or_path).exists():
                raise
    try:
        return get_clp_model(outline_by_name(name_or_path), CLPConfig(rewards=["first", "second"]))
    except OSError as error:
        raise FileNotFoundError(f"the model {name_or_path!r} cannot be read: {error}") from error


def _shapes_of(layer: CLPLayer) -> list[OperatorShape]:
    if isinstance(layer, SoftTokenAttention):  # its rows are the softmax over the tokens, in their own dtype
        D, K, num_tokens = layer.soft_values.shape
        dtype = layer.soft_values.dtype
        return [OperatorShape(layer.operator, dtype, dtype, K, D, num_tokens)]
    if isinstance(layer, LowRankLinear):
        down, up = layer.factors()
        return [OperatorShape(layer.operator, _dtype_of(layer), down.dtype, len(down), len(up), down.shape[1])]
    if isinstance(layer, DeltaNorm):
        D, K = layer.deltas.shape
        return [OperatorShape(layer.operator, _dtype_of(layer), layer.deltas.dtype, K, 1, D)]
    if isinstance(layer, (DeltaLinear, DeltaEmbedding)):
        N, K, D = layer.deltas.shape
        return [OperatorShape(layer.operator, _dtype_of(layer), layer.deltas.dtype, K, N, D)]
    return []  # looked up once for all sequences: a table of a few numbers


def _dtype_of(layer: CLPLayer) -> torch.dtype:
    """The dtype of a layer's rows: its own weight's, or float32's where that is a quantised format."""
    weight = getattr(layer, "weight", None)
    return weight.dtype if weight is not None and weight.is_floating_point() else torch.float32
