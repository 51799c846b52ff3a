"""mixed_embedding against look-ups in every table and against mixing whole tables.

Legend: ids_M, base_VD, deltas_VKD, premixed_VD; M positions, V vocabulary (the case's N), D width, K copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import HIDDEN, Case, product
from bench.correctness import Answers, Part, expect
from bench.workload import CEILING, OURS, Call, Contender, Draw, Tensors, Workload
from clp_kernels import mixed_embedding, mixed_embedding_ref

VOCABULARY = 49152
MAX_PREMIXED = 8


def test_mixed_embedding(measured: Callable[[Workload], None], case: Case, device: str) -> None:
    measured(build(case, device))


def cases(suite: str, device: str) -> dict[str, Case]:
    if suite == "tiny":
        return {"tiny-embedding": Case(24, 50, 40, 3, 4, "bf16", "f32", gradients="all")}
    if suite == "full":
        return product({model: ((VOCABULARY, hidden),) for model, hidden in HIDDEN.items()}, rows=(1, 64, 1024, 4096))
    return {"embedding-train-f32-K2-M1024": Case(1024, VOCABULARY, 576, 2, 8, gradients="all")}


def build(case: Case, device: str) -> Workload:
    draw, dtype = Draw(case, device), case.x_dtype
    t = {"ids": draw.ids(case.N), **draw.coefficients(), "base": draw.normal(case.N, case.D, dtype=dtype)}
    t["deltas"] = draw.normal(case.N, case.K, case.D, dtype=case.deltas_dtype)
    t["premixed"] = (t["base"] + torch.einsum("k,vkd->vd", t["c"][0].to(case.deltas_dtype), t["deltas"])).to(dtype)
    dy_MD = draw.normal(case.M, case.D, dtype=dtype)
    calls: dict[str, Call] = {OURS: ours, "streams": streams}
    if case.S <= MAX_PREMIXED:
        calls["premix"] = premix(case)
    contenders = {name: Contender(call, case.trained("deltas")) for name, call in calls.items()}
    return Workload(
        case,
        device,
        [t],
        contenders | {CEILING: Contender(plain, case.trained("premixed"), CEILING)},
        expected=lambda: answers(case, t, dy_MD),
        gradients=(dy_MD,),
        stream_bytes=case.M * case.D * (dtype.itemsize + case.K * case.deltas_dtype.itemsize),
        row_bytes=case.M * (case.D * dtype.itemsize + t["ids"].element_size()),
        flops=2 * case.M * case.K * case.D,
    )


def answers(case: Case, t: Tensors, dy_MD: Tensor) -> Answers:
    """All of y; of the gradients the rows of ids that occur. A vocabulary of those ids alone knows both."""
    rows, ids_M = t["ids"].unique(return_inverse=True)
    tensors = t | {"ids": ids_M} | {name: t[name].detach()[rows] for name in ("base", "deltas", "premixed")}
    part = Part(tensors, (dy_MD,), {"y": slice(None), "d_deltas": rows, "d_premixed": rows})
    mixing = Contender(
        lambda t: mixed_embedding_ref(t["ids"], t["base"], t["deltas"], t["c"], row_map=t["row_map"]),
        case.trained("deltas"),
    )
    return expect({"mix": mixing, CEILING: Contender(plain, case.trained("premixed"))}, [part])


def ours(t: Tensors) -> Tensor:
    return mixed_embedding(t["ids"], t["base"], t["deltas"], t["c"], row_map=t["row_map"])


def plain(t: Tensors) -> Tensor:
    """F.embedding on one premixed table: another result, the ceiling."""
    return F.embedding(t["ids"], t["premixed"])


def streams(t: Tensors) -> Tensor:
    """A look-up of the base and one of all copies, then the weighted sum."""
    copies_MKD = F.embedding(t["ids"], t["deltas"].flatten(1)).unflatten(1, t["deltas"].shape[1:])
    return F.embedding(t["ids"], t["base"]) + (t["c_rows"][:, :, None] * copies_MKD).sum(1).to(t["base"].dtype)


def premix(case: Case) -> Call:
    """One mixed table per weighting, made in every call, then F.embedding of its positions."""

    def call(t: Tensors) -> Tensor:
        outputs = []
        for c_K, rows in zip(t["c"], case.segments, strict=True):
            mixed_VD = torch.einsum("k,vkd->vd", c_K.to(t["deltas"].dtype), t["deltas"])
            outputs.append(F.embedding(t["ids"][rows], t["base"] + mixed_VD.to(t["base"].dtype)))
        return torch.cat(outputs)

    return call
