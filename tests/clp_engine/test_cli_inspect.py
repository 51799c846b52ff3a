"""`clp inspect`: what it prints of a sound folder, and that a damaged one is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_support import tensor_files, tiny_conditioned, to_version_1

from clp_engine import cli


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_conditioned()
    model.config._name_or_path = "/nowhere/base"  # not loaded, so not missed
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_inspect_lists_rewards_base_and_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folder)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{folder}: verified"
    values = {line[:20].strip(): line[20:].strip() for line in rest}
    assert (values["format version"], values["rewards"], values["variant"]) == ("2", "long, short", "attn")
    assert (values["parameterization"], values["base model"]) == ("delta", "/nowhere/base")
    assert values["base fingerprint"].startswith("v2:")
    assert values["tensors"] == "8 of F32, 0.006 MB"
    assert (values["q_proj"], values["k_proj"]) == ("2 tensors, 0.002 MB", "2 tensors, 0.001 MB")


def test_inspect_says_that_version_1_has_no_hashes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to_version_1(folder, "0" * 64)
    assert cli.main(["inspect", str(folder)]) == 0
    assert "format version     1, which has no hashes" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["altered", "missing", "no model"])
def test_inspect_reports_damage_in_one_line(
    damage: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = tensor_files(folder)
    if damage == "altered":
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    elif damage == "missing":
        file.unlink()
    else:
        folder = tmp_path / "nothing"
    assert cli.main(["inspect", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (file.name if damage != "no model" else "no such folder") in error
