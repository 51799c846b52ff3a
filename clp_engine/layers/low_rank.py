"""Linear layers with low-rank copies: LoRA per reward, Panacea's SVD form, PARM's bilinear form.

    y = linear(x) + up @ (g * (down @ x))       g: the row's gates, one per rank

The base term is the layer's own forward where it is not a plain nn.Linear, so any frozen quantised layer will do.

Legend: N out, D in, K copies, r ranks of one copy, R ranks of the layer, S distinct weightings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from clp_engine.conditioning import Conditioning
from clp_engine.layers.conditioned import (
    CLPLayer,
    LayerContext,
    added_up,
    condition,
    copies_dtype,
    device_of,
    widened,
)
from clp_engine.layers.linear import features, has_float_weight, is_transposed, runs_fused
from clp_kernels import low_rank_linear


class LowRankLinear(CLPLayer):
    """What the three forms share: their factors and gates go through one shrink and one expand."""

    operator = "low_rank_linear"

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair down [R, D], up [N, R]."""
        raise NotImplementedError

    def gates(self, c_SK: torch.Tensor, lambda_S1: torch.Tensor) -> torch.Tensor:
        """The gates [S, R] of the coefficient rows c and their lambda."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [B, ..., D] to [B, ..., N] with each sequence's own gates."""
        record = self.record(x.device)
        if record.is_reference:
            return super().forward(x)
        down, up = self.factors()
        fused = runs_fused(self)
        adapted = low_rank_linear(
            x,
            self.weight if fused else None,  # type: ignore[arg-type]
            down,
            up,
            self._row_gates(record),
            self.bias if fused else None,  # type: ignore[arg-type]
            row_map=record.row_map(x.shape[:-1]),
            backend=record.backend,
            batch_invariant=record.batch_invariant,
        )
        return adapted if fused else super().forward(x) + adapted

    def is_batch_invariant(self) -> bool:
        """No where another class's forward gives the base term."""
        return runs_fused(self)

    def _row_gates(self, record: Conditioning) -> torch.Tensor:
        return self.gates(record.coefficients_SK, record.columns(shared=True))

    def collapsed(self, c_K: torch.Tensor, lambda_1: torch.Tensor) -> dict[str, torch.Tensor]:
        """`weight + up @ diag(g) @ down`."""
        if not has_float_weight(self):
            raise NotImplementedError(
                f"{self.clp.path} ({self.plain_class.__name__}) is quantised: copies cannot be added to its weight; "
                "export the copies as adapters instead"
            )
        down, up = (widened(factor) for factor in self.factors())
        gates_R = self.gates(c_K.to(down)[None], lambda_1.to(down)[None])[0]
        delta_ND = (up * gates_R) @ down
        return {"weight": added_up(self.weight, delta_ND.T if is_transposed(self) else delta_ND)}  # type: ignore[arg-type]


