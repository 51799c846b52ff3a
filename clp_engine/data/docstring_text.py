"""Plain English out of docstrings: the first line as a summary, the sentences after it as the text to summarise."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

SUMMARY_WORDS = (3, 16)
BODY_WORDS = (12, 32)
BODY_CHARACTERS = 210

# What begins a part of a docstring that is not prose: sections, fields, doctests, directives, lists, tables, code.
_SECTION = re.compile(
    r"^\s*(:[a-zA-Z]|@[a-z]|>>>|\.\. |[-*+o#|] |[-=~^+*]{3,}|\(?\d+[.)] |"
    r"(args?|arguments|attributes|examples?|inputs?|kwargs|keyword arguments|keywords|methods|notes?|outputs?|other "
    r"parameters|parameters|params|raises|references|returns?|see also|shapes?|todo|usage|warnings?|warns|yields?)"
    r"\s*(:|$|\n\s*-{3,}))",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"'][.!?])\s+(?=[A-Z])")
# A word of plain English: letters, inner apostrophes and hyphens; an all-capital acronym; a number.
_WORD = re.compile(r"(?:[A-Z]?[a-z]+|[A-Z]{1,6}s?)(?:['-][A-Za-z]?[a-z]*)*|[0-9]+(?:\.[0-9]+)?%?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*(?:\(\))?")
_ROLE = re.compile(r":[a-z:]+:`[~!.]?([^`<]+)(?:<[^`]*>)?`")
_INLINE = re.compile(r"(`{1,2}|\*{1,2})([A-Za-z_][^`*\n]*?)\1_{0,2}")
_EDGES = "\"'(),;:.!?"
NAMES_SHARE = 0.12  # of a text's words may be names from code: readable, and three times the pairs
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|cf|resp)\.", re.IGNORECASE)
_FUNCTION_WORDS = frozenset(
    """
    a an and are as at be by can for from has if in into is it its not of on or that the then this to when which
    will with
    """.split()  # noqa: SIM905 - a list would take a line for each word
)


def summary_and_body(docstring: str) -> tuple[str, str] | None:
    """Return (summary, body) of a cleaned docstring, or None where either is not plain English of the wanted length.

    The summary is the first sentence of the first paragraph, nearly always the first line. The body is whole sentences
    after it, up to the first section, list, code or doctest.

    Args:
        docstring: as `inspect.cleandoc` leaves it.
    """
    sentences = _sentences(re.split(r"\n[ \t]*\n", docstring.strip()))
    summary = next(sentences, "")
    if summary[-1:].isalnum():
        summary += "."
    if not (SUMMARY_WORDS[0] <= len(summary.split()) <= SUMMARY_WORDS[1]) or not is_plain_english(summary):
        return None
    body = _body(sentences)
    return None if body is None else (summary, body)


def is_plain_english(sentence: str) -> bool:
    """Return whether the sentence starts with a capital, ends with `.`, `!` or `?` and its words are ordinary.

    At most `NAMES_SHARE` of them (and always one) may be a name such as `max_length` instead.
    """
    if not sentence[:1].isupper() or sentence[-1] not in ".!?" or _ABBREVIATION.search(sentence):
        return False
    if ". " in sentence[:-1] or sentence.endswith(".."):
        return False
    words = [word.strip(_EDGES) for word in sentence.split()]
    odd = [word for word in words if not _WORD.fullmatch(word)]
    if len(odd) > max(1, NAMES_SHARE * len(words)) or not all(_NAME.fullmatch(word) for word in odd):
        return False
    return any(word.lower() in _FUNCTION_WORDS for word in words)


def without_inline_markup(text: str) -> str:
    """Return the text without the marks of reStructuredText and Markdown roles, literals and emphasis."""
    return _INLINE.sub(r"\2", _ROLE.sub(r"\1", text))


def normalised_words(text: str) -> list[str]:
    """Return the lower-case letter runs of a text: what two near duplicates share."""
    return re.findall(r"[a-z]+", text.lower())


def word_ngrams(words: list[str], length: int) -> set[str]:
    """Return the set of n-grams of a list of words, joined by blanks; a shorter list is one n-gram."""
    return {" ".join(words[start : start + length]) for start in range(max(1, len(words) - length + 1))}


def _body(sentences: Iterator[str]) -> str | None:
    """Return the leading plain sentences that fit the window of words, or None where they are too few."""
    taken: list[str] = []
    count = characters = 0
    for sentence in sentences:
        words = len(sentence.split())
        if not is_plain_english(sentence) or count + words > BODY_WORDS[1]:
            break
        if characters + len(sentence) > BODY_CHARACTERS:
            break
        taken.append(sentence)
        count, characters = count + words, characters + len(sentence) + 1
    return " ".join(taken) if count >= BODY_WORDS[0] else None


def _sentences(paragraphs: list[str]) -> Iterator[str]:
    """Yield the sentences of the paragraphs up to the first line that is not prose."""
    for paragraph in paragraphs:
        lines = paragraph.split("\n")
        prose = list(itertools.takewhile(lambda line: not _SECTION.match(line), lines))
        if _SECTION.match(paragraph) or not prose or lines[0].startswith((" ", "\t")) or "::" in paragraph:
            return
        yield from _SENTENCE_END.split(without_inline_markup(" ".join(" ".join(prose).split())))
        if len(prose) < len(lines):
            return
