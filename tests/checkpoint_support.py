"""Checkpoints to damage: tiny ones, rewritten with right hashes, and what a model's copies hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests_support import randomise_deltas, tiny_llama

from clp_engine.checkpoint import CONFIG_FILE
from clp_engine.checkpoint.manifest import VERSION_1_WEIGHTS_FILE, content_hash


def tiny_conditioned(seed: int = 1, std: float = 0.1):
    """One layer of width 16 conditioned on two rewards: 8 tensors."""
    import clp_engine as clp

    base = tiny_llama(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    model = clp.get_clp_model(base, clp.CLPConfig(rewards=["long", "short"], min_kl_weight=0.05))
    randomise_deltas(model, std, seed)
    return model


def tiny_base():
    return tiny_llama(hidden_size=16, intermediate_size=16, num_hidden_layers=1)


def copies_of(model) -> dict[str, torch.Tensor]:
    from clp_engine.layers import named_copies

    return {name: view.clone() for name, view in named_copies(model).items()}


def is_equal(copies: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return copies.keys() == others.keys() and all(torch.equal(copies[name], others[name]) for name in copies)


def tensor_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def sign(folder: Path, edit) -> None:
    """Let `edit` change the manifest's record in place, and write it with the right hash of its content."""
    path = folder / CONFIG_FILE
    record = json.loads(path.read_text())
    record.pop("manifest_sha256", None)
    edit(record)
    path.write_text(json.dumps(record | {"manifest_sha256": content_hash(record)}))


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put `tensors` in the place of the single tensor file, and the right hashes in the manifest."""
    (old,) = tensor_files(folder)
    save_file(tensors, old)
    sign_files(folder)


def sign_files(folder: Path) -> None:
    """Record the single tensor file as it is."""
    (file,) = tensor_files(folder)
    tensors = {name: {"dtype": part.get_dtype(), "shape": part.get_shape()} for name, part in _slices(file).items()}
    sign_bytes(folder, tensors)


def sign_bytes(folder: Path, tensors: dict | None = None) -> None:
    """Record the single tensor file's hash and size, and `tensors` instead of those it had before."""
    (file,) = tensor_files(folder)

    def edit(record: dict) -> None:
        (entry,) = record["files"].values()
        entry.update(sha256=hashlib.sha256(file.read_bytes()).hexdigest(), size=file.stat().st_size)
        if tensors is not None:
            entry["tensors"] = tensors

    sign(folder, edit)


def _slices(file: Path) -> dict:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)


def to_version_1(folder: Path, fingerprint: str) -> None:
    """Rewrite a folder of one tensor file as format version 1 had it."""
    (file,) = tensor_files(folder)
    tensors = load_file(file)
    record = json.loads((folder / CONFIG_FILE).read_text())
    file.unlink()
    (folder / "README.md").unlink()
    save_file(tensors, folder / VERSION_1_WEIGHTS_FILE, metadata={"format": "pt"})
    version_1 = {
        "format_version": 1,
        "base_model_name_or_path": record["base_model_name_or_path"],
        "base_fingerprint": fingerprint,
        "config": record["config"],
    }
    (folder / CONFIG_FILE).write_text(json.dumps(version_1, indent=2) + "\n")
