"""Training in two processes, DDP and FSDP2 over gloo, against the same step in one process."""

from __future__ import annotations

import distributed_support as support
import pytest
import torch


@pytest.fixture(scope="module")
def results():
    return support.run(support.ddp_step, support.fsdp2_step, support.fsdp2_bfloat16_step)


@pytest.fixture(scope="module")
def single():
    model = support.condition()
    support.train_one_step(model, slice(None), [p for p in model.parameters() if p.requires_grad])
    return model


@pytest.mark.parametrize("wrapper", ["ddp_step", "fsdp2_step"])
def test_a_step_of_two_processes_is_the_step_of_one(results, single, wrapper):
    before, expected = support.deltas_of(support.condition()), support.deltas_of(single)
    for result in results:
        got = result[wrapper] if wrapper == "ddp_step" else result[wrapper]["deltas"]
        assert got.keys() == expected.keys()
        for name, deltas in got.items():
            assert (expected[name] - before[name]).abs().max() > 1e-4
            torch.testing.assert_close(deltas, expected[name], atol=1e-6, rtol=1e-5)


def test_sharded_models_generate_under_their_rows_weightings(results, single):
    sharded = [result["fsdp2_step"] for result in results]
    assert {part["class"] for part in sharded} == {"FSDPCLPLlamaForCausalLM"}
    assert all(part["local"] == {(16, 2, 32)} for part in sharded)  # 32 outputs over two processes
    expected = single.eval().generate(support.IDS, reward_weights=support.W, **support.GREEDY)
    assert torch.equal(torch.cat([part["tokens"] for part in sharded]), expected)


def test_float32_deltas_over_a_sharded_bfloat16_base(results):
    model = support.condition(torch.bfloat16)
    before = {name: deltas.clone() for name, deltas in support.deltas_of(model).items()}
    support.train_one_step(model, slice(None), [p for p in model.parameters() if p.requires_grad])
    for result in results:
        for name, deltas in result["fsdp2_bfloat16_step"].items():
            assert deltas.dtype == torch.float32
            step, expected = deltas - before[name], support.deltas_of(model)[name] - before[name]
            # Losses and gradients of half batches are rounded to bfloat16 on their own.
            assert (step - expected).abs().max() <= 2**-4 * expected.abs().max()
