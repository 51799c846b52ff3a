from __future__ import annotations

import copy
import math

import pytest
import torch
from tests_support import tiny_llama

import clp_engine as clp
from clp_engine.layers import conditioned_layers
from clp_engine.logprobs import shares_prompts_exactly, token_logprobs
from clp_engine.rollout import Rollout, rollout
from clp_engine.training import CLPTrainer, CLPTrainingConfig, RewardStatistics

ROWS = [{"prompt": f"{a} {b}"} for a in ("the cat", "a dog", "read all") for b in ("file", "of value", "sum", "red")]
STATISTICS = RewardStatistics(["long", "short"], [0.0, 0.0], [1.0, 1.0], 2)


def count(word):
    def reward(completions, **columns):
        return [float(text.split().count(word)) for text in completions]

    return reward


FUNCS = {"long": count("cat"), "short": count("dog")}


def config(tmp_path, **fields):
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 2,
        "max_completion_length": 6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "num_reference_samples": 8,
    }
    return CLPTrainingConfig(**{**defaults, **fields})


def trainer(model, tmp_path, tokenizer, rows=ROWS, funcs=FUNCS, statistics=STATISTICS, **fields):
    return CLPTrainer(
        model,
        config(tmp_path, **fields),
        rows,
        processing_class=tokenizer,
        reward_funcs=funcs,
        reward_statistics=statistics,
    )


def fresh(seed=0):
    return clp.get_clp_model(tiny_llama(seed), clp.CLPConfig(rewards=["long", "short"]))


GRAMMAR, THINGS = {"the", "a", "of", "in", "to", "and"}, {"cat", "dog", "red", "blue", "key", "item"}


def share(words):
    def reward(completions, **columns):
        return [sum(word in words for word in text.split()) / 6 for text in completions]

    return reward


def test_training_steers_each_corner_toward_its_reward(tmp_path, tokenizer):
    torch.manual_seed(0)
    model, funcs = fresh(), {"long": share(GRAMMAR), "short": share(THINGS)}
    before = mean_rewards(model, tokenizer, funcs)
    trainer(model, tmp_path, tokenizer, funcs=funcs, max_steps=30, per_device_train_batch_size=32, num_generations=4,
            learning_rate=1e-2, statistics=None).train()  # fmt: skip
    after = mean_rewards(model, tokenizer, funcs)
    # Row r: rewards under the corner weighting of reward r.
    for r in range(2):
        assert after[r, r] > before[r, r] + 0.15
        assert after[r, r] > after[1 - r, r] + 0.15
    assert torch.equal(mean_rewards(model, tokenizer, funcs, kl_weight=1.0), before)  # the reference is untouched


def mean_rewards(model, tokenizer, funcs, **weighting):
    torch.manual_seed(1)
    result = torch.zeros(2, 2)
    for r in range(2):
        prompts = [row["prompt"] for row in ROWS] * 4
        out = rollout(model, tokenizer, prompts, reward_weights=torch.eye(2)[r], max_new_tokens=6, do_sample=True,
                      **weighting)  # fmt: skip
        for q, reward in enumerate(funcs.values()):
            result[r, q] = torch.tensor(reward(out.texts)).mean()
    return result


def fixed_rollout(model, tokenizer, prompts, *, num_generations, **options):
    """Completions that depend on the prompt alone, so that two runs can see the same ones."""
    real = rollout(model, tokenizer, prompts, num_generations=num_generations,
                   **{**options, "do_sample": False, "reward_weights": None, "kl_weight": 1.0})  # fmt: skip
    ids = torch.stack([
        torch.randint(5, 30, (4,), generator=torch.Generator().manual_seed(sum(map(ord, prompt)) * 7 + i))
        for prompt in prompts for i in range(num_generations)
    ])  # fmt: skip
    mask = torch.ones_like(ids)
    texts = tokenizer.batch_decode(ids)
    return Rollout(real.prompt_ids_BP, real.prompt_mask_BP, ids, mask, mask[:, 0].bool(), texts, num_generations)


