"""torch.compile of a conditioned model: one graph without breaks, whatever the weightings."""

from __future__ import annotations

import pytest
import torch
from tests_support import randomise_deltas, tiny_llama, tiny_t5
from transformers import StaticCache

import clp_engine as clp
from clp_engine.layers import conditioned_layers

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
W, OTHER = torch.tensor([[1.0, 0.0], [0.3, 0.7]]), torch.tensor([[0.2, 0.8], [0.6, 0.4]])


def condition(plain):
    model = clp.get_clp_model(plain, clp.CLPConfig(rewards=["long", "short"]))
    randomise_deltas(model, 0.3)
    return model


@pytest.fixture
def model():
    torch.compiler.reset()
    return condition(tiny_llama(num_hidden_layers=1))


def gradients(model):
    return [layer.deltas.grad for layer in conditioned_layers(model).values()]


WEIGHTINGS = {
    "coefficients": ({"coefficients": W}, {"coefficients": OTHER}),
    "rows": ({"reward_weights": W}, {"reward_weights": OTHER}),
    "kl": ({"reward_weights": W, "kl_weight": torch.tensor([0.02, 1.0])},
           {"reward_weights": OTHER, "kl_weight": torch.tensor([0.01, 0.5])}),
    "default": ({}, {}),
}  # fmt: skip


# Tracing forward and backward takes seconds: once.
@pytest.mark.parametrize(("form", "backend"), [(form, "eager") for form in WEIGHTINGS] + [("rows", "aot_eager")])
def test_one_compiled_graph_serves_all_weightings(model, form, backend):
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for weighting in (*WEIGHTINGS[form], *WEIGHTINGS[form]):
        results = []
        for run in (compiled, model):
            model.zero_grad()
            logits = run(input_ids=IDS, use_cache=False, **weighting).logits
            logits.square().mean().backward()
            results.append([logits.detach(), *gradients(model)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_graphs_check_weightings_too(model):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="outside the domain simplex"):
            compiled(input_ids=IDS, use_cache=False, reward_weights=W * 2)
        with pytest.raises(RuntimeError, match="kl_weight lies outside"):
            compiled(input_ids=IDS, use_cache=False, reward_weights=W, kl_weight=torch.tensor([0.5, 2.0]))


@torch.no_grad()
def test_compiled_packed_rows(model):
    packed = {"input_ids": IDS.view(1, -1), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": False}
    expected = [model(**packed, reward_weights=weights).logits for weights in (W, OTHER)]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for weights, logits in zip((W, OTHER), expected, strict=True):
        torch.testing.assert_close(compiled(**packed, reward_weights=weights).logits, logits)
    packed["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 0]])
    with pytest.raises(RuntimeError, match="packed sequences and weightings differ in number"):
        compiled(**packed, reward_weights=W)


@torch.no_grad()
def test_compiled_encoder_decoder():
    model = condition(tiny_t5(num_layers=1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = {"input_ids": IDS, "decoder_input_ids": IDS, "use_cache": False}
    for weights in (W, OTHER):
        expected = model(**batch, reward_weights=weights).logits
        torch.testing.assert_close(compiled(**batch, reward_weights=weights).logits, expected)


@torch.no_grad()
def test_compiled_steps_with_a_static_cache(model):
    """As generate compiles them on a GPU: one graph for the steps of all weightings."""
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for weights in (W, OTHER):
        cache = StaticCache(config=model.config, max_cache_len=8)
        model(input_ids=IDS, past_key_values=cache, coefficients=weights)
        for token in (11, 12):
            step = {"input_ids": torch.full((2, 1), token), "coefficients": weights}
            got = compiled(**step, past_key_values=cache).logits
        longer = torch.cat([IDS, torch.tensor([[11, 12]] * 2)], dim=1)
        torch.testing.assert_close(got[:, -1], model(input_ids=longer, coefficients=weights).logits[:, -1])
        with pytest.raises(ValueError, match="belongs to its weighting"):
            model(input_ids=IDS[:, :1], past_key_values=cache, reward_weights=W.flip(0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
