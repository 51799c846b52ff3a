"""mixed_linear against all that a user would write instead, forward and forward + backward.

Legend: x_MD rows, base_ND, deltas_NKD, premixed_ND, c_SK, c_MK; M rows, D in, N out, K copies, S distinct weightings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import targets
from bench.cases import Case, product, shrunk
from bench.correctness import Answers, Part, expect, sample
from bench.workload import (
    CEILING,
    OURS,
    Call,
    Contender,
    Draw,
    Tensors,
    Workload,
    gemm_operands,
    num_bytes,
    rotate,
)
from clp_kernels import available_backends, backend_for, extension, mixed_linear, mixed_linear_ref

MAX_PREMIXED = 64  # weightings up to which premixing in every call is a peer at all
MOST_DECODED = 64  # rows up to which a kernel for few rows is worth its place among the back-ends
WIDE = 4096  # N and D of the cases for GPUs
# With torch.compile of the two best peers.
COMPILED = (
    "decode-f32-K2-M4",
    "sequences-f32-K2-M1024",
    f"decode-bf16-K2-M8-{WIDE}x{WIDE}",
    "train-bf16-K2-M4096-forward",
)


def test_mixed_linear(measured: Callable[[Workload], None], case: Case, device: str) -> None:
    measured(build(case, device))


def cases(suite: str, device: str) -> dict[str, Case]:
    if suite == "tiny":
        decode, train = Case(3, 48, 40, 2, 3), Case(24, 48, 40, 3, 4, "bf16", "f32", gradients="all")
        return {"tiny-decode": decode, "tiny-train": train} | shrunk(gpu_cases())
    found = product() if suite == "full" else decode_cases() | rows_cases() | training_cases() | memory_cases()
    if device == "cuda":  # launched from Python, and replayed from a CUDA graph
        forward = {name: case for name, case in found.items() if case.gradients == "none"}
        found |= {f"{name}-graph": replace(case, is_graph=True) for name, case in forward.items()}
    return found


def gpu_cases() -> dict[str, Case]:
    """What is asked of a GPU, bfloat16, replayed from CUDA graphs: decode, one weighting, sequences; some eagerly."""
    small, wide, mlp = (2048, 2048), (WIDE, WIDE), (11008, WIDE)
    decode = [(*wide, 2, M) for M in (1, 4, 8, 16)] + [(*wide, 3, 8), *((*wide, 4, M) for M in (1, 4, 16))]
    decode += [(*mlp, 2, 16), (*small, 3, 4), (*small, 4, 16)]
    one = Case(16, WIDE, WIDE, 2, 16, "bf16", is_cold=True, is_graph=True, is_gpu=True)
    found = {f"decode-bf16-K{K}-M{M}-{N}x{D}": replace(one, M=M, N=N, D=D, K=K, S=M) for N, D, K, M in decode}
    found["decode-bf16-K2-M16-weightings"] = replace(one, counts=(1, 2, 4, 8))
    found["decode-bf16-K4-M16-weightings"] = replace(one, K=4, counts=(1, 2, 4, 8))
    for gradients, passes in (("none", "forward"), ("all", "backward")):
        train = replace(one, S=1, is_cold=False, gradients=gradients)
        for K, M in ((2, 2048), (2, 4096), (2, 8192), (4, 2048), (4, 4096), (4, 8192)):
            found[f"train-bf16-K{K}-M{M}-{passes}"] = replace(train, K=K, M=M)
        found[f"sequences-bf16-K2-M4096-{passes}"] = replace(train, M=4096, S=8)
    eager = ("decode-bf16-K2-M16-4096x4096", "train-bf16-K2-M4096-backward", "sequences-bf16-K2-M4096-backward")
    return found | {f"{name}-eager": replace(found[name], is_graph=False) for name in eager}


def decode_cases() -> dict[str, Case]:
    """Each row its own weighting, weights from memory: bound by reading every stream once."""
    found = {
        f"decode-{dtype}-K{K}-M{M}": Case(M, 2048, 2048, K, M, dtype, is_cold=True)
        for dtype in ("f32", "bf16")
        for K, M in ((2, 1), (2, 4), (3, 4), (4, 1), (4, 4))
    }
    one = Case(1, 2048, 2048, 2, 1, is_cold=True)
    found["decode-folded-f32-K2-M1"] = replace(one, has_base=False)
    found["decode-smollm2-f32-K2-M1"] = replace(one, N=576, D=576)
    found["decode-bf16-f32deltas-K2-M1"] = replace(one, dtype="bf16", deltas="f32")
    return found


def rows_cases() -> dict[str, Case]:
    """Many rows, each its own weighting: between the limits of memory and of arithmetic."""
    settings = ((16, 2, "f32"), (64, 2, "f32"), (16, 4, "f32"), (16, 2, "bf16"), (64, 2, "bf16"))
    return {f"rows-{d}-K{K}-M{M}": Case(M, 2048, 2048, K, M, d, is_cold=True) for M, K, d in settings}


def training_cases() -> dict[str, Case]:
    """Forward and backward to x and the deltas, under one weighting, and under one per sequence."""
    settings = (
        (512, 2048, 2, "f32"),
        (512, 2048, 4, "f32"),
        (512, 2048, 8, "f32"),
        (2048, 2048, 2, "f32"),
        (512, 4096, 2, "f32"),
        (512, 2048, 2, "bf16"),
        (512, 2048, 4, "bf16"),
    )
    found = {f"train-{d}-K{K}-M{M}-N{N}": Case(M, N, N, K, 1, d, gradients="all") for M, N, K, d in settings}
    return found | {"sequences-f32-K2-M1024": Case(1024, 2048, 2048, 2, 8, gradients="all")}


def memory_cases() -> dict[str, Case]:
    """Weights of 128 MiB a stream: what a call allocates beside its results must not grow with them."""
    return {
        "memory-decode-f32-K2-M4": Case(4, 8192, 4096, 2, 4, is_cold=True),
        "memory-train-f32-K2-M512": Case(512, 8192, 4096, 2, 1, gradients="all"),
    }


def goals(case: Case) -> tuple[targets.Target, ...]:
    found = [targets.peak_at_most(4.0 * torch.get_num_threads())] if case.N * case.D >= 2**25 else []
    if case.is_gpu:
        return gpu_goals(case)
    stream_values = case.N * case.D
    if case.gradients == "none" and case.S == case.M:
        if case.M <= 4:
            found.append(targets.READS_AT_BANDWIDTH)
        else:
            found.append(targets.near_binding_floor(2 * case.M * (case.K + case.has_base) * stream_values))
            found.append(targets.faster_than_best_peer(1.3 if case.M == 16 else 1.0))
    if case.gradients == "all" and case.S == 1:
        extra_bytes = (3 * case.K - 1) * stream_values * case.deltas_dtype.itemsize
        found.append(targets.plain_and_extra_bytes(extra_bytes))
        if may_round(case, "cpu"):  # as `plain` does
            found.append(targets.plain_and_extra_bytes(extra_bytes, of=f"{OURS}-rounded"))
    if case.gradients == "all" and case.dtype == "f32" and case.K == 2 and case.S < case.M:
        found.append(targets.at_most_times_plain(1.10 if case.S == 1 else 1.35))
    return tuple(found)


def gpu_goals(case: Case) -> tuple[targets.Target, ...]:
    """Decode reads at the memory's rate, levelly; training hides half of what the copies add to the traffic."""
    found = [targets.peak_at_most(32.0)]
    weight_bytes = case.N * case.D * case.deltas_dtype.itemsize
    if case.S == case.M:
        is_long = (case.K + 1) * weight_bytes >= 128e6
        found += [targets.reads_at(0.95 if is_long else 0.90), targets.faster_than("concat", 1.0)]
    elif case.S == 1:
        found += [targets.plain_and_extra_bytes(extra_bytes(case), plain=1.05, extra=0.5)]
        found += [targets.faster_than_every("premix", 1.0)]
    else:
        found += [targets.at_most_times_plain(1.40), targets.faster_than("concat", 1.8)]
    if case.counts:
        found.append(targets.level_over_weightings(1.03))
    return tuple(found)


