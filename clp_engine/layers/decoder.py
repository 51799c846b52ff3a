"""Decoder layers of Llama's form, whose norm, projections and rotation are one operator call while they decode.

Legend: B sequences, T tokens, D width, E size of a head, H heads.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from clp_engine.conditioning import ActiveConditioning, Conditioning
from clp_engine.layers.conditioned import FrontedModule, LayerContext, condition
from clp_engine.layers.linear import DeltaLinear, runs_fused
from clp_kernels import Projection, available_backends, mixed_qkv
from clp_kernels.select import DECODE_ROWS

# Model types of transformers whose decoder layers are Llama's: norm, attention, residual, norm, MLP, residual.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Up to how many rows a decode step's attention blocks take 10 % less time by mixed_qkv. SmolLM2-135M's shape, K = 2,
# all weightings different, 64 cached tokens, 1, 4, 8, 16, 32 and 64 rows on a Xeon with AMX, two threads, percent saved
# in two runs (`make bench-full BENCH_FLAGS="-k qkv"`): float32 12 16 12 15 4 -, 23 22 16 16 8 7; bfloat16 16 20 21 24
# 22 15, 25 26 34 23 24 15; float32 copies beside it 17 19 21 16 17 11, 22 17 19 18 18 15. The layer's own forward by
# torch.compile takes up to 19 % less than this. Other dtypes and devices are not measured.
MOST_ROWS = {("cpu", torch.float32): 16, ("cpu", torch.bfloat16): DECODE_ROWS}


class LlamaDecoder(FrontedModule):
    """A decoder layer that decodes with one `mixed_qkv` instead of norm, q, k, v and rotation one by one.

    Only where that is the same computation, up to rounding: one token a sequence behind a KV cache, no gradient and no
    compiling, few rows, differences beside plain nn.Linear layers and no averaged norm, and none of the modules that
    are then not called has hooks. Everything else takes the layer's own forward: prompts and log-probs keep their bits,
    with a gradient or without.
    """

    self_attn: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    mlp: Any
    keeps_name = True

    @classmethod
    def adopt(cls, layer: nn.Module, context: LayerContext) -> LlamaDecoder:
        """Condition a decoder layer in place; its projections are conditioned already."""
        return condition(layer, cls, context)  # type: ignore[return-value]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own forward returns."""
        is_decoding = not args and hidden_states.shape[1:2] == (1,) and kwargs.get("past_key_values") is not None
        record = self.fused_record(hidden_states, kwargs.get("position_embeddings")) if is_decoding else None
        if record is None:
            return super().forward(hidden_states, *args, **kwargs)
        hidden_states = hidden_states + self.attend(hidden_states, record, **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def fused_record(self, x_BTD: torch.Tensor, tables: Any) -> Conditioning | None:
        """The record of the running forward where the fused call computes the same, else None."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        record = self.clp.active.record
        if record is None or record.is_reference or record.backend not in ("auto", "cpp"):
            return None
        most = MOST_ROWS.get((x_BTD.device.type, x_BTD.dtype), 0)
        if x_BTD.dim() != 3 or x_BTD.shape[0] * x_BTD.shape[1] > most or not isinstance(tables, tuple):
            return None
        if torch.is_autocast_enabled(x_BTD.device.type) or tables[0].shape[-1] != self.self_attn.head_dim:
            return None
        return record if self._has_plain_parts(x_BTD.dtype) else None

    def _has_plain_parts(self, dtype: torch.dtype) -> bool:
        # In each layer of each step: modules come from their dictionaries, attributes of modules take twice as long.
        attention: Any = self._modules["self_attn"]
        parts = attention._modules
        own = _own(self.plain_class)
        norms: list[Any] = [
            self._modules["input_layernorm"],
            *(parts[name] for name in ("q_norm", "k_norm") if name in parts),
        ]
        linears = [parts["q_proj"], parts["k_proj"], parts["v_proj"]]
        if type(attention) is not own.attention or _any_global_hook():
            return False
        for norm in norms:
            is_same = type(norm) is own.norm and norm.variance_epsilon == norms[0].variance_epsilon
            if not is_same or norm._parameters["weight"].dtype != dtype:
                return False
        for linear in linears:
            if not isinstance(linear, DeltaLinear) or not runs_fused(linear):
                return False
            weights: Any = linear._parameters
            if "weight" not in weights or weights["weight"].dtype != dtype:
                return False
            if linear.clp.shared != linears[0].clp.shared:
                return False
        return all(map(_is_bare, (attention, *norms, *linears)))

    def attend(
        self,
        hidden_states: torch.Tensor,
        record: Conditioning,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The attention's output for the layer's input, which is not normalised yet."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attention, norm = self.self_attn, self.input_layernorm
        cos, sin = position_embeddings
        heads = mixed_qkv(
            hidden_states,
            norm.weight,
            _projection(attention.q_proj),
            _projection(attention.k_proj),
            _projection(attention.v_proj),
            record.columns(attention.q_proj.clp.shared),
            cos,
            sin,
            q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
            k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
            eps=norm.variance_epsilon,
            row_map=record.row_map(hidden_states.shape[:-1]),
            backend=record.backend,
            batch_invariant=record.batch_invariant,
        )
        query, key, value = (t.transpose(1, 2) for t in heads)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        eager = _own(self.plain_class).eager
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
        dropout = attention.attention_dropout if attention.training else 0.0
        how = {**_window(attention), **kwargs}
        output, _ = attend(
            attention, query, key, value, attention_mask, dropout=dropout, scaling=attention.scaling, **how
        )
        return attention.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())


def fuse_decoders(model: nn.Module, active: ActiveConditioning) -> None:
    """Let the decoder layers of Llama's form whose q, k and v have full differences decode by one call each.

    Without the compiled operator nothing would be saved.
    """
    if available_backends()["cpp"] is not None:
        return
    for path, layer in list(model.named_modules()):
        attention = getattr(layer, "self_attn", None)
        linears = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        is_known = _model_type(type(layer)) in MODEL_TYPES and type(layer).__name__.endswith("DecoderLayer")
        if is_known and all(isinstance(part, DeltaLinear) for part in linears):
            LlamaDecoder.adopt(layer, LayerContext(active, path, ()))


def _model_type(cls: type) -> str | None:
    """The model type whose code in transformers defines `cls`; None for a class of anyone else."""
    package, _, name = cls.__module__.rpartition(".")
    is_known = package.startswith("transformers.models.") and name.startswith("modeling_")
    return name.removeprefix("modeling_") if is_known else None


class _Own(NamedTuple):
    """What the code of a decoder layer's model defines beside it."""

    attention: Any
    norm: Any
    eager: Any


@functools.cache
def _own(layer_class: type) -> _Own:
    """`LlamaAttention`, `LlamaRMSNorm` and the eager attention beside `LlamaDecoderLayer`."""
    code = sys.modules[layer_class.__module__]
    name = layer_class.__name__.removesuffix("DecoderLayer")
    return _Own(getattr(code, f"{name}Attention"), getattr(code, f"{name}RMSNorm"), code.eager_attention_forward)


def _any_global_hook() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _is_bare(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and, but for hooks of every module, nothing else."""
    own = vars(module)
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def _projection(linear: Any) -> Projection:
    own = linear._parameters
    return Projection(own["weight"], own["deltas"], own["bias"], own.get("bias_deltas"))


def _window(attention: Any) -> dict[str, Any]:
    """The sliding window as the model's own attention hands it on; Llama's hands on none."""
    if hasattr(attention, "sliding_window"):
        return {"sliding_window": attention.sliding_window}
    if _model_type(type(attention)) == "mistral":
        return {"sliding_window": getattr(attention.config, "sliding_window", None)}
    return {}
