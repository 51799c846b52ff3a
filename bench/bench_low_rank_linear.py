"""low_rank_linear against PEFT's loop over adapters, merging, and the same products in torch.

Legend: x_MD rows, base_ND, down_RD, up_NR, gates_SR; M rows, D in, N out, K adapters, R = K * rank, S weightings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import targets
from bench.cases import Case, product, shrunk
from bench.correctness import Answers, Part, expect, sample
from bench.workload import CEILING, OURS, Call, Contender, Draw, Tensors, Workload, gemm_operands, num_bytes, rotate
from clp_kernels import low_rank_linear, low_rank_linear_ref

RANK = 16
MAX_LOOPED = 64  # weightings up to which a call for each is a peer at all


def test_low_rank_linear(measured: Callable[[Workload], None], case: Case, device: str) -> None:
    measured(build(case, device))


def cases(suite: str, device: str) -> dict[str, Case]:
    if suite == "tiny":
        train = Case(24, 48, 40, 3, 4, "bf16", "f32", gradients="all", rank=4)
        return {"tiny-lowrank": Case(6, 48, 40, 2, 3, rank=4), "tiny-lowrank-train": train} | shrunk(gpu_cases())
    if suite == "full":
        return product(rank=RANK)
    found = {f"lowrank-f32-K4-M{M}-S64": Case(M, 2048, 2048, 4, 64, rank=RANK, is_cold=True) for M in (64, 256, 2048)}
    one = Case(256, 2048, 2048, 4, 1, rank=RANK, is_cold=True)
    found["lowrank-f32-K4-M256-S1"] = one
    found["lowrank-bf16-f32adapters-K4-M16-S16"] = replace(one, M=16, S=16, dtype="bf16", deltas="f32")
    found["lowrank-train-f32-K4-M512-S8"] = replace(one, M=512, S=8, gradients="all", is_cold=False)
    return found


def gpu_cases() -> dict[str, Case]:
    one = Case(64, 4096, 4096, 4, 64, "bf16", rank=RANK, is_cold=True, is_graph=True, is_gpu=True)
    found = {f"lowrank-bf16-K4-M{M}-S64": replace(one, M=M) for M in (64, 512, 2048)}
    return found | {"lowrank-bf16-K4-M2048-S64-eager": replace(one, M=2048, is_graph=False)}


def goals(case: Case) -> tuple[targets.Target, ...]:
    """Adapters cost their own operations and 5 %; PEFT, 4 active adapters, one call for each weighting."""
    if case.is_gpu:
        share = case.K * case.rank * (case.D + case.N) / (case.N * case.D)
        return targets.at_most_times_plain(1.05 * (1 + share)), targets.peak_at_most(32.0)
    if case.gradients != "none" or case.dtype != "f32":
        return ()
    share = case.K * case.rank * (case.D + case.N) / (case.N * case.D)
    over_peft = {1: 1.3, 64: 10.0}
    found = [targets.at_most_times_plain(1.05 * (1 + share))]
    return (*found, *(targets.faster_than("peft", over_peft[s]) for s in over_peft if s == case.S and case.K == 4))


def build(case: Case, device: str) -> Workload:
    draw, dtype, R = Draw(case, device), case.x_dtype, case.K * case.rank
    shared = {"x": draw.normal(case.M, case.D, dtype=dtype), **draw.coefficients()}
    shared["gates"] = shared["c"].repeat_interleave(case.rank, 1)
    shared["gate_rows"] = shared["gates"][shared["row_map"]].to(dtype)
    dy_MN = draw.normal(case.M, case.N, dtype=dtype)
    base = {"base": draw.normal(case.N, case.D, dtype=dtype, std=case.D**-0.5)}
    adapters = {
        "down": draw.normal(R, case.D, dtype=case.deltas_dtype, std=case.D**-0.5),
        "up": draw.normal(case.N, R, dtype=case.deltas_dtype, std=R**-0.5),
    }
    buffer, sets = rotate(case, device, adapters | base, {"premixed": base["base"]})
    sets = [shared | tensors for tensors in sets]
    base_flops, adapter_flops = 2 * case.M * case.N * case.D, 2 * case.M * R * (case.N + case.D)
    is_forward = case.gradients == "none"
    return Workload(
        case,
        device,
        sets,
        contenders(case, sets),
        expected=lambda: answers(case, sets[0], dy_MN),
        gradients=(dy_MN,),
        streams=buffer,
        stream_bytes=num_bytes(adapters | base),
        row_bytes=num_bytes({"x": shared["x"], "y": dy_MN}),
        flops=base_flops + adapter_flops if is_forward else 2 * base_flops + 3 * adapter_flops,
        gemm=gemm_operands(draw, sets[0]["base"]),
        targets=goals(case),
    )


def answers(case: Case, t: Tensors, dy_MN: Tensor) -> Answers:
    """Sampled rows of y and of the gradient of x; all of the adapters' gradients, to which the base adds nothing."""
    rows = sample(case.M, dy_MN.device)
    by_rows = t | {"x": t["x"][rows], "row_map": t["row_map"][rows]}
    without_base = {name: tensor for name, tensor in t.items() if name not in ("base", "premixed")}
    parts = [
        Part(by_rows, (dy_MN[rows],), {"y": rows, "d_x": rows}),
        Part(without_base, (dy_MN,), {"d_down": slice(None), "d_up": slice(None)}),
    ]
    mixing = Contender(
        lambda t: low_rank_linear_ref(t["x"], t.get("base"), t["down"], t["up"], t["gates"], row_map=t["row_map"]),
        case.trained("x", "down", "up"),
    )
    return expect({"mix": mixing, CEILING: Contender(plain, case.trained("x"))}, parts)