def extra_bytes(case: Case) -> int:
    """What a step under one weighting moves beside a plain layer's: the streams once forward; backward the copies
    again, and the gradients of all copies but one."""
    stream_bytes = case.N * case.D * case.deltas_dtype.itemsize
    return stream_bytes * (case.K + 1 if case.gradients == "none" else 3 * case.K - 1)


def build(case: Case, device: str) -> Workload:
    draw, dtype, std = Draw(case, device), case.x_dtype, case.D**-0.5
    shared = {"x": draw.normal(case.M, case.D, dtype=dtype), **draw.coefficients()}
    dy_MN = draw.normal(case.M, case.N, dtype=dtype)
    streams = {"deltas": draw.normal(case.N, case.K, case.D, dtype=case.deltas_dtype, std=std)}
    premixed_ND = torch.einsum("k,nkd->nd", shared["c"][0], streams["deltas"].float())
    if case.has_base:
        streams["base"] = draw.normal(case.N, case.D, dtype=dtype, std=std)
        premixed_ND += streams["base"]
    shared |= {f"row_map_S{S}": torch.arange(case.M, dtype=torch.int32, device=device) % S for S in case.counts}
    buffer, sets = rotate(case, device, streams, {"premixed": premixed_ND.to(dtype)})
    sets = [shared | tensors for tensors in sets]
    return Workload(
        case,
        device,
        sets,
        contenders(case, device, sets[0]),
        expected=lambda: answers(case, sets[0], dy_MN),
        gradients=(dy_MN,),
        streams=buffer,
        stream_bytes=num_bytes(streams),
        row_bytes=num_bytes({"x": shared["x"], "y": dy_MN}),
        flops=2 * case.M * case.N * case.D * (1 if case.gradients == "none" else 3),
        gemm=gemm_operands(draw, sets[0]["premixed"].detach()),
        targets=goals(case),
        derived={"hidden share of the extra bytes": targets.hidden_share(extra_bytes(case))}
        if case.is_gpu and case.S == 1 < case.M
        else {},
    )


