"""Loading: the folder, its files and the base model are checked before a model changes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from clp_engine.checkpoint import hub
from clp_engine.checkpoint.fingerprint import base_dtype, base_fingerprint
from clp_engine.checkpoint.manifest import (
    CONFIG_FILE,
    PROMPT_TEMPLATE_FILE,
    REMEDY,
    Manifest,
    file_hash,
    read_manifest,
    tensor_records,
)
from clp_engine.checkpoint.saving import check_finite
from clp_engine.checkpoint.strict_json import decode, read_object, shown
from clp_engine.layers import conditioned_layers, named_copies
from clp_engine.model import get_clp_model
from clp_engine.pretrained import load_by_name, outline_by_name
from clp_engine.prompt_template import PromptTemplate

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def verify(directory: Path) -> Manifest:
    """Check `directory`'s manifest and every file that it names: size, hash, tensors, finite values.

    Other files in the folder are not looked at. A folder of format version 1 has no hashes to compare.

    Raises:
        FileNotFoundError: the manifest or a file is missing.
        ValueError: one is truncated, altered or damaged.
    """
    manifest = read_manifest(directory)
    for name, record in manifest.files.items():
        path = directory / name
        found = file_hash(path)
        if (size := path.stat().st_size) != record.size:
            raise ValueError(f"{path} has {size} bytes, {CONFIG_FILE} records {shown(record.size)}; {REMEDY}")
        if found != record.sha256:
            raise ValueError(
                f"{path} was altered: it has the SHA-256 {found}, {CONFIG_FILE} records {record.sha256}; {REMEDY}"
            )
        tensors = {key: f"{t.dtype} {t.shape}" for key, t in tensor_records(path).items()}
        recorded = {key: f"{t.dtype} {t.shape}" for key, t in record.tensors.items()}
        _compare(tensors, recorded, path, CONFIG_FILE)
        for tensor, values in _tensors(path):
            check_finite({tensor: values}, path)
    return manifest


def load(
    path: str | Path, base_model: Any = None, is_trainable: bool = False, revision: str | None = None, **kwargs: Any
) -> Any:
    """Read what `saving.save` wrote; see `CLPModel.from_pretrained`."""
    directory = hub.find(path, revision, kwargs)
    manifest, prompt_template = verify(directory), read_prompt_template(directory)
    base = _load_base(base_model, manifest, directory, **kwargs)
    _check_base(base, manifest, directory)
    try:
        outline = get_clp_model(_on_meta(base), manifest.config)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{directory / CONFIG_FILE}: config does not fit {type(base).__name__}: {error}") from error
    _check_copies(outline, manifest, directory)
    model = get_clp_model(base, manifest.config)
    _take_precision(model, manifest)
    _fill(model, manifest, directory)
    model.prompt_template = prompt_template
    if not is_trainable:
        model.requires_grad_(False)
    return model.train(is_trainable)


def outline(directory: Path) -> Any:
    """The conditioned model of a folder without values, on the meta device: no tensor is read, here or of the base.

    Raises:
        FileNotFoundError: the manifest or the base model's config is missing.
        ValueError: the manifest is damaged, or names no base.
    """
    manifest = read_manifest(directory)
    name = manifest.base_model_name_or_path
    if not name:
        raise ValueError(f"{directory} records no name of its base model")
    try:
        base = outline_by_name(name, getattr(torch, manifest.base_dtype or "", None), revision=manifest.base_revision)
    except OSError as error:
        raise FileNotFoundError(f"the base model {name!r} of {directory} cannot be read ({error})") from error
    model = get_clp_model(base, manifest.config)
    _take_precision(model, manifest)
    return model


def read_prompt_template(directory: Path) -> PromptTemplate | None:
    """How the prompts of `directory`'s model were worded in training; None where it does not say.

    Raises:
        ValueError: the file is damaged.
    """
    path = directory / PROMPT_TEMPLATE_FILE
    return decode(read_object(path), PromptTemplate, str(path), prose=("content",)) if path.exists() else None


def load_copies(model: Any, directory: Path) -> None:
    """Copy what `directory` holds into the conditioned `model`, whose config and base must be the saved ones.

    Raises:
        FileNotFoundError: the manifest or a file is missing.
        ValueError: the folder is damaged, or the model has another config, base, set of tensors or less precision.
            The model is then as it was.
    """
    manifest = verify(directory)
    saved, own = manifest.config.to_dict(), model.clp_config.to_dict()
    if different := [name for name in saved if saved[name] != own[name]]:
        name = different[0]
        raise ValueError(
            f"{directory} was saved with {name}={shown(saved[name])}, the model has {name}={shown(own[name])}: "
            "condition the model with the saved config, or load it by CLPModel.from_pretrained"
        )
    _check_base(model, manifest, directory)
    _check_copies(model, manifest, directory)
    for name, view in named_copies(model).items():
        dtype = _DTYPES[manifest.tensors[name].dtype]
        if torch.promote_types(dtype, view.dtype) != view.dtype:
            raise ValueError(f"{name} is {dtype} in {directory}, {view.dtype} in the model: convert the model first")
    _fill(model, manifest, directory)


def _load_base(base: Any, manifest: Manifest, directory: Path, **kwargs: Any) -> Any:
    from transformers import PreTrainedModel

    if base is None:
        base = manifest.base_model_name_or_path
        if not base:
            raise ValueError(f"{directory} records no name of its base model: pass base_model=")
        kwargs = {"revision": manifest.base_revision, **kwargs} if manifest.base_revision else kwargs
    if isinstance(base, PreTrainedModel):
        if unused := sorted(set(kwargs) - set(hub.DOWNLOAD_OPTIONS)):
            raise TypeError(f"base_model is a model already, so {unused} have no from_pretrained to go to")
        return base
    if not isinstance(base, (str, Path)):
        raise TypeError(f"base_model is a {type(base).__name__}, expected a transformers model, a path or a hub id")
    message = f"the base model {str(base)!r} of {directory} cannot be loaded"
    try:
        return load_by_name(base, **kwargs)
    except OSError as error:
        raise FileNotFoundError(f"{message} ({error}); pass base_model= with its place") from error
    except ValueError as error:
        raise ValueError(f"{message} ({error}); pass base_model= with its place") from error


def _check_base(model: Any, manifest: Manifest, directory: Path) -> None:
    recorded = manifest.base_fingerprint
    found = base_fingerprint(model, scheme=recorded.partition(":")[0])
    if found != recorded:
        raise ValueError(
            f"{directory} was trained on another base model, or on this one in another precision: fingerprint "
            f"{recorded[:19]} in {manifest.base_dtype or 'unknown precision'}, the one from "
            f"{model.config._name_or_path!r} has {found[:19]} in {base_dtype(model)}; pass base_model= with the right "
            "one, dtype= with its precision"
        )


def _on_meta(model: nn.Module) -> Any:
    """A copy of `model` without values, to try on it what may fail."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    return copy.deepcopy(model, memo)


