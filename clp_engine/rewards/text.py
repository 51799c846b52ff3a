"""The text of a completion, and how far it reads as a plain English sentence."""

from __future__ import annotations

import re
from typing import Any

_PLAIN_WORD = re.compile(r"[\"'(]*[A-Za-z]{1,16}(?:['-][A-Za-z]{1,12}){0,2}[\"')]*[,;:.!?]?[\"')]*")
_NUMBER = re.compile(r"[0-9]{1,6}(?:[.,][0-9]+)?%?[,;:.!?]?")
_INNER_CAPITAL = re.compile(r"[a-z][A-Z]")
_PIECE = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
FUNCTION_WORDS = frozenset(
    """
    a about all an and any are as at be been being before between both but by can do does each for from has have
    how if in into is it its may more most no not of on once one only or other out over so some such than that
    the their them then there these they this those to up was were what when where which while who will with
    within without you
    """.split()  # noqa: SIM905 - a list would take a line for each word
)


def completion_text(completion: Any) -> str:
    """Return the text of a completion: itself, or the contents of its messages where the prompt was conversational.

    Raises:
        TypeError: it is neither a string nor a list of messages with string contents.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list) and all(isinstance(message, dict) for message in completion):
        contents = [message.get("content") or "" for message in completion]
        if all(isinstance(content, str) for content in contents):
            return "\n".join(contents)
    raise TypeError(f"a completion is a string or a list of messages with text, got {type(completion).__name__}")


def read_column(columns: dict[str, Any], name: str, reward: str) -> list[str]:
    """Return the texts of one column of the data set.

    Raises:
        ValueError: the column is absent; the message names the reward and the columns that are there.
    """
    if name not in columns:
        there = sorted(set(columns) - {"prompts", "completion_ids"})
        raise ValueError(f"the reward {reward!r} reads the column {name!r}; the data set has {there}")
    return list(columns[name])


def split_words(text: str) -> list[str]:
    """Return the lower-case words of a text, camelCase and snake_case cut at their joints, numbers among them."""
    return [piece.lower() for piece in _PIECE.findall(text)]


def fluency(text: str) -> float:
    """Return how far a text reads as one plain English sentence, in [0, 1]: a product of five shares.

    1. squared share of blank-separated tokens that are plain words or numbers (`camelCase`, `a.b`, `f()` are not);
    2. share of words that are not repeats, where function words may recur;
    3. share of words after the first that are not capitalised, half weight;
    4. function words ("the", "of", "to" ...): full from one in six words on, none costs 0.4;
    5. an end: `.`, `!` or `?`, its lack costs 0.3.
    """
    tokens = text.split()
    words = split_words(text)
    if not words:
        return 0.0
    plain = sum(_is_plain(token) for token in tokens) / len(tokens)
    content = [word for word in words if word not in FUNCTION_WORDS]
    distinct = len(set(content)) / len(content) if content else 0.0
    capitals = sum(token[0].isupper() for token in tokens[1:]) / max(1, len(tokens) - 1)
    function_share = (len(words) - len(content)) / len(words)
    ended = text.rstrip()[-1] in ".!?"
    sentence = (1.0 - 0.5 * capitals) * (0.6 + 0.4 * min(1.0, 6.0 * function_share)) * (1.0 if ended else 0.7)
    return plain * plain * distinct * sentence


def copied_share(text: str, source: str, length: int = 4) -> float:
    """Return the share of the text's words that stand in an n-gram of `length` words which the source has too."""
    words, source_words = split_words(text), split_words(source)
    if len(words) < length:
        return 0.0
    known = {tuple(source_words[i : i + length]) for i in range(len(source_words) - length + 1)}
    copied = [False] * len(words)
    for start in range(len(words) - length + 1):
        if tuple(words[start : start + length]) in known:
            copied[start : start + length] = [True] * length
    return sum(copied) / len(words)


def shared_words(text: str, source: str, letters: int = 5) -> float:
    """Return the share of the text's distinct content words that the source has too; their first `letters` count."""
    words = {word[:letters] for word in split_words(text) if word not in FUNCTION_WORDS}
    if not words:
        return 0.0
    return len(words & {word[:letters] for word in split_words(source)}) / len(words)


def _is_plain(token: str) -> bool:
    """Return whether a blank-separated token is a word or a number as English prose has them."""
    if _NUMBER.fullmatch(token):
        return True
    return _PLAIN_WORD.fullmatch(token) is not None and _INNER_CAPITAL.search(token) is None
