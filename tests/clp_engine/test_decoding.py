"""Decoding that shares prompts and drops ended rows against generate for each row alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests_support import randomise_deltas, tiny_llama

import clp_engine as clp
from clp_engine.decoding import PIECE, decode
from clp_engine.rollout import encode_prompts

PROMPTS = ["the cat", "the cat read all of the dog", "the cat sum"]
LENGTH = 4 * PIECE - 1


class Counting:
    """Records the shape of each forward's input ids."""

    def __init__(self, model, monkeypatch):
        self.shapes = []
        real = model.model.forward

        def forward(input_ids=None, **kwargs):
            self.shapes.append(tuple(input_ids.shape))
            return real(input_ids=input_ids, **kwargs)

        monkeypatch.setattr(model.model, "forward", forward)


def batch(model, tokenizer, num_weightings):
    """Every prompt under every weighting, prompt-major as a sweep has them."""
    ids, mask = encode_prompts(tokenizer, PROMPTS)
    w = torch.rand(num_weightings, 2, generator=torch.Generator().manual_seed(3))
    w = w / w.sum(dim=1, keepdim=True)
    return {
        "input_ids": ids.repeat_interleave(num_weightings, dim=0),
        "attention_mask": mask.repeat_interleave(num_weightings, dim=0),
        "coefficients": model.coefficients(len(w), w).repeat(len(PROMPTS), 1),
    }


def greedy(model):
    model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=[1, 7], pad_token_id=0)
    return model


@pytest.fixture
def model():
    model = clp.get_clp_model(tiny_llama(5), clp.CLPConfig(rewards=["long", "short"]))
    randomise_deltas(model, 0.2)
    return greedy(model)


@torch.no_grad()
def check_rows(model, inputs, n):
    """Each row's tokens and logits up to its end are those of the row generated alone; return the ends."""
    ids_BL, logits_BLV = decode(model, inputs, n, LENGTH, True)
    ends = []
    for b, (ids, logits) in enumerate(zip(ids_BL, logits_BLV, strict=True)):
        g = b // n
        prompt = inputs["input_ids"][g, inputs["attention_mask"][g].bool()][None]
        alone = model.generate(
            prompt,
            coefficients=inputs["coefficients"][g : g + 1],
            max_new_tokens=LENGTH,
            return_dict_in_generate=True,
            output_logits=True,
        )
        wanted = alone.sequences[0, prompt.shape[1] :]
        ends.append(len(wanted))
        assert torch.equal(ids[: len(wanted)], wanted), b
        assert not ids[len(wanted) :].any(), b
        torch.testing.assert_close(logits[: len(wanted)], torch.cat(alone.logits), atol=2e-5, rtol=1e-4)
    return ends


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_weightings", [1, 4])
def test_rows_are_those_of_generate(model, tokenizer, num_weightings, n):
    inputs = batch(model, tokenizer, num_weightings)
    ends = check_rows(model, inputs, n)
    if num_weightings == 4:
        assert len(set(ends)) > 2, "rows must end apart, or nothing is tested"


@pytest.mark.parametrize("family", ["gpt_neox", "bloom", "mistral-4", "mistral-12", "falcon_h1"])
def test_other_positions_windows_and_states(family, tokenizer):
    """Rotary positions of a part of each head, ALiBi, windows shorter than the prompt and than prompt and completion,
    and a recurrent state.
    """
    small = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "initializer_range": 0.3}  # fmt: skip
    configs = {
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**small, intermediate_size=48),
        "bloom": lambda: transformers.BloomConfig(**small, n_layer=2, n_head=4),
        "mistral-4": lambda: transformers.MistralConfig(
            **small, intermediate_size=48, num_key_value_heads=2, sliding_window=4
        ),
        "mistral-12": lambda: transformers.MistralConfig(
            **small, intermediate_size=48, num_key_value_heads=2, sliding_window=12
        ),
        "falcon_h1": lambda: transformers.FalconH1Config(
            **small, intermediate_size=48, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
            mamba_d_state=8, mamba_chunk_size=4,
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(configs[family]()).eval()
    model = greedy(clp.get_clp_model(plain, clp.CLPConfig(rewards=["long", "short"])))
    randomise_deltas(model, 0.2)
    check_rows(model, batch(model, tokenizer, 2), 2)


@torch.no_grad()
def test_rotations_that_depend_on_the_longest_row_are_left_to_generate(tokenizer):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    torch.manual_seed(0)
    config = transformers.Phi3Config(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, initializer_range=0.3, pad_token_id=0, rope_parameters=rope,
        max_position_embeddings=64, original_max_position_embeddings=4)  # fmt: skip
    model = transformers.Phi3ForCausalLM(config).eval()
    model = greedy(clp.get_clp_model(model, clp.CLPConfig(rewards=["long", "short"], target_modules=["o_proj"])))
    randomise_deltas(model, 0.2)
    inputs = batch(model, tokenizer, 2)
    expected = model.generate(**inputs, max_new_tokens=LENGTH)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(decode(model, inputs, 1, LENGTH, False)[0], expected)


def test_shared_tokens_run_once_and_ended_rows_leave(model, tokenizer, monkeypatch):
    inputs = batch(model, tokenizer, 4)
    with torch.no_grad():
        ends = torch.tensor(check_rows(model, inputs, 1))
    counted = Counting(model, monkeypatch)
    with torch.no_grad():
        decode(model, inputs, 1, LENGTH, False)
    width = inputs["input_ids"].shape[1]
    prefix, rest, *steps = counted.shapes
    assert prefix == (4, 1)  # "the" for each weighting; "cat" is the shortest prompt's last token
    assert rest == (12, width - 2)
    # The first token of a piece is the step that reads the last token of the one before.
    expected = [int((ends > PIECE * (i // PIECE)).sum()) for i in range(int(ends.max()))]
    assert [rows for rows, _ in steps] == expected
    assert expected[-1] < 12
