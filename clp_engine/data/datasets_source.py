"""Rows of a data set named on the command line: a JSON lines or CSV file, or a data set of the Hugging Face hub."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from clp_engine.data.docstrings import PROMPT_TEMPLATE, load_docstring_pairs
from clp_engine.extras import require
from clp_engine.prompt_template import PromptTemplate

EMBEDDED = "docstrings"
_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def load_dataset_rows(source: str, split: str = "train", limit: int | None = None) -> list[dict[str, Any]]:
    """Return the rows of a data set as dicts, each with a `prompt` (a string or a list of messages).

    Equivalent for a hub id: `list(datasets.load_dataset(source, split=split))`. A file is one split.

    Args:
        source: path of a `.jsonl` or `.csv` file, a hub id ("trl-lib/tldr"), or "docstrings" for the embedded set.
        split: split of a hub data set ("train", "test", "train[:100]") or of the embedded one.
        limit: at most this many rows; None returns all.

    Raises:
        FileNotFoundError: `source` looks like a path and is not there.
        ValueError: a line cannot be read, there are no rows, or rows without a prompt; the message names the place.
        ImportError: `source` is a hub id and `datasets` is missing.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    path = Path(source).expanduser()
    if _is_embedded(source):
        if split not in ("train", "test"):
            raise ValueError(f"split of {EMBEDDED!r} must be 'train' or 'test', got {split!r}")
        return load_docstring_pairs("train" if split == "train" else "test", limit=limit)
    if path.is_file():
        rows = _read_file(path)
    elif path.suffix.lower() in _FILE_ENDINGS or path.is_absolute() or source.startswith(("./", "../", "~")):
        raise FileNotFoundError(
            f"the data set file {source!r} does not exist or is not a file (looked at {path.absolute()})"
        )
    else:
        rows = _read_hub(source, split)
    _check_prompts(source, rows)
    return rows[:limit]


def prompt_template(source: str) -> PromptTemplate | None:
    """How the prompts of a data set are worded, where that is known: of the embedded one."""
    return PROMPT_TEMPLATE if _is_embedded(source) else None


def _is_embedded(source: str) -> bool:
    return source == EMBEDDED and not Path(source).exists()


def _read_file(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `.jsonl` or `.csv` file."""
    if path.suffix.lower() in (".jsonl", ".json"):
        return _read_json_lines(path)
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return [dict(row) for row in csv.DictReader(stream)]
    raise ValueError(f"{path} ends with {path.suffix!r}: a data set file is .jsonl (one object a line) or .csv")


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one JSON object a line; empty lines are passed over."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); one object a line is needed") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a {type(row).__name__}; one object a line is needed")
        rows.append(row)
    return rows


def _read_hub(source: str, split: str) -> list[dict[str, Any]]:
    """Return the rows of one split of a hub data set."""
    datasets = require("datasets", extra="train")
    try:
        loaded = datasets.load_dataset(source, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the data set {source!r} (split {split!r}) is neither a file here nor one that the hub gave: {error}"
        ) from error
    return [dict(row) for row in loaded]


def _check_prompts(source: str, rows: list[dict[str, Any]]) -> None:
    """Raise ValueError where there are no rows or a row has no usable prompt."""
    if not rows:
        raise ValueError(f"the data set {source!r} holds no rows: at least 1 is needed")
    for number, row in enumerate(rows, start=1):
        if "prompt" not in row:
            columns = sorted(str(column) for column in row)
            raise ValueError(f"the data set {source!r} has no column 'prompt' (row {number} has {columns}): rename one")
        prompt = row["prompt"]
        messages = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
        if not prompt or not (isinstance(prompt, str) or messages):
            raise ValueError(
                f"the data set {source!r}, row {number}: the prompt is {str(prompt)[:60]!r}; it must be a string or a "
                "list of messages, and not empty"
            )
