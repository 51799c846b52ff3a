"""The wording of a model's training prompts goes where the model goes, and `clp generate` applies it."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
from tests_support import randomise_deltas, tiny_llama

import clp_engine as clp
from clp_engine import checkpoint, cli
from clp_engine.data import load_dataset_rows, prompt_template
from clp_engine.prompt_template import PromptTemplate

TEMPLATE = PromptTemplate([{"role": "system", "content": "red"}, {"role": "user", "content": "{prompt} of the file"}])


@pytest.fixture
def model(saved_base):
    from transformers import AutoModelForCausalLM

    model = clp.get_clp_model(
        AutoModelForCausalLM.from_pretrained(saved_base), clp.CLPConfig(rewards=["long", "short"])
    )
    randomise_deltas(model, std=0.3)
    model.prompt_template = TEMPLATE
    return model


def test_a_template_is_filled_once_and_word_for_word():
    assert TEMPLATE.fill("{prompt} {braces}")[1]["content"] == "{prompt} {braces} of the file"
    assert TEMPLATE.fill("sort")[0] == {"role": "system", "content": "red"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "0 times"),
        ([{"role": "user", "content": "no place"}], "0 times"),
        ([{"role": "user", "content": "{prompt} {prompt}"}], "2 times"),
        ([{"role": "user", "text": "{prompt}"}], "a role and a content"),
    ],
)
def test_templates_without_one_place_are_refused(messages, words):
    with pytest.raises(ValueError, match=words):
        PromptTemplate(messages)


def test_the_embedded_data_set_is_worded_by_its_template():
    rows = load_dataset_rows("docstrings", "test", limit=2)
    assert [row["prompt"] for row in rows] == [prompt_template("docstrings").fill(row["source"]) for row in rows]
    assert rows[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"{rows[0]['source']}\n\nSay this in fewer words."},
    ]
    assert prompt_template("prompts.jsonl") is None


def test_it_is_saved_loaded_and_forgotten_with_the_model(model, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "model")
    loaded = clp.CLPModel.from_pretrained(tmp_path / "model")
    assert loaded.prompt_template == TEMPLATE
    assert not hasattr(loaded.collapse([0.5, 0.5]), "prompt_template")
    assert cli.main(["inspect", str(tmp_path / "model")]) == 0
    assert "{prompt} of the file" in capsys.readouterr().out
    uploaded = {}
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: huggingface_hub.RepoUrl(
        f"https://huggingface.co/{repo_id}"))  # fmt: skip
    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", lambda *_, **__: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, folder_path, **_: uploaded.update(
        template=checkpoint.read_prompt_template(tmp_path.joinpath(folder_path))))  # fmt: skip
    loaded.push_to_hub("name/model")
    assert uploaded == {"template": TEMPLATE}
    loaded.prompt_template = None
    loaded.save_pretrained(tmp_path / "model")
    assert clp.CLPModel.from_pretrained(tmp_path / "model").prompt_template is None


def test_a_damaged_one_is_refused_by_name(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "prompt_template.json").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    with pytest.raises(ValueError, match=r"prompt_template.json: messages hold .* 0 times"):
        clp.CLPModel.from_pretrained(tmp_path, base_model=tiny_llama())


def test_clp_generate_words_prompts_as_in_training(model, tokenizer, tmp_path, capsys):
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def text(*flags):
        assert cli.main(["generate", folder, "--max_new_tokens", "6", "--weights", "long=.5", "short=.5", *flags]) == 0
        return capsys.readouterr().out

    worded = text("--prompt", "sort")
    assert worded == text("--raw", "--system_prompt", "red", "--prompt", "sort of the file")
    assert worded != text("--raw", "--prompt", "sort")
    blue = text("--prompt", "sort", "--system_prompt", "blue")
    assert blue == text("--raw", "--system_prompt", "blue", "--prompt", "sort of the file")
    assert text("--no-chat", "--prompt", "sort") == text("--no-chat", "--raw", "--prompt", "sort")
    assert len({worded, blue, text("--no-chat", "--prompt", "sort")}) == 3
