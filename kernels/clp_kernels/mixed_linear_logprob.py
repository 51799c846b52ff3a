"""The public mixed_linear_logprob: log-probs and entropies of a head that is mixed per row, without its logits.

Shapes: M rows, D in, V vocabulary, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.arguments import autocast, check_main_grad, flatten_rows
from clp_kernels.mixed_linear_logprob_arguments import Logits, check_logits, check_targets
from clp_kernels.mixed_linear_logprob_ops import mixed_linear_logprob_fwd_op, mixed_linear_logprob_op
from clp_kernels.mixed_linear_logprob_reference import one_copy_where_plain
from clp_kernels.select import OperatorCall, resolve


def mixed_linear_logprob(
    hidden: Tensor,
    base: Tensor | None,
    deltas: Tensor | None,
    coefficients: Tensor | None,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    bias_deltas: Tensor | None = None,
    row_map: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = True,
    differentiate_entropy: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute each row's log-prob of its target and its entropy under its own mix of the head's K deltas.

    logits = softcap * tanh(logit_scale * mixed_linear(hidden, base, deltas, coefficients) / softcap) / temperature
    logprobs = logits.log_softmax(-1)
    logprob = logprobs.gather(-1, targets[..., None]).squeeze(-1); entropy = -(logprobs.exp() * logprobs).sum(-1)

    Neither the forward nor the backward pass makes a [..., V] tensor: both go over the vocabulary in chunks. Logits are
    float32 and never rounded below it. Backward makes them again; only where hidden alone needs a gradient, and entropy
    none, back-end "cpp" forms it in the forward pass instead (one product more), and backward scales it.

    The reference policy's log-prob on the same hidden state is one more product: the call without deltas.

    Args:
        hidden: [..., D] float32, bfloat16 or float16, the input of the head. Under autocast it alone is cast. float64
            (every argument then) runs on the reference back-end.
        base: [V, D], or None for a head that is the mix of its copies alone.
        deltas: [V, K, D], the base's dtype, or float32 over a 16-bit base. None for a head without copies, whose
            coefficients are None too: the reference policy where the head alone is conditioned. With a `main_grad`, to
            which the backward adds their gradient, as in `mixed_linear`.
        coefficients: float32 [K], one row per leading index of hidden, or [S, K] with `row_map`: as in `mixed_linear`.
        targets: int64 or int32, hidden.shape[:-1]: in [0, V), or `ignore_index`.
        bias: [V] or None.
        bias_deltas: [V, K] or None.
        row_map: int32, hidden.shape[:-1], row of `coefficients` for each row of hidden.
        temperature: > 0; divides the logits, after the cap.
        ignore_index: the target of rows that are left out: logprob 0, entropy 0, no gradient, nothing computed.
        logit_scale: multiplies the head's output (Cohere, Granite), before the cap.
        softcap: > 0 (Gemma), or None.
        return_entropy: False leaves it out, and its cost.
        differentiate_entropy: False where entropy is only reported: it then has no gradient, and costs no product.
        backend: "reference", "cpp", "triton" or "auto"; None takes the surrounding `backend(...)` block's, else "auto".

    Returns:
        logprob and entropy (or None), hidden.shape[:-1] in float32, in nats. Gradients for every floating argument that
        asks for one, in its dtype, reduced in float32.

    Raises:
        ValueError: an argument that does not fit, by name, with the remedy (targets out of range on the CPU alone,
            where looking is free); a back-end that does not take such ones.
        RuntimeError: a back-end asked for by name that this process lacks.

    Reference: arXiv 2407.15762, section 3 (parameter averaging; here of differences to the reference model).
    """
    logits = Logits(temperature, logit_scale, softcap)
    check_logits(logits)
    hidden = autocast(hidden)
    check_targets(hidden, targets)
    base, deltas, coefficients = one_copy_where_plain(hidden, base, deltas, coefficients)
    rows = flatten_rows(hidden, base, deltas, coefficients, bias, bias_deltas, row_map)
    if deltas.shape[0] == 0:
        raise ValueError("deltas hold V = 0 tokens; a head needs at least 1")
    parameters = {"base": base, "deltas": deltas, "bias": bias, "bias_deltas": bias_deltas}
    floats = {"hidden": hidden, **parameters}
    dtypes = {field: tensor.dtype for field, tensor in floats.items() if tensor is not None}
    name = resolve(backend, OperatorCall("mixed_linear_logprob", hidden.device.type, dtypes))
    trains_head = any(t is not None and t.requires_grad for t in (*parameters.values(), coefficients))
    needs_grad = torch.is_grad_enabled() and (trains_head or hidden.requires_grad)
    has_entropy_grad = return_entropy and differentiate_entropy
    forms_gradient = name == "cpp" and needs_grad and not trains_head and not has_entropy_grad
    arguments = (
        rows.x_MD, base, deltas, rows.c_SK, rows.row_map_M, bias, bias_deltas, targets.reshape(-1).long(), ignore_index,
        *logits, return_entropy, has_entropy_grad, forms_gradient, name,
    )  # fmt: skip
    if needs_grad:
        logprob_M, entropy_M, _, _ = mixed_linear_logprob_op(*arguments, check_main_grad(deltas))
    else:
        logprob_M, entropy_M, _, _ = mixed_linear_logprob_fwd_op(*arguments)
    return logprob_M.view(targets.shape), entropy_M.view(targets.shape) if return_entropy else None
