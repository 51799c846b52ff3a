"""mixed_norm on the CPU by the compiled extension: the launchers of back-end "cpp".

Shapes: M rows, D width, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x_MD: Tensor, *arguments: Tensor | float | None) -> Tensor:
    """Return y_MD in x's dtype; arguments and result are those of `mixed_norm_reference.forward`."""
    return torch.ops.clp.mixed_norm_cpu_fwd(x_MD, *arguments)


def backward(dy_MD: Tensor, *arguments: Tensor | float | None) -> tuple[Tensor | None, ...]:
    """Return the gradients that are asked for; arguments and result are those of `mixed_norm_reference.backward`."""
    needs = arguments[-6:]
    gradients = torch.ops.clp.mixed_norm_cpu_backward(dy_MD, *arguments)
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
