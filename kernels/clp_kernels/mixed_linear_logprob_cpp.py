"""mixed_linear_logprob on the CPU by the compiled extension: the launchers of back-end "cpp".

Shapes: M rows, D in, V vocabulary, K copies, S distinct weightings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clp_kernels.mixed_linear_logprob_arguments import Head, Logits, Needs, Targets


def forward(
    hidden_MD: Tensor, head: Head, targets: Targets, by: Logits, needs_entropy: bool, forms_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return logprob_M, entropy_M or None, normalizer_M2, and the gradient [M, D] of logprob by hidden or None.

    normalizer: a row's largest logit, and the log of the sum of exp(logit - largest). Rows without a target hold 0.
    """
    M = hidden_MD.shape[0]
    logprob_M, normalizer_M2 = head.c.new_zeros(M), head.c.new_zeros(M, 2)
    entropy_M = head.c.new_zeros(M) if needs_entropy else None
    formed_MD = head.c.new_zeros(hidden_MD.shape) if forms_gradient else None
    torch.ops.clp.mixed_linear_logprob_cpu_fwd(
        hidden_MD, *head, *targets, *by, logprob_M, entropy_M, normalizer_M2, formed_MD
    )
    return logprob_M, entropy_M, normalizer_M2, formed_MD


def backward(
    hidden_MD: Tensor,
    head: Head,
    targets: Targets,
    by: Logits,
    normalizer_M2: Tensor,
    entropy_M: Tensor | None,
    d_logprob_M: Tensor,
    d_entropy_M: Tensor | None,
    needs: Needs,
    main_grad: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden, base, deltas, c, bias and bias_deltas, None where not needed.

    d_logits = d_logprob (onehot - p) - d_entropy p (log p + entropy); the rest are those of mixed_linear, by chunks.
    The gradient of the deltas is added to `main_grad` [V, K, D] float32 where that is given, and not returned.
    """
    inputs = (hidden_MD, head.base, head.deltas, head.c, head.bias, head.bias_deltas)
    gradients = [
        None if t is None or not needed else torch.empty(t.shape, dtype=t.dtype)
        for t, needed in zip(inputs, needs, strict=True)
    ]
    if gradients[0] is not None:  # rows without a target are left alone; all else is written whole
        gradients[0].zero_()
    d_hidden, d_base, d_deltas, *others = gradients
    torch.ops.clp.mixed_linear_logprob_cpu_backward(
        hidden_MD, *head, *targets, *by, normalizer_M2, entropy_M, d_logprob_M, d_entropy_M, d_hidden, d_base,
        d_deltas if main_grad is None else main_grad, *others, main_grad is not None,
    )  # fmt: skip
    return tuple(gradients)
