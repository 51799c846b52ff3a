"""Linear layers with K full differences beside their frozen weight.

Legend: N out, D in, K copies, S distinct weightings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clp_engine.layers.conditioned import CLPLayer, DeltaLayer, LayerContext, added_up, condition, widened, zero_copies
from clp_kernels import backend_for, mixed_linear


def is_linear(module: nn.Module) -> bool:
    """Whether `module` maps [..., D] to [..., N] by one weight: nn.Linear, transformers' Conv1D, quantised forms."""
    if isinstance(module, nn.Linear) or is_transposed(module):
        return True
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    return all(isinstance(size, int) for size in sizes) and not isinstance(module, nn.Bilinear)


def features(linear: nn.Module) -> tuple[int, int]:
    """The sizes (N, D) of a linear layer of any kind."""
    if is_transposed(linear):
        return linear.nf, linear.nx  # type: ignore[return-value]
    return linear.out_features, linear.in_features  # type: ignore[return-value]


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer whose weight is stored [D, N]."""
    return hasattr(module, "nf") and hasattr(module, "nx")


def has_float_weight(linear: nn.Module) -> bool:
    """Whether the weight is a plain floating-point tensor, not a quantised format."""
    weight = getattr(linear, "weight", None)
    return isinstance(weight, nn.Parameter) and type(weight.data) is torch.Tensor and weight.dtype in _FLOATS


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def runs_fused(layer: CLPLayer) -> bool:
    """Whether base and copies are one operator call; another class's forward is its own base term."""
    return layer.plain_class is nn.Linear and type(layer.weight.data) is torch.Tensor


def contiguous_rows(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of a frozen output head: its input as one block of rows.

    `generate` hands the head a slice of the hidden states after the prompt. torch multiplies a slice by a frozen weight
    as a batch of matrices, and on the CPU copies the weight for each sequence: 1.8 GB and 2.6 s for 32 sequences of
    SmolLM2-135M in bfloat16. (A weight that needs a gradient is exempt, so a plain model does not show it.)
    """
    return tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in args)


class DeltaLinear(DeltaLayer):
    """A linear layer with K trained differences beside its frozen weight, and beside its bias where asked for.

    Equivalent to `F.linear(x, weight + einsum("k,nkd->nd", c, deltas), bias + bias_deltas @ c)` with every sequence's
    own c; the mixed weight is never materialised. `deltas` [N, K, D] and `bias_deltas` [N, K], float32, start at zero.
    Layers of a class of their own (Conv1D, Falcon's) give the base term by their own forward.
    """

    operator = "mixed_linear"

    @classmethod
    def adopt(
        cls, linear: nn.Module, context: LayerContext, with_bias: bool, deltas: nn.Parameter | None = None
    ) -> DeltaLinear:
        """Condition `linear` in place.

        Args:
            linear: a linear layer with floating-point weights.
            context: its place in the model.
            with_bias: give its bias copies too.
            deltas: copies of a tied weight instead of new ones.
        """
        layer: DeltaLinear = condition(linear, cls, context)  # type: ignore[assignment]
        (out, inner), num_copies = features(linear), len(context.copy_names)
        weight: torch.Tensor = linear.weight  # type: ignore[assignment]
        layer.deltas = zero_copies((out, num_copies, inner), weight) if deltas is None else deltas
        has_bias = with_bias and linear.bias is not None
        layer.bias_deltas = zero_copies((out, num_copies), weight) if has_bias else None
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [B, ..., D] to [B, ..., N] with each sequence's own average of the copies."""
        record = self.record(x.device)
        if record.is_reference:
            return super().forward(x)
        fused = runs_fused(self)
        y_mixed = mixed_linear(
            x,
            self.weight if fused else None,  # type: ignore[arg-type]
            self.deltas,
            record.columns(self.clp.shared),
            self.bias if fused else None,  # type: ignore[arg-type]
            bias_deltas=self.bias_deltas,
            row_map=record.row_map(x.shape[:-1]),
            backend=record.backend,
            batch_invariant=record.batch_invariant,
            exact_delta=record.exact_delta,
        )
        return y_mixed if fused else super().forward(x) + y_mixed

    def is_batch_invariant(self) -> bool:
        """No where another class's forward gives the base term."""
        return runs_fused(self)

    def auto_backend(self) -> str:
        """The operators' back-end that "auto" takes for this layer."""
        weight: torch.Tensor = self.weight  # type: ignore[assignment]
        x_1D = torch.empty(1, self.deltas.shape[2], dtype=weight.dtype, device=weight.device)
        c_K = torch.zeros(self.deltas.shape[1], dtype=widened(x_1D).dtype, device=weight.device)
        return backend_for(x_1D, weight if runs_fused(self) else None, self.deltas, c_K, bias_deltas=self.bias_deltas)

    def collapsed(self, c_K: torch.Tensor, lambda_1: torch.Tensor) -> dict[str, torch.Tensor]:
        """`weight + einsum("k,nkd->nd", c, deltas)` in the weight's own layout, and the bias."""
        deltas = widened(self.deltas)
        c_K = c_K.to(deltas)
        delta_ND = torch.einsum("k,nkd->nd", c_K, deltas)
        values = {"weight": added_up(self.weight, delta_ND.T if is_transposed(self) else delta_ND)}  # type: ignore[arg-type]
        if self.bias_deltas is not None:
            values["bias"] = added_up(self.bias, widened(self.bias_deltas) @ c_K)  # type: ignore[arg-type]
        return values

    def extra_repr(self) -> str:
        """Shape summary, printed by `print(model)`."""
        return f"{super().extra_repr()}, copies={self.deltas.shape[1]}"
