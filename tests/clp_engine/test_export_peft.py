"""Copies as PEFT adapters: the peft library loads the folders and computes what the conditioned model does."""

from __future__ import annotations

import copy
import json
import logging
import re

import pytest
import torch
from peft_support import ARCHITECTURES, TARGETS, inputs, load_adapters, tiny
from safetensors.torch import load_file
from tests_support import randomise_deltas, tiny_llama

import clp_engine as clp
from clp_engine.adapters import export_peft
from clp_engine.layers import DeltaLinear, conditioned_layers, release

WEIGHTS = {"long": 0.3, "short": 0.7}


def condition(base, **fields):
    """A conditioned copy of `base` with copies that matter."""
    model = clp.get_clp_model(copy.deepcopy(base), clp.CLPConfig(**{"rewards": ["long", "short"], **fields}))
    randomise_deltas(model)
    return model


def assert_same_logits(base, folder, expected, batch):
    """peft's model, and the plain one that it merges to, equal `expected`."""
    model = load_adapters(base, {"default": folder})
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, expected, rtol=0, atol=2e-5)
        assert torch.allclose(model.merge_and_unload()(**batch).logits, expected, rtol=0, atol=2e-5)


FAMILIES = {
    "delta": {},
    "lora": {"parameterization": "lora", "r": {"long": 2, "short": 3}, "lora_alpha": {"long": 5, "short": 1.5}},
    "svd": {"parameterization": "svd", "r": 3},
    "pblora": {"parameterization": "pblora", "r": 2},
    "mlp": {"target_modules": ["down_proj", "up_proj", "q_proj"]},
    "mixes": {"copies": {"a": {"long": 0.8, "short": 0.2}, "b": {"short": 1.0}}},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_copy_and_each_weighting_is_an_adapter(plain, family, tmp_path):
    model, batch = condition(plain, **FAMILIES[family]), inputs(plain, rows=2)
    config = model.clp_config
    one_hot_KC = torch.eye(config.num_copies, config.num_coefficients)
    one_hot_KC[:, config.num_copies :] = 1
    folders = export_peft(model, tmp_path / "copies")
    assert [folder.name for folder in folders] == list(config.copy_names)
    with torch.no_grad():
        before = plain(**batch).logits
        for folder, c_C in zip(folders, one_hot_KC, strict=True):
            expected = model(**batch, coefficients=c_C.repeat(2, 1)).logits
            assert (expected - before).abs().max() > 0.05
            assert_same_logits(plain, folder, expected, batch)
        for i, kl_weight in enumerate((None, 0.02)):
            (folder,) = export_peft(model, tmp_path / f"mix{i}", WEIGHTS, kl_weight)
            expected = model(**batch, reward_weights=WEIGHTS, kl_weight=kl_weight).logits
            assert_same_logits(plain, folder, expected, batch)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("parameterization", ["lora", "delta"])
def test_every_architecture(architecture, parameterization, tmp_path):
    base = tiny(architecture)
    targets = TARGETS[architecture]
    model, batch = condition(base, target_modules=targets, parameterization=parameterization), inputs(base, rows=2)
    (folder,) = export_peft(model, tmp_path, WEIGHTS)
    with torch.no_grad():
        assert_same_logits(base, folder, model(**batch, reward_weights=WEIGHTS).logits, batch)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == ("SEQ_2_SEQ_LM" if architecture == "t5" else "CAUSAL_LM")
    assert config["fan_in_fan_out"] == (architecture == "gpt2")


def test_lora_copies_are_written_as_they_are_and_come_back(saved_base, tmp_path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(saved_base)
    model, batch = condition(base, **FAMILIES["lora"]), inputs(base, rows=3)
    folders = export_peft(model, tmp_path / "copies")
    config = json.loads((folders[1] / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 1.5, {}, {})
    assert config["target_modules"] == list(conditioned_layers(model))
    assert config["base_model_name_or_path"] == str(saved_base)
    tensors = load_file(folders[1] / "adapter_model.safetensors")
    views = conditioned_layers(model)["model.layers.0.self_attn.q_proj"].copies()
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(tensors[key], views["lora_A.short"])
    back = clp.CLPModel.from_peft(saved_base, {folder.name: folder for folder in folders})
    weights_BK = torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.1, 0.9]])
    with torch.no_grad():
        assert torch.equal(
            back(**batch, reward_weights=weights_BK).logits, model(**batch, reward_weights=weights_BK).logits
        )


