"""The format on disk: what is written, that it loads bit for bit, older versions, precision, shards."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re

import pytest
import torch
from checkpoint_support import (
    copies_of,
    is_equal,
    sign,
    tensor_files,
    tiny_base,
    tiny_conditioned,
    to_version_1,
    write_tensors,
)
from safetensors.torch import load_file
from tests_support import randomise_deltas, tiny_llama

import clp_engine as clp
from clp_engine import checkpoint
from clp_engine.layers import conditioned_layers, named_copies


@pytest.fixture
def saved(saved_base, tmp_path):
    from transformers import AutoModelForCausalLM

    config = clp.CLPConfig(rewards=["long", "short"], min_kl_weight=0.05)
    model = clp.get_clp_model(AutoModelForCausalLM.from_pretrained(saved_base), config)
    randomise_deltas(model)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.fixture
def tiny(tmp_path):
    """A model small enough to be saved in every test, and its folder."""
    model = tiny_conditioned()
    model.save_pretrained(tmp_path / "tiny")
    return model, tmp_path / "tiny"


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_round_trip_keeps_every_bit(saved):
    model, folder = saved
    *others, weights_file = names(folder)
    assert others == ["README.md", "clp_config.json"]
    assert re.fullmatch(r"clp_model-[0-9a-f]{16}\.safetensors", weights_file)
    assert len({entry.stat().st_mode for entry in folder.iterdir()}) == 1  # all as the umask has it
    loaded = clp.CLPModel.from_pretrained(folder)
    assert loaded.clp_config == model.clp_config
    assert is_equal(copies_of(loaded), copies_of(model))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        for weights in ([1.0, 0.0], [0.3, 0.7]):
            got = loaded(input_ids=ids, reward_weights=weights).logits
            assert torch.equal(got, model(input_ids=ids, reward_weights=weights).logits)
    trainable = clp.CLPModel.from_pretrained(folder, is_trainable=True)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in trainable.named_parameters() if parameter.requires_grad} == wanted


def test_copies_are_named_and_the_base_is_not_copied(saved):
    model, folder = saved
    (file,) = tensor_files(folder)
    tensors = load_file(file)
    layer = model.model.layers[1].self_attn.v_proj
    assert len(tensors) == 2 * 2 * 4
    assert torch.equal(tensors["model.layers.1.self_attn.v_proj.weight.short"], layer.deltas[:, 1])


def test_the_manifest_records_base_files_and_tensors(saved):
    model, folder = saved
    (file,) = tensor_files(folder)
    record = json.loads((folder / "clp_config.json").read_text())
    assert record["format_version"] == 2
    assert record["base_model_name_or_path"] == model.config._name_or_path
    assert (record["base_revision"], record["base_dtype"]) == (None, "float32")
    assert record["base_fingerprint"] == checkpoint.base_fingerprint(model)
    assert record["config"] == model.clp_config.to_dict()
    entry = record["files"][file.name]
    assert entry["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert file.name == f"clp_model-{entry['sha256'][:16]}.safetensors"
    assert entry["size"] == file.stat().st_size
    assert entry["tensors"]["model.layers.0.self_attn.q_proj.weight.long"] == {"dtype": "F32", "shape": [32, 32]}


def test_copies_are_views_of_the_parameters(conditioned):
    layer = conditioned.model.layers[0].self_attn.q_proj
    key = "model.layers.0.self_attn.q_proj.weight.short"
    named_copies(conditioned)[key].fill_(7.0)
    assert (layer.deltas[:, 1] == 7).all()
    assert not (layer.deltas[:, 0] == 7).any()
    state = {name: torch.zeros_like(tensor) for name, tensor in conditioned.state_dict().items()}
    assert named_copies(conditioned, state)[key].abs().max() == 0
    del state["model.layers.0.self_attn.q_proj.deltas"]
    with pytest.raises(ValueError, match=r"state_dict lacks model\.layers\.0\.self_attn\.q_proj\.deltas"):
        named_copies(conditioned, state)


def test_each_layer_keeps_its_own_precision(tmp_path):
    model = tiny_conditioned()
    layers = conditioned_layers(model)
    dtypes = dict(zip(layers, (torch.bfloat16, torch.float32, torch.float16, torch.float64), strict=True))
    for path, layer in layers.items():
        layer.deltas.data = layer.deltas.data.to(dtypes[path])
    model.save_pretrained(tmp_path)
    (file,) = tensor_files(tmp_path)
    assert {tensor.dtype for tensor in load_file(file).values()} == set(dtypes.values())
    loaded = conditioned_layers(clp.CLPModel.from_pretrained(tmp_path, base_model=tiny_base()))
    for path, layer in layers.items():
        assert loaded[path].deltas.dtype == dtypes[path]
        assert torch.equal(loaded[path].deltas, layer.deltas)


def test_shards_and_saving_over_an_older_checkpoint(tiny):
    model, folder = tiny
    others = {"optimizer.pt": b"state", "model.safetensors": b"theirs", "clp_model-notes.safetensors": b"own"}
    for name, content in others.items():
        (folder / name).write_bytes(content)
    first = set(names(folder))
    model.save_pretrained(folder, max_shard_size="2KB")  # q and o have 1024 bytes per copy, k and v half of it
    shards = [path for path in tensor_files(folder) if path.name not in others]
    assert [path.name[:24] for path in shards] == [f"clp_model-0000{i}-of-00005" for i in range(1, 6)]
    assert all(sum(tensor.nbytes for tensor in load_file(path).values()) <= 2000 for path in shards)
    assert not (first - set(others) - {"README.md", "clp_config.json"}) & set(names(folder))
    assert is_equal(copies_of(clp.CLPModel.from_pretrained(folder, base_model=tiny_base())), copies_of(model))
    model.save_pretrained(folder, max_shard_size=1)  # every tensor is larger: a file each
    assert len([path for path in tensor_files(folder) if path.name not in others]) == 8
    assert is_equal(copies_of(clp.CLPModel.from_pretrained(folder, base_model=tiny_base())), copies_of(model))
    model.save_pretrained(folder)
    assert set(names(folder)) == first  # content names the file: the same copies, the same name
    assert all((folder / name).read_bytes() == content for name, content in others.items())


def test_a_gathered_state_dict_is_saved_instead_of_the_models_own(tmp_path):
    model = tiny_conditioned()
    state = {name: tensor * 2 if name.endswith("deltas") else tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = copies_of(clp.CLPModel.from_pretrained(tmp_path, base_model=tiny_base()))
    assert is_equal(loaded, {name: 2 * tensor for name, tensor in copies_of(model).items()})


@pytest.mark.parametrize("size", ["five", "5 apples", "-5GB", -1, None, "infGB"])
def test_a_wrong_shard_size_is_named_before_anything_is_written(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size is"):
        tiny_conditioned().save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


def version_1_fingerprint(model) -> str:
    """Format version 1's, written once more: it must not change with the code."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()[:64].bfloat16().view(torch.int16)
        digest.update(f"{name}{list(parameter.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def test_version_1_loads_and_becomes_version_2(tiny):
    model, folder = tiny
    to_version_1(folder, version_1_fingerprint(tiny_base()))
    assert names(folder) == ["clp_config.json", "clp_model.safetensors"]
    loaded = clp.CLPModel.from_pretrained(folder, base_model=tiny_base())
    assert is_equal(copies_of(loaded), copies_of(model))
    assert loaded.clp_config == model.clp_config
    loaded.save_pretrained(folder)
    assert "clp_model.safetensors" not in names(folder)
    assert json.loads((folder / "clp_config.json").read_text())["format_version"] == 2
    assert is_equal(copies_of(clp.CLPModel.from_pretrained(folder, base_model=tiny_base())), copies_of(model))


def test_version_1_is_checked(tiny):
    _, folder = tiny
    to_version_1(folder, version_1_fingerprint(tiny_base()))
    with pytest.raises(ValueError, match="another base model"):
        clp.CLPModel.from_pretrained(folder, base_model=tiny_llama(seed=5, hidden_size=16, intermediate_size=16))
    record = json.loads((folder / "clp_config.json").read_text())
    (folder / "clp_config.json").write_text(json.dumps(record | {"colour": 1}))
    with pytest.raises(ValueError, match=r"clp_config\.json: the manifest has the unknown field 'colour'"):
        checkpoint.verify(folder)
    (folder / "clp_config.json").write_text(json.dumps(record))
    (folder / "clp_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"clp_model\.safetensors is missing"):
        checkpoint.verify(folder)


def test_not_a_number_is_neither_saved_nor_loaded(tiny):
    model, folder = tiny
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    key = "model.layers.0.self_attn.k_proj.weight.short"
    named_copies(model)[key][0, 0] = torch.nan
    with pytest.raises(ValueError, match=re.escape(key)):
        model.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    for value in (torch.nan, torch.inf):
        tensors = load_file(tensor_files(folder)[0])
        tensors[key][0, 0] = value
        write_tensors(folder, tensors)
        with pytest.raises(ValueError, match=f"{re.escape(key)} of .* holds NaN or infinity"):
            clp.CLPModel.from_pretrained(folder, base_model=tiny_base())


def test_the_fingerprint_is_the_bases_own(plain, conditioned):
    fingerprint = checkpoint.base_fingerprint(plain)
    assert checkpoint.base_fingerprint(conditioned) == fingerprint
    assert checkpoint.base_fingerprint(copy.deepcopy(plain).bfloat16()) == fingerprint
    assert checkpoint.base_fingerprint(plain, scheme="v1") == f"v1:{version_1_fingerprint(plain)}"
    assert checkpoint.base_fingerprint(tiny_llama(seed=5)) != fingerprint
    state = {name: tensor + 1 for name, tensor in plain.state_dict().items()}
    assert checkpoint.base_fingerprint(plain, state) != fingerprint


@pytest.mark.parametrize("change", ["last row", "one column", "noise"])
def test_the_fingerprint_sees_more_than_the_first_values(change):
    model = tiny_llama(hidden_size=64, vocab_size=512)
    other = copy.deepcopy(model)
    weight = other.model.embed_tokens.weight.data
    if change == "last row":
        weight[-1] += 1
    elif change == "one column":
        weight[1:, 37] += 1
    else:
        weight[1:] += 0.02 * torch.randn_like(weight[1:])
    assert checkpoint.base_fingerprint(model, scheme="v1") == checkpoint.base_fingerprint(other, scheme="v1")
    assert checkpoint.base_fingerprint(model) != checkpoint.base_fingerprint(other)


@pytest.mark.parametrize("problem", ["base", "config", "precision", "damage"])
def test_copies_that_do_not_fit_leave_the_model_as_it_was(tiny, problem):
    model, folder = tiny
    target = tiny_conditioned(seed=9)
    checkpoint.load_copies(target, folder)
    assert is_equal(copies_of(target), copies_of(model))
    words = {"base": "another base", "config": "min_kl_weight=0.2", "precision": "float32", "damage": "was altered"}
    if problem == "base":
        target.model.norm.weight.data.add_(1)
    elif problem == "config":
        target.clp_config = dataclasses.replace(target.clp_config, min_kl_weight=0.2)
    elif problem == "precision":
        target.bfloat16()
    else:
        content = bytearray(tensor_files(folder)[0].read_bytes())
        content[-1] ^= 1
        tensor_files(folder)[0].write_bytes(content)
    for view in named_copies(target).values():
        view.zero_()
    with pytest.raises(ValueError, match=words[problem]):
        checkpoint.load_copies(target, folder)
    assert all(view.abs().max() == 0 for view in named_copies(target).values())


def test_only_the_main_process_writes_and_a_push_is_not_forgotten(tmp_path):
    model = tiny_conditioned()
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    with pytest.raises(ValueError, match=r"call model\.push_to_hub"):
        model.save_pretrained(tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()


def test_missing_places_are_named(saved, tmp_path):
    _, folder = saved
    with pytest.raises(FileNotFoundError, match="no conditioned model at"):
        clp.CLPModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no clp_config\.json"):
        clp.CLPModel.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="base_model is a int"):
        clp.CLPModel.from_pretrained(folder, base_model=3)
    with pytest.raises(TypeError, match=r"\['dtype'\] have no from_pretrained to go to"):
        clp.CLPModel.from_pretrained(folder, base_model=tiny_base(), dtype="bfloat16")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="pass base_model="):
        clp.CLPModel.from_pretrained(folder)
    assert clp.CLPModel.from_pretrained(folder, base_model=tmp_path / "moved") is not None
    sign(folder, lambda record: record.update(base_model_name_or_path=""))
    with pytest.raises(ValueError, match="records no name of its base model"):
        clp.CLPModel.from_pretrained(folder)
