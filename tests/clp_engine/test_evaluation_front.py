"""Front: its figures against hand-made values, its JSON form, its figure and its report."""

import json
import math

import numpy as np
import pytest

from clp_engine.evaluation import plot_fronts
from clp_engine.evaluation.front import BasePolicy, Front, mean_hypervolume_difference, mean_rewards, std_rewards
from clp_engine.evaluation.pareto import sweep_grid
from clp_engine.evaluation.report import results, side_by_side, table
from clp_engine.evaluation.text_measures import point_measures, text_record

NAMES = ["a", "b"]


def record(point, prompt_index, rewards, completion="some words to read"):
    return {
        "point": point,
        "prompt_index": prompt_index,
        "prompt": f"prompt {prompt_index}",
        "completion": completion,
        "rewards": dict(zip(NAMES, rewards, strict=True)),
        "num_tokens": 5,
        "ended": True,
        "policy_logprob": -3.0,
        "base_logprob": -4.0,
        "kl": 0.25,
        **text_record(completion, f"prompt {prompt_index}"),
    }


def make_front(shift=0.0, num_points=5, num_prompts=12, noise=0.1, seed=0, base_seed=99):
    rng, base_rng = np.random.default_rng(seed), np.random.default_rng(base_seed)
    weights = sweep_grid(2, num_points)
    samples = []
    for p, w in enumerate(weights):
        means = np.sqrt(w) + shift
        samples += [record(p, i, (means + noise * rng.normal(size=2)).tolist()) for i in range(num_prompts)]
    base_samples = [record(None, i, base_rng.normal(0.3, 0.5, size=2).tolist()) for i in range(num_prompts)]
    by_point = [[s for s in samples if s["point"] == p] for p in range(num_points)]
    base = BasePolicy(
        mean_rewards(base_samples, NAMES), std_rewards(base_samples, NAMES), base_samples, point_measures(base_samples)
    )
    rewards = np.stack([mean_rewards(group, NAMES) for group in by_point])
    return Front(NAMES, weights, None, rewards, samples, [point_measures(g) for g in by_point], base, 1.5)


def test_means_leave_out_what_does_not_apply():
    rows = [record(0, 0, (1.0, None)), record(0, 1, (3.0, None)), record(0, 2, (None, None))]
    mean = mean_rewards(rows, NAMES)
    assert mean[0] == 2
    assert math.isnan(mean[1])
    assert std_rewards(rows, NAMES)[0] == pytest.approx(1)  # correction 0


def test_default_hypervolume_counts_in_base_standard_deviations():
    front = make_front()
    base = np.array([[s["rewards"][n] for n in NAMES] for s in front.base.samples])
    z = (front.rewards - base.mean(0)) / base.std(0)
    assert front.hypervolume() == pytest.approx(front.hypervolume(ref=base.mean(0) - base.std(0), unit=base.std(0)))
    unit_front = Front(NAMES, front.reward_weights, None, z, [], [], front.base, 0.0)
    assert front.hypervolume() == pytest.approx(unit_front.hypervolume(ref=-1.0, unit=1.0))
    at_base = Front(NAMES, front.reward_weights[:1], None, front.base.rewards[None], [], [], front.base, 0.0)
    assert at_base.hypervolume() == pytest.approx(1)


def test_a_nan_point_and_a_constant_base_are_named():
    front = make_front()
    front.rewards[2, 1] = np.nan
    for figure in (front.hypervolume, front.kendall_tau):
        with pytest.raises(ValueError, match=r"points \[2\] of 5"):
            figure()
    front.base.std[0] = 0.0
    with pytest.raises(ValueError, match="reward 'a' has standard deviation 0"):
        front.hypervolume()


def test_steerability_figures():
    front = make_front(noise=0.0)
    assert front.kendall_tau() == {"a": pytest.approx(1), "b": pytest.approx(1)}
    assert front.spread()["a"] == pytest.approx(1 / front.base.std[0])
    assert front.non_dominated().all()


def test_json_round_trip_is_lossless():
    front = make_front()
    front.rewards[1, 0] = np.nan
    front.samples[0]["rewards"]["a"] = None
    text = front.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = Front.from_json(text)
    for name in ("reward_weights", "rewards"):
        np.testing.assert_array_equal(getattr(back, name), getattr(front, name))
    np.testing.assert_array_equal(back.base.std, front.base.std)
    assert back.samples == front.samples
    assert back.measures == front.measures
    assert back.base.samples == front.base.samples
    assert back.kl_weights is None
    assert back.to_json() == text
    with pytest.raises(ValueError, match="format 7"):
        Front.from_json('{"format": 7}')


def test_bootstrap_finds_a_real_difference_and_no_false_one():
    better, same = make_front(shift=0.2, seed=1), make_front(seed=2)
    result = better.hypervolume_difference(same, num_resamples=400)
    assert 0 < result["low"] <= result["mean"] <= result["high"]
    assert result["difference"] == pytest.approx(better.hypervolume() - same.hypervolume())
    assert result["share_positive"] == 1
    assert result == better.hypervolume_difference(same, num_resamples=400)
    none = same.hypervolume_difference(same, num_resamples=50)
    assert none["low"] == none["high"] == 0  # paired: the same prompts on both sides