def test_layers_of_other_sizes_get_patterns_that_match_them_alone(plain, tmp_path):
    (folder, _) = export_peft(condition(plain, target_modules=["down_proj", "k_proj"]), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    ranks = dict.fromkeys(config["target_modules"], config["r"])
    for key, rank in config["rank_pattern"].items():
        (match,) = [path for path in ranks if re.match(rf"(.*\.)?({key})$", path)]
        ranks[match] = rank
    assert set(config["rank_pattern"]) == set(config["alpha_pattern"])
    assert ranks == {path: 16 if "k_proj" in path else 32 for path in ranks}


def test_an_adapter_of_a_tied_head_is_not_to_be_merged(plain, tmp_path, caplog):
    model, batch = condition(plain, variant="logit"), inputs(plain, rows=2)
    with caplog.at_level(logging.WARNING):
        (folder,) = export_peft(model, tmp_path, WEIGHTS)
    assert "lm_head is tied: PEFT's merge_and_unload would change the embedding too" in caplog.text
    adapted = load_adapters(plain, {"default": folder})
    with torch.no_grad():
        expected = model(**batch, reward_weights=WEIGHTS).logits
        assert torch.allclose(adapted(**batch).logits, expected, rtol=0, atol=2e-5)
        assert (adapted.merge_and_unload()(**batch).logits - expected).abs().max() > 1
    caplog.clear()
    export_peft(condition(tiny_llama(tie_word_embeddings=False), variant="logit"), tmp_path / "untied", WEIGHTS)
    assert "tied" not in caplog.text


def test_the_reference_policy_is_an_adapter_that_does_nothing(plain, tmp_path):
    model, batch = condition(plain, **FAMILIES["svd"]), inputs(plain, rows=1)
    (folder,) = export_peft(model, tmp_path, WEIGHTS, kl_weight=1.0)
    with torch.no_grad():
        assert_same_logits(plain, folder, plain(**batch).logits, batch)


@pytest.mark.parametrize("family", ["delta", "lora"])
def test_truncation_is_the_nearest_of_its_rank_and_says_how_far_it_is(plain, family, tmp_path, caplog):
    model = condition(plain, **FAMILIES[family])
    with caplog.at_level(logging.WARNING):
        (folder,) = export_peft(model, tmp_path / "truncated", WEIGHTS, rank=2)
    tensors = load_file(folder / "adapter_model.safetensors")
    exact = load_file(export_peft(model, tmp_path / "exact", WEIGHTS)[0] / "adapter_model.safetensors")
    lost = total = 0.0
    for key in (name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name):
        got, full = (t[f"{key}.lora_B.weight"] @ t[f"{key}.lora_A.weight"] for t in (tensors, exact))
        assert tensors[f"{key}.lora_A.weight"].shape[0] == 2
        assert torch.allclose((full - got).norm(), torch.linalg.svdvals(full)[2:].norm(), rtol=1e-4)
        lost, total = lost + float((full - got).square().sum()), total + float(full.square().sum())
    said = float(re.search(r"truncated to rank 2, relative error ([\d.]+)", caplog.text)[1])
    assert said == pytest.approx((lost / total) ** 0.5, rel=1e-2)
    assert 0.05 < said < 1
    caplog.clear()
    export_peft(model, tmp_path / "enough", WEIGHTS, rank=32)
    assert "truncated" not in caplog.text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"variant": "full"}, r"model\.embed_tokens \(DeltaEmbedding\)"),
        ({"train_shared": True}, r"model\.embed_tokens \(DeltaEmbedding\)"),
        ({"target_modules": ["norm"]}, r"model\.norm \(DeltaNorm\)"),
        ({"parameterization": "soft_tokens"}, r"model\.layers\.0\.self_attn \(SoftTokenAttention\)"),
    ],
)
def test_what_no_lora_expresses_is_named_before_anything_is_written(plain, fields, words, tmp_path):
    with pytest.raises(NotImplementedError, match=rf"{words} has copies that no LoRA expresses; collapse"):
        export_peft(condition(plain, **fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_copies_of_biases_are_named(tmp_path):
    model = condition(tiny("gpt2"), variant="full")
    for layer in conditioned_layers(model).values():
        if not isinstance(layer, DeltaLinear):
            release(layer)
    with pytest.raises(NotImplementedError, match=r"transformer\.h\.0\.attn\.c_attn has copies of its bias"):
        export_peft(model, tmp_path / "out")


def test_bad_input_is_named(plain, tmp_path):
    model = condition(plain)
    with pytest.raises(ValueError, match="rank is 0"):
        export_peft(model, tmp_path / "out", rank=0)
    with pytest.raises(ValueError, match=r"kl_weight=0\.5 is part of a weighting"):
        export_peft(model, tmp_path / "out", kl_weight=0.5)
    with pytest.raises(ValueError, match="missing"):
        export_peft(model, tmp_path / "out", {"long": 1.0})
    with pytest.raises(ValueError, match="'short' is folded into the base"):
        export_peft(model.fold(), tmp_path / "out")
    with pytest.raises(ValueError, match="copy 'a/b' cannot name a folder"):
        export_peft(condition(plain, rewards=["a/b"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
