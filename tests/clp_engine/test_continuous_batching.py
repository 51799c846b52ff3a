"""Continuous batching: requests of different weightings in packed rows, against each request generated alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests_support import randomise_deltas, tiny_llama
from transformers.generation.continuous_batching import ContinuousBatchingManager

import clp_engine as clp
from clp_engine import packing
from clp_engine.continuous_batching import WeightedManager

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [8, 9], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [5, 6, 7]]
W = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 1.0], [0.5, 0.5]])
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
# Pages of 4 tokens and steps of at most 8: prompts are prefilled in parts beside others that already decode.
SMALL = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 8}


def condition(plain, **fields):
    model = clp.get_clp_model(plain, clp.CLPConfig(**{"rewards": ["long", "short"], **fields}))
    randomise_deltas(model, 0.3)
    return model


@pytest.fixture
def model():
    return condition(tiny_llama())


def run(model, prompts, generation=None, batching=None, **weighting):
    out = model.generate_batch(
        inputs=prompts,
        generation_config=transformers.GenerationConfig(**{**GREEDY, **(generation or {})}),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**{**SMALL, **(batching or {})}),
        **weighting,
    )
    assert not [result.error for result in out.values() if result.error]
    return [result.generated_tokens for result in out.values()]


def alone(model, prompt, weights, **options):
    inputs = {"input_ids": torch.tensor([prompt]), "reward_weights": weights}
    return model.generate(**inputs, **GREEDY, **options)[0, len(prompt) :].tolist()


def padded(model, prompts, rows):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(ids, attention_mask=mask, reward_weights=rows, **GREEDY)[:, width:].tolist()
    return [[token for token in row if token] for row in out]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("variant", ["attn", "logit"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mixed_requests_give_the_tokens_of_padded_generation(monkeypatch, attention, variant, backend):
    model = condition(tiny_llama(attn_implementation=attention), variant=variant)
    model.set_kernel_backend(backend)
    most, real = 0, packing.paged_rows

    def paged_rows(kwargs, width):
        nonlocal most
        c_SC, sequence_1T = real(kwargs, width)
        most = max(most, len({tuple(row) for row in c_SC[sequence_1T[0]].tolist()}))
        return c_SC, sequence_1T

    monkeypatch.setattr(packing, "paged_rows", paged_rows)
    got = run(model, PROMPTS, reward_weights=W)
    assert most >= 3, "no step held several weightings"
    assert got == padded(model, PROMPTS, W)
    assert got == [alone(model, prompt, w) for prompt, w in zip(PROMPTS, W, strict=True)]
    assert got != run(model, PROMPTS, reward_weights=W.flip(0))


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gpt_neox"])
def test_other_families(family):
    small = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
    configs = {
        "qwen2": lambda: transformers.Qwen2Config(**small, num_key_value_heads=2),
        "mistral": lambda: transformers.MistralConfig(**small, num_key_value_heads=2, sliding_window=4),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**small),
    }
    torch.manual_seed(0)
    model = condition(transformers.AutoModelForCausalLM.from_config(configs[family]()).eval())
    assert run(model, PROMPTS, reward_weights=W) == [alone(model, *row) for row in zip(PROMPTS, W, strict=True)]


def test_equal_prompts_share_no_blocks_across_weightings(model):
    """One request after the other, so that the second would find the blocks that the first left in the cache."""
    prompts = [PROMPTS[0]] * 4
    batching = {"max_requests_per_batch": 1, "max_batch_tokens": 32}
    got = run(model, prompts, batching=batching, reward_weights=W)
    assert got == [alone(model, PROMPTS[0], w) for w in W]
    assert len({tuple(tokens) for tokens in got}) > 2


def test_requests_that_leave_the_cache_come_back_under_their_weightings(model):
    """A cache too small for all: transformers drops requests and prefills them again with what they had generated."""
    again = []
    real = transformers.generation.continuous_batching.RequestState.create_equivalent_initial_request
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transformers.generation.continuous_batching.RequestState,
            "create_equivalent_initial_request",
            lambda self: again.append(self.request_id) or real(self),
        )
        generation = {"max_new_tokens": 14, "eos_token_id": -1}
        got = run(model, PROMPTS, generation, {"num_blocks": 10, "max_batch_tokens": 32}, reward_weights=W)
    assert again, "no request was dropped"
    for tokens, prompt, w in zip(got, PROMPTS, W, strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(ids, reward_weights=w, **{**GREEDY, **generation})[0, len(prompt) :].tolist()
        assert tokens == wanted


@pytest.mark.parametrize("per_request_processors", [False, True])
def test_returned_sequences_keep_their_prompts_weighting(model, per_request_processors):
    """Sampled so coldly that it is greedy; a processor's own arguments lie before the coefficients."""
    generation = {"num_return_sequences": 2, "do_sample": True, "temperature": 1e-4}
    got = run(model, PROMPTS, generation, {"per_request_processors": per_request_processors}, reward_weights=W)
    wanted = [alone(model, prompt, w) for prompt, w in zip(PROMPTS, W, strict=True)]
    assert got == [tokens for tokens in wanted for _ in range(2)]