def test_bootstrap_equals_resampling_by_hand():
    first, second = make_front(seed=1, num_prompts=6), make_front(seed=2, num_prompts=6)
    result = mean_hypervolume_difference([(first, second)], num_resamples=20, seed=3)
    draws = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=20)
    ref, unit = first.reference()
    differences = []
    for draw in draws:
        volumes = []
        for front in (first, second):
            rows = [s for s in front.samples for _ in range(draw[s["prompt_index"]])]
            means = np.stack([mean_rewards([s for s in rows if s["point"] == p], NAMES) for p in range(5)])
            volumes.append(
                Front(NAMES, front.reward_weights, None, means, [], [], first.base, 0.0).hypervolume(ref, unit)
            )
        differences.append(volumes[0] - volumes[1])
    assert result["mean"] == pytest.approx(np.mean(differences))
    assert result["low"] == pytest.approx(np.quantile(differences, 0.025))


def test_bootstrap_needs_the_same_prompts():
    with pytest.raises(ValueError, match="other prompts"):
        make_front().hypervolume_difference(make_front(num_prompts=9))


def test_figures_are_written_without_touching_pyplot(tmp_path):
    import sys

    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot_fronts({"clp": make_front(0.1, 11), "rewarded_soups": make_front(seed=5)}, tmp_path / "front.png", title="x")
    make_front().plot(tmp_path / "front.svg")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "front.svg").read_bytes()
    assert had_pyplot or "matplotlib.pyplot" not in sys.modules


def test_figures_refuse_fronts_of_other_rewards(tmp_path):
    other = make_front()
    renamed = Front(["x", "y"], other.reward_weights, None, other.rewards, [], [], other.base, 0.0)
    with pytest.raises(ValueError, match=r"\['x', 'y'\]"):
        plot_fronts({"one": make_front(), "two": renamed}, tmp_path / "f.png")


def test_report_fits_the_console_and_results_are_json():
    fronts = {"clp": make_front(0.2), "rewarded_soups": make_front(seed=5)}
    text = table(fronts)
    assert max(map(len, text.splitlines())) <= 120
    for word in ("clp", "rewarded_soups", "hypervolume", "Kendall tau", "base mean - 1 std"):
        assert word in text
    content = results(fronts, {"clp": {"seconds": 12.0, "samples": 384}}, num_resamples=50)
    json.dumps(content, allow_nan=False)
    entry = content["clp"]
    assert entry["samples"] == 384
    assert content["rewarded_soups"]["samples"] is None
    assert entry["sweep_samples"] == 5 * 12 + 12
    assert len(entry["rewards"]) == len(entry["reward_weights"]) == len(entry["measures"]) == 5
    assert set(entry["kendall_tau"]) == set(entry["base_rewards"]) == {"a", "b"}
    assert content["rewarded_soups"]["hypervolume_difference"]["difference"] == pytest.approx(
        entry["hypervolume"] - content["rewarded_soups"]["hypervolume"]
    )
    with pytest.raises(ValueError, match="'rs'"):
        results(fronts, {"rs": {}})


def test_side_by_side_shows_ends_and_centre():
    text = side_by_side(make_front(), num_prompts=3)
    assert text.count("[prompt]") == 3
    for label in ("[a=1 b=0]", "[a=0.5 b=0.5]", "[a=0 b=1]", "[base]"):
        assert text.count(label) == 3
    assert max(map(len, text.splitlines())) <= 120


def test_report_without_a_unit_still_shows_the_rewards():
    front = make_front()
    front.base.std[0] = 0.0
    assert "no hypervolume" in table({"clp": front})
    content = results({"clp": front, "again": front})
    json.dumps(content, allow_nan=False)
    assert content["clp"]["hypervolume"] is content["clp"]["spread"] is content["clp"]["hypervolume_unit"] is None
    assert content["clp"]["kendall_tau"]["a"] > 0.9


def test_three_rewards_are_drawn_as_three_pairs(tmp_path):
    weights = sweep_grid(3, 13)
    base = BasePolicy(np.zeros(3), np.ones(3), [], {})
    front = Front(["a", "b", "c"], weights, None, np.sqrt(weights), [], [], base, 0.0)
    front.plot(tmp_path / "front.svg")
    text = (tmp_path / "front.svg").read_text()
    assert text.count('<g id="axes_') == 3
    assert front.hypervolume() > 1
    front.rewards[4, 2] = np.nan
    with pytest.raises(ValueError, match=r"points \[4\] of 13"):
        front.plot(tmp_path / "front.svg")


@pytest.mark.parametrize(("module", "use"), [("moocore", "hypervolume"), ("matplotlib.figure", "plot")])
def test_a_missing_extra_names_its_pip_line_at_use(monkeypatch, tmp_path, module, use):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "clp_engine\[eval\]"'):
        getattr(make_front(), use)(**({"path": tmp_path / "f.png"} if use == "plot" else {}))