class LoRALinear(LowRankLinear):
    """One LoRA adapter per copy: `y = linear(x) + sum_k c_k scaling_k B_k A_k x` (arXiv 2106.09685, equation 3).

    `lora_A` [sum r_k, D] starts as PEFT's does (Kaiming), `lora_B` [N, sum r_k] at zero; both float32.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    added = ("lora_A", "lora_B")
    settings = ("ranks", "scalings")

    @classmethod
    def adopt(
        cls, linear: nn.Module, context: LayerContext, ranks: Sequence[int], scalings: Sequence[float]
    ) -> LoRALinear:
        """Condition `linear` in place; `ranks` and `scalings` (alpha / r) of each copy."""
        layer: LoRALinear = condition(linear, cls, context)  # type: ignore[assignment]
        out, inner = features(linear)
        total, like = sum(ranks), _like(linear)
        layer.lora_A = nn.Parameter(uniform(total, inner, **like))
        layer.lora_B = nn.Parameter(torch.zeros(out, total, **like))
        layer.ranks, layer.scalings = tuple(ranks), tuple(scalings)
        return layer

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All adapters' A, one under the other, and all their B side by side."""
        return self.lora_A, self.lora_B

    def gates(self, c_SK: torch.Tensor, lambda_S1: torch.Tensor) -> torch.Tensor:
        """c_k * scaling_k for each rank of copy k; lambda drives nothing of its own."""
        scaled_SK = c_SK * torch.tensor(self.scalings, dtype=c_SK.dtype, device=c_SK.device)
        return scaled_SK.repeat_interleave(
            torch.tensor(self.ranks, device=c_SK.device), dim=1, output_size=sum(self.ranks)
        )

    def _row_gates(self, record: Conditioning) -> torch.Tensor:
        c_SK = record.coefficients_SK
        return record.derived((self.ranks, self.scalings), lambda: self.gates(c_SK, c_SK))

    def copies(self, parameters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """`lora_A.<copy>` [r, D] and `lora_B.<copy>` [N, r], as PEFT's own tensors."""
        own = self.added_parameters() if parameters is None else parameters
        split_A = own["lora_A"].split(self.ranks, dim=0)
        split_B = own["lora_B"].split(self.ranks, dim=1)
        views: dict[str, torch.Tensor] = {}
        for name, a_rD, b_Nr in zip(self.clp.copy_names, split_A, split_B, strict=True):
            views |= {f"lora_A.{name}": a_rD, f"lora_B.{name}": b_Nr}
        return views


class SVDLinear(LowRankLinear):
    """Panacea's form (arXiv 2402.02030): `y = linear(x) + U diag(lambda s, c_1 t_1 .. c_K t_K) V x`.

    r singular values s are shared by all weightings and lambda alone scales them; each reward has one of its own, t_k,
    scaled by its coefficient. `svd_V` [r + K, D] and `svd_U` [N, r + K] start at random, `svd_values` [r + K] at zero.
    """

    svd_U: nn.Parameter
    svd_V: nn.Parameter
    svd_values: nn.Parameter
    added = ("svd_U", "svd_V", "svd_values")

    @classmethod
    def adopt(cls, linear: nn.Module, context: LayerContext, rank: int) -> SVDLinear:
        """Condition `linear` in place with `rank` shared singular values."""
        layer: SVDLinear = condition(linear, cls, context)  # type: ignore[assignment]
        (out, inner), like = features(linear), _like(linear)
        total = rank + len(context.copy_names)
        layer.svd_V = nn.Parameter(torch.randn(total, inner, **like) * inner**-0.5)
        layer.svd_U = nn.Parameter(torch.randn(out, total, **like) * total**-0.5)
        layer.svd_values = nn.Parameter(torch.zeros(total, **like))
        return layer

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """V and U."""
        return self.svd_V, self.svd_U

    def gates(self, c_SK: torch.Tensor, lambda_S1: torch.Tensor) -> torch.Tensor:
        """The weighted singular values."""
        num_shared = len(self.svd_values) - len(self.clp.copy_names)
        return torch.cat([lambda_S1.expand(-1, num_shared), c_SK], dim=1) * self.svd_values

    def copies(self, parameters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """`svd_U.shared`, `svd_V.shared`, `svd_values.shared` [r] and `svd_values.<copy>` [1]."""
        own = self.added_parameters() if parameters is None else parameters
        values = own["svd_values"]
        num_shared = len(values) - len(self.clp.copy_names)
        views = {f"{name}.shared": own[name] for name in ("svd_U", "svd_V")}
        views["svd_values.shared"] = values[:num_shared]
        views |= {
            f"svd_values.{name}": values[num_shared + k : num_shared + k + 1]
            for k, name in enumerate(self.clp.copy_names)
        }
        return views


class PBLoRALinear(LowRankLinear):
    """PARM's bilinear form (arXiv 2505.06274): `y = linear(x) + (lambda B1 M A1 + B2 (sum_k c_k M_k) A2) x`.

    A small r x r matrix M_k per reward between factors that all share, beside a part of its own for all weightings.
    `pb_A` [2 r, D] starts as LoRA's A, `pb_B` [N, 2 r] at zero, `pb_M` [K + 1, r, r], the shared one last, at identity.
    """

    pb_A: nn.Parameter
    pb_B: nn.Parameter
    pb_M: nn.Parameter
    added = ("pb_A", "pb_B", "pb_M")

    @classmethod
    def adopt(cls, linear: nn.Module, context: LayerContext, rank: int) -> PBLoRALinear:
        """Condition `linear` in place with rank `rank` in both parts."""
        layer: PBLoRALinear = condition(linear, cls, context)  # type: ignore[assignment]
        (out, inner), like, count = features(linear), _like(linear), len(context.copy_names) + 1
        layer.pb_A = nn.Parameter(uniform(2 * rank, inner, **like))
        layer.pb_B = nn.Parameter(torch.zeros(out, 2 * rank, **like))
        layer.pb_M = nn.Parameter(torch.eye(rank, **like).repeat(count, 1, 1))
        return layer

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A2 once per copy, then A1; up_k = B2 M_k beside B1 M."""
        rank, num_copies = self.pb_M.shape[1], len(self.clp.copy_names)
        conditioned_A, shared_A = self.pb_A.split(rank, dim=0)
        conditioned_B, shared_B = self.pb_B.split(rank, dim=1)
        up = [conditioned_B @ self.pb_M[k] for k in range(num_copies)]
        return torch.cat([*[conditioned_A] * num_copies, shared_A]), torch.cat([*up, shared_B @ self.pb_M[-1]], dim=1)

    def gates(self, c_SK: torch.Tensor, lambda_S1: torch.Tensor) -> torch.Tensor:
        """c_k for the ranks of copy k, lambda for the shared part's."""
        return torch.cat([c_SK, lambda_S1], dim=1).repeat_interleave(self.pb_M.shape[1], dim=1)

    def copies(self, parameters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """`pb_A.shared`, `pb_B.shared`, `pb_M.shared` and `pb_M.<copy>` [r, r]."""
        own = self.added_parameters() if parameters is None else parameters
        views = {f"{name}.shared": own[name] for name in ("pb_A", "pb_B")}
        views |= {f"pb_M.{name}": own["pb_M"][k] for k, name in enumerate((*self.clp.copy_names, "shared"))}
        return views


def uniform(rank: int, inner: int, **like: Any) -> torch.Tensor:
    """PEFT's start of lora_A: uniform within 1 / sqrt(D)."""
    a_rD = torch.empty(rank, inner, **like)
    nn.init.kaiming_uniform_(a_rD, a=math.sqrt(5))
    return a_rD


def _like(linear: nn.Module) -> dict[str, Any]:
    return {"device": device_of(linear), "dtype": copies_dtype(linear)}
