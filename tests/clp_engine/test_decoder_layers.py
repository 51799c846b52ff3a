"""Decoder layers that decode by one mixed_qkv: where they do, against their parts one by one, and where not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from architectures import load
from rows_support import needs_cpp
from tests_support import randomise_deltas, tiny_llama

import clp_engine as clp
from clp_engine.layers import decoder
from clp_engine.layers.decoder import LlamaDecoder

MODELS = ["llama", "mistral", "qwen2", "qwen3"]
W = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
NEXT = torch.tensor([[3], [17], [4]])


def condition(plain, **settings):
    model = clp.get_clp_model(plain, clp.CLPConfig(rewards=["long", "short"], **settings))
    randomise_deltas(model, 0.3)
    return model.eval()


@pytest.fixture
def calls(monkeypatch):
    """The shapes of x of each fused call."""
    shapes, real = [], decoder.mixed_qkv

    def record(x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return real(x, *args, **kwargs)

    monkeypatch.setattr(decoder, "mixed_qkv", record)
    return shapes


@torch.no_grad()
def decode(model, ids=IDS, next_ids=NEXT, **options):
    """Logits of a step behind a prompt."""
    weights = {"reward_weights": W[: len(ids)]}
    cache = model(ids, use_cache=True, **weights, **options).past_key_values
    return model(next_ids, past_key_values=cache, **weights, **options).logits


@pytest.fixture
def one_by_one(monkeypatch):
    def run(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "MOST_ROWS", {})
            return function(*args, **kwargs)

    return run


@needs_cpp
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_layers_one_by_one(name, attention, calls, one_by_one):
    plain = load(name)
    plain.set_attn_implementation(attention)
    model = condition(plain)
    expected = one_by_one(decode, model)
    assert not calls
    torch.testing.assert_close(decode(model), expected, rtol=1e-5, atol=1e-5)
    assert calls == [(3, 1, 32)] * 2


@needs_cpp
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_tokens_are_those_of_the_layers_one_by_one(name, cache, calls, one_by_one):
    model = condition(load(name))
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "attention_mask": mask}

    def generate():
        return model.generate(IDS, reward_weights=W, **options)

    expected = one_by_one(generate)
    assert not calls
    assert torch.equal(generate(), expected)
    assert (3, 1, 32) in calls


@needs_cpp
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotations(rope, calls, one_by_one):
    model = condition(tiny_llama(rope_parameters=rope))
    torch.testing.assert_close(decode(model), one_by_one(decode, model), rtol=1e-5, atol=1e-5)
    assert calls


@needs_cpp
def test_bfloat16_errs_no_more_than_the_layers_one_by_one(calls, one_by_one):
    model = condition(tiny_llama())
    exact = one_by_one(decode, model)
    model.to(torch.bfloat16)
    ours, theirs = (decode(model).float() - exact).norm(), (one_by_one(decode, model).float() - exact).norm()
    assert calls
    assert ours <= 2 * theirs


@needs_cpp
def test_biases_and_copies_of_biases(calls, one_by_one):
    model = condition(load("qwen2"), variant=None, target_modules=["q_proj", "k_proj", "v_proj"])
    for layer in model.modules():
        if isinstance(layer, clp.layers.DeltaLinear) and layer.bias is not None:
            layer.bias_deltas = torch.nn.Parameter(torch.randn(layer.bias.shape[0], 2))
    torch.testing.assert_close(decode(model), one_by_one(decode, model), rtol=1e-5, atol=1e-5)
    assert calls


def never(model, calls, run=decode):
    run(model)
    assert not calls


@needs_cpp
@pytest.mark.parametrize("part", ["self_attn", "self_attn.q_proj", "self_attn.v_proj", "input_layernorm"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_run(part, kind, calls):
    model, seen = condition(tiny_llama(num_hidden_layers=1)), []
    handle = getattr(model.model.layers[0].get_submodule(part), kind)(lambda *args: seen.append(part))
    never(model, calls)
    assert seen == [part] * 2
    handle.remove()
    decode(model)
    assert calls


def test_a_hook_on_every_module_runs(calls):
    model, seen = condition(tiny_llama(num_hidden_layers=1)), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        never(model, calls)
    finally:
        handle.remove()
    assert model.model.layers[0].self_attn.q_proj in seen


def test_a_replaced_forward_runs(calls):
    model = condition(tiny_llama(num_hidden_layers=1))
    norm = model.model.layers[0].input_layernorm
    seen, own = [], norm.forward
    norm.forward = lambda x: seen.append(x) or own(x)
    never(model, calls)
    assert len(seen) == 2


def test_gradients_take_the_layers_one_by_one(calls):
    model = condition(tiny_llama())
    model(NEXT, reward_weights=W).logits.sum().backward()
    assert not calls
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@needs_cpp
@torch.no_grad()
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 16), (torch.bfloat16, 64)])
def test_many_rows_take_the_layers_one_by_one(dtype, most, calls):
    model = condition(tiny_llama(num_hidden_layers=1)).to(dtype)
    for num_rows in (most, most + 1):
        model(torch.ones(num_rows, 1, dtype=torch.long), reward_weights=[0.5, 0.5])
    assert calls == [(most, 1, 32)]


@needs_cpp
@torch.no_grad()
def test_what_else_takes_the_layers_one_by_one(calls):
    model = condition(tiny_llama())
    model(IDS[:, :2], reward_weights=W)
    model(NEXT, reward_weights=W, use_cache=False)
    model(NEXT, reward_weights=W, kl_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        model(NEXT, reward_weights=W)
    model.set_kernel_backend("reference")
    model(NEXT, reward_weights=W)
    assert not calls
    model.set_kernel_backend("cpp")
    model(NEXT, reward_weights=W)
    assert calls


@pytest.mark.parametrize(
    "settings",
    [{"variant": "full"}, {"variant": None, "target_modules": ["q_proj", "v_proj"]}, {"parameterization": "lora"}],
    ids=["averaged norms", "two of three", "lora"],
)
def test_other_copies_take_the_layers_one_by_one(settings, calls):
    never(condition(tiny_llama(), **settings), calls)


@pytest.mark.parametrize("name", ["gemma", "phi3", "gpt_neox"])
def test_other_models_are_left_alone(name):
    model = condition(load(name))
    assert not any(isinstance(module, LlamaDecoder) for module in model.modules())


def test_compiled_step_has_no_break(calls):
    model = condition(tiny_llama(num_hidden_layers=1))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(NEXT, reward_weights=W).logits
        calls.clear()
        torch.testing.assert_close(compiled(NEXT, reward_weights=W).logits, expected, rtol=1e-4, atol=1e-4)
    assert not calls


@needs_cpp
def test_batch_invariance_reaches_the_call(monkeypatch):
    model, seen, real = condition(tiny_llama(num_hidden_layers=1)), [], decoder.mixed_qkv
    monkeypatch.setattr(decoder, "mixed_qkv", lambda *a, **k: seen.append(k["batch_invariant"]) or real(*a, **k))
    model.set_kernel_backend("auto", batch_invariant=True)
    decode(model)
    assert seen == [True]


@needs_cpp
def test_copies_of_a_model_decode_alike(calls):
    model = condition(tiny_llama())
    expected = decode(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.equal(decode(twin), expected)
        assert calls


@needs_cpp
def test_the_class_is_named_as_before_and_goes_with_the_copies():
    model = condition(tiny_llama())
    layer = model.model.layers[0]
    assert isinstance(layer, LlamaDecoder)
    assert type(layer).__name__ == "LlamaDecoderLayer"
    assert type(model.collapse({"long": 0.5, "short": 0.5}).model.layers[0]) is type(tiny_llama().model.layers[0])
