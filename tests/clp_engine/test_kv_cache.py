"""Tags of KV caches: which weighting filled one, compared where a caller hands it in."""

from __future__ import annotations

import pytest
import torch
from tests_support import randomise_deltas, tiny_bart, tiny_llama, tiny_t5
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import clp_engine as clp

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
W, OTHER = torch.tensor([[1.0, 0.0], [0.3, 0.7]]), torch.tensor([[0.3, 0.7], [1.0, 0.0]])
PLAIN = {"llama": tiny_llama, "t5": tiny_t5, "bart": tiny_bart}


def new_cache(kind, config):
    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=16)
    if kind == "static_encoder_decoder":
        return EncoderDecoderCache(
            StaticCache(config=config, max_cache_len=16), StaticCache(config=config, max_cache_len=IDS.shape[1])
        )
    return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))


CASES = [
    ("llama", "dynamic"),
    ("llama", "static"),
    ("t5", "encoder_decoder"),
    ("bart", "encoder_decoder"),
    ("bart", "static_encoder_decoder"),
]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    family, kind = request.param
    model = clp.get_clp_model(PLAIN[family](), clp.CLPConfig(rewards=["long", "short"]))
    randomise_deltas(model)
    return model, new_cache(kind, model.config)


def inputs(model, ids=IDS):
    """What a forward and a generate of one step of the decoder take."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    return {"input_ids": IDS, "decoder_input_ids": ids}


@torch.no_grad()
def test_a_cache_belongs_to_its_weighting(case):
    model, cache = case
    model(**inputs(model), past_key_values=cache, reward_weights=W)
    step = {**inputs(model, IDS[:, -1:]), "past_key_values": cache}
    model(**step, reward_weights=W)
    for weighting in ({"reward_weights": OTHER}, {"reward_weights": W, "kl_weight": 0.5}, {}):
        with pytest.raises(ValueError, match="belongs to its weighting"):
            model(**step, **weighting)
        with pytest.raises(ValueError, match="belongs to its weighting"):
            model.generate(**step, **weighting, max_new_tokens=1)


@torch.no_grad()
def test_a_cache_that_was_reset_is_anyones(case):
    model, cache = case
    first = model(**inputs(model), past_key_values=cache, reward_weights=W).logits
    cache.reset()
    second = model(**inputs(model), past_key_values=cache, reward_weights=OTHER).logits
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(second, model(**inputs(model), reward_weights=OTHER).logits)
    with pytest.raises(ValueError, match="belongs to its weighting"):
        model(**inputs(model, IDS[:, -1:]), past_key_values=cache, reward_weights=W)


@torch.no_grad()
def test_a_cropped_cache_still_holds_the_encoders_states():
    model = clp.get_clp_model(tiny_bart(), clp.CLPConfig(rewards=["long", "short"]))
    randomise_deltas(model)
    cache = model(**inputs(model), use_cache=True, reward_weights=W).past_key_values
    cache.crop(-IDS.shape[1])
    with pytest.raises(ValueError, match="belongs to its weighting"):
        model(**inputs(model), past_key_values=cache, reward_weights=OTHER)


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [True, False])
def test_caches_made_by_a_forward_are_tagged(conditioned, return_dict):
    outputs = conditioned(input_ids=IDS, reward_weights=W, use_cache=True, return_dict=return_dict)
    cache = outputs.past_key_values if return_dict else outputs[1]
    with pytest.raises(ValueError, match="belongs to its weighting"):
        conditioned(input_ids=IDS[:, -1:], past_key_values=cache, reward_weights=OTHER)


@torch.no_grad()
def test_a_forward_that_fails_leaves_a_tag(conditioned, monkeypatch):
    """Its first layers may have filled their part of the cache already."""
    cache = DynamicCache()

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conditioned.model.layers[1], "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            conditioned(input_ids=IDS, past_key_values=cache, reward_weights=W)
    assert cache.get_seq_length() == IDS.shape[1]
    with pytest.raises(ValueError, match="belongs to its weighting"):
        conditioned(input_ids=IDS[:, -1:], past_key_values=cache, reward_weights=OTHER)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generation_goes_on_from_a_cache_of_its_weighting(conditioned, kind):
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "reward_weights": W}
    whole = conditioned.generate(IDS, max_new_tokens=6, **options)
    cache = new_cache(kind, conditioned.config)
    half = conditioned.generate(IDS, max_new_tokens=3, past_key_values=cache, **options)
    assert torch.equal(conditioned.generate(half, max_new_tokens=3, past_key_values=cache, **options), whole)
    with pytest.raises(ValueError, match="belongs to its weighting"):
        conditioned.generate(whole, max_new_tokens=1, past_key_values=cache, **{**options, "reward_weights": OTHER})


@torch.no_grad()
def test_repeated_and_selected_rows_keep_the_one_weighting_that_filled_them():
    """Its owner may prefill a prompt once: what all rows of a cache share is known whatever became of them."""
    model = clp.get_clp_model(tiny_llama(), clp.CLPConfig(rewards=["long", "short"]))
    randomise_deltas(model)
    prompt, step = IDS[:1], IDS[:, -1:]
    cache = model(prompt, reward_weights=W[1], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    for weighting in (W, OTHER[1]):
        with pytest.raises(ValueError, match="belongs to its weighting"):
            model(step, past_key_values=cache, reward_weights=weighting)
    got = model(step, past_key_values=cache, reward_weights=W[1]).logits[:, -1]
    rows = torch.cat([prompt.expand(2, -1), step], dim=1)
    assert torch.allclose(got, model(rows, reward_weights=W[1]).logits[:, -1], atol=1e-5)
    mixed = model(IDS, reward_weights=W, use_cache=True).past_key_values
    mixed.batch_select_indices(torch.tensor([1]))
    with pytest.raises(ValueError, match="belongs to its weighting"):
        model(step[:1], past_key_values=mixed, reward_weights=W[1])
