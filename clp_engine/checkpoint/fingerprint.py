"""Fingerprint of a base model: says whether copies were trained on this one, without storing it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from clp_engine.layers import conditioned_layers

SCHEME = "v2"
_SAMPLES = 1024
_VERSION_1_VALUES = 64


def base_fingerprint(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None, scheme: str = SCHEME
) -> str:
    """SHA-256 of the base model's parameter names, shapes and a sample of each one's values in bfloat16.

    `model` may be plain or conditioned: what conditioning added is left out. Device and tying do not matter, nor does
    the dtype as long as the values round to the same bfloat16: float32 weights and the same in bfloat16 agree, float16
    agrees with what was loaded from float16, not with float32 weights rounded to it.

    Scheme "v2" samples 1024 values of each parameter, one of every block of 1/1024 of it, at a place that moves through
    the block: another checkpoint, a fine-tune, another seed, a resized or renamed parameter all change it. It does not
    see a change of few values between the sampled ones (some rows of an embedding), nor one below bfloat16's rounding;
    it is no protection against somebody who wants two models to agree. Scheme "v1" (format version 1) reads each
    parameter's first 64 values.

    Args:
        model: the model.
        state_dict: tensors to read instead of the model's own where it has them (gathered from shards).
        scheme: "v1" or "v2".

    Returns:
        The scheme, a colon and the hash in hexadecimal.
    """
    sample = {"v1": _first, "v2": _spread}[scheme]
    digest = hashlib.sha256()
    for name, parameter in sorted(_base_parameters(model).items()):
        tensor = parameter if state_dict is None else state_dict.get(name, parameter)
        values = sample(tensor.detach().flatten()).to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return f"{scheme}:{digest.hexdigest()}"


def base_dtype(model: nn.Module) -> str:
    """The precision of the base model's first floating-point parameter, as in "bfloat16"."""
    dtypes = [p.dtype for p in _base_parameters(model).values() if p.is_floating_point()]
    return str(dtypes[0]).removeprefix("torch.") if dtypes else "none"


def _base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base model's own parameters by name, without what conditioning added."""
    added = {f"{path}.{name}" for path, layer in conditioned_layers(model).items() for name in layer.added_parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if name not in added}


def _first(values: torch.Tensor) -> torch.Tensor:
    return values[:_VERSION_1_VALUES]


def _spread(values: torch.Tensor) -> torch.Tensor:
    block = max(1, -(-values.numel() // _SAMPLES))
    starts = torch.arange(0, values.numel(), block, device=values.device)
    # A fixed offset would read one column of a matrix whose row length divides the block. 7919 is prime.
    offsets = torch.arange(len(starts), device=values.device) * 7919 % block
    return values[(starts + offsets).clamp(max=max(0, values.numel() - 1))]