def answers(case: Case, t: Tensors, dy_MN: Tensor) -> Answers:
    """Sampled rows of y and of the gradient of x; sampled rows of the weights' gradients."""
    rows, outs = sample(case.M, dy_MN.device), sample(case.N, dy_MN.device)
    by_rows = t | {name: t[name][rows] for name in t if name == "x" or name.startswith("row_map")}
    by_outs = t | {name: t[name][outs] for name in ("base", "deltas", "premixed") if name in t}
    parts = [
        Part(by_rows, (dy_MN[rows],), {"y": rows, "d_x": rows}),
        Part(by_outs, (dy_MN[:, outs],), {"d_deltas": outs, "d_premixed": outs}),
    ]

    def mixing(row_map: str) -> Contender:
        def call(t: Tensors) -> Tensor:
            return mixed_linear_ref(t["x"], t.get("base"), t["deltas"], t["c"], row_map=t[row_map])

        return Contender(call, case.trained("x", "deltas"))

    references = {"mix": mixing("row_map"), CEILING: Contender(plain, case.trained("x", "premixed"))}
    return expect(references | {f"S{S}": mixing(f"row_map_S{S}") for S in case.counts}, parts)


def contenders(case: Case, device: str, tensors: Tensors) -> dict[str, Contender]:
    calls: dict[str, Call] = {OURS: ours("auto"), "streams": streams, "concat": concat, "einsum": einsum}
    if case.S <= MAX_PREMIXED:
        calls["premix"] = premix(case)
    if case.is_gpu and case.S <= MAX_PREMIXED:
        calls["premix_in_turn"] = premix_in_turn(case)
    if may_round(case, device):
        calls[f"{OURS}-rounded"] = ours("auto", exact_delta=False)
    if device == "cuda":  # on a CPU the reference is `concat`, and "auto" is the C++ kernel
        missing = available_backends()
        arguments = (tensors["x"], tensors.get("base"), tensors["deltas"], tensors["c"])
        few = set() if case.M <= MOST_DECODED else {"cuda"}
        others = missing.keys() - few - {"cpp", backend_for(*arguments, row_map=tensors["row_map"])}
        calls |= {f"{OURS}-{name}": ours(name) for name in sorted(others) if missing[name] is None}
    found = {name: Contender(call, case.trained("x", "deltas")) for name, call in calls.items()}
    found |= {f"{OURS}-S{S}": Contender(ours("auto", f"row_map_S{S}"), answers=f"S{S}") for S in case.counts}
    return found | {CEILING: Contender(plain, case.trained("x", "premixed"), CEILING)}


