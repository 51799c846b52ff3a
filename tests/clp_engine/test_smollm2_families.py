"""Every family on the embedded real model; attention's full differences are in test_smollm2.py.

One load of the model, three short rows: errors are root mean squares against float64, at most twice those of the plain
model of that weighting in float32.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tests_support import randomise_deltas

import clp_engine as clp
from clp_engine.layers import named_copies
from clp_engine.rollout import encode_prompts

W = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 1.0]])
TEXTS = ["the cat sat", "Read all files of the dog.", "Return the sum of two values"]
# Beside the family, how large its copies are made: so that they change the tokens and leave a language model.
FAMILIES = {
    "full": ({"variant": "full"}, 2e-3),
    "logit": ({"variant": "logit"}, 3e-2),
    "lora": ({"parameterization": "lora"}, 5e-2),
    "svd": ({"parameterization": "svd"}, 1e-1),
    "pblora": ({"parameterization": "pblora"}, 1e-1),
    "soft_tokens": ({"parameterization": "soft_tokens"}, 1.0),
}


@pytest.fixture(scope="module")
def batch(smollm2):
    ids, mask = encode_prompts(smollm2[1], TEXTS)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def before(smollm2, batch):
    return logits(smollm2[0], batch)


@torch.no_grad()
def logits(model, batch, **weighting):
    return model(**batch, **weighting).logits


def rms(tensor):
    return tensor.double().square().mean().sqrt()


def generate(model, batch, row=slice(None)):
    inputs = {name: tensor[row] for name, tensor in batch.items()}
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**inputs, reward_weights=W[row], **options)[:, -3:]


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, smollm2, batch, before, tmp_path):
    fields, std = FAMILIES[family]
    model = clp.get_clp_model(copy.deepcopy(smollm2[0]), clp.CLPConfig(rewards=["long", "short"], **fields))
    model.set_kernel_backend("reference")
    started = logits(model, batch, reward_weights=W)
    assert torch.equal(started.view(torch.int32), before.view(torch.int32))
    model.set_kernel_backend("auto")
    randomise_deltas(model, std)
    if family == "full":  # a gigabyte on disk otherwise
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.data = parameter.data.bfloat16()
    after = logits(model, batch, reward_weights=W)
    seen = batch["attention_mask"].bool()
    assert all(rms((after - before)[row][seen[row]]) > 0.1 for row in range(3))
    assert torch.equal(generate(model, batch, slice(1, 2)), generate(model, batch)[1:2])
    _check_collapse(model, batch, after)
    model.save_pretrained(tmp_path)
    loaded = clp.CLPModel.from_pretrained(tmp_path, base_model=copy.deepcopy(smollm2[0]))
    views = named_copies(loaded)
    assert all(torch.equal(view, views[name]) for name, view in named_copies(model).items())
    assert torch.equal(logits(loaded, batch, reward_weights=W), after)


def _check_collapse(model, batch, after):
    """The row of copy `short` alone, against the plain model of that weighting."""
    if model.clp_config.parameterization == "soft_tokens":
        with pytest.raises(NotImplementedError, match="soft_tokens"):
            model.collapse(W[2])
        return
    seen = batch["attention_mask"][2].bool()
    plain = model.collapse(W[2])
    single = logits(plain, batch)[2][seen]
    exact = logits(plain.double(), batch)[2][seen]
    assert rms(after[2][seen] - exact) <= 2 * rms(single - exact)
