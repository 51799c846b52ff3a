"""Samplers Q of weightings: where the weighting of each training prompt comes from.

Legend: G groups (a prompt under one weighting), R rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

SAMPLERS = ("dirichlet", "corners")


@dataclass(frozen=True)
class SamplerState:
    """Where a sampler's stream is: weightings drawn, the draw that rotations follow, numpy's generator; for JSON."""

    num_drawn: int
    draw: list[float] | None
    generator: dict[str, Any]


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
        self._draw: np.ndarray | None = None

    def sample(self, num_groups: int) -> torch.Tensor:
        """The next weightings w_GR, [num_groups, R] float32, each on the simplex."""
        rows = [self._next() for _ in range(num_groups)]
        return torch.tensor(np.array(rows), dtype=torch.float32)

    def state(self) -> SamplerState:
        """Where the stream is, for `resume`."""
        draw = None if self._draw is None else self._draw.tolist()
        return SamplerState(self._drawn, draw, dict(self._generator.bit_generator.state))

    def resume(self, state: SamplerState) -> None:
        """Go on where the sampler with that state was.

        Raises:
            ValueError: a state that no sampler of so many rewards had.
        """
        if state.draw is not None and len(state.draw) != self.num_rewards:
            raise ValueError(f"weighting_sampler.draw is {state.draw}, expected {self.num_rewards} weights")
        try:
            self._generator.bit_generator.state = state.generator
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"weighting_sampler.generator is no state of numpy's generator: {error!r}") from error
        self._drawn, self._draw = state.num_drawn, None if state.draw is None else np.array(state.draw)

    def _next(self) -> np.ndarray:
        turn = self._drawn % self.num_rewards
        self._drawn += 1
        if self.name == "corners":
            return np.eye(self.num_rewards)[turn]
        if turn == 0 or self._draw is None:
            self._draw = self._generator.dirichlet([self.concentration] * self.num_rewards)
        return np.roll(self._draw, turn)