def _check_copies(model: Any, manifest: Manifest, directory: Path) -> None:
    shapes = {name: str(record.shape) for name, record in manifest.tensors.items()}
    expected = {name: str(list(view.shape)) for name, view in named_copies(model).items()}
    _compare(shapes, expected, directory / CONFIG_FILE, "the base model under this config")


def _compare(found: Mapping[str, str], expected: Mapping[str, str], place: Path, source: str) -> None:
    if missing := sorted(set(expected) - set(found)):
        raise ValueError(
            f"{place} lacks {len(missing)} tensors of {source}, the first is {shown(missing[0])}; {REMEDY}"
        )
    if extra := sorted(set(found) - set(expected)):
        raise ValueError(
            f"{place} holds {len(extra)} tensors that {source} has not, the first is {shown(extra[0])}; {REMEDY}"
        )
    for name in expected:
        if found[name] != expected[name]:
            raise ValueError(
                f"{shown(name)} is {shown(found[name])} in {place}, {shown(expected[name])} in {source}; {REMEDY}"
            )


def _take_precision(model: Any, manifest: Manifest) -> None:
    """Give each layer's copies the precision that they were saved in."""
    tensors = manifest.tensors
    for path, layer in conditioned_layers(model).items():
        saved = [_DTYPES[tensors[name].dtype] for key in layer.copies() if (name := f"{path}.{key}") in tensors]
        for name in layer.added_parameters() if saved else ():
            parameter = layer.get_parameter(name)
            parameter.data = parameter.data.to(functools.reduce(torch.promote_types, saved))


def _fill(model: Any, manifest: Manifest, directory: Path) -> None:
    views = named_copies(model)
    with torch.no_grad():
        for file in manifest.files:
            for name, values in _tensors(directory / file):
                views[name].copy_(values)


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file, one in memory at a time."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            yield name, file.get_tensor(name)
