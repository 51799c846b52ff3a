"""Functions that several tests share."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

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


def tiny_t5(seed: int = 0, num_layers: int = 2):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=48, num_layers=num_layers, num_heads=4,
        initializer_factor=2.0, dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def tiny_bart(seed: int = 0):
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(seed)
    size = {f"{side}_{name}": n for side in ("encoder", "decoder")
            for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    config = BartConfig(vocab_size=32, d_model=32, **size, init_std=0.3, max_position_embeddings=64, dropout=0.0,
        pad_token_id=0, eos_token_id=1, bos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None)  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def mixed_by_hand(plain, conditioned, weights):
    """The plain model with W_0 + sum_k w_k Delta_k written into its layers."""
    from clp_engine.layers import conditioned_layers

    model = copy.deepcopy(plain)
    with torch.no_grad():
        for name, layer in conditioned_layers(conditioned).items():
            model.get_submodule(name).weight += torch.einsum("k,nkd->nd", weights, layer.deltas)
    return model


def fixed_noise(num_sequences: int = 1):
    """A logits processor for do_sample that leaves one token of each row, drawn by noise that depends on the step and
    on the sequence's place among those of its prompt, not on the batch.
    """
    from transformers import LogitsProcessor

    class FixedNoise(LogitsProcessor):
        step = 0

        def __call__(self, input_ids, scores):
            self.step += 1
            noise = torch.rand(num_sequences, scores.shape[1], generator=torch.Generator().manual_seed(self.step))
            gumbel = -(-noise.log()).log()
            drawn = (scores + gumbel.repeat(len(scores) // num_sequences, 1)).argmax(dim=1, keepdim=True)
            return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)

    return FixedNoise()


def randomise_deltas(model, std: float = 0.1, seed: int = 1) -> None:
    """Give everything that conditioning added values that matter."""
    from clp_engine.layers import conditioned_layers

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in conditioned_layers(model).values():
            for parameter in layer.added_parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def load_setup() -> ModuleType:
    """setup.py, not run as a program."""
    spec = importlib.util.spec_from_file_location("clp_setup", Path(__file__).parents[1] / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
