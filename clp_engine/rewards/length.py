"""Rewards of a completion's length."""

from __future__ import annotations

import math
from typing import Any

from clp_engine.rewards.text import completion_text, fluency, read_column, shared_words, split_words

_SHORTER = 2.0  # how much faster than above the target the reward falls below it


class Brevity:
    """A short plain sentence on the subject: `tent(words) * fluency * on_subject`, in [0, 1], 0 when empty.

    `tent` is `max(0, 1 - log(words / target) / width)` above the target, nothing being left from `target * e**width`
    words (17.2) on, so that a source repeated as it is earns little: where whole copies pay, training finds them first
    and never shortens them. Below the target it falls twice as fast: a word too few costs more than one too many.
    Words are counted with camelCase and snake_case cut, so gluing them gains nothing; what does not read as an English
    sentence loses by `clp_engine.rewards.text.fluency`; `on_subject` is 0.25 + 0.75 * the share of the content words
    that the source has too, without which one stock phrase would answer everything.

    Args:
        target_words: where it peaks.
        width: log of the factor, longer than the target, at which nothing is left.
        source_column: column with the text that the sentence must be about; None asks for no subject.

    Raises:
        ValueError: a parameter is not positive.
    """

    def __init__(self, target_words: float = 7.0, width: float = 0.9, source_column: str | None = "source") -> None:
        if not target_words > 0 or not width > 0:
            raise ValueError(f"target_words and width must be positive, got {target_words} and {width}")
        self.__name__ = "brevity"
        self.target_words = target_words
        self.width = width
        self.source_column = source_column

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        """Return one score for each completion (TRL's signature; `completions` and the source column are read)."""
        texts = [completion_text(completion) for completion in completions]
        if self.source_column is None:
            return [self.score(text) for text in texts]
        sources = read_column(columns, self.source_column, self.__name__)
        return [self.score(text, source) for text, source in zip(texts, sources, strict=True)]

    def score(self, text: str, source: str | None = None) -> float:
        """Return the score of one text about `source`, or about anything."""
        count = len(split_words(text))
        if count == 0:
            return 0.0
        longer = math.log(count / self.target_words)
        tent = max(0.0, 1.0 - max(longer, -_SHORTER * longer) / self.width)
        on_subject = 1.0 if source is None else 0.25 + 0.75 * shared_words(text, source)
        return tent * fluency(text) * on_subject
