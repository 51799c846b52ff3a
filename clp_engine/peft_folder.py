"""PEFT's folder of a LoRA adapter, read and written without the library.

    adapter_config.json            rank, scaling and targets; patterns for modules whose rank or scaling is another
    adapter_model.safetensors      `base_model.model.<module path>.lora_A.weight` [r, D] and `lora_B.weight` [N, r]

Legend: N out, D in, r rank.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(.+)\.(lora_A|lora_B|base_layer)\.weight")

# Fields that the tensors already answer, or that had their say in training. Every other one must be off.
_HARMLESS = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "eva_config", "loftq_config", "corda_config"),
    *("lora_ga_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config"),
}
_OFF: tuple[Any, ...] = (None, False, {}, [], "none")
# Starts that leave the base's weights as they are.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_REMEDY = "merge the adapter with PEFT's merge_and_unload and import the result by from_finetuned"


@dataclass(frozen=True)
class ModuleAdapter:
    """One module's part of an adapter: what it adds is `scaling * B @ A`, [N, D]."""

    a_rD: torch.Tensor
    b_Nr: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a_rD.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        modules: its parts by module path.
        base_model_name_or_path: the model that it was trained on, where known.
        base_weights: weights of that model by module path: PEFT adds the head's where the head has an adapter.
    """

    modules: dict[str, ModuleAdapter]
    base_model_name_or_path: str | None = None
    base_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(module.rank for module in self.modules.values())

    @property
    def scaling(self) -> float:
        """The scaling of most modules."""
        return Counter(module.scaling for module in self.modules.values()).most_common(1)[0][0]


def read_adapter(place: str | Path) -> Adapter:
    """Read a LoRA adapter from a folder or a hub repository.

    Args:
        place: a folder with adapter_config.json and adapter_model.safetensors, or a hub id.

    Raises:
        FileNotFoundError: no adapter there, or one without safetensors.
        NotImplementedError: more than plain LoRA on linear layers; the message names the field or tensor.
        ValueError: tensors and config do not agree.
    """
    folder = _folder(place)
    config, tensors = _read_files(folder)
    _check_plain_lora(config, folder)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    base_weights = {}
    for key, tensor in tensors.items():
        if (match := _KEY.fullmatch(key)) is None:
            raise NotImplementedError(
                f"{folder / WEIGHTS_FILE} holds {key} {list(tensor.shape)}: only lora_A and lora_B of linear layers "
                f"are imported; {_REMEDY}"
            )
        if match[2] == "base_layer":
            base_weights[match[1]] = tensor
        else:
            factors.setdefault(match[1], {})[match[2]] = tensor
    if not factors:
        raise ValueError(f"{folder / WEIGHTS_FILE} holds no adapter tensors")
    modules = {path: _module(path, pair, config, folder) for path, pair in factors.items()}
    return Adapter(modules, config.get("base_model_name_or_path"), base_weights)


def write_adapter(folder: Path, adapter: Adapter, task_type: str, fan_in_fan_out: bool) -> None:
    """Write what PeftModel.from_pretrained reads; the config last.

    Args:
        folder: made where missing.
        adapter: its modules, ranks and scalings may differ.
        task_type: PEFT's name of the kind of model, as in "CAUSAL_LM".
        fan_in_fan_out: whether the targets store their weights [D, N].
    """
    sizes = {path: (module.rank, _alpha(module)) for path, module in adapter.modules.items()}
    rank, alpha = Counter(sizes.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": adapter.base_model_name_or_path,
        "r": rank,
        "lora_alpha": alpha,
        # PEFT matches patterns from the right: the ^ makes a key one module's whole path.
        "rank_pattern": {f"^{path}": own for path, (own, _) in sizes.items() if own != rank},
        "alpha_pattern": {f"^{path}": own for path, (_, own) in sizes.items() if own != alpha},
        "target_modules": list(sizes),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
    tensors = {}
    for path, module in adapter.modules.items():
        for name, tensor in (("lora_A", module.a_rD), ("lora_B", module.b_Nr)):
            tensors[f"{_PREFIX}{path}.{name}.weight"] = tensor.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _alpha(module: ModuleAdapter) -> float:
    alpha = module.scaling * module.rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _folder(place: str | Path) -> Path:
    folder = Path(place)
    if not folder.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(str(place), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(f"no adapter at {place}: not a folder here, and no hub repository") from error
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{place} holds no adapter that can be read: it has no {name}")
    return folder


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        tensors = load_file(folder / WEIGHTS_FILE)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no adapter that can be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG_FILE} holds a {type(config).__name__}, expected an object")
    return config, tensors


def _check_plain_lora(config: dict[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise NotImplementedError(f"{folder} has peft_type={kind!r}: only LORA is imported; {_REMEDY}")
    for name, value in config.items():
        if name not in _HARMLESS and value not in _OFF:
            raise NotImplementedError(f"{folder} has {name}={value!r}: only plain LoRA is imported; {_REMEDY}")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise NotImplementedError(
            f"{folder} has init_lora_weights={start!r}, which changes the base's weights: save it as plain LoRA by "
            "PEFT's path_initial_model_for_weight_conversion"
        )


def _module(path: str, pair: dict[str, torch.Tensor], config: dict[str, Any], folder: Path) -> ModuleAdapter:
    if missing := {"lora_A", "lora_B"} - set(pair):
        raise ValueError(f"{folder / WEIGHTS_FILE} lacks {missing.pop()} of {path}")
    rank = _by_pattern(config.get("rank_pattern"), path, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ValueError(f"{folder / CONFIG_FILE} gives {path} r={rank!r} and lora_alpha={alpha!r}, expected numbers")
    a_rD, b_Nr = pair["lora_A"], pair["lora_B"]
    if a_rD.dim() != 2 or b_Nr.dim() != 2 or not a_rD.shape[0] == b_Nr.shape[1] == rank:
        raise ValueError(
            f"{path} of {folder} has lora_A {list(a_rD.shape)} and lora_B {list(b_Nr.shape)}, {CONFIG_FILE} says "
            f"[{rank}, D] and [N, {rank}]"
        )
    return ModuleAdapter(a_rD, b_Nr, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT's choice: the first key that matches the whole path or what follows one of its dots."""
    try:
        return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)
    except re.error as error:
        raise ValueError(f"{CONFIG_FILE} has a pattern that is no regular expression: {error}") from error
