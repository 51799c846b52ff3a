"""The public mixed_embedding: an embedding whose rows are a base plus a per-position weighted sum of K deltas.

Shapes: M token positions, V vocabulary, D width, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.arguments import check_main_grad
from clp_kernels.mixed_embedding_arguments import flatten_positions
from clp_kernels.mixed_embedding_ops import mixed_embedding_fwd_op, mixed_embedding_op
from clp_kernels.select import OperatorCall, resolve


def mixed_embedding(
    ids: Tensor,
    base: Tensor | None,
    deltas: Tensor,
    coefficients: Tensor,
    *,
    row_map: Tensor | None = None,
    padding_idx: int | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Look up token ids in an embedding under each position's own mix of K deltas over a frozen base.

    y = F.embedding(ids, base + einsum("k,vkd->vd", c, deltas), padding_idx)  # c: the position's coefficients

    A factor that a model multiplies its embeddings with (Gemma's) is not in it.

    Args:
        ids: int64 or int32 of any shape, each in [0, V).
        base: [V, D], or None for an embedding that is the mix of its copies alone. float32, bfloat16 or float16.
            Autocast casts nothing here. float64 (every argument then) runs on the reference back-end.
        deltas: [V, K, D], the base's dtype, or float32 over a 16-bit base. With a `main_grad`, to which
            the backward adds their gradient, as in `mixed_linear`: it then touches rows of the ids that occur alone.
            Back-end "cpp" copies base and deltas that are not contiguous in each call.
        coefficients: float32. [K], or one row per leading index of ids: [B, K], [B, T, K]; their leading sizes are a
            prefix of ids.shape. With `row_map`: [S, K]. The C++ and Triton back-ends do not read a copy whose
            coefficient is 0.
        row_map: int32 of ids' shape, row of `coefficients` for each position; an expanded view will do.
        padding_idx: an id whose positions add nothing to the gradients of base and deltas; negative counts from V.
        backend: "reference", "cpp", "triton" or "auto"; None takes the surrounding `backend(...)` block's, else "auto".
            "cuda" has no form of this operator.
        batch_invariant: True refuses the reference back-end, whose bits may depend on the shape of the call; by the
            others a row's are the same whatever else is in the batch, asked for or not.

    Returns:
        [..., D] in the base's dtype (in the deltas' where base is None), added in float32. Gradients for base, deltas
        and coefficients, dense, each in its dtype, reduced in float32; by the C++ back-end the same bits for any number
        of threads, by the Triton back-end the same bits on every run.

    Raises:
        ValueError: an argument that does not fit, by name, with the remedy; a back-end that does not take such ones.
        IndexError: an id outside [0, V). On a GPU: a device-side assertion.
        RuntimeError: a back-end asked for by name that this process lacks.

    Reference: arXiv 2407.15762, section 3 (parameter averaging; here of differences to the reference model).
    """
    p = flatten_positions(ids, base, deltas, coefficients, row_map, padding_idx)
    dtypes = {"deltas": deltas.dtype} if base is None else {"base": base.dtype, "deltas": deltas.dtype}
    name = resolve(backend, OperatorCall("mixed_embedding", ids.device.type, dtypes, batch_invariant))
    tensors = (base, deltas, coefficients)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    arguments = (p.ids_M, base, deltas, p.c_SK, p.row_map_M)
    # An op with an autograd key, or with a Python kernel, costs more a call than the compiled one; see mixed_linear.
    if needs_grad:
        y_MD = mixed_embedding_op(*arguments, p.padding_idx, name, check_main_grad(deltas))
    elif name == "cpp":
        y_MD = torch.ops.clp.mixed_embedding_cpu_fwd.default(*arguments)
    else:
        y_MD = mixed_embedding_fwd_op(*arguments, name)
    return y_MD.view(*ids.shape, deltas.shape[2])
