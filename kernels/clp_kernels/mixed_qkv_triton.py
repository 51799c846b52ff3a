"""Launcher of the Triton kernel of `mixed_qkv`.

Legend: M rows, D width, E size of a head, H heads, K copies, S distinct weightings.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from clp_kernels.launch_triton import Tile, check_tensors, dot_precision, on_device
from clp_kernels.mixed_qkv_triton_kernels import mixed_qkv_kernel


def select_qkv_tile(
    num_rows: int, x: torch.dtype, is_wide: bool, half: int, has_norms: bool, batch_invariant: bool
) -> Tile:
    """Chooses the tile: rows, pairs of outputs (`outs`) and reduced elements of a program.

    Args:
        num_rows: M.
        x: Dtype of x.
        is_wide: Whether an operand of the products is float32.
        half: Pairs of a head. A norm of heads needs all of a head in one program; else few of them give more programs,
            of which a decode step has too few to read memory at its rate.
        has_norms: Whether heads are normalised.
        batch_invariant: One tile for any number of rows.

    Returns:
        The tile; what spills of those for heads of up to 128 is in tests/clp_kernels/aot_known.json.
    """
    outs = max(16, triton.next_power_of_2(half)) if has_norms else 16
    if x == torch.float32 and has_norms:
        return Tile(rows=16, outs=outs, reduced=16, num_warps=8 if outs >= 64 else 4, num_stages=3)
    if x == torch.float32:
        return Tile(rows=16, outs=outs, reduced=32, num_warps=8, num_stages=2)
    num_warps = 8 if outs >= 64 else 4
    if is_wide:
        return Tile(rows=16, outs=outs, reduced=32, num_warps=num_warps, num_stages=3)
    rows = 16 if num_rows <= 16 and not batch_invariant else 32
    return Tile(rows=rows, outs=outs, reduced=64, num_warps=num_warps, num_stages=3)


def forward(
    x_MD: Tensor,
    norm_weight_D: Tensor,
    q_base_ND: Tensor,
    q_deltas_NKD: Tensor,
    q_bias_N: Tensor | None,
    q_bias_deltas_NK: Tensor | None,
    k_base_ND: Tensor,
    k_deltas_NKD: Tensor,
    k_bias_N: Tensor | None,
    k_bias_deltas_NK: Tensor | None,
    v_base_ND: Tensor,
    v_deltas_NKD: Tensor,
    v_bias_N: Tensor | None,
    v_bias_deltas_NK: Tensor | None,
    c_SK: Tensor,
    row_map_M: Tensor,
    cos_ME: Tensor,
    sin_ME: Tensor,
    q_norm_E: Tensor | None,
    k_norm_E: Tensor | None,
    eps: float,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes queries, keys and values [M, H, E]; arguments and result are those of `mixed_qkv_reference.forward`.

    Deterministic and without atomics. Weights that are not contiguous are copied first.

    Raises:
        ValueError: A dtype or device that the kernel does not take.
    """
    weights = {
        "q": (q_base_ND, q_deltas_NKD, q_bias_N, q_bias_deltas_NK),
        "k": (k_base_ND, k_deltas_NKD, k_bias_N, k_bias_deltas_NK),
        "v": (v_base_ND, v_deltas_NKD, v_bias_N, v_bias_deltas_NK),
    }
    bases = {f"{name}.base": tensors[0] for name, tensors in weights.items()}
    deltas = {f"{name}.deltas": tensors[1] for name, tensors in weights.items()}
    check_tensors({"x": x_MD, "norm_weight": norm_weight_D, **bases, **deltas})
    (M, D), E, K = x_MD.shape, cos_ME.shape[1], c_SK.shape[1]
    num_heads = [tensors[1].shape[0] // E for tensors in weights.values()]
    outs = [x_MD.new_empty(M, H, E) for H in num_heads]
    if M and sum(num_heads):
        has_norms = q_norm_E is not None or k_norm_E is not None
        is_wide = any(t.dtype == torch.float32 for t in (x_MD, *bases.values(), *deltas.values()))
        tile = select_qkv_tile(M, x_MD.dtype, is_wide, E // 2, has_norms, batch_invariant)
        tensors = (x_MD, norm_weight_D, *weights["q"], *weights["k"], *weights["v"], c_SK, row_map_M, cos_ME, sin_ME)
        grid = (triton.cdiv(M, tile.rows), sum(num_heads), triton.cdiv(E // 2, tile.outs))
        with on_device(x_MD):
            mixed_qkv_kernel[grid](
                *(None if t is None else t.contiguous() for t in (*tensors, q_norm_E, k_norm_E)),
                *outs,
                *(M, D, K, *num_heads, E // 2, eps),
                **_constants(x_MD.dtype, weights, (q_norm_E, k_norm_E), tile),
            )
    return outs[0], outs[1], outs[2]


def _constants(
    dtype: torch.dtype,
    weights: dict[str, tuple[Tensor, Tensor, Tensor | None, Tensor | None]],
    norms: tuple[Tensor | None, Tensor | None],
    tile: Tile,
) -> dict[str, Any]:
    constants: dict[str, Any] = {}
    for name, (base, deltas, bias, bias_deltas) in weights.items():
        letter = name.upper()
        constants |= {
            f"HAS_{letter}_BIAS": bias is not None,
            f"HAS_{letter}_BIAS_DELTAS": bias_deltas is not None,
            f"{letter}_BASE_PRECISION": dot_precision(dtype, torch.promote_types(dtype, base.dtype)),
            f"{letter}_DELTAS_PRECISION": dot_precision(dtype, torch.promote_types(dtype, deltas.dtype)),
        }
    return {
        **constants,
        "HAS_Q_NORM": norms[0] is not None,
        "HAS_K_NORM": norms[1] is not None,
        "BLOCK_M": tile.rows,
        "BLOCK_O": tile.outs,
        "BLOCK_R": tile.reduced,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
