"""PEFT's own adapters as copies: every row's logits are those of PEFT's exact combination at its weights."""

from __future__ import annotations

import copy
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from peft_support import ARCHITECTURES, TARGETS, inputs, load_adapters, save_adapter, tiny
from safetensors.torch import load_file, save_file
from tests_support import tiny_llama

import clp_engine as clp
from clp_engine.layers import conditioned_layers
from clp_engine.peft_folder import CONFIG_FILE, WEIGHTS_FILE

PATTERNS = {
    "llama": {"rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"^model.layers.0.mlp.down_proj": 2}},
    "gpt2": {"rank_pattern": {"h.1.attn.c_attn": 6}, "alpha_pattern": {"c_fc": 2}},
    "t5": {"rank_pattern": {"decoder.block.1.layer.0.SelfAttention.q": 6}, "alpha_pattern": {"wo": 2}},
}


def make_adapters(base, architecture: str, folder: Path) -> dict[str, Path]:
    """Three adapters that differ in rank, scaling and targets; the second one within itself too."""
    targets = TARGETS[architecture]
    transposed = architecture == "gpt2"
    return {
        "plain": save_adapter(base, folder / "plain", 1, r=2, lora_alpha=8, target_modules=targets,
                              fan_in_fan_out=transposed),
        "patterns": save_adapter(base, folder / "patterns", 2, r=3, lora_alpha=5, target_modules=targets,
                                 use_rslora=True, fan_in_fan_out=transposed, **PATTERNS[architecture]),
        "narrow": save_adapter(base, folder / "narrow", 3, r=4, lora_alpha=2, target_modules=targets[:1],
                               fan_in_fan_out=transposed),
    }  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_pefts_exact_combination(architecture, tmp_path):
    base = tiny(architecture)
    base.save_pretrained(tmp_path / "base")
    folders = make_adapters(base, architecture, tmp_path)
    torch.manual_seed(4)
    weights_BK = torch.distributions.Dirichlet(torch.ones(3)).sample((5,))
    batch = inputs(base, rows=5)
    peft_model = load_adapters(base, folders)
    model = clp.CLPModel.from_peft(tmp_path / "base", folders)
    assert not model.training
    with torch.no_grad():
        got = model(**batch, reward_weights=weights_BK).logits
        plain = base(**batch).logits
        for i, weights in enumerate(weights_BK):
            peft_model.add_weighted_adapter(list(folders), weights.tolist(), f"mix{i}", combination_type="cat")
            peft_model.set_adapter(f"mix{i}")
            expected = peft_model(**{name: ids[i : i + 1] for name, ids in batch.items()}).logits[0]
            assert (expected - plain[i]).abs().max() > 0.1
            assert torch.allclose(got[i], expected, rtol=0, atol=1e-5)


def test_one_hot_weights_are_one_adapter_and_zeros_are_where_it_has_none(plain, tmp_path):
    folders = make_adapters(plain, "llama", tmp_path)
    peft_model = load_adapters(plain, folders)
    model = clp.CLPModel.from_peft(copy.deepcopy(plain), folders)
    batch = inputs(plain, rows=3)
    with torch.no_grad():
        got = model(**batch, reward_weights=torch.eye(3)).logits
        for k, name in enumerate(folders):
            peft_model.set_adapter(name)
            assert torch.allclose(got[k], peft_model(**batch).logits[k], rtol=0, atol=1e-5)
    layers = conditioned_layers(model)
    assert sorted({path.rpartition(".")[2] for path in layers}) == sorted(TARGETS["llama"])
    assert model.clp_config.r == {"plain": 2, "patterns": 6, "narrow": 4}
    views = layers["model.layers.0.mlp.down_proj"].copies()
    assert not views["lora_A.narrow"].any()
    assert not views["lora_B.narrow"].any()
    assert not views["lora_A.patterns"][3:].any()
    saved = load_file(folders["plain"] / WEIGHTS_FILE)
    key = "base_model.model.model.layers.0.mlp.down_proj"
    assert torch.equal(views["lora_A.plain"], saved[f"{key}.lora_A.weight"])
    assert torch.equal(views["lora_B.plain"], saved[f"{key}.lora_B.weight"])


def test_an_adapter_of_the_head_may_carry_the_bases_weight(plain, tmp_path):
    folder = save_adapter(plain, tmp_path / "adapter", 1, r=2, target_modules=["lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(folder / WEIGHTS_FILE)
    batch = inputs(plain, rows=2)
    with torch.no_grad():
        expected = load_adapters(plain, {"long": folder})(**batch).logits
        got = clp.CLPModel.from_peft(plain, {"long": folder})(**batch).logits
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)


@pytest.fixture
def adapter(plain, tmp_path) -> Path:
    return save_adapter(plain, tmp_path / "adapter", 1, r=2, target_modules=["q_proj"], bias="none")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["mlp.experts"]),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("init_lora_weights", "pissa"),
        ("a_field_of_a_later_release", {"on": True}),
    ],
)
def test_more_than_plain_lora_is_refused_by_name(plain, adapter, field, value):
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps(config | {field: value}))
    with pytest.raises(NotImplementedError, match=re.escape(f"{field}={value!r}")):
        clp.CLPModel.from_peft(plain, {"long": adapter})
    assert not hasattr(plain, "clp_config")


