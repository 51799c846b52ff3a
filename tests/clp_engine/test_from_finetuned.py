"""Full fine-tunes as copies: a one-hot weighting is the fine-tune, and a mix is the average of the parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from peft_support import inputs, tiny
from tests_support import tiny_llama

import clp_engine as clp
from clp_engine.layers import conditioned_layers


def finetune(base, seed: int, *parts: str, std: float = 0.05):
    """A copy of `base` whose parameters with one of `parts` in their names have moved; all without any."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parts or any(part in name for part in parts):
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter) * std
    return model


def average(models, weights):
    """The plain model of averaged parameters: Rewarded Soups by hand."""
    soup = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, parameter in soup.named_parameters():
            parameter.copy_(sum(w * dict(m.named_parameters())[name] for w, m in zip(weights, models, strict=True)))
    return soup


CASES = {
    "attention": (lambda: tiny_llama(), ["q_proj", "o_proj"]),
    "tied head": (lambda: tiny_llama(), ["embed_tokens"]),
    "norms": (lambda: tiny_llama(tie_word_embeddings=False), ["norm", "lm_head"]),
    "biases": (lambda: tiny_llama(attention_bias=True), ["q_proj.bias"]),
    "everything": (lambda: tiny_llama(), []),
    "transposed": (lambda: tiny("gpt2"), ["c_attn.weight", "wte", "ln_1"]),
    "everything transposed": (lambda: tiny("gpt2"), []),
    "encoder-decoder": (lambda: tiny("t5"), []),
}


@pytest.mark.parametrize("case", CASES)
def test_one_hot_is_the_fine_tune_and_a_mix_the_average(case):
    make, parts = CASES[case]
    base = make()
    tuned = {"long": finetune(base, 1, *parts), "short": finetune(base, 2, *parts)}
    models, batch = list(tuned.values()), inputs(base, rows=3)
    weights_BK = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.7]])
    with torch.no_grad():
        before = base(**batch).logits
        model = clp.CLPModel.from_finetuned(base, tuned)
        got = model(**batch, reward_weights=weights_BK).logits
        for i, plain in enumerate([*models, average(models, [0.3, 0.7])]):
            expected = plain(**batch).logits[i]
            assert (expected - before[i]).abs().max() > 0.05
            assert torch.allclose(got[i], expected, rtol=0, atol=2e-5)


def test_only_what_differs_is_conditioned():
    base = tiny_llama(attention_bias=True)
    tuned = {"long": finetune(base, 1, "0.self_attn.q_proj.weight"), "short": finetune(base, 2, "layers.1.mlp.up_proj")}
    model = clp.CLPModel.from_finetuned(copy.deepcopy(base), tuned)
    assert model.clp_config.target_modules == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert list(conditioned_layers(model)) == model.clp_config.target_modules
    assert not conditioned_layers(model)["model.layers.1.mlp.up_proj"].copies()["weight.long"].any()
    tuned["short"] = finetune(base, 2, "q_proj.bias")
    model = clp.CLPModel.from_finetuned(copy.deepcopy(base), tuned)
    assert model.clp_config.variant == "full"
    assert model.clp_config.target_modules is None


def test_a_tied_head_stays_tied():
    base = tiny_llama()
    model = clp.CLPModel.from_finetuned(base, {"long": finetune(base, 1, "embed_tokens")})
    layers = conditioned_layers(model)
    assert sorted(layers) == ["lm_head", "model.embed_tokens"]
    assert layers["lm_head"].deltas is layers["model.embed_tokens"].deltas
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_fine_tune_comes_back_bit_for_bit(dtype):
    base = tiny_llama().to(dtype)
    tuned = {"long": finetune(base, 1, "proj"), "short": finetune(base, 2, "proj")}
    model = clp.CLPModel.from_finetuned(base, tuned)
    assert all(layer.deltas.dtype == torch.float32 for layer in conditioned_layers(model).values())
    for k, plain in enumerate(tuned.values()):
        collapsed = model.collapse(torch.eye(2)[k])
        for name, parameter in plain.named_parameters():
            assert torch.equal(collapsed.get_parameter(name), parameter), name


def test_models_are_taken_by_path_too(tmp_path):
    base = tiny("t5")
    places = {"base": base, "long": finetune(base, 1), "short": finetune(base, 2)}
    for name, plain in places.items():
        plain.save_pretrained(tmp_path / name)
    model = clp.CLPModel.from_finetuned(tmp_path / "base", {name: tmp_path / name for name in ("long", "short")})
    batch = inputs(base, rows=1)
    with torch.no_grad():
        got = model(**batch, reward_weights={"long": 0.0, "short": 1.0}).logits
        assert torch.allclose(got, places["short"](**batch).logits, rtol=0, atol=2e-5)
    with pytest.raises(FileNotFoundError, match=r"the model '.*nowhere' cannot be loaded"):
        clp.CLPModel.from_finetuned(tmp_path / "base", {"long": str(tmp_path / "nowhere")})


class Scaled(torch.nn.Linear):
    """A linear layer with a parameter of its own kind."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight, self.scale = linear.weight, torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


def untied(base):
    model = copy.deepcopy(base)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    return model


def with_buffer(base):
    base.model.register_buffer("running", torch.zeros(2))
    model = copy.deepcopy(base)
    model.model.running += 1
    return model


def with_scale(base):
    base.model.layers[0].mlp.up_proj = Scaled(base.model.layers[0].mlp.up_proj)
    model = copy.deepcopy(base)
    model.model.layers[0].mlp.up_proj.scale.data += 1
    return model


def not_finite(base):
    model = copy.deepcopy(base)
    model.model.norm.weight.data[0] = float("nan")
    return model


def other(**fields):
    return lambda base: tiny_llama(**fields)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (copy.deepcopy, ValueError, "the fine-tune of 'long' equals the base in every parameter"),
        (other(num_hidden_layers=1), ValueError, r"lacks 9 tensors .* model\.layers\.1\.input_layernorm"),
        (other(num_hidden_layers=3), ValueError, r"holds 9 tensors that the base has not.* model\.layers\.2"),
        (other(vocab_size=40), ValueError, r"embed_tokens\.weight is \[40, 32\] .*, \[32, 32\] in the base"),
        (untied, ValueError, r"lm_head\.weight and model\.embed_tokens\.weight are one tied parameter"),
        (with_buffer, NotImplementedError, r"model\.running .* differs in the fine-tune of 'long'"),
        (with_scale, NotImplementedError, r"up_proj\.scale \[\] differs"),
        (not_finite, ValueError, r"model\.norm\.weight .* not finite"),
    ],
)
def test_fine_tunes_that_do_not_fit_are_named(make, error, words):
    base = tiny_llama()
    tuned = make(base)
    with pytest.raises(error, match=words):
        clp.CLPModel.from_finetuned(base, {"long": tuned})
    assert not conditioned_layers(base)


def test_a_conditioned_base_or_fine_tune_is_refused(plain, conditioned):
    with pytest.raises(TypeError, match="conditioned already"):
        clp.CLPModel.from_finetuned(conditioned, {"long": plain})
    with pytest.raises(TypeError, match="conditioned already"):
        clp.CLPModel.from_finetuned(plain, {"long": conditioned})
