"""The commands that write other libraries' formats and read them: collapse, export, import."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft_support import load_adapters, save_adapter
from tests_support import randomise_deltas, tiny_llama

import clp_engine as clp
from clp_engine import cli
from clp_engine.cli import arguments, import_

IDS = torch.tensor([[5, 6, 7, 8]])
WEIGHTS = {"long": 0.3, "short": 0.7}


@pytest.fixture
def saved_model(saved_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conditioned model in a folder that has no tokenizer of its own."""
    from transformers import AutoModelForCausalLM

    model = clp.get_clp_model(
        AutoModelForCausalLM.from_pretrained(saved_base), clp.CLPConfig(rewards=["long", "short"])
    )
    randomise_deltas(model)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model"


def logits(model, **weighting):
    with torch.no_grad():
        return model(input_ids=IDS, **weighting).logits


def expected(folder: Path, kl_weight: float | None = None) -> torch.Tensor:
    return logits(clp.CLPModel.from_pretrained(folder), reward_weights=WEIGHTS, kl_weight=kl_weight)


@pytest.mark.parametrize("command", [["collapse"], ["export", "--format", "hf"]])
def test_one_weighting_as_an_ordinary_checkpoint(saved_model, command, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    argv = [*command, "--weights", "long=.3", "short=.7", "model", "--kl_weight", ".1", "--output_dir", "out"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "wrote out"
    plain = AutoModelForCausalLM.from_pretrained("out")
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert torch.allclose(logits(plain), expected(saved_model, 0.1), rtol=0, atol=2e-5)
    assert AutoTokenizer.from_pretrained("out").chat_template  # the base's


def test_adapters_of_every_copy_and_of_one_weighting(saved_base, saved_model, plain, capsys):
    assert cli.main(["export", "model", "--format", "peft", "--output_dir", "copies"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["wrote copies/long", "wrote copies/short"]
    assert cli.main(
        ["export", "model", "--format", "peft", "--weights", "long=.3,short=.7", "--output_dir", "one", "--rank", "2"]
    ) == 0  # fmt: skip
    assert json.loads(Path("one/adapter_config.json").read_text())["r"] == 2
    assert cli.main(["export", "model", "--format=peft", "--weights=long=.3,short=.7", "--output_dir=exact"]) == 0
    assert json.loads(Path("exact/adapter_config.json").read_text())["base_model_name_or_path"] == str(saved_base)
    adapter = load_adapters(plain, {"default": Path("exact")})
    assert torch.allclose(logits(adapter), expected(saved_model), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "kind",
    ["peft", "finetuned"],
)
def test_checkpoints_become_a_steerable_model(saved_base, tmp_path, monkeypatch, kind, plain, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("helpful", "brief"), start=1):
        if kind == "peft":
            save_adapter(plain, tmp_path / name, seed, r=2, target_modules=["q_proj"])
        else:
            tuned = tiny_llama()
            tuned.model.layers[0].self_attn.q_proj.weight.data += seed * 0.1
            tuned.save_pretrained(tmp_path / name)
    argv = ["import", f"--{kind}", "helpful=helpful", "brief=brief", "--base_model", "base", "--output_dir", "out"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "wrote out, steered by helpful, brief"
    model = clp.CLPModel.from_pretrained("out")
    assert model.clp_config.rewards == ["helpful", "brief"]
    build = clp.CLPModel.from_peft if kind == "peft" else clp.CLPModel.from_finetuned
    weights = {"helpful": 0.4, "brief": 0.6}
    direct = build("base", {"helpful": "helpful", "brief": "brief"})
    assert torch.equal(logits(model, reward_weights=weights), logits(direct, reward_weights=weights))
    assert Path("out/tokenizer_config.json").is_file()


def test_a_model_without_a_tokenizer_is_written_without_one(saved_base, saved_model, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved_base / name).unlink()
    assert cli.main(["collapse", "model", "--weights", "long=1", "short=0", "--output_dir", "out"]) == 0
    assert f"no tokenizer found in model or {saved_base}" in capsys.readouterr().out
    assert not list(Path("out").glob("tokenizer*"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["collapse", "--output_dir", "out"], "no model given"),
        (["collapse", "model", "--output_dir", "base"], "--output_dir base holds"),
        (["collapse", "model", "--weights", "long=1", "--output_dir", "out"], "missing: ['short']"),
        (["export", "--format", "hf", "--output_dir", "out"], "no model given"),
        (["export", "model", "--format", "peft", "--output_dir", "model"], "--output_dir model holds"),
        (["export", "model", "--format", "hf", "--rank", "4", "--output_dir", "out"], "--rank is an adapter's"),
        (["export", "model", "--format", "peft", "--kl_weight", ".5", "--output_dir", "out"], "part of a weighting"),
        (["import", "--base_model", "base", "--output_dir", "out"], "one of the two"),
        (["import", "--base_model", "base", "--peft", "a=b", "--finetuned", "a=b", "--output_dir", "out"], "one of"),
        (["import", "--base_model", "base", "--peft", "a=b", "a=c", "--output_dir", "out"], "given twice"),
        (["import", "--base_model", "base", "--peft", "a=./none", "--output_dir", "out"], "a ./none: no such folder"),
        (["import", "--base_model", "base", "--finetuned", "a=base", "--output_dir", "out"], "'a' equals the base"),
        (["import", "--base_model", "base", "--peft", "a=base", "--output_dir", "model"], "--output_dir model holds"),
        (["import", "--base_model", "./none", "--peft", "a=base", "--output_dir", "out"], "--base_model ./none"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(saved_model, argv, words, capsys):
    before = sorted(Path().rglob("*"))
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert words in error.splitlines()[-1]
    assert sorted(Path().rglob("*")) == before


def test_a_yaml_file_gives_places_as_a_mapping(tmp_path):
    (tmp_path / "import.yaml").write_text("base_model: base\noutput_dir: out\npeft: {helpful: a, brief: b=c}\n")
    options = arguments.parse(import_._parser(), ["--config", str(tmp_path / "import.yaml")])
    assert options.peft == [("helpful", "a"), ("brief", "b=c")]
    with pytest.raises(SystemExit):
        arguments.parse(import_._parser(), ["--base_model", "b", "--output_dir", "o", "--peft", "helpful"])