def test_corner_training_equals_separate_runs_of_each_copy(tmp_path, tokenizer, monkeypatch):
    """Rewarded Soups is this trainer with the corner sampler: copy k gets what a run on reward k alone gives it."""
    monkeypatch.setattr("clp_engine.training.trainer.rollout", fixed_rollout)
    options = {"max_steps": 3, "optim": "sgd", "train_sampling_strategy": "sequential", "num_generations": 2}
    funcs = {"long": lambda completions, **_: [float(len(t)) for t in completions],
             "short": lambda completions, **_: [-float(t.count("w")) for t in completions]}  # fmt: skip
    joint = fresh()
    trainer(joint, tmp_path, tokenizer, funcs=funcs, weighting_sampler="corners", per_device_train_batch_size=8,
            learning_rate=0.02, **options).train()  # fmt: skip
    for k in range(2):
        alone = fresh()
        rows = [{**row, "reward_weights": torch.eye(2)[k].tolist()} for row in ROWS[k::2]]
        # Half the rows a step: the mean over them is twice the joint run's share, so half the learning rate.
        trainer(alone, tmp_path, tokenizer, rows=rows, funcs=funcs, per_device_train_batch_size=4,
                learning_rate=0.01, **options).train()  # fmt: skip
        for name, layer in conditioned_layers(joint).items():
            other = conditioned_layers(alone)[name].deltas
            assert other[:, 1 - k].abs().max() == 0
            assert layer.deltas[:, k].abs().max() > 1e-4
            assert torch.allclose(layer.deltas[:, k], other[:, k], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("num_generations", [1, 3])
def test_logprobs_while_generating_equal_those_of_the_training_forward(
    conditioned, tokenizer, num_generations, temperature
):
    # Whatever the model's generation_config would do to sampling must not reach a rollout.
    conditioned.generation_config.update(top_k=2, top_p=0.5, temperature=0.3, repetition_penalty=1.7, do_sample=True)
    prompts, w = ["the cat", "read all file of the dog"], torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    torch.manual_seed(0)
    out = rollout(conditioned, tokenizer, prompts, reward_weights=w, num_generations=num_generations,
                  max_new_tokens=9, do_sample=True, temperature=temperature, return_logits=True)  # fmt: skip
    seen_BLV = (out.policy_logits_BLV.float() / temperature).log_softmax(-1)
    seen = seen_BLV.gather(-1, out.completion_ids_BL.unsqueeze(-1)).squeeze(-1)
    assert len(set(map(tuple, out.completion_ids_BL.tolist()))) > 1
    for share_prompts in (False, True):
        trained = token_logprobs(conditioned, out, conditioned.coefficients(2, w), temperature=temperature,
                                 share_prompts=share_prompts)  # fmt: skip
        assert torch.allclose(trained, seen * out.completion_mask_BL, atol=2e-5)
    # EOS counts, what follows does not.
    for ids, mask in zip(out.completion_ids_BL.tolist(), out.completion_mask_BL.tolist(), strict=True):
        end = ids.index(1) + 1 if 1 in ids else len(ids)
        assert mask == [1] * end + [0] * (len(ids) - end)


def test_rollouts_are_drawn_at_the_temperature(conditioned, tokenizer):
    conditioned.lm_head.weight.data.mul_(4.0)  # far from uniform, so that the temperature shows
    torch.manual_seed(0)
    n, w = 4000, torch.tensor([[0.5, 0.5]])
    out = rollout(conditioned, tokenizer, ["the cat"], reward_weights=w, num_generations=n, max_new_tokens=1,
                  do_sample=True, temperature=0.5, return_logits=True)  # fmt: skip
    logits_V = out.policy_logits_BLV[0, 0].float()
    drawn_V = torch.bincount(out.completion_ids_BL[:, 0], minlength=len(logits_V)) / n
    half, one = ((drawn_V - (logits_V / t).softmax(-1)).abs().sum() / 2 for t in (0.5, 1.0))
    assert half < 0.05 < 0.1 < one


def test_shared_prompts_give_the_padded_gradients(conditioned, tokenizer):
    assert shares_prompts_exactly(conditioned)
    w = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    out = rollout(conditioned, tokenizer, ["the cat", "read all file of the dog"], reward_weights=w,
                  num_generations=3, max_new_tokens=5, do_sample=True)  # fmt: skip
    gradients = []
    for share_prompts in (False, True):
        model = copy.deepcopy(conditioned)
        token_logprobs(model, out, model.coefficients(2, w), share_prompts=share_prompts).square().sum().backward()
        gradients.append([layer.deltas.grad for layer in conditioned_layers(model).values()])
    for padded, shared in zip(*gradients, strict=True):
        assert torch.allclose(padded, shared, atol=1e-4, rtol=1e-4)


def test_a_model_that_ignores_the_mask_is_found_out(conditioned, monkeypatch):
    real = conditioned.model.forward

    def without_positions(*args, position_ids=None, **kwargs):
        return real(*args, **kwargs)

    monkeypatch.setattr(conditioned.model, "forward", without_positions)
    assert not shares_prompts_exactly(conditioned)


def test_save_load_and_resume(tmp_path, tokenizer, saved_base):
    def model():
        from transformers import AutoModelForCausalLM

        return clp.get_clp_model(AutoModelForCausalLM.from_pretrained(saved_base), clp.CLPConfig(["long", "short"]))

    first = trainer(model(), tmp_path, tokenizer, save_strategy="steps", save_steps=2, max_steps=2)
    first.train()
    history = [entry for entry in first.state.log_history if "kl" in entry]
    assert {"reward", "rewards/long/mean", "weighting/short/mean", "completions/mean_length"} <= set(history[0])
    assert history[0]["kl"] == pytest.approx(0, abs=1e-5)  # at step 0 the policy is the reference
    checkpoint = tmp_path / "out" / "checkpoint-2"
    loaded = clp.CLPModel.from_pretrained(checkpoint)
    for name, layer in conditioned_layers(loaded).items():
        assert torch.equal(layer.deltas, conditioned_layers(first.model)[name].deltas)
        assert not layer.deltas.requires_grad
    first.state.best_model_checkpoint = str(checkpoint)
    with torch.no_grad():
        next(iter(conditioned_layers(first.model).values())).deltas.zero_()
    first._load_best_model()  # what load_best_model_at_end calls
    for name, layer in conditioned_layers(loaded).items():
        assert torch.equal(layer.deltas, conditioned_layers(first.model)[name].deltas)
    with pytest.raises(FileExistsError, match=r"holds another run \(checkpoint-2\)"):
        trainer(model(), tmp_path, tokenizer).train()
    resumed = trainer(model(), tmp_path, tokenizer, max_steps=3)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 3


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rows": []}, ValueError, "train_dataset is empty"),
        ({"rows": [{"text": "a"}]}, ValueError, "'prompt' column"),
        ({"funcs": {"long": FUNCS["long"]}}, ValueError, "short"),
        ({"funcs": {**FUNCS, "long": lambda completions, **_: [1.0]}}, ValueError, "long"),
        ({"funcs": {**FUNCS, "long": lambda completions, **_: [math.nan] * len(completions)}}, ValueError, "long"),
        ({"funcs": {**FUNCS, "long": lambda completions, **_: [None] * len(completions)}}, ValueError, "long"),
        ({"num_generations": 3}, ValueError, "multiple of num_generations 3"),
        ({"num_generations": 1}, ValueError, "at least 2"),
        ({"kl_weight": 1.0}, ValueError, "kl_weight"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"weighting_sampler": "grid"}, ValueError, "weighting_sampler"),
    ],
)
def test_bad_input_is_refused_before_any_training(tmp_path, tokenizer, change, error, words):
    model = fresh()
    with pytest.raises(error, match=words):
        trainer(model, tmp_path, tokenizer, statistics=None, **change).train()
    assert all(layer.deltas.abs().max() == 0 for layer in conditioned_layers(model).values())


def test_a_plain_model_and_bad_row_weights_are_refused(tmp_path, tokenizer, plain):
    with pytest.raises(TypeError, match="get_clp_model"):
        trainer(plain, tmp_path, tokenizer)
    rows = [{**row, "reward_weights": {"long": 0.7, "short": 0.7}} for row in ROWS]
    with pytest.raises(ValueError, match=r"sum 1\.4"):
        trainer(fresh(), tmp_path, tokenizer, rows=rows).train()


def test_none_rewards_train_on_the_rest(tmp_path, tokenizer):
    def sometimes(completions, **columns):
        return [None if i % 2 else float(len(t)) for i, t in enumerate(completions)]

    model = fresh()
    run = trainer(model, tmp_path, tokenizer, funcs={"long": sometimes, "short": FUNCS["short"]})
    run.train()
    randomised = [layer.deltas.abs().max() for layer in conditioned_layers(model).values()]
    assert all(torch.isfinite(value) and value > 0 for value in randomised)
