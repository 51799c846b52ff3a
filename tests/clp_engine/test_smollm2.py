"""The embedded real model, conditioned: exactness at step 0, gradients, generation.

Errors are root mean squares against float64, at most twice those of the plain model in float32.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tests_support import randomise_deltas

import clp_engine as clp
from clp_engine.decoding import position_ids
from clp_engine.layers import conditioned_layers
from clp_engine.logprobs import token_logprobs
from clp_engine.rollout import encode_prompts, rollout

W = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
MIX = torch.tensor([0.3, 0.7])
PROMPTS = [
    [{"role": "user", "content": f"Summarize: {text}"}]
    for text in ("the cat sat", "Read all files of the dog.", "Return the sum of two values")
]


@pytest.fixture(scope="module")
def plain(smollm2):
    return smollm2[0]


@pytest.fixture(scope="module")
def batch(smollm2):
    ids, mask = encode_prompts(smollm2[1], PROMPTS)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def conditioned(plain):
    model = fresh(plain)
    randomise_deltas(model, std=3e-3)
    return model


def fresh(plain):
    return clp.get_clp_model(copy.deepcopy(plain), clp.CLPConfig(rewards=["long", "short"]))


def mixed_by_hand(plain, conditioned, weights, dtype):
    """The plain model with W_0 + sum_k w_k Delta_k written into its layers, these alone to be differentiated."""
    model = copy.deepcopy(plain).to(dtype).requires_grad_(False)
    for name, layer in conditioned_layers(conditioned).items():
        weight = model.get_submodule(name).weight
        weight.data += torch.einsum("k,nkd->nd", weights.to(dtype), layer.deltas.detach().to(dtype))
        weight.requires_grad_(True)
    return model


def rms(tensor):
    return tensor.double().square().mean().sqrt()


@pytest.fixture(scope="module")
def exact_logits(plain, batch):
    with torch.no_grad():
        return copy.deepcopy(plain).double()(**batch).logits


@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.5, 0.5], W], ids=["corner", "centre", "mixed"])
def test_before_training_the_logits_are_the_plain_models(plain, batch, exact_logits, weights):
    model = fresh(plain)
    with torch.no_grad():
        expected = plain(**batch).logits
        model.set_kernel_backend("reference")
        got = model(**batch, reward_weights=weights).logits
        assert torch.equal(got.view(torch.int32), expected.view(torch.int32))
        model.set_kernel_backend("auto")
        got = model(**batch, reward_weights=weights).logits
    seen = batch["attention_mask"].bool()
    assert rms((got - exact_logits)[seen]) <= 2 * rms((expected - exact_logits)[seen])


def differentiate(model, batch, **weighting):
    logprobs = model(**batch, **weighting).logits[:, -1].log_softmax(-1)
    logprobs[:, :100].sum().backward()


@pytest.fixture(scope="module")
def plain_gradients(plain, conditioned, batch):
    """Of each conditioned layer's mixed weight, by hand: the exact gradient, and what float32 leaves of it."""
    by_hand, exact = (mixed_by_hand(plain, conditioned, MIX, dtype) for dtype in (torch.float32, torch.float64))
    for model in (by_hand, exact):
        differentiate(model, batch)
    return {
        name: tuple(model.get_submodule(name).weight.grad for model in (exact, by_hand))
        for name in conditioned_layers(conditioned)
    }


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradient_of_copy_k_is_its_coefficient_times_the_plain_gradient(conditioned, batch, plain_gradients, backend):
    conditioned.set_kernel_backend(backend)
    conditioned.zero_grad()
    differentiate(conditioned, batch, reward_weights=MIX)
    for name, layer in conditioned_layers(conditioned).items():
        want, in_float32 = plain_gradients[name]
        allowed = 2 * rms(in_float32 - want) + 2**-24 * rms(want)
        for k, w in enumerate(MIX.double()):
            assert rms(layer.deltas.grad[:, k] - w * want) <= w * allowed, (name, k)


