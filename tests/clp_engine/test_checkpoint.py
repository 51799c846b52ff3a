from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import randomise_deltas, tiny_llama

import clp_engine as clp
from clp_engine.layers import conditioned_layers


@pytest.fixture
def saved(saved_base, tmp_path):
    from transformers import AutoModelForCausalLM

    config = clp.CLPConfig(rewards=["long", "short"], min_kl_weight=0.05)
    model = clp.get_clp_model(AutoModelForCausalLM.from_pretrained(saved_base), config)
    randomise_deltas(model)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_round_trip_keeps_every_bit(saved):
    model, folder = saved
    assert sorted(entry.name for entry in folder.iterdir()) == ["clp_config.json", "clp_model.safetensors"]
    loaded = clp.CLPModel.from_pretrained(folder)
    assert loaded.clp_config == model.clp_config
    assert not loaded.training
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        for weights in ([1.0, 0.0], [0.3, 0.7]):
            got = loaded(input_ids=ids, reward_weights=weights).logits
            assert torch.equal(got, model(input_ids=ids, reward_weights=weights).logits)
    trainable = clp.CLPModel.from_pretrained(folder, is_trainable=True)
    assert all(layer.deltas.requires_grad for layer in conditioned_layers(trainable).values())


def test_copies_are_named_and_the_base_is_not_copied(saved):
    model, folder = saved
    tensors = load_file(folder / "clp_model.safetensors")
    layer = model.model.layers[1].self_attn.v_proj
    assert len(tensors) == 2 * 2 * 4
    assert torch.equal(tensors["model.layers.1.self_attn.v_proj.weight.short"], layer.deltas[:, 1])


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "version", "base"])
def test_what_does_not_fit_is_named(saved, damage):
    _, folder = saved
    tensors = load_file(folder / "clp_model.safetensors")
    record = json.loads((folder / "clp_config.json").read_text())
    first = sorted(tensors)[0]
    base, words = None, first
    if damage == "missing":
        del tensors[first]
    elif damage == "extra":
        tensors["stray.weight.long"], words = torch.zeros(1), "stray"
    elif damage == "shape":
        tensors[first], words = torch.zeros(3, 3), r"\[3, 3\]"
    elif damage == "version":
        record["format_version"], words = 99, "format_version 99"
    else:
        base, words = tiny_llama(seed=5), "another base model"
    save_file(tensors, folder / "clp_model.safetensors")
    (folder / "clp_config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=words):
        clp.CLPModel.from_pretrained(folder, base_model=base)


def test_missing_places_are_named(saved, tmp_path):
    _, folder = saved
    with pytest.raises(FileNotFoundError, match="no conditioned model at"):
        clp.CLPModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no clp_config\.json"):
        clp.CLPModel.from_pretrained(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="pass base_model="):
        clp.CLPModel.from_pretrained(folder)
    assert clp.CLPModel.from_pretrained(folder, base_model=tmp_path / "moved") is not None