def contenders(case: Case, sets: Sequence[Tensors]) -> dict[str, Contender]:
    calls: dict[str, Call] = {OURS: ours, "two_products": two_products}
    if case.S <= MAX_LOOPED:
        calls |= {"premix": premix(case), "adapter_loop": adapter_loop(case)}
        if case.gradients == "none" and find_spec("peft") is not None:
            calls["peft"] = peft(case, sets)
    trained, on_host = case.trained("x", "down", "up"), ("adapter_loop", "peft")  # these read coefficients there
    found = {name: Contender(call, trained, is_capturable=name not in on_host) for name, call in calls.items()}
    return found | {CEILING: Contender(plain, case.trained("x"), CEILING)}


def ours(t: Tensors) -> Tensor:
    return low_rank_linear(t["x"], t["base"], t["down"], t["up"], t["gates"], row_map=t["row_map"])


def plain(t: Tensors) -> Tensor:
    """The base layer alone: another result, the ceiling."""
    return F.linear(t["x"], t["premixed"])


def two_products(t: Tensors) -> Tensor:
    """All adapters in one shrink and one expand, gates between, by torch."""
    shrunk_MR = F.linear(t["x"], t["down"].to(t["x"].dtype))
    return F.linear(t["x"], t["base"]) + F.linear(shrunk_MR * t["gate_rows"], t["up"].to(t["x"].dtype))


def premix(case: Case) -> Call:
    """One merged weight per weighting, made in every call, then F.linear on its segment of rows."""

    def call(t: Tensors) -> Tensor:
        outputs = []
        for gates_R, rows in zip(t["gates"], case.segments, strict=True):
            merged_ND = (t["up"] * gates_R.to(t["up"].dtype)) @ t["down"]
            outputs.append(F.linear(t["x"][rows], t["base"] + merged_ND.to(t["x"].dtype)))
        return torch.cat(outputs)

    return call


def adapter_loop(case: Case) -> Call:
    """PEFT's arithmetic without its bookkeeping: one call per weighting, in it one adapter after another."""

    def call(t: Tensors) -> Tensor:
        downs, ups = t["down"].split(case.rank), t["up"].split(case.rank, dim=1)
        outputs = []
        for c_K, rows in zip(t["c"].tolist(), case.segments, strict=True):
            x = t["x"][rows]
            y = F.linear(x, t["base"])
            for down, up, c in zip(downs, ups, c_K, strict=True):
                y = y + (F.linear(F.linear(x.to(down.dtype), down), up) * c).to(y.dtype)
            outputs.append(y)
        return torch.cat(outputs)

    return call


def peft(case: Case, sets: Sequence[Tensors]) -> Call:
    """PEFT's own layer with K active adapters: one call per weighting, its scales set before."""
    layers = {id(t): _peft_layer(case, t) for t in sets}
    names = [f"copy{k}" for k in range(case.K)]

    def call(t: Tensors) -> Tensor:
        layer, outputs = layers[id(t)], []
        for c_K, rows in zip(t["c"].tolist(), case.segments, strict=True):
            for name, c in zip(names, c_K, strict=True):
                layer.set_scale(name, c)
            outputs.append(layer(t["x"][rows]))
        return torch.cat(outputs)

    return call


def _peft_layer(case: Case, t: Tensors) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    host = nn.ModuleDict({"linear": nn.Linear(case.D, case.N, bias=False, device="meta")})
    host["linear"].weight = nn.Parameter(t["base"], requires_grad=False)
    config = LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules=["linear"], init_lora_weights=False)
    pairs = zip(t["down"].split(case.rank), t["up"].split(case.rank, dim=1), strict=True)
    for k, (down, up) in enumerate(pairs):
        inject_adapter_in_model(config, host, adapter_name=f"copy{k}")
        layer: Any = host["linear"]
        layer.lora_A[f"copy{k}"].weight = nn.Parameter(down, requires_grad=False)
        layer.lora_B[f"copy{k}"].weight = nn.Parameter(up.contiguous(), requires_grad=False)
    layer.set_adapter([f"copy{k}" for k in range(case.K)])
    return layer.eval()
