"""Tiny models of several architectures, and adapters of theirs made by the peft library itself."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from tests_support import tiny_llama

ARCHITECTURES = ("llama", "gpt2", "t5")
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "t5": ["q", "v", "wo"]}


def tiny(architecture: str):
    import transformers

    if architecture == "llama":
        return tiny_llama()
    torch.manual_seed(0)
    if architecture == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
            bos_token_id=1, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def inputs(model, rows: int) -> dict[str, torch.Tensor]:
    """Random ids, and those of the decoder where the model has one."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 32, (rows, 7), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": torch.randint(2, 32, (rows, 5), generator=generator)}
    return {"input_ids": ids}


def save_adapter(base, folder: Path, seed: int, **fields) -> Path:
    """An adapter that peft makes on a copy of `base`, both factors random, saved by peft."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(base), LoraConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    model.save_pretrained(folder)
    return folder


def load_adapters(base, folders: dict[str, Path]):
    """peft's model of a copy of `base` with every adapter, by name."""
    from peft import PeftModel

    (first, folder), *others = folders.items()
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name=first)
    for name, other in others:
        model.load_adapter(other, adapter_name=name)
    return model.eval()
