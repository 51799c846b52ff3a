"""The public low_rank_linear: a linear layer beside all K low-rank adapters in one, gated per row and rank.

Shapes: M rows, D in, N out, R ranks (of all adapters together), S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.arguments import autocast, flatten_low_rank_rows
from clp_kernels.low_rank_linear_autograd import compiled_with_autograd
from clp_kernels.low_rank_linear_ops import compiled_op, low_rank_linear_fwd_op, low_rank_linear_op
from clp_kernels.select import OperatorCall, resolve, runs_compiled


def low_rank_linear(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    gates: Tensor,
    bias: Tensor | None = None,
    *,
    row_map: Tensor | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Compute a linear layer plus its low-rank adapters, every rank under the row's own gate.

    y = F.linear(x, base, bias) + ((x @ down.T) * gates) @ up.T  # gates: the row's own

    K LoRA adapters are one call: `down = cat(A_k)`, `up = cat(B_k, dim=1)`, a row's gates c_k * scaling_k, each
    repeated over adapter k's ranks. Panacea's shared singular values stand beside reward-scaled ones; PARM's bilinear
    form has gates from its mixing matrix. Gates may have any value. A gate of zero multiplies: it does not hide a NaN.

    Args:
        x: [..., D] float32, bfloat16 or float16. Under autocast x alone is cast. float64 (every argument then) runs on
            the reference back-end.
        base: [N, D] in any of these dtypes, or None where the base term is a module's own forward (a quantised linear).
            Back-end "cpp" copies weights that are not contiguous in each call.
        down: [R, D], in any of these dtypes (float32 beside a 16-bit base is the training default). R may be 0.
        up: [N, R], likewise.
        gates: float32. [R], or one row per leading index of x: [B, R], [B, T, R]; their leading sizes are a prefix of
            x's. With `row_map`: [S, R].
        bias: [N] or None.
        row_map: int32 of shape x.shape[:-1], row of `gates` for each row of x; an expanded view will do.
        backend: "reference", "cpp", "triton" or "auto"; None takes the surrounding `backend(...)` block's, else "auto".
            "cuda" has no form of this operator.
        batch_invariant: True gives a row's y and gradient the same bits whatever else is in the batch, for any number
            of threads. By "cpp" many rows then go 16 at a time through the kernel of few rows, and the gradient copies
            the weights; "triton" takes one tile and one split for any number of rows. The reference refuses it.

    Returns:
        [..., N] in x's dtype. Back-ends "cpp" and "triton" add base and low-rank term in float32 and round once. Of
        bfloat16 rows on AMX "cpp" keeps 16 bits of the gated ranks and of float32 `up`; of 384 or more without a bias,
        beside a bfloat16 base, the low-rank term is a bfloat16 of its own before it is added. The reference rounds a
        16-bit base term before (see `low_rank_linear_ref`), and with `base=None` so does the caller's sum. Beside
        16-bit rows "triton" multiplies float32 operands in TF32.
        Gradients for every floating argument that needs one, in its dtype, reduced in float32; saved for them beyond
        the arguments is `x @ down.T`, [M, R] float32.

    Raises:
        ValueError: an argument that does not fit, by name, with the remedy; a back-end that does not take such ones.
        RuntimeError: a back-end asked for by name that this process lacks.

    Reference: LoRA, arXiv 2106.09685, equation 3; its conditioned forms: Panacea, arXiv 2402.02030.
    """
    if torch._C._is_any_autocast_enabled():  # asked for a device by name it takes 0.15 us more
        x = autocast(x)
    needs_grad = torch.is_grad_enabled() and (
        up.requires_grad or x.requires_grad or any(t is not None and t.requires_grad for t in (base, down, gates, bias))
    )
    if not batch_invariant and runs_compiled(x, backend):
        try:
            if needs_grad:
                return compiled_with_autograd(x, base, down, up, gates, row_map, bias)
            return compiled_op(x, base, down, up, gates, row_map, bias, False)[0]
        except RuntimeError:
            pass  # as in mixed_linear: the long way names the argument that does not fit, or takes the reference
    rows = flatten_low_rank_rows(x, base, down, up, gates, bias, row_map)
    floats = {"x": x, "base": base, "down": down, "up": up}
    dtypes = {field: tensor.dtype for field, tensor in floats.items() if tensor is not None}
    name = resolve(backend, OperatorCall("low_rank_linear", x.device.type, dtypes, batch_invariant))
    arguments = (rows.x_MD, base, down, up, rows.c_SK, rows.row_map_M, bias, name, batch_invariant)
    # As in mixed_linear: an op without an autograd key where nothing needs a gradient.
    y_MN = low_rank_linear_op(*arguments)[0] if needs_grad else low_rank_linear_fwd_op(*arguments)
    return y_MN.view(*x.shape[:-1], up.shape[0])
