"""Comparison of every contender with float64, before anything is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.workload import Contender, Tensors, run

NUM_SAMPLES = 16


@dataclass
class Expected:
    """Rows `index` of one output: the float64 values, and the reference's result in the case's own dtype."""

    index: Tensor | slice
    exact: Tensor
    own: Tensor

    def error(self, values: Tensor) -> float:
        """The largest error as a share of the largest value."""
        if values.numel() == 0:
            return 0.0
        difference = (values.double() - self.exact).abs().max() / self.exact.abs().max()
        return float("inf") if difference.isnan() else difference.item()

    def budget(self, dtype: torch.dtype, is_ours: bool) -> float:
        """Twice the reference's own error and one unit in the last place; a peer may round each partial sum: 16."""
        return 2 * self.error(self.own) + (1 if is_ours else 16) * torch.finfo(dtype).eps


Answers = Mapping[str, Mapping[str, Expected]]  # by Contender.answers, by output


@dataclass
class Part:
    """A problem small enough for float64, and the whole one's outputs that it knows: name -> which of their rows."""

    tensors: Tensors
    gradients: tuple[Tensor, ...]
    knows: Mapping[str, Tensor | slice]


def sample(size: int, device: str | torch.device) -> Tensor:
    """Up to 16 indices below `size`, first and last among them."""
    return torch.linspace(0, size - 1, min(size, NUM_SAMPLES), device=device).round().long()


def expect(references: Mapping[str, Contender], parts: Sequence[Part]) -> Answers:
    """Evaluate each reference on each part, in float64 and in the part's own dtypes."""
    found: dict[str, dict[str, Expected]] = {}
    for answers, reference in references.items():
        outputs = {"y", *(f"d_{name}" for name in reference.trained)}
        found[answers] = {}
        for part in parts:
            names = outputs & part.knows.keys()
            if names:
                exact, own = _evaluate(reference, part, torch.float64), _evaluate(reference, part, None)
                found[answers] |= {name: Expected(part.knows[name], exact[name], own[name]) for name in names}
    return found


def _evaluate(reference: Contender, part: Part, dtype: torch.dtype | None) -> Tensors:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype) if dtype and tensor.is_floating_point() else tensor.detach()

    tensors = {name: cast(tensor) for name, tensor in part.tensors.items()}
    for name in reference.trained:
        tensors[name].requires_grad_()
    with torch.enable_grad():
        return run(reference, tensors, ("y",), [cast(gradient) for gradient in part.gradients])


def check(name: str, outputs: Tensors, expected: Mapping[str, Expected], input_dtype: torch.dtype) -> float:
    """Return the largest error as a share of its budget.

    input_dtype: of x, in which a peer may round, also where its output is wider.

    Raises:
        AssertionError: an output is missing, or beyond its budget.
    """
    missing = expected.keys() - outputs.keys()
    assert not missing, f"{name} returned no {', '.join(sorted(missing))}"
    is_ours, worst = name.startswith("ours"), 0.0
    for output, part in expected.items():
        values = outputs[output][part.index]
        dtype = values.dtype if is_ours else max((values.dtype, input_dtype), key=lambda d: torch.finfo(d).eps)
        error, budget = part.error(values), part.budget(dtype, is_ours)
        assert error <= budget, f"{name} is wrong in {output}: error {error:.3e} of the largest, budget {budget:.3e}"
        worst = max(worst, error / budget)
    return worst