def test_a_mixed_batch_generates_what_each_row_generates_alone(smollm2, conditioned):
    tokenizer = smollm2[1]
    conditioned.set_kernel_backend("auto")
    together = rollout(conditioned, tokenizer, PROMPTS, reward_weights=W, max_new_tokens=8, do_sample=False)
    for i, w in enumerate(W):
        alone = rollout(conditioned, tokenizer, PROMPTS[i : i + 1], reward_weights=w, max_new_tokens=8, do_sample=False)
        assert alone.texts[0] == together.texts[i]
    assert len(set(together.texts)) == len(PROMPTS)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_logprobs_while_generating_equal_those_of_the_training_forward(plain, smollm2, conditioned, backend):
    conditioned.set_kernel_backend(backend)
    torch.manual_seed(0)
    out = rollout(
        conditioned,
        smollm2[1],
        PROMPTS,
        reward_weights=W,
        num_generations=2,
        max_new_tokens=8,
        do_sample=True,
        return_logits=True,
    )
    real = out.completion_mask_BL.bool()
    seen = log_softmax_of(out.policy_logits_BLV, out)
    coefficients = conditioned.coefficients(len(PROMPTS), W)
    with torch.no_grad():
        trained = [token_logprobs(conditioned, out, coefficients, share_prompts=share) for share in (False, True)]
        exact, single = torch.zeros_like(seen, dtype=torch.float64), torch.zeros_like(seen)
        for i, w in enumerate(W):
            rows = slice(2 * i, 2 * i + 2)
            inputs = {"input_ids": out.input_ids_BT[rows], "attention_mask": out.attention_mask_BT[rows]}
            for logprobs in (exact, single):
                logits = mixed_by_hand(plain, conditioned, w, logprobs.dtype)(**inputs).logits
                start = out.prompt_ids_BP.shape[1] - 1
                logprobs[rows] = log_softmax_of(logits[:, start:-1], out, rows)
    allowed = 2 * rms((single - exact)[real])
    for logprobs in (seen, *trained):
        assert rms((logprobs - exact)[real]) <= allowed


def log_softmax_of(logits_BLV, out, rows=slice(None)):
    ids = out.completion_ids_BL[rows].unsqueeze(-1)
    return logits_BLV.log_softmax(-1).gather(-1, ids).squeeze(-1)


@torch.no_grad()
def decode_against_prefill(model, batch, answer_BL, **weighting):
    """Differences of the answer's log-probs between a forward of whole rows and one forward for each token."""
    width, length = batch["input_ids"].shape[1], answer_BL.shape[1]
    ids = torch.cat([batch["input_ids"], answer_BL], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(answer_BL)], dim=1)
    positions = position_ids(mask)
    whole = model(ids, attention_mask=mask, position_ids=positions, **weighting).logits[:, width - 1 : -1]
    steps, cache = [], None
    for start, stop in ((0, width), *((i, i + 1) for i in range(width, width + length - 1))):
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                    past_key_values=cache, use_cache=True, **weighting)  # fmt: skip
        steps.append(out.logits[:, -1:])
        cache = out.past_key_values
    prefilled, decoded = (
        logits.float().log_softmax(-1).gather(-1, answer_BL[:, :, None]) for logits in (whole, torch.cat(steps, dim=1))
    )
    return (prefilled - decoded).abs()


def test_bfloat16_decoding_is_as_near_to_prefill_as_the_plain_models(plain, conditioned, smollm2, batch):
    """Few rows and many take different kernels, in torch's plain layers as in the conditioned ones."""
    answer = smollm2[1]("The cat sat on the mat and looked at the dog, which read a file.")["input_ids"]
    answer_BL = torch.tensor(answer).expand(len(PROMPTS), -1)
    plain_16, conditioned_16 = copy.deepcopy(plain).bfloat16(), fresh(copy.deepcopy(plain).bfloat16())
    for layer, source in zip(*(conditioned_layers(m).values() for m in (conditioned_16, conditioned)), strict=True):
        assert layer.deltas.dtype == torch.float32
        layer.deltas.data.copy_(source.deltas)
    of_plain = decode_against_prefill(plain_16, batch, answer_BL)
    ours = decode_against_prefill(conditioned_16, batch, answer_BL, reward_weights=W)
    assert of_plain.max() > 0
    assert ours.max() <= 2 * of_plain.max()
    assert ours.mean() <= 2 * of_plain.mean()
