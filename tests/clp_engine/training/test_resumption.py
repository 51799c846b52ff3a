"""A resumed run is the uninterrupted one, bit for bit on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests_support import tiny_llama

import clp_engine as clp
from clp_engine.layers import named_copies
from clp_engine.training import CLPTrainer, CLPTrainingConfig
from clp_engine.training.weighting_sampler import WeightingSampler

ROWS = [{"prompt": f"{a} {b}"} for a in ("the cat", "a dog", "read all") for b in ("file", "of value", "sum")]
FUNCS = {
    "long": lambda completions, **_: [float(len(text.split())) for text in completions],
    "short": lambda completions, **_: [float(text.count("a")) for text in completions],
}


def trainer(folder, tokenizer, max_steps=5, **fields):
    """Three prompts a step of nine: an epoch ends after step 3, and the rotations of a draw go over a step's end."""
    model = clp.get_clp_model(tiny_llama(), clp.CLPConfig(["long", "short"], min_kl_weight=0.05))
    defaults = {"output_dir": str(folder), "per_device_train_batch_size": 6, "num_generations": 2, "use_cpu": True,
                "max_completion_length": 5, "save_steps": 1, "kl_weight": 0.05, "learning_rate": 1e-2,
                "num_reference_samples": 8, "report_to": "none", "disable_tqdm": True, "seed": 3}  # fmt: skip
    args = CLPTrainingConfig(max_steps=max_steps, **{**defaults, **fields})
    return CLPTrainer(model, args, ROWS, processing_class=tokenizer, reward_funcs=FUNCS)


def weightings(run):
    return [entry["weighting/long/mean"] for entry in run.state.log_history if "weighting/long/mean" in entry]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tokenizer):
    run = trainer(tmp_path_factory.mktemp("straight"), tokenizer)
    run.train()
    return run


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(straight, tokenizer, tmp_path, step, monkeypatch):
    run = trainer(tmp_path, tokenizer)
    monkeypatch.setattr(run, "measure_reference", None)  # the statistics come from the checkpoint
    torch.rand(5)
    run.train(f"{straight.args.output_dir}/checkpoint-{step}")
    assert run.reward_statistics == straight.reward_statistics
    assert weightings(run) == weightings(straight)
    assert len(set(weightings(straight))) == 5
    copies = named_copies(run.model)
    assert all(torch.equal(view, copies[name]) for name, view in named_copies(straight.model).items())


def test_without_its_state_a_checkpoint_resumes_with_a_warning(straight, tokenizer, tmp_path, caplog):
    bare = tmp_path / "checkpoint-1"
    shutil.copytree(f"{straight.args.output_dir}/checkpoint-1", bare)
    (bare / "clp_trainer_state.json").unlink()
    run = trainer(tmp_path / "out", tokenizer, max_steps=2)
    run.train(str(bare))
    assert "clp_trainer_state.json is missing: the weightings are drawn from the start again" in caplog.text
    assert run.state.global_step == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weighting_sampler": {"num_drawn": 3, "draw": [0.5], "generator": {}}}, r"draw is \[0.5\], expected 2"),
        ({"weighting_sampler": {"num_drawn": 3, "draw": None, "generator": {}}}, "no state of numpy's generator"),
        ({"weighting_sampler": {"num_drawn": 3, "draw": None}}, "lacks the field 'generator'"),
        ({"reward_statistics": {"names": ["b"], "mean": [0], "std": [1], "num_samples": 2}}, r"a run on \['b'\]"),
    ],
)
def test_damaged_states_are_refused_by_name(straight, tokenizer, tmp_path, change, words):
    state = json.loads(Path(straight.args.output_dir, "checkpoint-1", "clp_trainer_state.json").read_text())
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "clp_trainer_state.json").write_text(json.dumps({**state, **change}))
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, tokenizer).train(True)


def test_a_missing_checkpoint_is_refused_before_anything_is_measured(tokenizer, tmp_path, monkeypatch):
    run = trainer(tmp_path, tokenizer)
    monkeypatch.setattr(run, "measure_reference", None)
    for resume, words in ((True, "no checkpoint in"), (str(tmp_path / "checkpoint-7"), "no such folder")):
        with pytest.raises(FileNotFoundError, match=words):
            run.train(resume)


@pytest.mark.parametrize("name", ["dirichlet", "corners"])
@pytest.mark.parametrize("drawn", [0, 1, 4])
def test_samplers_go_on_where_another_was(name, drawn):
    first, second = (WeightingSampler(name, 3, 0.5, seed=seed) for seed in (1, 2))
    first.sample(drawn)
    state = json.loads(json.dumps(vars(first.state())))
    second.resume(type(first.state())(**state))
    assert torch.equal(second.sample(7), first.sample(7))
