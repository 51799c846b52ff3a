"""`clp inspect`: verify a conditioned model's folder and list what it holds."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from clp_engine.cli import arguments, loading

_DESCRIPTION = """Verify a steerable model: its manifest, every file's hash and tensors. The base model is not loaded.

Prints the rewards, what is conditioned, the base model and the sizes; a damaged folder is an error.

example:
  clp inspect runs/demo/model"""


def run(argv: Sequence[str]) -> None:
    """Parse `argv`, verify, and print."""
    parser = argparse.ArgumentParser(
        "clp inspect", description=_DESCRIPTION, formatter_class=arguments.HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a steerable model")
    options = parser.parse_args(argv)
    loading.check_path(options.model, "the model")
    from clp_engine import checkpoint

    directory = checkpoint.find(options.model)
    manifest = checkpoint.verify(directory)
    print(f"{options.model}: verified")
    template = checkpoint.read_prompt_template(directory)
    for name, value in _lines(manifest, template):
        print(f"  {name:<18} {value}")


def _lines(manifest: Any, template: Any) -> Iterator[tuple[str, str]]:
    config = manifest.config
    hashes = "" if manifest.format_version > 1 else ", which has no hashes: save again to have them"
    yield "format version", f"{manifest.format_version}{hashes}"
    yield "base model", manifest.base_model_name_or_path or "without a name"
    yield "base revision", manifest.base_revision or "unknown"
    yield "base fingerprint", f"{manifest.base_fingerprint} in {manifest.base_dtype or 'unknown precision'}"
    yield "rewards", ", ".join(config.rewards)
    for field, value in config.to_dict().items():
        if field != "rewards" and value is not None:
            yield field, str(value)
    if template is not None:
        yield "prompt template", str(template.messages)
    families = manifest.sizes_by_family()
    dtypes = ", ".join(sorted({tensor.dtype for tensor in manifest.tensors.values()}))
    total = sum(size for _, size in families.values())
    yield "files", str(len(manifest.files))
    yield "tensors", f"{len(manifest.tensors)} of {dtypes}, {_megabytes(total)}"
    for family, (count, size) in families.items():
        yield f"  {family}", f"{count} tensors, {_megabytes(size)}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3f} MB"
