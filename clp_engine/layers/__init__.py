"""Conditioned layers: what each family does to a linear layer, an embedding, a norm or an attention block."""

from clp_engine.layers.conditioned import (
    CLPLayer,
    LayerContext,
    condition,
    conditioned_layers,
    named_copies,
    release,
    widened,
)
from clp_engine.layers.embedding import DeltaEmbedding, RelativeBiasEmbedding
from clp_engine.layers.linear import DeltaLinear
from clp_engine.layers.low_rank import LoRALinear, PBLoRALinear, SVDLinear
from clp_engine.layers.norm import DeltaNorm
from clp_engine.layers.soft_tokens import SoftTokenAttention

__all__ = [
    "CLPLayer",
    "DeltaEmbedding",
    "DeltaLinear",
    "DeltaNorm",
    "LayerContext",
    "LoRALinear",
    "PBLoRALinear",
    "RelativeBiasEmbedding",
    "SVDLinear",
    "SoftTokenAttention",
    "condition",
    "conditioned_layers",
    "named_copies",
    "release",
    "widened",
]
