"""The public mixed_qkv: what attention does to its input before it attends, under each row's own mix of K deltas.

Shapes: M rows, D width, N outputs of a projection, H heads of size E, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.mixed_qkv_arguments import Projection, flatten_qkv
from clp_kernels.mixed_qkv_ops import compiled_op, mixed_qkv_op
from clp_kernels.select import CPP_DTYPES, OperatorCall, resolve, runs_compiled


def mixed_qkv(
    x: Tensor,
    norm_weight: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    coefficients: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    row_map: Tensor | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute rotated queries, rotated keys and values of a decode step, forward only.

    n = F.rms_norm(x, (D,), norm_weight, eps)
    query = rotate(F.rms_norm(mixed_linear(n, *q).unflatten(-1, (-1, E)), (E,), q_norm, eps), cos, sin)
    key likewise, value = mixed_linear(n, *v).unflatten(-1, (-1, E))  # rotate: transformers' apply_rotary_pos_emb

    What Llama, Mistral, Qwen2 and (with q_norm and k_norm) Qwen3 compute, for few rows: a GPU reads each weight once
    for each block of rows.

    Args:
        x: [..., D] float32, bfloat16 or float16: the input of the norm, the residual stream. float64 (every argument
            then) runs on the reference back-end. Autocast casts nothing here.
        norm_weight: [D]. As LlamaRMSNorm does, norm(x) is rounded to x's dtype before it is scaled.
        q: weights of the queries' layer, N a multiple of E.
        k: of the keys'.
        v: of the values'.
        coefficients: float32, as `mixed_linear` takes them.
        cos: [..., E], its leading sizes those of x; or the last of them, behind sizes of 1, for one table for all
            sequences. Any of the dtypes. E, the size of a head, is even.
        sin: like cos.
        q_norm: [E], the scale of each query head's RMSNorm; None for none.
        k_norm: the same for keys.
        eps: added to the mean square in each of the norms.
        row_map: int32 of shape x.shape[:-1], row of `coefficients` for each row of x; an expanded view will do.
        backend: "reference", "cpp", "triton" or "auto"; None takes the surrounding `backend(...)` block's, else "auto".
        batch_invariant: True gives a row the same bits whatever else is in the batch. The reference refuses it.

    Returns:
        query [..., H_q, E], key [..., H_k, E] and value [..., H_k, E] in x's dtype. The products accumulate in float32;
        they and norm(x) are rounded to x's dtype as the separate layers round them, or less often.

    Raises:
        ValueError: an argument that does not fit, by name, with the remedy; a back-end that does not take such ones.
        RuntimeError: a back-end asked for by name that this process lacks.
        NotImplementedError: a gradient is needed.

    Reference: arXiv 2407.15762, section 3 (parameter averaging; here of differences to the reference model).
    """
    if torch.is_grad_enabled():
        _refuse_gradients(x, norm_weight, *q, *k, *v, coefficients, q_norm, k_norm)
    if row_map is not None and x.dtype in CPP_DTYPES and runs_compiled(x, backend):
        try:
            return compiled_op(
                x, norm_weight, *q, *k, *v, coefficients, row_map, cos, sin, q_norm, k_norm, eps, batch_invariant
            )
        except RuntimeError:
            pass  # the long way names what it does not take, or gives the call to another back-end
    projections = {"q": q, "k": k, "v": v}
    rows = flatten_qkv(x, norm_weight, projections, coefficients, cos, sin, q_norm, k_norm, row_map)
    tensors = {"x": x, "norm_weight": norm_weight, "cos": cos, "q_norm": q_norm, "k_norm": k_norm}
    for name, projection in projections.items():
        tensors |= {f"{name}.{field}": tensor for field, tensor in projection._asdict().items()}
    dtypes = {field: tensor.dtype for field, tensor in tensors.items() if tensor is not None}
    name = resolve(backend, OperatorCall("mixed_qkv", x.device.type, dtypes, batch_invariant))
    heads = mixed_qkv_op(
        *(rows.x_MD, norm_weight, *q, *k, *v, rows.c_SK, rows.row_map_M, rows.cos_ME, rows.sin_ME, q_norm, k_norm),
        *(eps, batch_invariant, name),
    )
    query, key, value = (t.view(*x.shape[:-1], *t.shape[1:]) for t in heads)
    return query, key, value


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(
            "mixed_qkv has no gradient: call it under torch.no_grad(), or call mixed_qkv_ref, or mixed_linear for each "
            "of the three layers"
        )