@pytest.mark.parametrize("kind", ["dora", "embedding", "trained_bias"])
def test_what_peft_writes_for_other_forms_is_refused(plain, tmp_path, kind):
    fields = {
        "dora": {"target_modules": ["q_proj"], "use_dora": True},
        "embedding": {"target_modules": ["embed_tokens"]},
        "trained_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    }[kind]
    folder = save_adapter(plain, tmp_path / "adapter", 1, r=2, **fields)
    words = {"dora": "use_dora=True", "embedding": "lora_embedding_A", "trained_bias": "lora_bias=True"}[kind]
    with pytest.raises(NotImplementedError, match=words):
        clp.CLPModel.from_peft(plain, {"long": folder})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ("stray tensor", NotImplementedError, "lm_head.weight"),
        ("lone factor", ValueError, r"lacks lora_B of model\.layers\.0\.self_attn\.q_proj"),
        ("other rank", ValueError, r"lora_A \[2, 32\] .* says \[3, D\]"),
        ("other width", ValueError, r"lora_A \[2, 16\] .* takes \[r, 32\]"),
        ("other module", ValueError, r"self_attn\.q_prob, the base has no such module; near: .*q_proj"),
        ("no linear layer", NotImplementedError, r"model\.norm, a LlamaRMSNorm"),
        ("other head", ValueError, r"the weight of lm_head \[32, 32\], which is not the base's"),
        ("empty", ValueError, "no adapter tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(plain, adapter, change, error, words):
    tensors = load_file(adapter / WEIGHTS_FILE)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    if change == "stray tensor":
        tensors["base_model.model.lm_head.weight"] = torch.zeros(32, 32)
    elif change == "lone factor":
        del tensors[f"{path}.lora_B.weight"]
    elif change == "other rank":
        config = json.loads((adapter / CONFIG_FILE).read_text())
        (adapter / CONFIG_FILE).write_text(json.dumps(config | {"r": 3}))
    elif change == "other width":
        tensors[f"{path}.lora_A.weight"] = torch.zeros(2, 16)
    elif change == "other head":
        tensors["base_model.model.lm_head.base_layer.weight"] = torch.zeros(32, 32)
    elif change == "empty":
        tensors = {}
    else:
        place = path.replace("q_proj", "q_prob") if change == "other module" else "base_model.model.model.norm"
        tensors = {name.replace(path, place): tensor for name, tensor in tensors.items()}
    save_file(tensors, adapter / WEIGHTS_FILE)
    with pytest.raises(error, match=words):
        clp.CLPModel.from_peft(plain, {"long": adapter})
    assert not hasattr(plain, "clp_config")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (WEIGHTS_FILE, b"not safetensors", "no adapter that can be read"),
        (CONFIG_FILE, b"{", "no adapter that can be read"),
        (CONFIG_FILE, b"[]", "holds a list"),
        (CONFIG_FILE, b'{"peft_type": "LORA"}', "r=None and lora_alpha=None"),
        (
            CONFIG_FILE,
            b'{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {"(": 3}}',
            "no regular expression",
        ),
    ],
)
def test_damaged_files_are_named(plain, adapter, name, content, words):
    (adapter / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        clp.CLPModel.from_peft(plain, {"long": adapter})


def test_missing_places_are_named(plain, adapter, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter at .*nowhere"):
        clp.CLPModel.from_peft(plain, {"long": tmp_path / "nowhere"})
    (adapter / WEIGHTS_FILE).rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=f"it has no {WEIGHTS_FILE}"):
        clp.CLPModel.from_peft(plain, {"long": adapter})
    with pytest.raises(FileNotFoundError, match=f"it has no {CONFIG_FILE}"):
        clp.CLPModel.from_peft(plain, {"long": tmp_path})
    with pytest.raises(ValueError, match="rewards must be one or more names"):
        clp.CLPModel.from_peft(plain, {})


def test_another_bases_name_is_said_and_another_object_refused(plain, adapter, conditioned, caplog):
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": "someone/other"}))
    with caplog.at_level(logging.WARNING):
        clp.CLPModel.from_peft(tiny_llama(), {"long": adapter})
    assert "'long' was trained on 'someone/other'" in caplog.text
    for base, words in ((conditioned, "conditioned already"), (torch.nn.Linear(2, 2), "got Linear")):
        with pytest.raises(TypeError, match=words):
            clp.CLPModel.from_peft(base, {"long": adapter})
    with pytest.raises(ValueError, match=r"\['device_map'\] are for loading a model by name"):
        clp.CLPModel.from_peft(plain, {"long": adapter}, device_map="cpu")
    with pytest.raises(FileNotFoundError, match="the model '/nowhere/base' cannot be loaded"):
        clp.CLPModel.from_peft("/nowhere/base", {"long": adapter})
