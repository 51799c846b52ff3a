from __future__ import annotations

import copy

import pytest
import torch
from tests_support import mixed_by_hand
from torch.nn import functional as F

import clp_engine as clp
from clp_engine.conditioning import Conditioning
from clp_engine.layers import conditioned_layers, linear
from clp_engine.rollout import encode_prompts, rollout
from clp_kernels import mixed_linear

W = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
PROMPTS = ["the cat", "read all file of the dog", "sum of value"]


@pytest.fixture
def batch(tokenizer):
    ids, mask = encode_prompts(tokenizer, PROMPTS)
    return {"input_ids": ids, "attention_mask": mask}


def condition(plain, **fields):
    return clp.get_clp_model(copy.deepcopy(plain), clp.CLPConfig(**{"rewards": ["long", "short"], **fields}))


@pytest.mark.parametrize("weights", [None, {"long": 1.0, "short": 0.0}, W])
def test_before_training_the_model_is_the_plain_one_bit_for_bit(plain, batch, weights):
    model = condition(plain)
    model.set_kernel_backend("reference")
    got = model(**batch, reward_weights=weights).logits
    assert torch.equal(got.view(torch.int32), plain(**batch).logits.view(torch.int32))


@pytest.mark.parametrize("variant", ["attn", "logit"])
def test_each_row_is_the_plain_model_with_that_rows_mix(plain, batch, variant):
    from tests_support import randomise_deltas

    model = condition(plain, variant=variant)
    randomise_deltas(model)
    with torch.no_grad():
        got = model(**batch, reward_weights=W).logits
        if variant == "logit":
            # The head is tied: mixing into it would change the embedding too, so mix outside.
            hidden = plain.model(**batch).last_hidden_state
            head = conditioned_layers(model)["lm_head"]
            expected = torch.stack(
                [
                    F.linear(h, head.weight + torch.einsum("k,nkd->nd", w, head.deltas))
                    for h, w in zip(hidden, W, strict=False)
                ]
            )
        else:
            rows = [mixed_by_hand(plain, model, w)(**batch).logits[i] for i, w in enumerate(W)]
            expected = torch.stack(rows)
    assert (expected - plain(**batch).logits).abs().max() > 0.1
    assert torch.allclose(got, expected, atol=2e-5)


def test_a_float64_model_is_its_own_oracle(plain, conditioned, batch):
    single = conditioned(**batch, reward_weights=W).logits
    double = conditioned.double()(**batch, reward_weights=W).logits
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=2e-5)


def test_bfloat16_keeps_the_steering_effect(plain, conditioned, batch):
    """float32 deltas over a bfloat16 base: y(c) - y(0) agrees with that of a float32 model."""
    for layer in conditioned_layers(conditioned).values():
        layer.deltas.data.mul_(0.1)
    narrow = copy.deepcopy(conditioned)
    for parameter in narrow.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    for parameter in conditioned.parameters():
        parameter.data = parameter.data.bfloat16().float() if not parameter.requires_grad else parameter.data
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    records = [Conditioning.from_rows(c, "auto", 2) for c in (W, W * 0)]
    for name, layer in conditioned_layers(narrow).items():
        wide = conditioned_layers(conditioned)[name]
        effects = []
        for module, inputs in ((layer, x), (wide, x.float())):
            outputs = []
            for record in records:
                with module.clp.active.use(record), torch.no_grad():
                    outputs.append(module(inputs).float())
            effects.append(outputs[0] - outputs[1])
        # Each of the two bfloat16 outputs is rounded once: 2 * 2^-9 of the largest output.
        assert (effects[0] - effects[1]).abs().max() <= 2 * 2**-8 * outputs[0].abs().max(), name


def test_kl_weight_one_is_the_reference_and_the_middle_interpolates(plain, conditioned, batch):
    with torch.no_grad():
        reference = conditioned(**batch, reward_weights=W, kl_weight=1.0).logits
        assert torch.equal(reference, plain(**batch).logits)
        per_row = conditioned(**batch, reward_weights=W, kl_weight=torch.tensor([1.0, 0.01, 0.02])).logits
        trained = conditioned(**batch, reward_weights=W).logits
        half = conditioned(**batch, coefficients=W * (0.01 * 0.98 / (0.02 * 0.99))).logits
    assert torch.allclose(per_row[0], reference[0], atol=1e-5)
    assert torch.allclose(per_row[1], trained[1], atol=1e-5)
    assert torch.allclose(per_row[2], half[2], atol=1e-5)
    assert not torch.allclose(per_row[2], trained[2], atol=1e-3)


