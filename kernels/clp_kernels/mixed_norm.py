"""The public mixed_norm: RMSNorm and LayerNorm whose scale and bias are a base plus a per-row weighted sum of K deltas.

Shapes: M rows, D width, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.mixed_norm_arguments import flatten_norm_rows
from clp_kernels.mixed_norm_ops import mixed_norm_fwd_op, mixed_norm_op
from clp_kernels.select import OperatorCall, resolve


def mixed_norm(
    x: Tensor,
    weight: Tensor | None,
    weight_deltas: Tensor,
    coefficients: Tensor,
    bias: Tensor | None = None,
    *,
    bias_deltas: Tensor | None = None,
    row_map: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "rms",
    offset: float = 0.0,
    cast_before_scale: bool = False,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Compute RMSNorm or LayerNorm under each row's own mix of K deltas of its scale and bias.

    y = F.rms_norm(x, (D,), weight + weight_deltas @ c, eps)  # c: the row's coefficients; kind="layer": F.layer_norm

    In full, y = norm(x.float()) * (offset + weight + weight_deltas @ c) + bias + bias_deltas @ c, in float32, rounded
    to x's dtype once, at the end: torch's F.rms_norm and F.layer_norm, transformers' Olmo2RMSNorm, Gemma4RMSNorm,
    CohereLayerNorm. `offset=1.0`: GemmaRMSNorm. `cast_before_scale=True`: LlamaRMSNorm (also Qwen's, Mistral's), and
    T5LayerNorm where x and weight share a dtype.

    Args:
        x: [..., D] float32, bfloat16 or float16, normalised over D; any strides. Autocast casts nothing here: norms
            keep the precision of what they are given. float64 (every argument then) runs on the reference back-end.
        weight: [D], or None for a scale that is the mix of its copies alone.
        weight_deltas: [D, K], any of the dtypes.
        coefficients: float32. [K], or one row per leading index of x: [B, K], [B, T, K]; their leading sizes are a
            prefix of x's. With `row_map`: [S, K].
        bias: [D] or None.
        bias_deltas: [D, K] or None; with or without `bias`.
        row_map: int32 of shape x.shape[:-1], row of `coefficients` for each row of x; an expanded view will do.
        eps: added to the mean square (to the variance), as the module does; LayerNorm's default is 1e-5.
        kind: "rms", or "layer", which takes the row's mean out too.
        offset: added to the mixed weight.
        cast_before_scale: round norm(x) to x's dtype before it is scaled. The result is rounded once after that, also
            where there is a bias. In bfloat16, a mix below 2**-9 beside a weight of exactly 1 then rounds back to none.
        backend: "reference", "cpp", "triton" or "auto"; None takes the surrounding `backend(...)` block's, else "auto".
            "cuda" has no form of this operator.
        batch_invariant: True refuses the reference back-end, whose bits may depend on the shape of the call; by the
            others a row's are the same whatever else is in the batch, asked for or not.

    Returns:
        x.shape in x's dtype. Gradients for every floating argument, in its dtype, reduced in float32; by the C++
        back-end the same bits for any number of threads, by the Triton back-end on every run. Saved for backward are
        references to the arguments alone.

    Raises:
        ValueError: an argument that does not fit, by name, with the remedy; a back-end that does not take such ones.
        RuntimeError: a back-end asked for by name that this process lacks.

    Reference: arXiv 2407.15762, section 3 (parameter averaging; here of differences to the reference model).
    """
    rows = flatten_norm_rows(x, weight, weight_deltas, coefficients, bias, bias_deltas, row_map, kind)
    parameters = {"x": x, "weight": weight, "weight_deltas": weight_deltas, "bias": bias, "bias_deltas": bias_deltas}
    dtypes = {field: tensor.dtype for field, tensor in parameters.items() if tensor is not None}
    name = resolve(backend, OperatorCall("mixed_norm", x.device.type, dtypes, batch_invariant))
    tensors = (x, weight, weight_deltas, coefficients, bias, bias_deltas)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    arguments = (rows.x_MD, weight, weight_deltas, rows.c_SK, rows.row_map_M, bias, bias_deltas)
    settings = (eps, kind == "layer", offset, cast_before_scale)
    # An op with an autograd key, or with a Python kernel, costs more a call than the compiled one; see mixed_linear.
    if needs_grad:
        y_MD = mixed_norm_op(*arguments, *settings, name)
    elif name == "cpp":
        y_MD = torch.ops.clp.mixed_norm_cpu_fwd.default(*arguments, *settings)
    else:
        y_MD = mixed_norm_fwd_op(*arguments, *settings, name)
    return y_MD.view(x.shape)