FORMS = {
    "dict": {"reward_weights": {"short": 0.8, "long": 0.2}},
    "dicts": {"reward_weights": [{"short": float(w[1]), "long": float(w[0])} for w in W]},
    "list": {"reward_weights": [0.2, 0.8]},
    "default": {},
    "kl": {"reward_weights": W, "kl_weight": torch.tensor([0.01, 1.0, 0.02, 0.01])},
    "coefficients": {"coefficients": W * 0.5},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_weighting(model, form):
    weighting = FORMS[form]
    c = weighting.get("coefficients")
    c = model.coefficients(4, **weighting) if c is None else c
    wanted = [alone(model, prompt, None, coefficients=row[None]) for prompt, row in zip(PROMPTS, c, strict=True)]
    assert run(model, PROMPTS, **weighting) == wanted


def test_what_does_not_fit_is_refused_before_the_first_token(model):
    with pytest.raises(ValueError, match="4 rows for a batch of 2"):
        model.generate_batch(PROMPTS[:2], reward_weights=W)
    with pytest.raises(ValueError, match="must sum to 1"):
        model.generate_batch(PROMPTS, reward_weights=[0.5, 0.6])


def test_a_manager_takes_a_weighting_with_each_request(model):
    with model.continuous_batching_context_manager(
        generation_config=transformers.GenerationConfig(**GREEDY),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**SMALL),
    ) as manager:
        assert isinstance(manager, WeightedManager)
        weighting = {"reward_weights": {"short": 0.25, "long": 0.75}, "kl_weight": 0.02}
        wanted = {manager.add_request(PROMPTS[0], **weighting): model.coefficients(1, **weighting)}
        wanted[manager.add_request(PROMPTS[0])] = model.coefficients(1)
        wrong = manager.add_request(PROMPTS[0], reward_weights={"short": 1.0})
        longer = manager.add_request(PROMPTS[0], coefficients=[0.0] * 3)
        results = {}
        while len(results) < 4:
            result = manager.get_result(timeout=60)
            results[result.request_id] = result
    for name, c in wanted.items():
        assert results[name].generated_tokens == alone(model, PROMPTS[0], None, coefficients=c)
    assert "missing: ['long']" in results[wrong].error
    assert "coefficients has 3 entries, the model takes 2" in results[longer].error


def test_a_manager_of_another_make_knows_no_weightings(model, caplog):
    manager = ContinuousBatchingManager(
        model, transformers.GenerationConfig(**GREEDY), transformers.ContinuousBatchingConfig(**SMALL)
    )
    manager.start()
    manager.add_request(PROMPTS[0])
    result = manager.get_result(timeout=60)
    manager.stop()
    assert "continuous batching without weightings" in result.error


def test_a_manager_from_before_the_conditioning_is_refused():
    plain = tiny_llama()
    config = transformers.GenerationConfig(**GREEDY)
    batching = transformers.ContinuousBatchingConfig(**SMALL)
    plain.generate_batch(PROMPTS, config, batching, persistent_manager=True)
    model = condition(plain)
    with pytest.raises(RuntimeError, match="destroy_cached_continuous_batching_manager"):
        model.generate_batch(PROMPTS, config, batching, reward_weights=W)
    model.destroy_cached_continuous_batching_manager()
    first, second = (
        [r.generated_tokens for r in model.generate_batch(PROMPTS, config, batching, persistent_manager=True,
                                                          reward_weights=w).values()]
        for w in (W, W.flip(0))
    )  # fmt: skip
    assert first == padded(model, PROMPTS, W)
    assert second == padded(model, PROMPTS, W.flip(0))


def test_the_paged_cache_of_generate(model):
    prompts, options = [PROMPTS[0], PROMPTS[2]], {**GREEDY, "eos_token_id": None}
    batching = transformers.ContinuousBatchingConfig(**SMALL)
    ids = torch.tensor(prompts)
    paged = model.generate(
        ids, reward_weights=W[:2], cache_implementation="paged", continuous_batching_config=batching, **options
    )
    assert torch.equal(paged[0], model.generate(ids, reward_weights=W[:2], **options))
