"""A conditioned model on disk: safetensors and JSON, the base model by reference.

clp_config.json          format_version, the CLPConfig, the base model's name or path and fingerprint
clp_model.safetensors    `<module path>.weight.<copy name>` -> Delta_k [N, D] in its own precision
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from clp_engine.config import CLPConfig
from clp_engine.layers import conditioned_layers
from clp_engine.model import get_clp_model

FORMAT_VERSION = 1
CONFIG_FILE = "clp_config.json"
WEIGHTS_FILE = "clp_model.safetensors"
_FINGERPRINT_VALUES = 64


def save(model: Any, directory: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write `model`'s copies and config to `directory`; each file appears whole or not at all, the config last."""
    directory.mkdir(parents=True, exist_ok=True)
    names = model.clp_config.rewards
    tensors = {}
    for path, layer in conditioned_layers(model).items():
        deltas_NKD = layer.deltas if state_dict is None else state_dict[f"{path}.deltas"]
        for k, name in enumerate(names):
            tensors[f"{path}.weight.{name}"] = deltas_NKD[:, k].detach().contiguous().cpu()
    record = {
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": model.config._name_or_path,
        "base_fingerprint": base_fingerprint(model),
        "config": model.clp_config.to_dict(),
    }
    _replace(directory / WEIGHTS_FILE, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    _replace(directory / CONFIG_FILE, lambda temporary: temporary.write_text(json.dumps(record, indent=2) + "\n"))


def load(path: str | Path, base_model: Any = None, is_trainable: bool = False, **kwargs: Any) -> Any:
    """Read what `save` wrote; see `CLPModel.from_pretrained`."""
    directory = _directory(path)
    record = json.loads((directory / CONFIG_FILE).read_text())
    if record["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{directory} has format_version {record['format_version']}, this release reads {FORMAT_VERSION}"
        )
    base = _load_base(base_model if base_model is not None else record["base_model_name_or_path"], directory, **kwargs)
    fingerprint = base_fingerprint(base)
    if fingerprint != record["base_fingerprint"]:
        raise ValueError(
            f"{directory} was trained on another base model: fingerprint {record['base_fingerprint'][:16]}, the one "
            f"loaded from {base.config._name_or_path!r} has {fingerprint[:16]}; pass base_model= with the right one"
        )
    model = get_clp_model(base, CLPConfig.from_dict(record["config"]))
    load_deltas(model, directory)
    for layer in conditioned_layers(model).values():
        layer.deltas.requires_grad_(is_trainable)
    return model.train(is_trainable)


def load_deltas(model: Any, directory: Path) -> None:
    """Copy the saved deltas in `directory` into `model`.

    Raises:
        ValueError: a tensor is missing, extra or of another shape.
    """
    tensors = load_file(directory / WEIGHTS_FILE)
    layers = conditioned_layers(model)
    expected = {f"{path}.weight.{name}" for path in layers for name in model.clp_config.rewards}
    if missing := sorted(expected - set(tensors)):
        raise ValueError(f"{directory / WEIGHTS_FILE} lacks {len(missing)} tensors, the first is {missing[0]}")
    if extra := sorted(set(tensors) - expected):
        raise ValueError(f"{directory / WEIGHTS_FILE} holds {len(extra)} unexpected tensors, the first is {extra[0]}")
    with torch.no_grad():
        for path, layer in layers.items():
            for k, name in enumerate(model.clp_config.rewards):
                key = f"{path}.weight.{name}"
                if tensors[key].shape != layer.weight.shape:
                    found, wanted = list(tensors[key].shape), list(layer.weight.shape)
                    raise ValueError(f"{key} has shape {found}, the base model's layer has {wanted}")
                layer.deltas[:, k].copy_(tensors[key])


def base_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of the base model's parameter names, shapes and first values; dtype and device do not matter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith(".deltas"):
            continue
        head = parameter.detach().flatten()[:_FINGERPRINT_VALUES].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(head.numpy().tobytes())
    return digest.hexdigest()


def is_conditioned(path: str | Path) -> bool:
    """Whether the local folder `path` holds a conditioned model."""
    return (Path(path) / CONFIG_FILE).is_file()


def _directory(path: str | Path) -> Path:
    if is_conditioned(path):
        return Path(path)
    if Path(path).exists():
        raise FileNotFoundError(f"{path} holds no conditioned model: it has no {CONFIG_FILE}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"no conditioned model at {path}: not a folder here, and no hub repository") from error


def _load_base(base: Any, directory: Path, **kwargs: Any) -> Any:
    if not isinstance(base, (str, Path)):
        return base
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    try:
        config = AutoConfig.from_pretrained(base, **kwargs)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto.from_pretrained(base, **kwargs)
    except OSError as error:
        raise FileNotFoundError(
            f"the base model {str(base)!r} of {directory} cannot be loaded ({error}); pass base_model= with its place"
        ) from error


def _replace(target: Path, write: Any) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
