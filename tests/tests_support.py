"""Functions that several tests share."""

from __future__ import annotations

import torch


def tiny_llama(seed: int = 0, **overrides):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    fields = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **overrides})).eval()


def randomise_deltas(model, std: float = 0.1, seed: int = 1) -> None:
    """Give everything that conditioning added values that matter."""
    from clp_engine.layers import conditioned_layers

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in conditioned_layers(model).values():
            for parameter in layer.added_parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
