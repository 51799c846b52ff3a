"""What launchers of Triton kernels share: tiles, precisions, checks, arguments of a product, the sum over weightings.

Legend: M rows, D in, N out, K copies, S distinct weightings, P partial sums; R the reduced and O the output dimension
of one product.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.runtime.errors
from torch import Tensor

from clp_kernels.launch_configs import Tile, choose
from clp_kernels.mixed_linear_triton_kernels import mixed_product_tile, weighting_sum_kernel

# Triton chooses its CPU interpreter where a kernel is decorated (TRITON_INTERPRET=1 at the first import), for good.
INTERPRETED = not isinstance(mixed_product_tile, triton.JITFunction)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# What a candidate of `tuning` may fail by: it wants more of the chip than there is, or does not compile.
LAUNCH_ERROR = triton.runtime.errors.TritonError


def choose_tile(
    kernel: str,
    rows: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    sizes: tuple[int, int, int],
    heuristic: Callable[[], Tile],
    batch_invariant: bool = False,
) -> Tile:
    """Chooses the tile of a launch as `launch_configs.choose`; tables hold for a base in the rows' dtype, or none."""
    if base is not None and base.dtype != rows.dtype:
        return heuristic()
    return choose(kernel, rows, deltas, sizes, heuristic, batch_invariant=batch_invariant)


def select_product_tile(num_rows: int, dtype: torch.dtype, batch_invariant: bool = False) -> Tile:
    """Chooses the tile of x W^T or dy W from the number of rows and the dtype of the rows alone.

    Args:
        num_rows: M, at least 1.
        dtype: Dtype of x; float32 takes smaller tiles because its IEEE products run on the scalar units.
        batch_invariant: One tile for any number of rows: the reduced block sets the order of a row's sum.

    Returns:
        The tile; where a launch with it spills registers is in tests/clp_kernels/aot_known.json.
    """
    if batch_invariant:
        num_rows = 128
    if num_rows <= 16:
        reduced = 32 if dtype == torch.float32 else 64
        return Tile(rows=16, outs=32, reduced=reduced, num_warps=4, num_stages=4)
    if dtype == torch.float32:
        return Tile(rows=32, outs=64, reduced=32, num_warps=4, num_stages=3)
    if num_rows <= 128:
        return Tile(rows=32, outs=64, reduced=64, num_warps=4, num_stages=3)
    return Tile(rows=64, outs=128, reduced=64, num_warps=8, num_stages=3)


def select_gradient_tile(dtype: torch.dtype) -> Tile:
    """Chooses the tile of d_deltas (outs = rows of the tile's N, reduced = its D) and of the coefficients' gradient."""
    if dtype == torch.float32:
        return Tile(rows=32, outs=32, reduced=64, num_warps=4, num_stages=3)
    return Tile(rows=32, outs=64, reduced=64, num_warps=4, num_stages=3)


def dot_precision(rows: torch.dtype, operands: torch.dtype) -> str:
    """Names tl.dot's input precision for rows of one dtype where both its operands fit into another.

    A float32 weight beside 16-bit rows goes through TF32, which holds the rows exactly; float32 beside float32 is IEEE
    unless `torch.backends.cuda.matmul` allows TF32 (`allow_tf32 = True` or `fp32_precision = "tf32"`).
    """
    if rows != operands and rows != torch.float32:
        return "tf32"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


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


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the device of `tensor` the one that Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def product_arguments(
    a_MR: torch.Tensor,
    base: torch.Tensor | None,
    deltas: torch.Tensor,
    c_SK: torch.Tensor,
    row_map_M: torch.Tensor,
    bias_N: torch.Tensor | None,
    bias_deltas_NK: torch.Tensor | None,
    *,
    base_strides: tuple[int, ...],
    deltas_strides: tuple[int, ...],
    tile: Tile,
    rows_dtype: torch.dtype,
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...], dict[str, Any]]:
    """Returns what a kernel around `mixed_product_tile` is launched with: its tensors, their strides, its constants.

    The strides of base come as (output, reduced), those of the deltas as (output, copy, reduced). `rows_dtype` is that
    of x, which a_MR may be wider than.
    """
    tensors = (a_MR, base, deltas, c_SK, row_map_M, bias_N, bias_deltas_NK)
    bias_strides = (
        *((0,) if bias_N is None else bias_N.stride()),
        *((0, 0) if bias_deltas_NK is None else bias_deltas_NK.stride()),
    )
    strides = (*a_MR.stride(), *base_strides, *deltas_strides, *c_SK.stride(), *row_map_M.stride(), *bias_strides)
    base_dtype, deltas_dtype = (
        a_MR.dtype if stream is None else torch.promote_types(a_MR.dtype, stream.dtype) for stream in (base, deltas)
    )
    constants = {
        "HAS_BASE": base is not None,
        "HAS_BIAS": bias_N is not None,
        "HAS_BIAS_DELTAS": bias_deltas_NK is not None,
        "BASE_PRECISION": dot_precision(rows_dtype, base_dtype),
        "DELTAS_PRECISION": dot_precision(rows_dtype, deltas_dtype),
        "BLOCK_M": tile.rows,
        "BLOCK_O": tile.outs,
        "BLOCK_R": tile.reduced,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return tensors, strides, constants


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
