"""Ordinary models out of a conditioned one: collapsed at one weighting, or folded into one delta less.

Legend: K copies, C coefficients.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from clp_engine.layers import CLPLayer, conditioned_layers, release, widened
from clp_engine.layers.conditioned import FrontedModule
from clp_engine.layers.linear import contiguous_rows


@torch.no_grad()
def collapse(model: Any, c_C: torch.Tensor) -> Any:
    """A new plain model whose parameters are those of `model` under coefficients c_C; see `CLPModel.collapse`."""
    twin = _copy_without_copies(model)
    layers = conditioned_layers(twin)
    c_K, lambda_1 = c_C.split([model.clp_config.num_copies, len(c_C) - model.clp_config.num_copies])
    values = {path: x.collapsed(lambda_1 if x.clp.shared else c_K, lambda_1) for path, x in layers.items()}
    owners = _owners(twin)
    untied = _assign(layers, values, owners)
    for module in list(twin.modules()):
        if isinstance(module, FrontedModule):
            release(module)
    twin.__class__ = model.base_class
    for name in model.own_attributes():
        delattr(twin, name)
    if "_old_forward" in vars(twin):  # accelerate's hook runs it in the forward's place
        twin._old_forward = type(twin).forward.__get__(twin)
        functools.update_wrapper(twin.forward, twin._old_forward)
    if untied:
        twin.config.tie_word_embeddings = False
    if any(getattr(module, "gradient_checkpointing", False) for module in twin.modules()):
        twin.gradient_checkpointing_disable()
    for module in twin.modules():
        vars(module).pop("_gradient_checkpointing_func", None)  # ours
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is contiguous_rows]:
            del module._forward_pre_hooks[key]
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return twin.eval()


@torch.no_grad()
def fold(model: Any) -> Any:
    """The same policy on the simplex with one copy less; see `CLPModel.fold`."""
    *kept, last = copy_names = model.clp_config.copy_names
    if model.clp_config.folded is not None:
        raise ValueError(f"copy {model.clp_config.folded!r} is folded into this model already")
    if model.clp_config.parameterization != "delta" or model.clp_config.has_shared or len(copy_names) < 2:
        raise NotImplementedError(
            f"fold takes full deltas of two or more copies without shared parts, this model has {len(copy_names)} of "
            f'parameterization "{model.clp_config.parameterization}"'
        )
    if model.clp_config.copies is not None or model.clp_config.weight_domain != "simplex":
        raise ValueError("fold needs copies that are weighted on the simplex: sum_k w_k = 1 makes it exact")
    twin = copy.deepcopy(model)
    only_last = torch.eye(len(copy_names))[-1]
    layers = conditioned_layers(twin)
    values = {path: layer.collapsed(only_last, only_last) for path, layer in layers.items()}
    if _assign(layers, values, _owners(twin)):
        twin.config.tie_word_embeddings = False
    done: set[int] = set()
    for layer in layers.values():
        for parameter in layer.added_parameters().values():
            if id(parameter) not in done:
                # [N, K, D] of linear layers and embeddings, [D, K] of norms and biases: copies are dim 1.
                wide = widened(parameter)
                parameter.data = (wide[:, :-1] - wide[:, -1:]).to(parameter.dtype).contiguous()
                done.add(id(parameter))
        layer.clp = dataclasses.replace(layer.clp, copy_names=tuple(kept))
    copies = {name: {name: 1.0} for name in kept}
    twin.clp_config = dataclasses.replace(model.clp_config, copies=copies, folded=last)
    return twin


def _copy_without_copies(model: Any) -> Any:
    """A deep copy of the plain model inside: what conditioning added is shared with `model`, not copied."""
    layers = conditioned_layers(model).values()
    memo = {id(p): p for layer in layers for p in layer.added_parameters().values()}
    return copy.deepcopy(model, memo)


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold each parameter, by the parameter's id: more than one where it is tied."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return owners


def _assign(
    layers: dict[str, CLPLayer], values: dict[str, dict[str, torch.Tensor]], owners: dict[int, list[nn.Module]]
) -> bool:
    """Put new values into the layers' own parameters; whether a tied one had to be split.

    A tied parameter stays tied where all its owners have the same copies of it.
    """
    split = False
    for path, layer in layers.items():
        deltas = layer._parameters.get("deltas")
        for name, value in values[path].items():
            parameter: nn.Parameter = getattr(layer, name)
            users = owners[id(parameter)]
            alike = deltas is not None and all(user._parameters.get("deltas") is deltas for user in users)
            if len(users) == 1 or alike:
                parameter.data = value
            else:
                setattr(layer, name, nn.Parameter(value))
                split = True
    return split
