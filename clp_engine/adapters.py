"""PEFT LoRA adapters in and out of a conditioned model.

Legend: N out, D in, K copies, C coefficients, R ranks of a layer, r rank of an adapter.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clp_engine.config import CLPConfig
from clp_engine.layers import CLPLayer, DeltaLinear, LoRALinear, conditioned_layers
from clp_engine.layers.linear import features, is_linear, is_transposed
from clp_engine.layers.low_rank import LowRankLinear
from clp_engine.model import get_clp_model
from clp_engine.peft_folder import Adapter, ModuleAdapter, read_adapter, write_adapter
from clp_engine.pretrained import load_plain_model
from clp_engine.weighting import RewardWeights

logger = logging.getLogger(__name__)


def from_peft(base: Any, adapters: Mapping[str, str | Path], **kwargs: Any) -> Any:
    """A conditioned model whose copies are PEFT LoRA adapters; see `CLPModel.from_peft`."""
    config = CLPConfig(rewards=list(adapters))
    read = {reward: read_adapter(place) for reward, place in adapters.items()}
    plain = load_plain_model(base, **kwargs)
    modules = dict(plain.named_modules())
    for reward, adapter in read.items():
        _check_fits(reward, adapter, modules)
        own, recorded = plain.config._name_or_path, adapter.base_model_name_or_path
        if recorded and recorded != own:
            logger.warning("the adapter of %r was trained on %r, the base is %r", reward, recorded, own)
    config = dataclasses.replace(
        config,
        variant=None,
        target_modules=[path for path in modules if any(path in adapter.modules for adapter in read.values())],
        parameterization="lora",
        r={reward: adapter.rank for reward, adapter in read.items()},
        lora_alpha={reward: adapter.scaling * adapter.rank for reward, adapter in read.items()},
    )
    model = get_clp_model(plain, config)
    _fill(model, read)
    return model.eval()


@torch.no_grad()
def export_peft(
    model: Any,
    directory: str | Path,
    reward_weights: RewardWeights | None = None,
    kl_weight: float | None = None,
    rank: int | None = None,
) -> list[Path]:
    """Write PEFT LoRA adapters that `PeftModel.from_pretrained` puts on the plain base model.

    LoRA copies are written as they are. SVD and bilinear copies become the adapter of their one-hot weighting. A full
    delta is an exact adapter of rank min(N, D): the delta and an identity. One weighting's adapter is the copies'
    "cat" combination, scaled by the coefficients, and exact too. An adapter of a tied head is for use beside the base
    only: PEFT would merge it into the embedding as well (logged).

    Args:
        model: a conditioned model.
        directory: the adapter's folder; without `reward_weights` the parent of one folder per copy, by its name.
        reward_weights: a dict or [R]: one adapter for this weighting.
        kl_weight: alpha, beside `reward_weights`; None for the trained policy.
        rank: the largest rank to write: what exceeds it is truncated by SVD, and the relative error logged.

    Returns:
        The adapters' folders.

    Raises:
        NotImplementedError: a copy that no LoRA expresses (norm, embedding, bias, soft tokens), by path.
        ValueError: a weighting of a wrong name, length or value, or a folded model.
    """
    config = model.clp_config
    if config.folded is not None:
        raise ValueError(f"copy {config.folded!r} is folded into the base: export the model that it was folded from")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1")
    layers = {path: layer for path, layer in conditioned_layers(model).items() if layer.added}
    for path, layer in layers.items():
        _check_expressible(path, layer)
        if getattr(layer, "weight", None) is getattr(model.get_input_embeddings(), "weight", layer):
            logger.warning("%s is tied: PEFT's merge_and_unload would change the embedding too, collapse instead", path)
    task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    transposed = any(is_transposed(layer) for layer in layers.values())
    folders = []
    for name, c_C in _coefficients(model, reward_weights, kl_weight).items():
        folders.append(Path(directory) / name)
        modules = {path: _module_adapter(layer, name, c_C, config.num_copies) for path, layer in layers.items()}
        if rank is not None:
            modules = _truncated(modules, rank, folders[-1])
        write_adapter(folders[-1], Adapter(modules, model.config._name_or_path), task_type, transposed)
    return folders


def _check_fits(reward: str, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    what = f"the adapter of {reward!r}"
    for path, part in adapter.modules.items():
        if path not in modules:
            near = difflib.get_close_matches(path, modules, n=3)
            raise ValueError(f"{what} is for {path}, the base has no such module; near: {near}")
        if not is_linear(modules[path]):
            raise NotImplementedError(f"{what} is for {path}, a {type(modules[path]).__name__}: not a linear layer")
        (out, inner), (found_A, found_B) = features(modules[path]), (part.a_rD.shape, part.b_Nr.shape)
        if (found_B[0], found_A[1]) != (out, inner):
            raise ValueError(
                f"{what} has lora_A {list(found_A)} and lora_B {list(found_B)} for {path}, the base's layer takes "
                f"[r, {inner}] and [{out}, r]: it belongs to another model"
            )
    for path, found in adapter.base_weights.items():
        own = getattr(modules.get(path), "weight", torch.empty(0)).cpu().float()
        # Their precision may differ, their values may not.
        if own.shape != found.shape or not torch.allclose(own, found.float(), rtol=1e-2, atol=1e-5):
            raise ValueError(f"{what} holds the weight of {path} {list(found.shape)}, which is not the base's")


@torch.no_grad()
def _fill(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Copy the adapters in; zeros up to each one's largest rank, and where it has no such module.

    The model has one scaling per copy: a module of another one takes the quotient into its B.
    """
    for path, layer in conditioned_layers(model).items():
        views = layer.copies()
        for reward, adapter in adapters.items():
            a_rD, b_Nr = views[f"lora_A.{reward}"].zero_(), views[f"lora_B.{reward}"].zero_()
            if (part := adapter.modules.get(path)) is not None:
                a_rD[: part.rank] = part.a_rD.to(a_rD)
                b_Nr[:, : part.rank] = part.b_Nr.to(b_Nr) * (part.scaling / adapter.scaling)


