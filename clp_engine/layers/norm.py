"""Norms with K differences beside their frozen scale and bias.

Legend: D width, K copies.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from clp_engine.layers.conditioned import DeltaLayer, LayerContext, added_up, condition, widened, zero_copies
from clp_kernels import mixed_norm

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "layer_norm_epsilon")
_AGREEMENT = 1e-4  # of normalised values of order one, in float32


@dataclass(frozen=True)
class NormArithmetic:
    """What a norm does before it scales: kind "rms" or "layer", and the eps in its square root."""

    kind: str
    eps: float


class DeltaNorm(DeltaLayer):
    """A norm under each sequence's own average of its copies.

    Every norm is linear in its scale and bias, so `y = norm(x) + normalised(x) * (deltas @ c) + bias_deltas @ c`: the
    module's own arithmetic, where it casts and whether it adds one to its scale, gives the base term untouched.
    `deltas` [D, K] and `bias_deltas` [D, K], float32, start at zero.
    """

    arithmetic: NormArithmetic
    settings = ("arithmetic",)
    operator = "mixed_norm"

    @classmethod
    def adopt(cls, norm: nn.Module, context: LayerContext) -> DeltaNorm:
        """Condition `norm` in place.

        Raises:
            NotImplementedError: its output is not a normalised input times a scale.
        """
        arithmetic = norm_arithmetic(norm, context.path)
        layer: DeltaNorm = condition(norm, cls, context)  # type: ignore[assignment]
        weight: torch.Tensor = norm.weight  # type: ignore[assignment]
        shape = (weight.numel(), len(context.copy_names))
        layer.deltas = zero_copies(shape, weight)
        layer.bias_deltas = zero_copies(shape, weight) if getattr(norm, "bias", None) is not None else None
        layer.arithmetic = arithmetic
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [B, ..., D], each sequence with its own scale and bias."""
        record = self.record(x.device)
        y = super().forward(x)
        if record.is_reference:
            return y
        steered = mixed_norm(
            x,
            None,
            self.deltas,
            record.columns(self.clp.shared),
            bias_deltas=self.bias_deltas,
            row_map=record.row_map(x.shape[:-1]),
            eps=self.arithmetic.eps,
            kind=self.arithmetic.kind,
            backend=record.backend,
            batch_invariant=record.batch_invariant,
        )
        return y + steered.to(y.dtype)

    def collapsed(self, c_K: torch.Tensor, lambda_1: torch.Tensor) -> dict[str, torch.Tensor]:
        """`weight + deltas @ c` and `bias + bias_deltas @ c`."""
        values = {}
        for name, deltas_DK in (("weight", self.deltas), ("bias", self.bias_deltas)):
            if deltas_DK is not None:
                values[name] = added_up(getattr(self, name), widened(deltas_DK) @ c_K.to(widened(deltas_DK)))
        return values


def is_norm(module: nn.Module) -> bool:
    """Whether `module` looks like a norm: a scale vector, perhaps a bias, and a class that says so."""
    own = {name: p.dim() for name, p in module.named_parameters(recurse=False)}
    named = "norm" in type(module).__name__.lower()
    return named and "weight" in own and set(own) <= {"weight", "bias"} and set(own.values()) == {1}


@torch.no_grad()
def norm_arithmetic(norm: nn.Module, path: str) -> NormArithmetic:
    """Find out what `norm` does, by running a float32 copy of it on random values, whatever its own weights are.

    Raises:
        NotImplementedError: it is neither an RMSNorm nor a LayerNorm in its scale.
    """
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    for name, parameter in probe.named_parameters():
        parameter.fill_(1.0 if name == "weight" else 0.0)
    generator = torch.Generator().manual_seed(0)
    width = probe.weight.numel()  # type: ignore[operator]
    x_MD, delta_D = torch.randn(4, width, generator=generator) * 3 + 1, torch.randn(width, generator=generator)
    eps = next((float(v) for name in _EPS_NAMES if isinstance(v := getattr(norm, name, None), (int, float))), None)
    for kind in ("rms", "layer") if eps is not None else ():
        expected_MD = mixed_norm(x_MD, None, delta_D[:, None], torch.ones(1), eps=eps, kind=kind)  # type: ignore[arg-type]
        if _moves_by(probe, x_MD, delta_D, expected_MD):
            return NormArithmetic(kind, eps)  # type: ignore[arg-type]
    raise NotImplementedError(
        f"{path} ({type(norm).__name__}) is neither an RMSNorm nor a LayerNorm in its scale (eps {eps}): leave it out "
        "with target_modules"
    )


def _moves_by(probe: nn.Module, x_MD: torch.Tensor, delta_D: torch.Tensor, expected_MD: torch.Tensor) -> bool:
    """Whether adding `delta_D` to the scale adds `expected_MD` to what `probe` makes of x."""
    weight: nn.Parameter = probe.weight  # type: ignore[assignment]
    try:
        before_MD = probe(x_MD)
        weight.add_(delta_D)
        moved_MD = probe(x_MD) - before_MD
        weight.sub_(delta_D)
    except TypeError:  # it takes more than x
        return False
    return torch.allclose(moved_MD, expected_MD, atol=_AGREEMENT * float(delta_D.abs().max()))
