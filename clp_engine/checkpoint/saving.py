"""Saving a conditioned model's copies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from clp_engine.checkpoint import card
from clp_engine.checkpoint.fingerprint import base_dtype, base_fingerprint
from clp_engine.checkpoint.folder_update import FolderUpdate, updating
from clp_engine.checkpoint.manifest import (
    CONFIG_FILE,
    HASH_IN_NAME,
    PROMPT_TEMPLATE_FILE,
    FileRecord,
    Manifest,
    file_record,
)
from clp_engine.layers import named_copies


def save(
    model: Any,
    directory: Path,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write `model`'s copies, config, prompt template and model card to `directory`, over an older checkpoint or not.

    A kill at any moment leaves the old or the new one. Two saves to one folder at once wait for each other where the
    file system has locks.

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
    with updating(directory) as update:
        files = dict(_put_shard(update, stem, {name: copies[name] for name in names}) for stem, names in shards)
        update.sync()
        manifest = Manifest(
            base_model_name_or_path=str(model.config._name_or_path or ""),
            base_revision=getattr(model.config, "_commit_hash", None),
            base_dtype=base_dtype(model),
            base_fingerprint=base_fingerprint(model, state_dict),
            config=model.clp_config,
            files=files,
        )
        update.put_text(manifest.to_json(), CONFIG_FILE)
        update.sync()
        if model.prompt_template is None:
            (directory / PROMPT_TEMPLATE_FILE).unlink(missing_ok=True)
        else:
            update.put_text(json.dumps(asdict(model.prompt_template), indent=1) + "\n", PROMPT_TEMPLATE_FILE)
        if card.may_write(directory):
            update.put_text(card.text(manifest), card.CARD_FILE)


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
    """The tensor files' names, without their hashes, and what each will hold."""
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


def _put_shard(update: FolderUpdate, stem: str, views: Mapping[str, torch.Tensor]) -> tuple[str, FileRecord]:
    """Write one tensor file; its name and record."""
    # Dense copies, of one file at a time: views are strided.
    tensors = {name: view.detach().contiguous().cpu() for name, view in views.items()}
    temporary = update.scratch / stem
    temporary.touch()
    mode = temporary.stat().st_mode
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.chmod(mode)  # save_file's own is for its owner alone, whatever the umask
    record = file_record(temporary)
    name = f"{stem}-{record.sha256[:HASH_IN_NAME]}.safetensors"
    update.put(temporary, name)
    return name, record
