"""Every family through the trainer: what conditioning added moves, the base does not, a checkpoint resumes."""

from __future__ import annotations

import pytest
import torch
from tests_support import tiny_llama

import clp_engine as clp
from clp_engine.layers import conditioned_layers, named_copies
from clp_engine.training import CLPTrainer, CLPTrainingConfig, RewardStatistics

FAMILIES = {
    "full": {"variant": "full"},
    "shared": {"train_shared": True},
    "lora": {"parameterization": "lora"},
    "svd": {"parameterization": "svd"},
    "pblora": {"parameterization": "pblora"},
    "soft_tokens": {"parameterization": "soft_tokens"},
}
ROWS = [{"prompt": text} for text in ("the cat", "a dog file", "read all", "of value", "sum", "red key")]
FUNCS = {
    "long": lambda completions, **_: [text.count("a") / 10 for text in completions],
    "short": lambda completions, **_: [-len(text.split()) / 10 for text in completions],
}


def trained(family, folder, tokenizer, steps, resume=None):
    torch.manual_seed(0)
    model = clp.get_clp_model(tiny_llama(), clp.CLPConfig(rewards=["long", "short"], **FAMILIES[family]))
    start = {name: view.clone() for name, view in named_copies(model).items()}
    args = CLPTrainingConfig(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=12,
        num_generations=4,
        max_completion_length=6,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    statistics = RewardStatistics(["long", "short"], [0.0, 0.0], [0.1, 0.1], 2)
    CLPTrainer(model, args, ROWS, None, tokenizer, FUNCS, reward_statistics=statistics).train(resume)
    return model, start


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_train_and_checkpoints_resume(family, tmp_path, tokenizer):
    model, start = trained(family, tmp_path / "whole", tokenizer, steps=6)
    still = [name for name, view in named_copies(model).items() if torch.equal(view, start[name])]
    assert not still
    added = {id(p) for layer in conditioned_layers(model).values() for p in layer.added_parameters().values()}
    plain = dict(tiny_llama().named_parameters())
    base = {name: p for name, p in model.named_parameters() if id(p) not in added}
    assert base.keys() == plain.keys()
    assert all(torch.equal(parameter, plain[name]) for name, parameter in base.items())
    loaded = clp.CLPModel.from_pretrained(tmp_path / "whole" / "checkpoint-6", base_model=tiny_llama())
    views = named_copies(loaded)
    assert all(torch.equal(view, views[name]) for name, view in named_copies(model).items())
    resumed, _ = trained(
        family, tmp_path / "whole", tokenizer, steps=4, resume=str(tmp_path / "whole" / "checkpoint-3")
    )
    # One step of at most the learning rate in each value behind what was saved.
    saved = named_copies(clp.CLPModel.from_pretrained(tmp_path / "whole" / "checkpoint-3", base_model=tiny_llama()))
    moved = max(float((view - saved[name]).abs().max()) for name, view in named_copies(resumed).items())
    assert 0 < moved <= 0.03
