"""What the launchers of several operators' Triton kernels share: checks, and the sum over a weighting's rows.

Shapes: M rows, K copies, S distinct weightings, P partial sums.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clp_kernels.mixed_linear_triton import DTYPES, INTERPRETED, on_device
from clp_kernels.mixed_linear_triton_kernels import weighting_sum_kernel


def check_tensors(tensors: Mapping[str, Tensor | None]) -> None:
    """Checks the dtype of every tensor and the device of the first.

    Args:
        tensors: Argument name -> tensor; None is skipped. On a GPU all are on one device, which the operators check.

    Raises:
        ValueError: A dtype or device that the kernels do not take, with the argument's name and the remedy.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"the Triton back-end takes float32, bfloat16 and float16, {name} is {tensor.dtype}")
        if INTERPRETED and tensor.dtype == torch.bfloat16:
            raise ValueError(
                f"Triton's interpreter multiplies bfloat16 as raw bits and rounds to it by cutting, {name} is "
                "torch.bfloat16: use float32 or float16 there"
            )
    name, first = next(iter(given.items()))
    if not INTERPRETED and first.device.type == "cpu":
        raise ValueError(
            f"the Triton back-end needs a GPU, {name} is on cpu: choose backend='cpp' or 'reference' "
            "(or set TRITON_INTERPRET=1 before triton is imported, for tests)"
        )


def sum_by_weighting(terms_PMK: Tensor, row_map_M: Tensor, S: int) -> Tensor:
    """Sums the terms of each weighting's rows, over partial sums and rows in a fixed order, without atomics.

    Equivalent torch: `zeros(S, K).index_add(0, row_map, terms.sum(0))`.

    Args:
        terms_PMK: float32, contiguous.
        row_map_M: int32, row -> weighting, values in [0, S).
        S: Number of weightings.

    Returns:
        [S, K] float32; zeros for a weighting without rows.
    """
    P, M, K = terms_PMK.shape
    sums_SK = terms_PMK.new_zeros(S, K)
    if terms_PMK.numel() == 0 or S == 0:
        return sums_SK
    with on_device(terms_PMK):
        weighting_sum_kernel[(S, K)](
            *(terms_PMK, row_map_M, sums_SK),
            *(M, P, K, terms_PMK.stride(0)),
            *row_map_M.stride(),
            BLOCK_M=128,
        )
    return sums_SK
