"""Samplers Q of weightings: where the weighting of each training prompt comes from.

Legend: G groups (a prompt under one weighting), R rewards.
"""

from __future__ import annotations

import numpy as np
import torch

SAMPLERS = ("dirichlet", "corners")


class WeightingSampler:
    """Draws one weighting per prompt, w ~ Q; its stream depends on the seed alone, never on torch's global state.

    - "dirichlet": w ~ Dirichlet(concentration, ..., concentration), each draw followed by its R - 1 cyclic rotations. A
      rotation has the same distribution, so Q is unchanged; a step of a multiple of R prompts weights every reward
      the same in the mean, which takes the luck of the draw out of small steps.
    - "corners": the one-hot weightings in turn. W(e_k) holds copy k alone, so this trains K separate policies, one per
      reward: Rewarded Soups (Rame et al. 2023, arXiv 2306.04488). A step of a multiple of R prompts gives each reward
      the same share.

    Args:
        name: one of `SAMPLERS`.
        num_rewards: R.
        concentration: of the Dirichlet distribution.
        seed: of this stream; one per process.
    """

    def __init__(self, name: str, num_rewards: int, concentration: float = 0.5, seed: int = 0) -> None:
        if name not in SAMPLERS:
            raise ValueError(f"weighting sampler is {name!r}, expected one of {SAMPLERS}")
        self.name, self.num_rewards, self.concentration = name, num_rewards, concentration
        self._generator = np.random.default_rng(seed)
        self._drawn = 0
        self._draw = np.full(num_rewards, np.nan)

    def sample(self, num_groups: int) -> torch.Tensor:
        """The next weightings w_GR, [num_groups, R] float32, each on the simplex."""
        rows = [self._next() for _ in range(num_groups)]
        return torch.tensor(np.array(rows), dtype=torch.float32)

    def _next(self) -> np.ndarray:
        turn = self._drawn % self.num_rewards
        self._drawn += 1
        if self.name == "corners":
            return np.eye(self.num_rewards)[turn]
        if turn == 0:
            self._draw = self._generator.dirichlet([self.concentration] * self.num_rewards)
        return np.roll(self._draw, turn)
