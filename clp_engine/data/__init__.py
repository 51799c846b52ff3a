"""Prompts to train and evaluate on, and the embedded models, found in the Python installation."""

from __future__ import annotations

from clp_engine.data.datasets_source import load_dataset_rows, prompt_template
from clp_engine.data.docstrings import build_prompt, load_docstring_pairs
from clp_engine.data.minilm import ensure_minilm
from clp_engine.data.smollm2 import ensure_smollm2

__all__ = [
    "build_prompt",
    "ensure_minilm",
    "ensure_smollm2",
    "load_dataset_rows",
    "load_docstring_pairs",
    "prompt_template",
]
