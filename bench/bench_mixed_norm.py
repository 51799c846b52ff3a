"""mixed_norm against torch's norm with one premixed scale, and against mixing the scale for each row.

Legend: x_MD, weight_D, deltas_DK, premixed_D; M rows, D width (the case's N as well), K copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from bench.cases import HIDDEN, Case, product
from bench.correctness import Part, expect
from bench.workload import CEILING, OURS, Contender, Draw, Tensors, Workload, num_bytes
from clp_kernels import mixed_norm, mixed_norm_ref

EPS = 1e-6


def test_mixed_norm(measured: Callable[[Workload], None], case: Case, device: str) -> None:
    measured(build(case, device))


def cases(suite: str, device: str) -> dict[str, Case]:
    if suite == "tiny":
        return {"tiny-norm": Case(24, 40, 40, 3, 4, "bf16", gradients="all")}
    if suite == "full":
        return product({model: ((hidden, hidden),) for model, hidden in HIDDEN.items()}, rows=(1, 64, 1024, 4096))
    return {"norm-train-f32-K2-M1024": Case(1024, 2048, 2048, 2, 8, gradients="all")}


def build(case: Case, device: str) -> Workload:
    draw, dtype = Draw(case, device), case.x_dtype
    t = {"x": draw.normal(case.M, case.D, dtype=dtype), **draw.coefficients()}
    t["weight"] = draw.normal(case.D, dtype=dtype, std=0.1) + 1
    t["deltas"] = draw.normal(case.D, case.K, dtype=case.deltas_dtype, std=0.1)
    t["premixed"] = (t["weight"] + t["deltas"].float() @ t["c"][0]).to(dtype)
    dy_MD = draw.normal(case.M, case.D, dtype=dtype)
    mixing, alone = case.trained("x", "deltas"), case.trained("x", "premixed")
    references = {"mix": Contender(reference, mixing), CEILING: Contender(plain, alone)}
    knows = dict.fromkeys(("y", "d_x", "d_deltas", "d_premixed"), slice(None))
    return Workload(
        case,
        device,
        [t],
        {
            OURS: Contender(ours, mixing),
            CEILING: Contender(plain, alone, CEILING),
            "mixed_scale": Contender(mixed_scale, mixing),
        },
        expected=lambda: expect(references, [Part(t, (dy_MD,), knows)]),
        gradients=(dy_MD,),
        stream_bytes=num_bytes({name: t[name] for name in ("weight", "deltas")}),
        row_bytes=num_bytes({"x": t["x"]}) * (2 if case.gradients == "none" else 5),
        flops=4 * case.M * case.D,
    )


def ours(t: Tensors) -> Tensor:
    return mixed_norm(t["x"], t["weight"], t["deltas"], t["c"], row_map=t["row_map"], eps=EPS)


def reference(t: Tensors) -> Tensor:
    return mixed_norm_ref(t["x"], t["weight"], t["deltas"], t["c"], row_map=t["row_map"], eps=EPS)


def plain(t: Tensors) -> Tensor:
    """F.rms_norm with one premixed scale: another result, the ceiling."""
    return F.rms_norm(t["x"], t["premixed"].shape, t["premixed"], EPS)


def mixed_scale(t: Tensors) -> Tensor:
    """torch's norm without a scale, times the scale mixed for each weighting and looked up for each row."""
    scale_SD = t["weight"].float() + t["c"] @ t["deltas"].float().T
    return (F.rms_norm(t["x"], t["weight"].shape, None, EPS) * scale_SD[t["row_map"]]).to(t["x"].dtype)
