"""Small random models of each architecture, saved and loaded through from_pretrained."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
import transformers

SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "initializer_range": 0.3,
}
GROUPED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 8}
CONFIGS = {
    "llama": transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**GROUPED),
    "qwen3": transformers.Qwen3Config(**HEADED),
    "gemma": transformers.GemmaConfig(**HEADED),
    "gemma2": transformers.Gemma2Config(**HEADED, sliding_window=4, final_logit_softcapping=2.0),
    "gemma3": transformers.Gemma3TextConfig(**HEADED, sliding_window=4),
    "mistral": transformers.MistralConfig(**GROUPED, sliding_window=4),
    "phi": transformers.PhiConfig(**SMALL, intermediate_size=48),
    "phi3": transformers.Phi3Config(**GROUPED),
    "gpt2": transformers.GPT2Config(
        vocab_size=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=1, bos_token_id=1,
        pad_token_id=0,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=48),
    "falcon": transformers.FalconConfig(**SMALL, multi_query=True),
    "bloom": transformers.BloomConfig(**{**SMALL, "n_layer": 2, "n_head": 4}),
    "t5": transformers.T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=1.0,
        decoder_start_token_id=0,
    ),
    "bart": transformers.BartConfig(
        vocab_size=32, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.3, forced_eos_token_id=None,
    ),
}  # fmt: skip


@cache
def _saved(name: str) -> Path:
    folder = Path(mkdtemp(prefix=f"{name}-"))
    torch.manual_seed(0)
    auto_class(name).from_config(CONFIGS[name]).save_pretrained(folder)
    return folder


def auto_class(name: str):
    if CONFIGS[name].is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def load(name: str):
    """A fresh model of that architecture, always with the same weights, float32."""
    return auto_class(name).from_pretrained(_saved(name)).eval()
