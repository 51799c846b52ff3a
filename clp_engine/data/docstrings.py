"""The embedded summarisation data set: docstrings of this Python installation, body -> first line.

Read live from the standard library and the installed packages with `ast`; nothing is imported and nothing is stored.
The order of files is that of their hashed package-relative paths, so it depends on neither the file system nor the
place of installation, and another package installed adds pairs without moving the split of the others.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import heapq
import inspect
import itertools
import os
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clp_engine.data.docstring_text import normalised_words, summary_and_body, word_ngrams
from clp_engine.prompt_template import PromptTemplate

# The instruction stands behind the text and asks for fewer words: asked before it for a summary, the small model mostly
# copies the text. The system message is two words because SmolLM2's chat template otherwise puts a long one in front.
PROMPT_TEMPLATE = PromptTemplate(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "{prompt}\n\nSay this in fewer words."},
    ]
)
SEED = 9
MAX_PAIRS = {"train": 3000, "test": 300}
MAX_FILE_BYTES = 60_000
PAIRS_PER_FILE = 12
TEST_SHARE = 0.1
MIN_PAIRS = {"train": 1000, "test": 100}

_SKIPPED_FOLDERS = frozenset(
    """
    __pycache__ _vendor _vendored build dist-packages externals idle_test lib2to3 site-packages test testing
    tests turtledemo vendor vendored clp_engine clp_kernels
    """.split()  # noqa: SIM905 - a list would take a line for each word
)
_TRIPLE_QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)
_NGRAM = 5  # words; a pair is a near duplicate when more than NEAR_DUPLICATE of its n-grams were seen before
_NEAR_DUPLICATE = 0.25
_WINDOW = 128  # pairs


def load_docstring_pairs(
    split: Literal["train", "test"], limit: int | None = None, min_pairs: int | None = None
) -> list[dict[str, Any]]:
    """Return the rows of one split: `{"prompt", "source", "summary", "file"}`, in an order fixed by a hash.

    `prompt` is in the conversational format (system and user message) and asks to say `source`, the docstring's body,
    in fewer words; `summary` is its first line; `file` the path below the package root. The split is by file, and near
    duplicates across files are dropped, so that no test pair is seen in training. `datasets.Dataset.from_list` takes
    the rows.

    Args:
        split: "train" (about 9 of 10 files) or "test".
        limit: at most this many rows, the first ones; None returns all.
        min_pairs: fewer rows than this (or than `limit`) is an error; None takes 1000 for train, 100 for test, or
            `limit` where that is smaller.

    Raises:
        ValueError: `split` or `limit` is wrong, or too few pairs were found; the message holds both numbers.
    """
    if split not in MIN_PAIRS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    pairs = collect_pairs(python_roots(), split, limit)
    needed = max(limit or 0, min_pairs or 0) or MIN_PAIRS[split]
    if len(pairs) < needed:
        raise ValueError(
            f"{len(pairs)} docstring pairs found for split {split!r}, {needed} needed (looked below "
            f"{', '.join(map(str, python_roots()))}). Install packages with their sources (sympy, networkx, "
            "transformers hold thousands), ask for fewer rows, or name a data set: a hub id, a JSONL or a CSV file"
        )
    return [{"prompt": build_prompt(pair["source"]), **pair} for pair in pairs]


def build_prompt(body: str) -> list[dict[str, str]]:
    """Return the conversational prompt that asks to say `body` in fewer words."""
    return PROMPT_TEMPLATE.fill(body)


def python_roots() -> list[Path]:
    """Return the existing source roots of this interpreter: standard library, then site-packages."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return [Path(path) for path in dict.fromkeys(paths) if path and Path(path).is_dir()]


def collect_pairs(roots: Sequence[Path], split: Literal["train", "test"], limit: int | None) -> list[dict[str, str]]:
    """Return the first pairs `{"source", "summary", "file"}` of a split below the roots, in hashed order.

    The test split (at most `MAX_PAIRS["test"]` pairs) is read first in either case: what resembles it never gets into
    the training split. Reading stops at `limit`, so that a short run waits for a few hundred files only.

    Args:
        roots: folders of Python sources; unreadable and unparsable files are passed over.
        split: which side of the split.
        limit: at most this many pairs; None takes `MAX_PAIRS`.
    """
    train_files, test_pairs, seen = _test_side(tuple(roots))
    most = min(MAX_PAIRS[split], limit or MAX_PAIRS[split])
    if split == "test":
        return [dict(pair) for pair in test_pairs[:most]]
    return list(itertools.islice(_mixed(_new_pairs(train_files, seen.copy())), most))