def may_round(case: Case, device: str) -> bool:
    """Whether base and mix as one 16-bit weight, which is what `plain` and `premix` multiply, is a form of its own."""
    is_half = case.dtype != "f32" and case.has_base and case.S < case.M
    return is_half and (case.is_gpu or (device == "cpu" and extension.isa() == "amx_bf16"))


def ours(backend: str, row_map: str = "row_map", exact_delta: bool = True) -> Call:
    def call(t: Tensors) -> Tensor:
        how = {"row_map": t[row_map], "backend": backend, "exact_delta": exact_delta}
        return mixed_linear(t["x"], t.get("base"), t["deltas"], t["c"], **how)

    return call


def plain(t: Tensors) -> Tensor:
    """F.linear on one premixed weight: another result, the ceiling."""
    return F.linear(t["x"], t["premixed"])


def streams(t: Tensors) -> Tensor:
    """F.linear per stream, then the weighted sum."""
    x_MD, c_MK = t["x"], t["c_rows"]
    parts = [F.linear(x_MD, t["base"])] if "base" in t else []
    for k, copy_ND in enumerate(t["deltas"].to(x_MD.dtype).unbind(1)):
        parts.append(c_MK[:, k : k + 1] * F.linear(x_MD, copy_ND))
    return functools.reduce(torch.add, parts)


def premix(case: Case) -> Call:
    """One mixed weight per weighting, made in every call, then F.linear on its segment of rows."""

    def call(t: Tensors) -> Tensor:
        outputs = []
        for c_K, rows in zip(t["c"], case.segments, strict=True):
            mixed_ND = torch.einsum("k,nkd->nd", c_K.to(t["deltas"].dtype), t["deltas"]).to(t["x"].dtype)
            outputs.append(F.linear(t["x"][rows], t["base"] + mixed_ND if "base" in t else mixed_ND))
        return torch.cat(outputs)

    return call


def premix_in_turn(case: Case) -> Call:
    """The same with one addcmul for each copy, which is what eager torch adds up fastest on a GPU."""

    def call(t: Tensors) -> Tensor:
        outputs, copies = [], t["deltas"].unbind(1)
        for c_K, rows in zip(t["c"].to(t["x"].dtype), case.segments, strict=True):
            mixed_ND = t["base"]
            for c, copy_ND in zip(c_K, copies, strict=True):
                mixed_ND = torch.addcmul(mixed_ND, copy_ND, c)
            outputs.append(F.linear(t["x"][rows], mixed_ND))
        return torch.cat(outputs)

    return call


def concat(t: Tensors) -> Tensor:
    """The K-concatenated GEMM on c (x) x."""
    wide_x = (t["c_rows"][:, :, None] * t["x"][:, None, :]).flatten(1)
    return _beside_base(t, F.linear(wide_x, t["deltas"].flatten(1).to(t["x"].dtype)))


def einsum(t: Tensors) -> Tensor:
    """All copies' outputs in one einsum, and a second one over the copies."""
    z_MNK = torch.einsum("md,nkd->mnk", t["x"], t["deltas"].to(t["x"].dtype))
    return _beside_base(t, torch.einsum("mnk,mk->mn", z_MNK, t["c_rows"]))


def _beside_base(t: Tensors, y_MN: Tensor) -> Tensor:
    return F.linear(t["x"], t["base"]) + y_MN if "base" in t else y_MN
