"""Padding-free batches: sequences of different weightings in one packed row, against the padded batch."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests_support import randomise_deltas, tiny_llama

import clp_engine as clp
from clp_engine.layers import conditioned_layers

SEQUENCES = [[5, 6, 7, 8, 9], [10], [11, 12], [5, 6, 7, 8, 9]]
W = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 1.0], [0.5, 0.5]])
LENGTHS = [len(sequence) for sequence in SEQUENCES]
SMALL = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip


def condition(plain, **fields):
    model = clp.get_clp_model(plain, clp.CLPConfig(**{"rewards": ["long", "short"], **fields}))
    randomise_deltas(model, 0.3)
    return model


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return condition(tiny_llama(attn_implementation=request.param))


def packed(labels=False, **options):
    features = [{"input_ids": sequence} for sequence in SEQUENCES]
    batch = transformers.DataCollatorWithFlattening(return_tensors="pt", **options)(features)
    return batch if labels else {name: value for name, value in batch.items() if name != "labels"}


def padded():
    width = max(LENGTHS)
    ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in SEQUENCES])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def rows_of(logits_1TV):
    return logits_1TV[0].split(LENGTHS)


FORMS = {
    "rows": {"reward_weights": W},
    "dicts": {"reward_weights": [{"short": float(w[1]), "long": float(w[0])} for w in W]},
    "kl": {"reward_weights": {"long": 0.5, "short": 0.5}, "kl_weight": torch.tensor([0.01, 1.0, 0.02, 0.01])},
    "coefficients": {"coefficients": W * 0.5},
    "one": {"reward_weights": [0.2, 0.8]},
    "default": {},
}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_packed_sequences_are_the_rows_of_the_padded_batch(model, form):
    weighting = FORMS[form]
    got = model(**packed(), **weighting, use_cache=False).logits
    expected = model(**padded(), **weighting).logits
    for row, wanted, length in zip(rows_of(got), expected, LENGTHS, strict=True):
        torch.testing.assert_close(row, wanted[:length], atol=1e-5, rtol=1e-5)
    flipped = model(**packed(), coefficients=W.flip(0)).logits
    assert (flipped - got).abs().max() > 0.1, "nothing was tested"


@torch.no_grad()
@pytest.mark.parametrize("keep", [3, torch.tensor([2, 5, 7])])
def test_heads_that_see_the_kept_tokens_only(keep):
    model = condition(tiny_llama(), variant="logit")
    whole = model(**packed(), reward_weights=W).logits
    kept = model(**packed(), reward_weights=W, logits_to_keep=keep).logits
    index = slice(-keep, None) if isinstance(keep, int) else keep
    torch.testing.assert_close(kept, whole[:, index], atol=1e-5, rtol=1e-5)


def test_training_steps_are_those_of_the_padded_batch(model):
    batch = packed(labels=True, return_flash_attn_kwargs=True, return_seq_idx=True)
    model.train()
    losses, gradients = [], []
    labels = padded()["input_ids"].masked_fill(padded()["attention_mask"] == 0, -100)
    for inputs in (batch, {**padded(), "labels": labels}):
        model.zero_grad()
        loss = model(**inputs, reward_weights=W).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([layer.deltas.grad.clone() for layer in conditioned_layers(model).values()])
    torch.testing.assert_close(*losses)
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
    assert model.training
    assert all(module.training for module in model.modules())


def test_numbers_of_sequences_and_weightings_must_agree(model):
    for rows in (W[:1], W[:3]):
        with pytest.raises(ValueError, match=rf"restart for 4 packed sequences, and {len(rows)} weightings"):
            model(**packed(), reward_weights=rows)
        with pytest.raises(ValueError, match="4 packed sequences"):
            model(**packed(), coefficients=rows)


def test_what_is_not_known_to_be_packed_is_refused(model):
    ids = packed()["input_ids"]
    with pytest.raises(ValueError, match="4 rows for a batch of 1"):
        model(input_ids=ids, reward_weights=W)
    with pytest.raises(ValueError, match="4 rows for a batch of 1"):
        model(**packed(), attention_mask=torch.ones_like(ids), reward_weights=W)
    with pytest.raises(ValueError, match="packed"):
        model(input_ids=ids, coefficients=W)
    with pytest.raises(ValueError, match="use_cache=True"):
        model(**packed(), reward_weights=W, use_cache=True)


@pytest.mark.parametrize("family", ["mistral", "gpt_neox", "falcon", "bloom", "falcon_h1"])
def test_models_whose_sequences_would_see_each_other_are_refused(family):
    """Falcon's masks and BLOOM's positions ignore position ids, Falcon-H1 has recurrent states."""
    configs = {
        "mistral": lambda: transformers.MistralConfig(
            **SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=4
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, intermediate_size=48),
        "falcon": lambda: transformers.FalconConfig(**SMALL),
        "bloom": lambda: transformers.BloomConfig(**SMALL, n_layer=2, n_head=4),
        "falcon_h1": lambda: transformers.FalconH1Config(
            **SMALL, intermediate_size=48, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
            mamba_d_state=8, mamba_chunk_size=4,
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configs[family]()).eval()
    model = condition(model, target_modules=r".*(self_attn|attention|self_attention)\..*")
    batch = packed()
    if family in ("mistral", "gpt_neox"):
        got, expected = model(**batch, reward_weights=W).logits, model(**padded(), reward_weights=W).logits
        for row, wanted, length in zip(rows_of(got), expected, LENGTHS, strict=True):
            torch.testing.assert_close(row, wanted[:length], atol=2e-5, rtol=1e-4)
    else:
        with pytest.raises(NotImplementedError, match="see each other: pad the batch"):
            model(**batch, reward_weights=W)