def is_test_file(name: str) -> bool:
    """Return whether a file of this package-relative path belongs to the test split."""
    return int(_hash("split\n" + name)[:8], 16) < TEST_SHARE * 16**8


@dataclass
class _Seen:
    """What earlier pairs said: keys of their summaries, and hashes of the n-grams of their bodies."""

    summaries: set[str] = field(default_factory=set)
    ngrams: set[int] = field(default_factory=set)

    def copy(self) -> _Seen:
        """Return an independent copy."""
        return _Seen(set(self.summaries), set(self.ngrams))

    def is_new(self, summary: str, body: str) -> bool:
        """Return whether neither the summary nor much of the body was seen before, and remember both if so."""
        key = " ".join(normalised_words(summary))
        ngrams = {zlib.crc32(ngram.encode()) for ngram in word_ngrams(normalised_words(body), _NGRAM)}
        if key in self.summaries or len(ngrams & self.ngrams) > _NEAR_DUPLICATE * len(ngrams):
            return False
        self.summaries.add(key)
        self.ngrams |= ngrams
        return True


@functools.lru_cache(maxsize=2)
def _test_side(roots: tuple[Path, ...]) -> tuple[list[tuple[str, Path]], list[dict[str, str]], _Seen]:
    """Return the training files, the test pairs and what those said; kept, because both splits need it (2 s here)."""
    files: dict[str, Path] = {}
    for root in roots:
        for path in _source_files(root):
            files.setdefault(path.relative_to(root).as_posix(), path)
    ordered = sorted(files.items(), key=lambda item: _hash(item[0]))
    seen = _Seen()
    test_files = [item for item in ordered if is_test_file(item[0])]
    test_pairs = list(itertools.islice(_mixed(_new_pairs(test_files, seen)), MAX_PAIRS["test"]))
    return [item for item in ordered if not is_test_file(item[0])], test_pairs, seen


def _new_pairs(files: Iterable[tuple[str, Path]], seen: _Seen) -> Iterator[dict[str, str]]:
    """Yield the pairs of some files that `seen` does not know yet."""
    for name, path in files:
        fresh = (pair for pair in _pairs_of_file(path) if seen.is_new(*pair))
        for summary, body in itertools.islice(fresh, PAIRS_PER_FILE):
            yield {"source": body, "summary": summary, "file": name}


def _mixed(pairs: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Yield the pairs through a window that deals them out by hash: a batch would otherwise speak of one subject."""
    window: list[tuple[str, dict[str, str]]] = []
    for pair in pairs:
        entry = (_hash(pair["file"] + "\n" + pair["summary"]), pair)
        if len(window) < _WINDOW:
            heapq.heappush(window, entry)
        else:
            yield heapq.heappushpop(window, entry)[1]
    yield from (pair for _, pair in sorted(window, key=lambda entry: entry[0]))


def _hash(text: str) -> str:
    """Return the seeded hexadecimal hash that orders and splits."""
    return hashlib.sha256(f"{SEED}\n{text}".encode("utf-8", "surrogateescape")).hexdigest()


def _source_files(root: Path) -> Iterator[Path]:
    """Yield the Python files below `root`, without tests, vendored copies and the project itself."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for name in names:
            if name.endswith(".py"):
                yield Path(folder, name)


def _pairs_of_file(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (summary, body) of every class and function of one file whose docstring is plain English."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return
        text = path.read_text(encoding="utf-8")
        # Parsing is most of the cost and most files hold no pair: look at what stands between triple quotes first.
        if not any(summary_and_body(inspect.cleandoc(chunk)) for chunk in _TRIPLE_QUOTED.findall(text)):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning for somebody else's escape sequences
            tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return  # not text, another encoding, a template: one file less
    for node in _definitions(tree):
        docstring = ast.get_docstring(node, clean=False)
        pair = summary_and_body(inspect.cleandoc(docstring)) if docstring and docstring.isascii() else None
        if pair is not None:
            yield pair


def _definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yield the classes and functions of a module, nested ones too, walking statements alone."""
    nodes: list[ast.AST] = [tree]
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
        for block in ("body", "orelse", "finalbody", "handlers"):
            nodes.extend(getattr(node, block, ()))
