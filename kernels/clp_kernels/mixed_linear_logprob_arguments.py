"""What every level of mixed_linear_logprob passes on: the head's parameters, how logits are made, which gradients.

Shapes: M rows, D in, V vocabulary, K copies, S distinct weightings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """A head and the weighting of each row: base_VD or None, deltas_VKD, c_SK, row_map_M, bias_V, bias_deltas_VK."""

    base: Tensor | None
    deltas: Tensor
    c: Tensor
    row_map: Tensor
    bias: Tensor | None
    bias_deltas: Tensor | None

    def columns(self, begin: int, end: int) -> Head:
        """Return the head of the tokens [begin, end) alone: views."""
        base, bias, bias_deltas = (
            None if t is None else t[begin:end] for t in (self.base, self.bias, self.bias_deltas)
        )
        return Head(base, self.deltas[begin:end], self.c, self.row_map, bias, bias_deltas)


class Targets(NamedTuple):
    """The token of each row, ids_M int64, and the id that means "no token": such rows give 0 and no gradient."""

    ids: Tensor
    ignore_index: int


class Logits(NamedTuple):
    """How logits are made of the head's output y: capped(logit_scale * y) / temperature."""

    temperature: float
    logit_scale: float
    softcap: float | None


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for."""

    hidden: bool
    base: bool
    deltas: bool
    c: bool
    bias: bool
    bias_deltas: bool


def check_targets(hidden: Tensor, targets: Tensor) -> None:
    """Check dtype, shape and device of `targets` beside `hidden` [..., D].

    Raises:
        ValueError: one that does not fit, by name.
    """
    rows = list(hidden.shape[:-1])
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets are {targets.dtype}, must be torch.int64 or torch.int32: targets.long()")
    if list(targets.shape) != rows:
        raise ValueError(f"targets must be {rows}, hidden without its last size, got {list(targets.shape)}")
    if targets.device != hidden.device:
        raise ValueError(f"targets are on {targets.device}, hidden on {hidden.device}; move one with .to(device)")


def check_logits(logits: Logits) -> None:
    """Check the numbers that make logits.

    Raises:
        ValueError: a temperature or softcap that is not positive.
    """
    if not logits.temperature > 0.0:
        raise ValueError(
            f"temperature must be > 0, got {logits.temperature}; greedy decoding has no log-probs to ask for"
        )
    if logits.softcap is not None and not logits.softcap > 0.0:
        raise ValueError(f"softcap must be > 0, got {logits.softcap}; None leaves logits uncapped")


def check_range(targets: Targets, V: int) -> None:
    """Check on the CPU, where reading values is free, that every target is ignored or in [0, V).

    Raises:
        ValueError: the first target that is neither.
    """
    ids = targets.ids
    if ids.device.type != "cpu":
        return
    is_bad = ((ids < 0) | (ids >= V)) & (ids != targets.ignore_index)
    if is_bad.any():
        row = int(is_bad.nonzero()[0, 0])
        raise ValueError(
            f"targets hold {int(ids[row])} (row {row}), outside [0, {V}), the head's vocabulary; mark positions "
            f"without a target by ignore_index = {targets.ignore_index}"
        )
