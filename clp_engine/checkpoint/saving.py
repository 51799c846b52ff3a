"""Saving: new tensor files beside the old ones, then the manifest in one step, then the old files go.

A process that is killed at any moment leaves the old checkpoint or the new one. Other files in the folder
(an optimizer's state, a tokenizer) are never touched.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from clp_engine.checkpoint import card
from clp_engine.checkpoint.fingerprint import base_dtype, base_fingerprint
from clp_engine.checkpoint.manifest import (
    CONFIG_FILE,
    HASH_IN_NAME,
    TENSOR_FILE,
    FileRecord,
    Manifest,
    file_record,
    read_manifest,
)
from clp_engine.layers import named_copies

MAX_SHARD_SIZE = "5GB"
_TEMPORARY = re.compile(r"\.clp_engine-[0-9a-f]{32}\.tmp")
# What file systems answer that have no locks, or no fsync of a folder.
_NOT_OFFERED = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def save(
    model: Any,
    directory: Path,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write `model`'s copies, config and model card to `directory`, over an older checkpoint or not.

    Two saves to one folder at once wait for each other where the file system has locks.

    Args:
        model: a conditioned model.
        directory: made where missing.
        state_dict: tensors to write instead of the model's own (gathered from shards).
        max_shard_size: bytes of a tensor file at most, or as "200MB"; a larger tensor gets a file of its own.

    Raises:
        ValueError: a copy holds NaN or infinity (the older checkpoint stays), or max_shard_size is no size.
    """
    copies = named_copies(model, state_dict)
    shards = _shards(copies, max_shard_size)
    check_finite(copies, "the model")
    directory.mkdir(parents=True, exist_ok=True)
    with _exclusive(directory) as (folder, is_alone):
        before = _named_files(directory)
        try:
            files = dict(_write_shard(directory, name, {key: copies[key] for key in keys}) for name, keys in shards)
            _sync(folder)
            manifest = Manifest(
                base_model_name_or_path=str(model.config._name_or_path or ""),
                base_revision=getattr(model.config, "_commit_hash", None),
                base_dtype=base_dtype(model),
                base_fingerprint=base_fingerprint(model, state_dict),
                config=model.clp_config,
                files=files,
            )
            _write(directory / CONFIG_FILE, manifest.to_json())
            _sync(folder)
            if card.may_write(directory):
                _write(directory / card.CARD_FILE, card.text(manifest))
        finally:
            _remove_unnamed(directory, before, is_alone)


def check_finite(tensors: Mapping[str, torch.Tensor], place: object) -> None:
    """Refuse NaN and infinity, which would spoil every output under every weighting.

    Raises:
        ValueError: with the tensor's name.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} of {place} holds NaN or infinity: its training has diverged; take an earlier checkpoint"
            )


def _shards(copies: Mapping[str, torch.Tensor], max_shard_size: int | str) -> list[tuple[str, list[str]]]:
    """Names of the tensor files, hashes to come, and what each holds."""
    from huggingface_hub import split_state_dict_into_shards_factory

    if str(max_shard_size).startswith("-"):
        raise ValueError(f"max_shard_size is {max_shard_size!r}, expected a size above 0")
    try:
        split = split_state_dict_into_shards_factory(
            dict(copies),
            get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
            filename_pattern="clp_model{suffix}",
            max_shard_size=max_shard_size,
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f'max_shard_size is {max_shard_size!r}, expected bytes or as in "200MB"') from error
    return list(split.filename_to_tensors.items())


def _write_shard(directory: Path, stem: str, views: Mapping[str, torch.Tensor]) -> tuple[str, FileRecord]:
    # Dense copies of one shard at a time: views are strided.
    tensors = {name: view.detach().contiguous().cpu() for name, view in views.items()}
    with _temporary(directory) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        record = file_record(temporary)
        name = f"{stem}-{record.sha256[:HASH_IN_NAME]}.safetensors"
        _commit(temporary, directory / name)
    return name, record


def _write(target: Path, text: str) -> None:
    with _temporary(target.parent) as temporary:
        temporary.write_text(text, encoding="utf-8")
        _commit(temporary, target)


@contextmanager
def _temporary(directory: Path) -> Iterator[Path]:
    temporary = directory / f".clp_engine-{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _commit(temporary: Path, target: Path) -> None:
    """Make `temporary`, once it is on the disk, appear as `target`, whole."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)


def _sync(folder: int) -> None:
    """Bring the names in an open folder to the disk."""
    _where_offered(lambda: os.fsync(folder))


@contextmanager
def _exclusive(directory: Path) -> Iterator[tuple[int, bool]]:
    """Keep other saves out of `directory`; yields its descriptor, and False where the file system has no locks."""
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield folder, _where_offered(lambda: fcntl.flock(folder, fcntl.LOCK_EX))
    finally:
        os.close(folder)


def _where_offered(call: Callable[[], Any]) -> bool:
    try:
        call()
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
        return False
    return True


def _named_files(directory: Path) -> set[str] | None:
    """The tensor files that `directory`'s manifest names; None where it cannot be read."""
    if not (directory / CONFIG_FILE).exists():
        return set()
    try:
        return set(read_manifest(directory).files)
    except (ValueError, OSError):
        return None


def _remove_unnamed(directory: Path, before: set[str] | None, is_alone: bool) -> None:
    """Remove the tensor files that the manifest does not name (any more), and what killed saves left."""
    named = _named_files(directory)
    if named is None:  # a damaged manifest stays as it is, with the files that it may be about
        return
    for entry in list(directory.iterdir()):
        is_left_over = is_alone and (TENSOR_FILE.fullmatch(entry.name) or _TEMPORARY.fullmatch(entry.name))
        if entry.name not in named and (is_left_over or entry.name in (before or ())):
            entry.unlink(missing_ok=True)
