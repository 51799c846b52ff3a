"""The wording of a model's training prompts goes where the model goes, and `clp generate` applies it."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
from tests_support import randomise_deltas, tiny_llama

import clp_engine as clp
from clp_engine import checkpoint, cli, rollout
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
        ([{"role": "us\ner", "content": "{prompt}"}], r"the role 'us\\ner'"),
        ([{"role": "user", "content": "{prompt}\x1b[2J"}], r"the user's content holds .* '\\x1b'"),
        ([{"role": "user", "content": "{prompt}\x7f"}], r"'\\x7f'"),
        ([{"role": "user", "content": "{prompt}\x9b"}], r"'\\x9b'"),
        ([{"role": "user", "content": "{prompt}\ud800"}], r"'\\ud800'"),
    ],
)
def test_templates_that_could_not_be_used_are_refused(messages, words):
    with pytest.raises(ValueError, match=words):
        PromptTemplate(messages)


def test_contents_of_several_lines_in_any_script_are_saved_and_loaded(model, tmp_path):
    text = "Be brief.\n\n\tSeulement \u00e9t\u00e9, \u732b \U0001f408.\r\n{prompt}\n"
    model.prompt_template = PromptTemplate([{"role": "user", "content": text}])
    model.save_pretrained(tmp_path)
    loaded = clp.CLPModel.from_pretrained(tmp_path, base_model=tiny_llama())
    assert loaded.prompt_template == model.prompt_template
    assert loaded.prompt_template.fill("sort")[0]["content"] == text.replace("{prompt}", "sort")


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


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": "x"}, ": messages hold .* 0 times"),
        ({"role": "user", "content": "{prompt}\x1b[2J"}, r": the user's content holds the control character '\\x1b'"),
        ({"role": "us\ner", "content": "{prompt}"}, r"\.messages\[0\]\['role'\] .* holds control characters"),
        ({"role": "user", "content": 3}, r"\.messages\[0\]\['content'\] is 3, expected str"),
    ],
)
def test_a_damaged_one_is_refused_by_name(model, tmp_path, message, words):
    model.save_pretrained(tmp_path)
    (tmp_path / "prompt_template.json").write_text(json.dumps({"messages": [message]}))
    with pytest.raises(ValueError, match=rf"prompt_template.json{words}"):
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


def test_clp_generate_and_inspect_take_a_template_of_several_lines(model, tokenizer, tmp_path, capsys, monkeypatch):
    model.prompt_template = PromptTemplate([{"role": "user", "content": "{prompt} of\n\nthe file"}])
    folder = str(tmp_path / "model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seen = []
    encode = rollout.encode_prompts
    monkeypatch.setattr(rollout, "encode_prompts", lambda tok, rows: seen.append(rows) or encode(tok, rows))
    assert cli.main(["generate", folder, "--max_new_tokens", "2", "--prompt", "sort"]) == 0
    assert seen == [[[{"role": "user", "content": "sort of\n\nthe file"}]]]
    assert cli.main(["inspect", folder]) == 0
    assert r"{prompt} of\n\nthe file" in capsys.readouterr().out  # one line a field
