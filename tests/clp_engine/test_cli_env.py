"""`clp env --tune`: what it measures, where there is no GPU, and what `clp env` says of tables."""

from __future__ import annotations

import pytest
import torch

import clp_engine as clp
from clp_engine import cli
from clp_engine.operator_shapes import shapes_of_model
from clp_kernels import launch_tables, tuning, tuning_clock
from clp_kernels.tuning_cases import OperatorShape

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture
def tuned(monkeypatch):
    """What `clp env --tune` asks for, on a GPU that is none."""
    asked = []
    monkeypatch.setattr(tuning, "find_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(tuning_clock, "GPUClock", lambda device: "clock")
    monkeypatch.setattr(tuning, "tune", lambda *arguments: asked.append(arguments))
    return asked


def test_shapes_are_handed_on(tuned):
    assert (
        cli.main(["env", "--tune", "--shapes", "64x32x2", "32x64x3", "--rows", "8", "--deltas_dtype", "float16"]) == 0
    )
    shapes = [OperatorShape("mixed_linear", BF16, torch.float16, K, N, D) for N, D, K in ((64, 32, 2), (32, 64, 3))]
    assert tuned.pop() == (shapes, [8], torch.device("cpu"), "clock")
    assert cli.main(["env", "--tune", "--dtype", "float32"]) == 0
    assert tuned.pop() == (tuning.common_shapes(F32, F32), tuning.ROWS, torch.device("cpu"), "clock")


def test_a_models_layers_are_handed_on(tuned, saved_base):
    """The plain model's attention: q and o alike, k and v alike."""
    assert cli.main(["env", "--tune", "--model", str(saved_base)]) == 0
    (shapes, *_) = tuned.pop()
    assert shapes == [OperatorShape("mixed_linear", F32, F32, 2, N, 32) for N in (32, 16)]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rows", "8"], "--rows is for --tune"),
        (["--tune"], "torch sees none"),
        (["--tune", "--model", "/nowhere"], "no such folder"),
        (["--tune", "--model", "there", "--dtype", "float32"], "leave them out beside --model"),
    ],
)
def test_errors(argv, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "--model" in argv:
        monkeypatch.setattr(tuning, "find_gpu", lambda: torch.device("cpu"))
    assert cli.main(["env", *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_shape_of_another_form_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["env", "--tune", "--shapes", "64x32"])
    assert "'64x32' is not of the form NxDxK" in capsys.readouterr().err


def test_env_says_which_table_is_in_use(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CLP_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made up 9000")
    assert cli.main(["env"]) == 0
    assert "`clp env --tune` measures others" in capsys.readouterr().out
    path = launch_tables.user_path("Made up 9000")
    empty = launch_tables.Table("Made up 9000", "2026-01-31", "2.13.0", launch_tables.triton_version(), {})
    launch_tables.write(path, empty)
    assert cli.main(["env"]) == 0
    assert f"tiles, Made up 9000 0 measured tiles of 2026-01-31, {path}" in capsys.readouterr().out


def test_shapes_of_every_family(plain, saved_base, tmp_path):
    """From the saved folder alone, with the precision that its copies were saved in."""

    def shapes(name: str, half: bool = False, **settings):
        from clp_engine.pretrained import load_by_name

        model = clp.get_clp_model(load_by_name(saved_base), clp.CLPConfig(rewards=["a", "b", "c"], **settings))
        (model.bfloat16() if half else model).save_pretrained(tmp_path / name)
        return shapes_of_model(str(tmp_path / name))

    linear = [OperatorShape("mixed_linear", BF16, BF16, 3, N, D) for N, D in ((32, 32), (16, 32), (48, 32), (32, 48))]
    head = OperatorShape("mixed_linear_logprob", BF16, BF16, 3, 32, 32)
    rest = [OperatorShape("mixed_embedding", BF16, BF16, 3, 32, 32), OperatorShape("mixed_norm", BF16, BF16, 3, 1, 32)]
    assert set(shapes("full", half=True, variant="full")) == {*linear, *rest, head}
    low_rank = {OperatorShape("low_rank_linear", F32, F32, 3 * 4, N, 32) for N in (32, 16)}
    assert set(shapes("lora", parameterization="lora", r=4)) == low_rank
    soft = shapes("soft", parameterization="soft_tokens", num_virtual_tokens=5)
    assert soft == [OperatorShape("mixed_linear", F32, F32, 3, 32, 5)]
