"""Sweeps of small random models, against plain forwards and one-weighting-at-a-time generation."""

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import clp_engine as clp
from clp_engine.evaluation import base_scoring
from clp_engine.evaluation.base_scoring import score_against_base
from clp_engine.evaluation.front import Front
from clp_engine.evaluation.sweep import sweep, write
from clp_engine.rollout import rollout

VOCABULARY = 61
EOS = 2


def build_model(seed=0, delta=0.3):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=EOS, bos_token_id=1, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model = clp.get_clp_model(LlamaForCausalLM(config).eval(), clp.CLPConfig(rewards=["long", "even"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("deltas"):
                parameter.copy_(delta * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<bos>": 1, "<eos>": EOS, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCABULARY)}}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.fixture(scope="module")
def model():
    return build_model()


def even(prompts, completions, completion_ids, **columns):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def long(prompts, completions, completion_ids, target, **columns):
    return [None if goal < 0 else -abs(len(ids) - goal) for ids, goal in zip(completion_ids, target, strict=True)]


FUNCS = {"even": even, "long": long}  # not in the model's order, on purpose


def dataset(num_rows=5):
    rng = np.random.default_rng(0)
    lengths = [3, 9, 1, 6, 4, 7, 2][:num_rows]
    rows = [" ".join(f"w{i}" for i in rng.integers(4, VOCABULARY, size=n)) for n in lengths]
    return [{"prompt": text, "target": i + 3} for i, text in enumerate(rows)]


def plain_scores(model, out, row, weights, kl_weight):
    """Sums of policy and base log-probability and of the KL of one row, from whole unpadded forwards."""
    keep = out.prompt_mask_BP[row].bool()
    length = int(out.completion_mask_BL[row].sum())
    ids = torch.cat([out.prompt_ids_BP[row][keep], out.completion_ids_BL[row, :length]]).unsqueeze(0)
    start = int(keep.sum()) - 1
    with torch.no_grad():
        p = (
            model(input_ids=ids, reward_weights=weights, kl_weight=kl_weight)
            .logits[0, start:-1]
            .double()
            .log_softmax(-1)
        )
        q = model(input_ids=ids, kl_weight=1.0).logits[0, start:-1].double().log_softmax(-1)
    target = ids[0, start + 1 :, None]
    return [x.sum().item() for x in (p.gather(1, target), q.gather(1, target), p.exp() * (p - q))]


@pytest.fixture(scope="module")
def front(model, tokenizer):
    return sweep(
        model, dataset(), FUNCS, tokenizer, grid=4, max_completion_length=7, batch_size=6, progress=False
    )  # fmt: skip


def test_a_front_has_every_prompt_under_every_point(front):
    assert front.reward_names == ["long", "even"]
    assert front.rewards.shape == front.reward_weights.shape == (4, 2)
    assert [(s["point"], s["prompt_index"]) for s in front.samples] == [(p, i) for p in range(4) for i in range(5)]
    assert [s["prompt_index"] for s in front.base.samples] == list(range(5))
    for p in range(4):
        for k, name in enumerate(front.reward_names):
            values = [s["rewards"][name] for s in front.samples if s["point"] == p]
            assert front.rewards[p, k] == pytest.approx(np.mean(values))
    assert len(front.measures) == 4
    assert front.seconds > 0
    assert front.kendall_tau().keys() == {"long", "even"}
    assert front.kl_weights is None


def test_columns_and_ids_reach_the_rewards_of_their_own_row(front):
    for s in front.samples:
        assert s["rewards"]["long"] == -abs(s["num_tokens"] - (s["prompt_index"] + 3))


def test_mixed_batches_equal_one_prompt_under_one_weighting(model, tokenizer, front):
    rows = dataset()
    texts = set()
    for s in [*front.samples, *front.base.samples]:
        weighting = {"reward_weights": s["reward_weights"], "kl_weight": s["kl_weight"]}
        alone = rollout(
            model, tokenizer, [rows[s["prompt_index"]]["prompt"]], max_new_tokens=7, do_sample=False, **weighting
        )
        assert alone.texts[0] == s["completion"]
        assert bool(alone.ended_B[0]) == s["ended"]
        texts.add(s["completion"])
    assert len(texts) > 10  # the weightings steer, so that equality says something


def test_batch_size_changes_nothing(model, tokenizer, front):
    other = sweep(model, dataset(), FUNCS, tokenizer, grid=4, max_completion_length=7, batch_size=25, progress=False)
    assert [s["completion"] for s in other.samples] == [s["completion"] for s in front.samples]
    np.testing.assert_array_equal(other.rewards, front.rewards)
    for name in ("policy_logprob", "base_logprob", "kl"):
        ours, theirs = ([s[name] for s in f.samples] for f in (front, other))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk_bytes", [1, 6 * VOCABULARY * 4, 2**20])
@pytest.mark.parametrize("with_cache", [True, False])
def test_scores_equal_whole_forwards(model, tokenizer, monkeypatch, chunk_bytes, with_cache):
    monkeypatch.setattr(base_scoring, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(base_scoring, "BLOCK_BYTES", 5 * VOCABULARY * 4)
    if not with_cache:
        monkeypatch.setattr(base_scoring, "rows_can_be_selected", lambda cache: False)
    prompts = [row["prompt"] for row in dataset(3) for _ in range(4)]
    weights = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.3, 0.7], [0.0, 1.0]]).repeat(3, 1)
    kl = torch.tensor([0.01, 0.2, 0.2, 1.0]).repeat(3)
    out = rollout(
        model, tokenizer, prompts, reward_weights=weights, kl_weight=kl, max_new_tokens=9, do_sample=False,
        return_logits=True,
    )  # fmt: skip
    scores = score_against_base(model, out)
    for row in range(len(prompts)):
        policy, base, kl_sum = plain_scores(model, out, row, weights[row], float(kl[row]))
        assert float(scores.policy_logprob_B[row]) == pytest.approx(policy, abs=2e-4)
        assert float(scores.base_logprob_B[row]) == pytest.approx(base, abs=2e-4)
        assert float(scores.kl_B[row]) == pytest.approx(kl_sum, abs=2e-4)
    assert scores.kl_B[3::4].abs().max() < 1e-5  # the reference against itself
    assert scores.kl_B[0::4].min() > 0.1


def test_each_prompt_and_each_distinct_completion_is_run_once(model, tokenizer, monkeypatch):
    prompts = [row["prompt"] for row in dataset(2) for _ in range(5)]
    out = rollout(
        model, tokenizer, prompts, reward_weights=torch.tensor([0.5, 0.5]), max_new_tokens=6, do_sample=False,
        return_logits=True,
    )  # fmt: skip
    shapes = []
    forward = type(model).forward

    def counted(self, *args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    score_against_base(model, out)
    assert shapes[0] == (2, 9)
    assert sum(rows for rows, _ in shapes[1:]) == 2


def test_the_base_of_an_earlier_sweep_is_not_run_again(model, tokenizer, front):
    options = {"processing_class": tokenizer, "grid": 3, "progress": False}
    again = sweep(model, dataset(), FUNCS, max_completion_length=7, base=front.base, **options)
    assert again.base is front.base
    assert all(sample["point"] is not None for sample in again.samples)
    assert again.rewards[0] == pytest.approx(front.rewards[0])
    with pytest.raises(ValueError, match="5 prompts, eval_ds has 4"):
        sweep(model, dataset(4), FUNCS, base=front.base, **options)


def test_scores_need_the_policys_logits(model, tokenizer):
    out = rollout(model, tokenizer, ["w4 w5"], max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match="return_logits=True"):
        score_against_base(model, out)


def test_measures_follow_from_the_samples(front):
    tokens = sum(s["num_tokens"] for s in front.samples if s["point"] == 0)
    logprob = sum(s["base_logprob"] for s in front.samples if s["point"] == 0)
    assert front.measures[0]["base_perplexity"] == pytest.approx(math.exp(-logprob / tokens))
    assert front.base.measures["kl"] == pytest.approx(0, abs=1e-5)
    assert all(m["kl"] > 0 for m in front.measures)


def test_kl_weights_take_the_grid_at_each(model, tokenizer):
    front = sweep(
        model, dataset(2), FUNCS, tokenizer, grid=[[1.0, 0.0], [0.2, 0.8]], kl_weights=[0.01, 1.0], batch_size=4,
        max_completion_length=5, measures=False, progress=False,
    )  # fmt: skip
    assert front.kl_weights.tolist() == [0.01, 0.01, 1.0, 1.0]
    assert front.reward_weights.tolist() == [[1, 0], [0.2, 0.8]] * 2
    at_reference = [s["completion"] for s in front.samples if s["kl_weight"] == 1.0]
    assert at_reference == [s["completion"] for s in front.base.samples] * 2
    assert front.measures[0]["kl"] is front.measures[0]["base_perplexity"] is None


def test_sampling_is_seeded_and_leaves_the_global_state(model, tokenizer):
    def draw(seed):
        return sweep(
            model, dataset(2), FUNCS, tokenizer, grid=2, num_generations=3, do_sample=True, seed=seed, batch_size=9,
            max_completion_length=5, progress=False,
        )  # fmt: skip

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(before, torch.get_rng_state())
    texts = [[s["completion"] for s in f.samples] for f in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(first.samples) == 2 * 2 * 3
    assert len(first.base.samples) == 2 * 3


def test_train_and_eval_modes_are_left_as_they_were(model, tokenizer):
    modules = dict(model.named_modules())
    modules["model.layers.0"].train()
    sweep(model, dataset(1), FUNCS, tokenizer, grid=2, max_completion_length=2, progress=False)
    assert {name for name, m in modules.items() if m.training} == {
        name for name in modules if name == "model.layers.0" or name.startswith("model.layers.0.")
    }
    model.eval()


def test_a_reward_that_does_not_apply_is_left_out_of_the_mean(model, tokenizer):
    rows = dataset(3)
    rows[1]["target"] = -1
    front = sweep(model, rows, FUNCS, tokenizer, grid=2, max_completion_length=4, measures=False, progress=False)
    values = {(s["point"], s["prompt_index"]): s["rewards"]["long"] for s in front.samples}
    assert values[0, 1] is None
    assert front.rewards[0, 0] == pytest.approx(np.mean([values[0, 0], values[0, 2]]))


def test_conversational_prompts_give_message_completions(model, tokenizer):
    seen = []

    def spy(prompts, completions, completion_ids, **columns):
        seen.extend(completions)
        return [0.0] * len(completions)

    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": "w4 w5 w6"}]}]
    sweep(model, rows, {"long": spy, "even": spy}, tokenizer, grid=2, max_completion_length=2, progress=False)
    assert seen[0][0]["role"] == "assistant"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "eval_ds is empty"),
        ([{"prompt": "w4"}, {"text": "w4"}], {}, r"row 1 has no prompt; its columns are \['text'\]"),
        ([{"prompt": "w4"}, {"prompt": "w4", "more": 1}], {}, "row 1 has columns"),
        (["w4"], {}, "row 0 is a str"),
        ([{"prompt": "w4"}], {"grid": [[0.5, 0.4]]}, "sum to 1"),
        ([{"prompt": "w4"}], {"grid": [[0.5, 0.3, 0.2]]}, r"shape \[1, 3\], expected \[P, 2\]"),
        ([{"prompt": "w4"}], {"grid": 1}, "grid=1 cannot hold the 2 corners"),
        ([{"prompt": "w4"}], {"kl_weights": 1.5}, "kl_weight is 1.5"),
        ([{"prompt": "w4"}], {"batch_size": 0}, "batch_size is 0"),
        ([{"prompt": "w4"}], {"num_generations": 2}, "do_sample=True"),
        ([{"prompt": "w4"}], {"reward_funcs": {"long": long}}, "even"),
        ([{"prompt": "w4"}], {"processing_class": None}, "processing_class is None"),
    ],
)
def test_bad_input_is_named_before_anything_runs(model, tokenizer, monkeypatch, rows, options, message):
    monkeypatch.setattr(type(model), "generate", lambda *args, **kwargs: pytest.fail("generated"))
    options = {"reward_funcs": FUNCS, "processing_class": tokenizer, "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        sweep(model, rows, **options)


def test_write_leaves_json_and_figure(front, tmp_path):
    written = write(front, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["front.json", "front.png"]
    assert [p.name for p in written] == ["front.json", "front.png"]
    back = Front.from_json(tmp_path / "run" / "front.json")
    assert back.samples == json.loads(json.dumps(front.samples))
    np.testing.assert_array_equal(back.rewards, front.rewards)
