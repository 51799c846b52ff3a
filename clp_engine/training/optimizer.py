"""Padam: Adam whose second moment counts in part, for gradients that are mostly noise.

Legend: N, K, D as in mixed_linear (a copy of a parameter is one k of [N, K, D]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Padam(torch.optim.Optimizer):
    """Partially adaptive Adam (Chen et al. 2018, arXiv 1806.06763), in Adam's scale, each copy by itself.

    With m and v Adam's bias-corrected moments and v_k the mean of v over copy k of a parameter:

        p -= lr * (m / (v**power * v_k**(1/2 - power)) + weight_decay * p)

    Power 1/2 is AdamW (with eps inside the root). Power 0 is momentum whose step has the size of AdamW's, copy by copy:
    each entry moves by its share of the gradient, so that the many whose gradient is noise alone move little. AdamW
    moves all of them alike, and a policy gradient of a few dozen samples then drifts from the reference. At power 1/4
    `lr` wants to be about half of AdamW's.

    The original has v**power alone and so a learning rate in other units; it keeps the largest v seen, which this does
    not.

    Args:
        params: parameters [N, K, D] with copies along the second axis; of another number of axes, one copy.
        lr: step size.
        betas: decay of the moments.
        eps: added to v.
        weight_decay: decoupled, as AdamW's.
        power: in [0, 1/2].

    Raises:
        ValueError: `power`, `lr` or a beta out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-24,
        weight_decay: float = 0.0,
        power: float = 0.25,
    ) -> None:
        if not 0.0 <= power <= 0.5:
            raise ValueError(f"power is {power}, it must lie in [0, 0.5]: 0.5 is Adam, 0 momentum alone")
        if not lr >= 0.0:
            raise ValueError(f"lr is {lr}, it must not be negative")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas are {betas}, each must lie in [0, 1)")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "power": power}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient; `closure`, where given, is run first and its result returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        step, (beta1, beta2), power = state["step"].item(), group["betas"], group["power"]
        moment, square = state["exp_avg"], state["exp_avg_sq"]
        moment.lerp_(parameter.grad, 1 - beta1)
        square.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        v = square / (1 - beta2**step) + group["eps"]
        axes = (0, 2) if parameter.ndim == 3 else tuple(range(parameter.ndim))
        size = v.mean(dim=axes, keepdim=True).pow_(0.5 - power) if axes else v.pow(0.5 - power)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(moment, v.pow_(power).mul_(size), value=-group["lr"] / (1 - beta1**step))
