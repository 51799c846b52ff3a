"""mixed_qkv on the CPU by the compiled extension: the launcher of back-end "cpp".

Shapes: M rows, D width, E size of a head, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x_MD: Tensor, *arguments: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [M, H, E]; arguments and result are those of `mixed_qkv_reference.forward`."""
    return torch.ops.clp.mixed_qkv_cpu_fwd(x_MD, *arguments)
