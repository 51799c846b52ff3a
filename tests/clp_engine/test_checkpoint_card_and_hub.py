"""The model card, and checkpoints that come from or go to the Hugging Face hub (played by stand-ins)."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from checkpoint_support import copies_of, is_equal, sign, tiny_base, tiny_conditioned

import clp_engine as clp

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model():
    """As if its base had come from the hub."""
    model = tiny_conditioned()
    model.config._name_or_path, model.config._commit_hash = "owner/base", REVISION
    return model


def test_the_card_names_base_rewards_and_use(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("owner/base", "clp_engine")
    assert "steerable" in card.data.tags
    for part in ("`long`, `short`", "`attn`, as `delta`", REVISION, "from 0.05 "):
        assert part in card.text


def test_the_cards_snippet_runs(saved_base, tmp_path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(saved_base)
    clp.get_clp_model(base, clp.CLPConfig(rewards=["long", "short"])).save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert "base_model:" not in text  # the hub refuses a folder's path
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code.replace("FOLDER OR HUB ID", str(tmp_path / "model")).replace("a prompt", "open the file"), {})
    assert output.getvalue().strip()


def test_an_edited_card_stays_and_an_untouched_one_follows(model, tmp_path):
    model.save_pretrained(tmp_path)
    model.config._name_or_path = "owner/renamed"
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "owner/renamed" in text
    for own in (text.replace("steerable language", "steered language", 1), "# My model\n", ""):
        (tmp_path / "README.md").write_text(own)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == own


class Hub:
    """What HfApi does with an upload, for one repository in memory."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def __call__(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        assert exist_ok
        self.folder.mkdir(exist_ok=True)
        self.calls.append(("private", private))
        return SimpleNamespace(repo_id=f"owner/{repo_id}")

    def file_exists(self, repo_id, filename, *, revision=None):
        return (self.folder / filename).exists()

    def hf_hub_download(self, repo_id, filename, *, revision=None):
        return str(self.folder / filename)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, delete_patterns, **options):
        from pathlib import Path

        self.calls.append((repo_id, options))
        for pattern in delete_patterns:
            for entry in list(self.folder.glob(pattern)):
                entry.unlink()
        sent = [entry for entry in Path(folder_path).iterdir() if entry.name not in ignore_patterns]
        for entry in sent:
            shutil.copy(entry, self.folder)
        return "commit"


def test_push_uploads_exactly_our_files(model, tmp_path, monkeypatch):
    hub = Hub(tmp_path / "repository")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    options = {"commit_message": "First", "revision": "main", "create_pr": True}
    assert model.push_to_hub("name", token="secret", private=True, **options) == "commit"
    assert hub.calls == [("token", "secret"), ("private", True), ("owner/name", options)]
    first = sorted(entry.name for entry in hub.folder.iterdir())
    assert [re.sub("[0-9a-f]{16}", "HASH", name) for name in first] == [
        *("README.md", "clp_config.json", "clp_model-HASH.safetensors")
    ]
    (hub.folder / "README.md").write_text("edited there")
    (hub.folder / "tokenizer.json").write_text("{}")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.deltas.add_(1)
    model.push_to_hub("name", max_shard_size="2KB")
    second = sorted(entry.name for entry in hub.folder.iterdir())
    assert first[2] not in second
    assert {"README.md", "clp_config.json", "tokenizer.json"} < set(second)
    assert (hub.folder / "README.md").read_text() == "edited there"
    assert is_equal(copies_of(clp.CLPModel.from_pretrained(hub.folder, base_model=tiny_base())), copies_of(model))


def test_a_hub_id_is_downloaded_and_the_bases_arguments_reach_the_base(model, tmp_path, monkeypatch):
    import transformers

    model.save_pretrained(tmp_path / "snapshot")
    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(tmp_path / "snapshot")

    def from_pretrained(name, **options):
        calls.append((name, options))
        return tiny_base()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: tiny_base().config)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    loaded = clp.CLPModel.from_pretrained("owner/steerable", revision="v1", token="secret", dtype="float32")
    assert is_equal(copies_of(loaded), copies_of(model))
    ours = ["clp_config.json", "prompt_template.json", "clp_model*.safetensors"]
    assert calls == [
        (
            "owner/steerable",
            {"revision": "v1", "token": "secret", "allow_patterns": ours},
        ),
        ("owner/base", {"revision": REVISION, "token": "secret", "dtype": "float32"}),
    ]
    calls.clear()
    clp.CLPModel.from_pretrained("owner/steerable", base_model="owner/other")
    assert calls[1] == ("owner/other", {})  # the recorded revision is the recorded base's


def test_a_repository_without_a_conditioned_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the hub repository owner/plain holds no conditioned model"):
        clp.CLPModel.from_pretrained("owner/plain")


def test_a_base_that_the_hub_does_not_know_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"(?s)the base model 'owner/base' of .* pass base_model="):
        clp.CLPModel.from_pretrained(tmp_path)
    sign(tmp_path, lambda record: record.update(base_model_name_or_path="no id: nor a path"))
    with pytest.raises((FileNotFoundError, ValueError), match=r"(?s)'no id: nor a path' of .* pass base_model="):
        clp.CLPModel.from_pretrained(tmp_path)