def test_gradient_of_copy_k_is_its_coefficient_times_the_plain_gradient(plain, conditioned, batch):
    weights = torch.tensor([0.3, 0.7])
    by_hand = mixed_by_hand(plain, conditioned, weights)
    by_hand(**batch).logits.square().mean().backward()
    conditioned(**batch, reward_weights=weights).logits.square().mean().backward()
    for name, layer in conditioned_layers(conditioned).items():
        expected = by_hand.get_submodule(name).weight.grad
        for k in range(2):
            error = (layer.deltas.grad[:, k] - weights[k] * expected).abs().max()
            assert error <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_under_its_own_forwards_weighting(conditioned, batch, use_reentrant):
    def gradients(model, interleave):
        model.train()
        loss = model(**batch, reward_weights=W, use_cache=False).logits.square().mean()
        if interleave:  # another forward, another weighting and another back-end, before the backward
            model.set_kernel_backend("reference")
            with torch.no_grad():
                model(**batch, reward_weights=[0.0, 1.0], use_cache=False)
        loss.backward()
        return [layer.deltas.grad for layer in conditioned_layers(model).values()]

    expected = gradients(copy.deepcopy(conditioned), interleave=False)
    conditioned.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    conditioned.enable_input_require_grads()
    for got, want in zip(gradients(conditioned, interleave=True), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_packed_rows_are_refused(conditioned, batch):
    with pytest.raises(ValueError, match="packed"):
        conditioned(inputs_embeds=torch.zeros(3, 4, 32), coefficients=torch.zeros(2, 2) + 0.5)


def test_a_part_of_the_model_has_no_weighting(conditioned, batch):
    with pytest.raises(RuntimeError, match="outside the conditioned model's forward"):
        conditioned.model(**batch)


def test_in_place_and_still_the_same_kind_of_model(plain, tokenizer):
    model = clp.get_clp_model(plain, clp.CLPConfig(rewards=["long", "short"]))
    assert model is plain
    assert isinstance(model, clp.CLPModel)
    assert isinstance(model, model.base_class)
    assert type(model).__name__ == "CLPLlamaForCausalLM"
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.deltas" for name in conditioned_layers(model)}
    assert len(trainable) == 2 * 4
    with pytest.raises(TypeError, match="conditioned already"):
        clp.get_clp_model(model, model.clp_config)
    copied = copy.deepcopy(model)
    rollout(copied, tokenizer, PROMPTS[:1], max_new_tokens=1, do_sample=False)


@pytest.mark.parametrize(
    ("targets", "count"), [(["q_proj", "v_proj"], 4), (r".*layers\.1\.self_attn\.[qk]_proj", 2), ("all-linear", 14)]
)
def test_target_modules_follow_pefts_grammar(plain, targets, count):
    assert len(conditioned_layers(condition(plain, target_modules=targets))) == count


def test_no_match_lists_near_names(plain):
    with pytest.raises(ValueError, match=r"qproj.*near names.*q_proj"):
        condition(plain, target_modules=["qproj"])


@pytest.mark.parametrize("exact_delta", [True, False])
def test_linear_layers_are_told_whether_they_may_round(conditioned, batch, monkeypatch, exact_delta):
    told = []

    def spy(*arguments, **options):
        told.append(options["exact_delta"])
        return mixed_linear(*arguments, **options)

    monkeypatch.setattr(linear, "mixed_linear", spy)
    conditioned.set_kernel_backend("auto", exact_delta=exact_delta)
    conditioned(**batch, reward_weights=W)
    assert set(told) == {exact_delta}
    conditioned.set_kernel_backend("auto")
    conditioned(**batch, reward_weights=W)
    assert told[-1] is True


def test_unknown_and_missing_backends_raise(conditioned):
    with pytest.raises(ValueError, match="'fast'"):
        conditioned.set_kernel_backend("fast")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cuda"):
            conditioned.set_kernel_backend("cuda")
    assert conditioned.kernel_backend() in ("reference", "cpp", "triton")