def _check_expressible(path: str, layer: CLPLayer) -> None:
    if isinstance(layer, DeltaLinear) and layer.bias_deltas is not None:
        raise NotImplementedError(f"{path} has copies of its bias, which no LoRA expresses; {_COLLAPSE}")
    if not isinstance(layer, (LowRankLinear, DeltaLinear)):
        raise NotImplementedError(f"{path} ({layer.family.__name__}) has copies that no LoRA expresses; {_COLLAPSE}")


_COLLAPSE = "collapse the model at a weighting and export that instead"


def _coefficients(model: Any, reward_weights: RewardWeights | None, kl_weight: float | None) -> dict[str, torch.Tensor]:
    """Coefficients [C] of each adapter by its folder's name: each copy alone, or one weighting in "" itself."""
    config = model.clp_config
    if reward_weights is not None:
        return {"": model.coefficients(1, reward_weights, kl_weight)[0]}
    if kl_weight is not None:
        raise ValueError(f"kl_weight={kl_weight} is part of a weighting: give reward_weights with it")
    if odd := [name for name in config.copy_names if Path(name).name != name]:
        raise ValueError(f"copy {odd[0]!r} cannot name a folder: export it by its one-hot weighting")
    one_hot_KC = torch.eye(config.num_copies, config.num_coefficients)
    one_hot_KC[:, config.num_copies :] = 1  # lambda
    return dict(zip(config.copy_names, one_hot_KC, strict=True))


def _module_adapter(layer: Any, copy_name: str, c_C: torch.Tensor, num_copies: int) -> ModuleAdapter:
    """What the layer adds to its base under c_C, as one adapter; the LoRA copy of that name as it is."""
    c_K, lambda_1 = c_C[:num_copies], c_C[num_copies:]
    if isinstance(layer, DeltaLinear):
        return _full_rank(torch.einsum("k,nkd->nd", c_K.to(layer.deltas), layer.deltas))
    if isinstance(layer, LoRALinear) and copy_name:
        views, k = layer.copies(), layer.clp.copy_names.index(copy_name)
        return ModuleAdapter(views[f"lora_A.{copy_name}"], views[f"lora_B.{copy_name}"], layer.scalings[k])
    down_RD, up_NR = layer.factors()
    gates_R = layer.gates(c_K.to(down_RD)[None], lambda_1.to(down_RD)[None])[0]
    on = gates_R.nonzero().flatten() if gates_R.any() else torch.zeros(1, dtype=torch.long, device=gates_R.device)
    return ModuleAdapter(down_RD[on], up_NR[:, on] * gates_R[on], 1.0)


def _full_rank(delta_ND: torch.Tensor) -> ModuleAdapter:
    """The delta times an identity on its smaller side."""
    out, inner = delta_ND.shape
    identity = torch.eye(min(out, inner), dtype=delta_ND.dtype, device=delta_ND.device)
    return ModuleAdapter(identity, delta_ND, 1.0) if inner <= out else ModuleAdapter(delta_ND, identity, 1.0)


def _truncated(modules: dict[str, ModuleAdapter], rank: int, folder: Path) -> dict[str, ModuleAdapter]:
    """The nearest adapter of at most `rank` in each module; logs how far it is."""
    kept, lost, total = dict(modules), 0.0, 0.0
    for path, module in modules.items():
        if module.rank <= rank:
            continue
        u_NR, values_R, v_RD = torch.linalg.svd(module.scaling * module.b_Nr @ module.a_rD, full_matrices=False)
        root_r = values_R[:rank].sqrt()
        kept[path] = ModuleAdapter(root_r[:, None] * v_RD[:rank], u_NR[:, :rank] * root_r, 1.0)
        lost, total = lost + float(values_R[rank:].square().sum()), total + float(values_R.square().sum())
    if total > 0:
        error = (lost / total) ** 0.5
        logger.warning("%s: truncated to rank %d, relative error %.3g of the truncated deltas", folder, rank, error)
    return kept
