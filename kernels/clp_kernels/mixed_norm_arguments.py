"""Checks of mixed_norm's arguments, and their normal form.

Shapes: M rows, D width, K copies, S distinct weightings.
"""

from __future__ import annotations

from torch import Tensor

from clp_kernels.arguments import Rows, check_floats, flatten_coefficients

KINDS = ("rms", "layer")


def flatten_norm_rows(
    x: Tensor,
    weight: Tensor | None,
    weight_deltas: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    bias_deltas: Tensor | None,
    row_map: Tensor | None,
    kind: str,
) -> Rows:
    """Check every argument of `mixed_norm` and return the row-wise ones in normal form.

    Raises:
        ValueError: a shape, dtype, device or kind that does not fit; the message names field, both numbers, remedy.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be 'rms' (RMSNorm) or 'layer' (LayerNorm), got {kind!r}")
    if weight_deltas.dim() != 2:
        raise ValueError(
            f"weight_deltas must be [D, K], got {list(weight_deltas.shape)}; one copy is weight_deltas[:, None]"
        )
    D, K = weight_deltas.shape
    if D < 1 or K < 1:
        raise ValueError(f"weight_deltas are {[D, K]}; D and the number of copies K must be at least 1")
    if x.dim() < 1 or x.shape[-1] != D:
        raise ValueError(f"x must be [..., D] with D = {D} as in weight_deltas {[D, K]}, got x {list(x.shape)}")
    for name, tensor, shape in (("weight", weight, (D,)), ("bias", bias, (D,)), ("bias_deltas", bias_deltas, (D, K))):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} to fit weight_deltas {[D, K]}, got {list(tensor.shape)}")
    floats = {"x": x, "weight": weight, "weight_deltas": weight_deltas, "bias": bias, "bias_deltas": bias_deltas}
    check_floats(floats, "x")
    c_SK, row_map_M = flatten_coefficients(coefficients, row_map, x.shape[:-1], K, like=x)
    x_MD = x if x.dim() == 2 else x.reshape(-1, D)
    return Rows(x_MD.contiguous(), c_SK, row_map_M)
