"""Draws of a rollout's tokens from exactly the policy's distribution.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessor


class InverseCDFSampler(LogitsProcessor):
    """A logits processor that draws each row's token and leaves nothing else possible: for greedy decoding.

    The drawn token has the distribution of `torch.multinomial((logits / temperature).softmax(-1), 1)`: the first whose
    cumulated probability exceeds one uniform number of the row. multinomial draws an exponential number for each entry
    of the vocabulary instead, 13 % of the time of a rollout of 40 rows of SmolLM2 on two CPU cores.

    The logits' device must have float64. On a GPU each call waits for it once, to look at the sums.

    Args:
        temperature: of the distribution, > 0.

    Raises:
        RuntimeError: logits that are no distribution (NaN, or +inf).
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, it must be positive")
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Map logits [B, V] to 0 at the drawn token and -inf elsewhere."""
        logits_BV = scores if self.temperature == 1.0 else scores / self.temperature
        # float64: in float32 the sum over 50 000 entries is off by more than the rare tokens' probabilities.
        cumulated_BV = logits_BV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        total_B1 = cumulated_BV[:, -1:].clone()
        if not bool(torch.isfinite(total_B1).all()):
            raise RuntimeError("the policy's logits hold NaN or infinity: no token can be drawn from them")
        # rand is at most 1 - 2**-53, so the product stays below the total, and `right` skips tokens of probability 0.
        uniform_B1 = torch.rand(total_B1.shape, dtype=torch.float64, device=scores.device) * total_B1
        drawn_B1 = torch.searchsorted(cumulated_BV, uniform_B1, right=True)
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn_B1, 0.0)
