"""Conditioned modules: a linear layer whose weight is averaged per row, and the search for the layers to condition.

Legend: N out, D in, K copies.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import torch
from torch import nn

from clp_engine.conditioning import ActiveConditioning
from clp_engine.config import CLPConfig
from clp_kernels import mixed_linear


class CLPLinear(nn.Linear):
    """A linear layer with K trained differences beside its frozen weight.

    Equivalent to `F.linear(x, weight + einsum("k,nkd->nd", c, deltas), bias)` with every sequence's own c; the mixed
    weight is never materialised. `weight` and `bias` are the replaced layer's own parameters (a tied weight stays
    tied), `deltas` [N, K, D] float32 starts at zero.

    Raises:
        RuntimeError: called outside the conditioned model's forward, where no weighting is known.
    """

    deltas: nn.Parameter
    active: ActiveConditioning
    name: str

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_copies: int, active: ActiveConditioning, name: str) -> CLPLinear:
        """Take over `linear`'s parameters, freeze them and add `num_copies` zero deltas on their device."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        shape = (linear.out_features, num_copies, linear.in_features)
        layer.deltas = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=linear.weight.device))
        layer.active, layer.name = active, name
        layer.train(linear.training)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [B, ..., D] to [B, ..., N] with each sequence's own average of the copies."""
        record = self.active.record
        if record is None:
            raise RuntimeError(
                f"{self.name} was called outside the conditioned model's forward, so its weighting is unknown: "
                "call the model that get_clp_model returned, not one of its parts"
            )
        if record.is_reference:
            return nn.functional.linear(x, self.weight, self.bias)
        record = record.to(x.device)  # a device_map may put layers on several
        row_map = record.row_map(x.shape[:-1])
        return mixed_linear(
            x, self.weight, self.deltas, record.coefficients_SK, self.bias, row_map=row_map, backend=record.backend
        )

    def extra_repr(self) -> str:
        """Shape summary, printed by `print(model)`."""
        return f"{super().extra_repr()}, copies={self.deltas.shape[1]}"


def conditioned_layers(model: nn.Module) -> dict[str, CLPLinear]:
    """The conditioned layers of `model` by module path, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CLPLinear)}


def find_targets(model: nn.Module, config: CLPConfig) -> list[str]:
    """Paths of the linear layers that `config` conditions, in module order.

    Raises:
        ValueError: nothing matches; the message lists the nearest names, or says why a module is out of reach.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if config.target_modules is not None:
        found = _matching(linears, config.target_modules, head)
        wanted = f"target_modules={config.target_modules!r}"
    elif config.variant == "logit":
        found = [name for name, module in linears.items() if module is head]
        wanted = 'variant="logit" (the linear output head)'
    else:
        inside = [name for name, module in model.named_modules() if "Attention" in type(module).__name__]
        found = [name for name in linears if any(name.startswith(f"{parent}.") for parent in inside)]
        wanted = 'variant="attn" (linear layers inside attention modules)'
    if not found:
        raise ValueError(f"{wanted} matches no linear layer of {type(model).__name__}{_hint(model, linears, config)}")
    return found


def _matching(linears: dict[str, nn.Linear], targets: list[str] | str, head: nn.Module | None) -> list[str]:
    if targets == "all-linear":
        return [name for name, module in linears.items() if module is not head]
    if isinstance(targets, str):
        return [name for name in linears if re.fullmatch(targets, name)]
    return [name for name in linears if any(name == t or name.endswith(f".{t}") for t in targets)]


def _hint(model: nn.Module, linears: dict[str, nn.Linear], config: CLPConfig) -> str:
    if any(type(module).__name__ == "Conv1D" for module in model.modules()):
        return ": its layers are Conv1D, and Conv1D is not conditioned yet"
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linears})
    wanted: Sequence[str] = config.target_modules if isinstance(config.target_modules, list) else []
    near = sorted({match for target in wanted for match in difflib.get_close_matches(target, suffixes, n=3)})
    return f"; near names: {near}" if near else f"; its linear layers end in {suffixes}"
