"""Encoder-decoders: encoder rows are the batch's, decoder rows those of its beams, all under their weightings."""

from __future__ import annotations

import copy

import pytest
import torch
from tests_support import fixed_noise, mixed_by_hand, randomise_deltas, tiny_bart, tiny_t5
from transformers.modeling_outputs import BaseModelOutput

import clp_engine as clp
from clp_engine.layers import conditioned_layers
from clp_engine.rollout import rollout

W = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
IDS = torch.tensor([[5, 6, 7, 8, 1], [8, 9, 10, 1, 0], [11, 1, 0, 0, 0]])
LABELS = torch.tensor([[12, 13, 1], [14, 1, -100], [15, 16, 1]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
OPTIONS = {"max_new_tokens": 6, "do_sample": False}

FAMILIES = {"t5": tiny_t5, "bart": tiny_bart}
# Two blocks each: q, k, v, o of the encoder's, the decoder's and the cross-attention, once each.
NUM_LAYERS = 2 * 4 * 3


@pytest.fixture(params=FAMILIES)
def plain(request):
    return FAMILIES[request.param]()


def condition(plain, **fields):
    return clp.get_clp_model(copy.deepcopy(plain), clp.CLPConfig(**{"rewards": ["long", "short"], **fields}))


@pytest.fixture
def model(plain):
    model = condition(plain)
    randomise_deltas(model, 0.3)
    return model


def test_attention_layers_are_found_once_and_position_biases_are_left(model):
    names = list(conditioned_layers(model))
    assert len(names) == len(set(names)) == NUM_LAYERS
    assert not any("relative_attention_bias" in name for name in names)


# Without gradients: T5's trainable position bias makes torch choose another attention kernel than a frozen one does.
@torch.no_grad()
@pytest.mark.parametrize("variant", ["attn", "logit"])
@pytest.mark.parametrize("weights", [None, {"long": 1.0, "short": 0.0}, W])
def test_before_training_the_model_is_the_plain_one_bit_for_bit(plain, weights, variant):
    model = condition(plain, variant=variant)
    model.set_kernel_backend("reference")
    got, expected = model(**BATCH, labels=LABELS, reward_weights=weights), plain(**BATCH, labels=LABELS)
    assert torch.equal(got.logits.view(torch.int32), expected.logits.view(torch.int32))
    assert torch.equal(got.loss, expected.loss)
    beams = {"num_beams": 3, "num_return_sequences": 2, **OPTIONS}
    assert torch.equal(model.generate(**BATCH, reward_weights=weights, **beams), plain.generate(**BATCH, **beams))


@torch.no_grad()
def test_each_row_is_the_plain_model_with_that_rows_mix(plain, model):
    got = model(**BATCH, labels=LABELS, reward_weights=W).logits
    for i, w in enumerate(W):
        mixed = mixed_by_hand(plain, model, w)
        expected = mixed(**BATCH, labels=LABELS).logits[i]
        # The test's own premise: mixing matters to encoder and decoder.
        assert (expected - plain(**BATCH, labels=LABELS).logits[i]).abs().max() > 0.1
        assert torch.allclose(got[i], expected, atol=2e-4)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "static_cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mixed_batch_generates_what_each_row_generates_alone(model, mode, backend):
    model.set_kernel_backend(backend)
    n = MODES[mode].get("num_return_sequences", 1)

    def generate(inputs, weights):
        noise = {"logits_processor": [fixed_noise(n)]} if mode == "samples" else {}
        return model.generate(**inputs, reward_weights=weights, **{**OPTIONS, **MODES[mode]}, **noise)

    together = generate(BATCH, W)
    for i, w in enumerate(W):
        ids = IDS[i, IDS[i] != 0][None]
        wanted = generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, w)
        assert torch.equal(together[i * n : (i + 1) * n, : wanted.shape[1]], wanted)
    assert not torch.equal(together, generate(BATCH, W.flip(0))), "nothing was tested"


def test_encoder_outputs_of_the_caller_are_taken(model, monkeypatch):
    with torch.no_grad():
        whole = model(**BATCH, labels=LABELS, reward_weights=W)
        tokens = model.generate(**BATCH, reward_weights=W, num_beams=2, **OPTIONS)

        def never(*args, **kwargs):
            raise AssertionError("the encoder ran")

        monkeypatch.setattr(model.get_encoder(), "forward", never)
        encoded = BaseModelOutput(last_hidden_state=whole.encoder_last_hidden_state)
        rest = {"encoder_outputs": encoded, "attention_mask": BATCH["attention_mask"], "reward_weights": W}
        assert torch.equal(model(labels=LABELS, **rest).logits, whole.logits)
        del rest["attention_mask"]  # the rows are counted by the encoder's outputs then
        decoder_ids = torch.zeros(3, 1, dtype=torch.long)
        assert model(decoder_input_ids=decoder_ids, **rest).logits.shape[0] == 3
        rest["attention_mask"] = BATCH["attention_mask"]
        encoded = BaseModelOutput(last_hidden_state=whole.encoder_last_hidden_state)
        assert torch.equal(model.generate(**{**rest, "encoder_outputs": encoded}, num_beams=2, **OPTIONS), tokens)


def test_the_encoder_by_itself_has_no_weighting(model):
    with pytest.raises(RuntimeError, match="outside the conditioned model's forward"):
        model.get_encoder()(**BATCH)


def test_assisted_decoding_runs_the_assistants_encoder_under_the_weighting(model):
    assistant = copy.deepcopy(model)
    for layer in conditioned_layers(assistant).values():
        layer.deltas.data.mul_(0.9)
    row = {"input_ids": IDS[:1], "reward_weights": W[1], **OPTIONS}
    assert torch.equal(model.generate(**row, assistant_model=assistant), model.generate(**row))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_under_its_own_forwards_weighting(model, use_reentrant):
    def gradients(model, interleave):
        model.double().train().enable_input_require_grads()  # float64: the gradients nearly cancel
        loss = model(**BATCH, labels=LABELS, reward_weights=W, use_cache=False).loss
        if interleave:
            with torch.no_grad():
                model(**BATCH, labels=LABELS, reward_weights=[0.0, 1.0], use_cache=False)
        loss.backward()
        return [layer.deltas.grad for layer in conditioned_layers(model).values()]

    expected = gradients(copy.deepcopy(model), interleave=False)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for got, want in zip(gradients(model, interleave=True), expected, strict=True):
        assert (got - want).abs().max() <= 1e-9 * want.abs().max()


def test_a_saved_model_comes_back_as_an_encoder_decoder(plain, tmp_path):
    plain.save_pretrained(tmp_path / "base")
    model = clp.get_clp_model(type(plain).from_pretrained(tmp_path / "base"), clp.CLPConfig(rewards=["long", "short"]))
    randomise_deltas(model)
    model.save_pretrained(tmp_path / "model")
    loaded = clp.CLPModel.from_pretrained(tmp_path / "model", dtype=torch.float32, device_map="cpu")
    assert loaded.base_class is type(plain)
    with torch.no_grad():
        got, expected = (m(**BATCH, labels=LABELS, reward_weights=W).logits for m in (loaded, model))
    assert torch.equal(got, expected)


def test_rollouts_are_refused_by_name(model, tokenizer):
    with pytest.raises(NotImplementedError, match="encoder-decoders"):
        rollout(model, tokenizer, ["the cat"], max_new_tokens=2, do_sample=False)
