"""Text measures on sentences small enough to count by hand."""

import math

import pytest

from clp_engine.evaluation.text_measures import (
    copied_ngram_share,
    distinct_n,
    point_measures,
    text_record,
    user_text,
    words,
)


def sample(completion, **fields):
    return {"completion": completion, "num_tokens": 1, "ended": True, **text_record(completion, "p"), **fields}


def test_words_are_lower_case_runs_with_inner_apostrophes_and_hyphens():
    assert words("Don't re-open the File, 3 times!") == ["don't", "re-open", "the", "file", "3", "times"]
    assert words(" .,- ") == []


def test_copied_4grams_by_hand():
    source = "the cat sat on the mat today"
    assert copied_ngram_share("The cat sat on the mat.", source) == 1
    assert copied_ngram_share("the cat sat on a mat", source) == pytest.approx(1 / 3)
    assert copied_ngram_share("the cat sat", source) is None


def test_user_text_is_the_users_messages_alone():
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": [{"type": "text", "text": "again"}]},
    ]
    assert user_text(messages) == "hello\nagain"
    assert user_text("plain") == "plain"


def test_distinct_2_pools_completions_without_joining_them():
    assert distinct_n(["a b a b", "a b"]) == pytest.approx(2 / 4)  # ab ba ab | ab
    assert distinct_n(["a", ""]) is None


def test_point_measures_by_hand():
    a = sample("one two three four five", num_tokens=6, base_logprob=-6.0, kl=0.5, ended=True)
    a["copied_4gram_share"] = 0.5
    b = sample("...", num_tokens=2, base_logprob=-6.0, kl=1.5, ended=False)
    c = sample("one two three four", num_tokens=4, base_logprob=-12.0, kl=4.0, ended=True)
    c["copied_4gram_share"] = 1.0
    m = point_measures([a, b, c])
    assert m["mean_words"] == pytest.approx(3)
    assert m["empty_share"] == pytest.approx(1 / 3)
    assert m["distinct_2"] == pytest.approx(4 / 7)
    assert m["copied_4gram_share"] == pytest.approx((2 * 0.5 + 1 * 1.0) / 3)
    assert m["base_perplexity"] == pytest.approx(math.exp(24 / 12))
    assert m["kl"] == pytest.approx(2)
    assert m["ended_share"] == pytest.approx(2 / 3)


def test_measures_that_do_not_apply_are_none():
    m = point_measures([sample("", ended=False)])
    assert m["empty_share"] == 1
    assert m["distinct_2"] is m["copied_4gram_share"] is m["base_perplexity"] is m["kl"] is None
    with pytest.raises(ValueError, match="at least one sample"):
        point_measures([])
