"""What completions look like apart from their rewards: length, emptiness, variety, copying, likelihood.

A word is a run of letters, digits or underscores, inner apostrophes and hyphens included, in lower case. Every
measure of a sweep point is a pure function of its sample records, so it can be taken again from a saved front.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")

MEASURES = (
    "mean_words",
    "empty_share",
    "distinct_2",
    "copied_4gram_share",
    "base_perplexity",
    "kl",
    "ended_share",
)


def words(text: str) -> list[str]:
    """Return the words of `text` in lower case."""
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return the runs of `n` neighbouring tokens, in order, repeats included."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def user_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Return what the user wrote: a string prompt itself, else the contents of the messages with the role "user"."""
    if isinstance(prompt, str):
        return prompt
    contents = [message["content"] for message in prompt if message.get("role") == "user"]
    return "\n".join(_content_text(content) for content in contents)


def _content_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content)


def copied_ngram_share(completion: str, source: str, n: int = 4) -> float | None:
    """Return the share of the completion's n-grams of words that occur in `source`; None if it has fewer words."""
    grams = ngrams(words(completion), n)
    if not grams:
        return None
    known = set(ngrams(words(source), n))
    return sum(gram in known for gram in grams) / len(grams)


def distinct_n(completions: Sequence[str], n: int = 2) -> float | None:
    """Return the share of distinct n-grams among all n-grams of the completions together; None if there are none.

    It falls with the number and the length of the completions: compare sets with equally many completions only.
    """
    grams = [gram for completion in completions for gram in ngrams(words(completion), n)]
    return len(set(grams)) / len(grams) if grams else None


def text_record(completion: str, prompt: str | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the measures of one completion that need its text alone: `num_words` and `copied_4gram_share`."""
    return {
        "num_words": len(words(completion)),
        "copied_4gram_share": copied_ngram_share(completion, user_text(prompt)),
    }


def point_measures(samples: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the measures of one sweep point from its sample records.

    - `mean_words`: words per completion.
    - `empty_share`: share of completions without any word.
    - `distinct_2`: `distinct_n` of all completions of the point together.
    - `copied_4gram_share`: of all 4-grams of words of the point's completions, the share found in the user's text.
    - `base_perplexity`: exp of the mean negative log-probability of a token under the reference policy, each token
      (EOS included) counting alike, so long completions weigh more.
    - `kl`: nats per sequence: the exact KL(policy || reference) over the whole vocabulary at each position, summed
      over the positions of a completion, averaged over completions.
    - `ended_share`: share of completions that reached EOS.

    A measure that does not apply (no 4-gram anywhere, no log-probabilities taken) is None.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("point_measures needs at least one sample, got 0")
    count = len(samples)
    num_4grams = [max(0, s["num_words"] - 3) for s in samples]
    copied = sum(n * s["copied_4gram_share"] for n, s in zip(num_4grams, samples, strict=True) if n)
    scored = [s for s in samples if s.get("base_logprob") is not None]
    scored_tokens = sum(s["num_tokens"] for s in scored)
    with_kl = [s["kl"] for s in samples if s.get("kl") is not None]
    return {
        "mean_words": sum(s["num_words"] for s in samples) / count,
        "empty_share": sum(s["num_words"] == 0 for s in samples) / count,
        "distinct_2": distinct_n([s["completion"] for s in samples]),
        "copied_4gram_share": copied / sum(num_4grams) if any(num_4grams) else None,
        "base_perplexity": math.exp(-sum(s["base_logprob"] for s in scored) / scored_tokens) if scored_tokens else None,
        "kl": sum(with_kl) / len(with_kl) if with_kl else None,
        "ended_share": sum(bool(s["ended"]) for s in samples) / count,
    }
