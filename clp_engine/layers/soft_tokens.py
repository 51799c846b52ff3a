"""Soft tokens whose values depend on the weighting.

Legend: B sequences, D width, K copies, m soft tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clp_engine.layers.conditioned import CLPLayer, LayerContext, condition, copies_dtype, device_of, widened
from clp_kernels import backend_for, mixed_linear


class SoftTokenAttention(CLPLayer):
    """An attention block in which every position also attends to m soft tokens, in a softmax of their own.

    Equivalent to `attention(x) + softmax(x @ soft_keys.T / sqrt(D)) @ einsum("k,dkm->md", c, soft_values)`: the tokens'
    values are averaged by each sequence's weights. `soft_values` [D, K, m] start at zero, so the block starts as it
    was; `soft_keys` [m, D] start at random. Positions, masks and the KV cache are untouched.
    """

    soft_keys: nn.Parameter
    soft_values: nn.Parameter
    added = ("soft_keys", "soft_values")
    operator = "mixed_linear"

    @classmethod
    def adopt(cls, attention: nn.Module, context: LayerContext, width: int, num_tokens: int) -> SoftTokenAttention:
        """Condition an attention block of `width` in place with `num_tokens` soft tokens."""
        like: dict[str, Any] = {"device": device_of(attention), "dtype": copies_dtype(attention)}
        layer: SoftTokenAttention = condition(attention, cls, context)  # type: ignore[assignment]
        layer.soft_keys = nn.Parameter(torch.randn(num_tokens, width, **like))
        layer.soft_values = nn.Parameter(torch.zeros(width, len(context.copy_names), num_tokens, **like))
        return layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns, its first output steered."""
        x = args[0] if args else kwargs["hidden_states"]
        record, outputs = self.record(x.device), super().forward(*args, **kwargs)
        if record.is_reference:
            return outputs
        scores = x.to(self.soft_keys.dtype) @ self.soft_keys.T * x.shape[-1] ** -0.5
        steered = mixed_linear(
            scores.softmax(dim=-1),
            None,
            self.soft_values,
            record.columns(self.clp.shared),
            row_map=record.row_map(x.shape[:-1]),
            backend=record.backend,
        )
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        first = first + steered.to(first.dtype)
        return (first, *outputs[1:]) if isinstance(outputs, tuple) else first

    def auto_backend(self) -> str:
        """The operators' back-end that "auto" takes for this layer."""
        scores_1m = self.soft_keys.new_empty(1, len(self.soft_keys))
        return backend_for(scores_1m, None, self.soft_values, widened(self.soft_values[0, :, 0]))

    def is_batch_invariant(self) -> bool:
        """No: the block's own attention and linear layers are the plain model's."""
        return False

    def copies(self, parameters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """`soft_keys.shared` [m, D] and `soft_values.<copy>` [D, m]."""
        own = self.added_parameters() if parameters is None else parameters
        views = {f"soft_values.{name}": own["soft_values"][:, k] for k, name in enumerate(self.clp.copy_names)}
        return {"soft_keys.shared": own["soft_keys"], **views}

    def collapsed(self, c_K: torch.Tensor, lambda_1: torch.Tensor) -> dict[str, torch.Tensor]:
        """Raise: soft tokens are no parameters of a plain model."""
        raise NotImplementedError("soft_tokens cannot be collapsed: no plain model attends to them")
