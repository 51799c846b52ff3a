"""Fine-tunes of one base as the copies of a conditioned model: Rewarded Soups (arXiv 2306.04488) without training.

Delta_k = finetuned_k - base              for every parameter that differs in one of them
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clp_engine.config import CLPConfig
from clp_engine.layers import conditioned_layers
from clp_engine.layers.linear import is_linear, is_transposed
from clp_engine.model import get_clp_model
from clp_engine.pretrained import load_plain_model


@torch.no_grad()
def from_finetuned(base: Any, finetuned: Mapping[str, Any], **kwargs: Any) -> Any:
    """A conditioned model whose copies are fine-tunes of `base`; see `CLPModel.from_finetuned`."""
    config = CLPConfig(rewards=list(finetuned))
    plain = load_plain_model(base, **kwargs)
    deltas: dict[str, dict[str, torch.Tensor]] = {}
    for reward, source in finetuned.items():
        # One fine-tune in memory at a time, in the precision that it is stored in.
        for name, delta in _differences(plain, load_plain_model(source), reward).items():
            deltas.setdefault(name, {})[reward] = delta
    model = get_clp_model(plain, dataclasses.replace(config, **_choice(plain, deltas)))
    _fill(model, deltas)
    return model.eval()


def _differences(base: nn.Module, tuned: nn.Module, reward: str) -> dict[str, torch.Tensor]:
    """What to add to the parameters of `base` to get `tuned`'s, float32 or wider; a tied one by its first name.

    Raises:
        ValueError: the two have not the same tensors, or the same values in all of them.
        NotImplementedError: a buffer or a quantised weight differs.
    """
    own, others = base.state_dict(), tuned.state_dict()
    _check_same_tensors(own, others, reward)
    parameters = dict(base.named_parameters(remove_duplicate=False))
    first_names: dict[int, str] = {}
    deltas = {}
    for name, value in own.items():
        other = others[name].to(value.device)
        first = first_names.setdefault(id(parameters[name]), name) if name in parameters else name
        if first != name:
            if not torch.equal(others[name], others[first]):
                raise ValueError(
                    f"{name} and {first} are one tied parameter in the base, two in the fine-tune of {reward!r}: "
                    "untie the base's first"
                )
            continue
        dtype = torch.promote_types(torch.promote_types(value.dtype, other.dtype), torch.float32)
        delta = other.to(dtype) - value.to(dtype)
        if not delta.count_nonzero():
            continue
        if name not in parameters or not value.is_floating_point():
            raise NotImplementedError(
                f"{name} ({value.dtype}) differs in the fine-tune of {reward!r}: only floating-point parameters carry "
                "copies, not buffers or quantised weights"
            )
        if not delta.isfinite().all():
            raise ValueError(f"{name} of the fine-tune of {reward!r}, or of the base, holds values that are not finite")
        deltas[name] = delta
    if not deltas:
        raise ValueError(f"the fine-tune of {reward!r} equals the base in every parameter: is it the right one?")
    return deltas


def _check_same_tensors(own: dict[str, torch.Tensor], others: dict[str, torch.Tensor], reward: str) -> None:
    what = f"the fine-tune of {reward!r}"
    if missing := sorted(set(own) - set(others)):
        raise ValueError(f"{what} lacks {len(missing)} tensors of the base, the first is {missing[0]}")
    if extra := sorted(set(others) - set(own)):
        raise ValueError(f"{what} holds {len(extra)} tensors that the base has not, the first is {extra[0]}")
    for name, value in own.items():
        if value.shape != others[name].shape:
            shapes = f"{list(others[name].shape)} in {what}, {list(value.shape)} in the base"
            raise ValueError(f"{name} is {shapes}: both must be one architecture with one vocabulary")


def _choice(base: nn.Module, deltas: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields that condition what differs: those modules alone, or all where a linear layer's bias does.

    Raises:
        NotImplementedError: a parameter that carries no copies.
    """
    parameters = dict(base.named_parameters(remove_duplicate=False))
    changed = {id(parameters[name]) for name in deltas}
    paths = []
    for name, parameter in parameters.items():
        if id(parameter) not in changed:
            continue
        path, _, leaf = name.rpartition(".")
        if not path or leaf not in ("weight", "bias"):
            raise NotImplementedError(
                f"{name} {list(parameter.shape)} differs between the base and its fine-tunes: copies are built for the "
                "weights and biases of linear layers, embeddings and norms"
            )
        if leaf == "bias" and is_linear(base.get_submodule(path)):
            return {"variant": "full"}
        paths.append(path)
    return {"variant": None, "target_modules": list(dict.fromkeys(paths))}


def _fill(model: nn.Module, deltas: dict[str, dict[str, torch.Tensor]]) -> None:
    """Move the differences into the copies, one parameter at a time."""
    layers = conditioned_layers(model)
    for name in list(deltas):
        path, _, leaf = name.rpartition(".")
        layer = layers[path]
        views = layer.copies()
        for reward, delta in deltas.pop(name).items():
            views[f"{leaf}.{reward}"].copy_(delta.T if leaf == "weight" and is_transposed(layer) else delta)
