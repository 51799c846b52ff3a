"""The head: log-probs and entropies under a per-row mix, against logits that exist as a whole.

Legend: x_MD hidden states, base_VD, deltas_VKD, targets_M; M tokens, D in, V vocabulary (the case's N), K copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import targets
from bench.cases import HIDDEN, Case, product, shrunk
from bench.correctness import Answers, Expected, sample
from bench.workload import CEILING, OURS, Contender, Draw, Tensors, Workload, gemm_operands, num_bytes
from clp_kernels import mixed_linear_logprob, mixed_linear_ref

VOCABULARIES = {"smollm2-135m": 49152, "0.5b": 151936, "1.5b": 151936, "7b": 32000}
GEMM_OUTPUTS = 4096
OUTPUTS = ("log_prob", "entropy")
NUM_CHECKED = 8
MAX_MIXED = 65536  # words up to which mixing logits is a peer: three times the ceiling's time and memory
# Weights up to which torch's own head is a peer on the CPU: of 131072 words by 2048, a call took 84 to 108 s (512
# tokens, forward and backward, two Zen 3 cores).
MAX_FUSED = 49152 * 576
CHUNK = 4096  # words that are widened to float64 at a time


def test_mixed_linear_logprob(measured: Callable[[Workload], None], case: Case, device: str) -> None:
    measured(build(case, device))


def cases(suite: str, device: str) -> dict[str, Case]:
    if suite == "tiny":
        trained = Case(12, 200, 40, 2, 4, gradients="all", has_entropy=True)
        tiny = {"tiny-head-trained": trained, "tiny-head-frozen": Case(12, 200, 40, 3, 1, "bf16", gradients="x")}
        return tiny | shrunk(gpu_cases())
    if suite == "full":
        layers = {model: ((V, HIDDEN[model]),) for model, V in VOCABULARIES.items()}
        found = product(layers, rows=(1, 16, 128, 512), gradients=("none", "x", "all"))
        return found | {f"{name}-entropy": replace(case, has_entropy=True) for name, case in found.items()}
    frozen = Case(512, 131072, 2048, 2, 4, gradients="x")
    return {
        "head-frozen-f32-K2": frozen,
        "head-frozen-entropy-f32-K2": replace(frozen, has_entropy=True),
        "head-trained-f32-K2": replace(frozen, gradients="all"),
        "head-smollm2-frozen-f32-K2": replace(frozen, N=49152, D=576),
        "head-smollm2-forward-bf16-K2": Case(64, 49152, 576, 2, 4, "bf16", has_entropy=True),
    }


def gpu_cases() -> dict[str, Case]:
    """Qwen2.5-1.5B's head: one weighting, and one for each token."""
    one = Case(4096, VOCABULARIES["1.5b"], HIDDEN["1.5b"], 2, 1, "bf16", is_graph=True, is_gpu=True)
    found = {"head-bf16-K2-M4096": one, "head-bf16-K2-M4096-rows": replace(one, S=4096)}
    return found | {
        "head-bf16-K2-M8192": replace(one, M=8192),
        "head-bf16-K2-M4096-wide": replace(one, N=65536, D=4096),
    }


def goals(case: Case) -> tuple[targets.Target, ...]:
    """A trained head makes its logits twice; without a gradient of entropy a frozen one forms dx in the forward."""
    if case.is_gpu:  # under one weighting one product is enough, else each stream has its own
        products = 1 if case.S == 1 else case.K + 1
        at_rate = targets.products_at_rate(products * 2 * case.M * case.N * case.D, 0.8)
        return at_rate, targets.peak_at_most(32.0)
    if case.gradients == "none":
        return ()
    over_plain = 1.4 if case.gradients == "all" else 1.5 if case.has_entropy else 1.15
    logits_mib = 4 * case.M * case.N / 2**20
    return targets.at_most_times_plain(over_plain), targets.peak_at_most(0.05 * logits_mib)


def build(case: Case, device: str) -> Workload:
    draw, dtype, std = Draw(case, device), case.x_dtype, case.D**-0.5
    t = {"x": draw.normal(case.M, case.D, dtype=dtype), **draw.coefficients(), "targets": draw.ids(case.N)}
    t["base"] = draw.normal(case.N, case.D, dtype=dtype, std=std)
    t["deltas"] = draw.normal(case.N, case.K, case.D, dtype=case.deltas_dtype, std=std)
    t["premixed"] = t["base"].detach()  # any weight does for the ceiling; one more would not fit into 8 GB
    outputs = OUTPUTS if case.has_entropy else OUTPUTS[:1]
    d_outputs = draw.normal(len(outputs), case.M, dtype=torch.float32)
    rows = sample(case.M, device)[:NUM_CHECKED]
    d_checked = torch.zeros_like(d_outputs).index_copy_(1, rows, d_outputs[:, rows])
    products = {"none": 1, "x": 2, "all": 3}[case.gradients]
    return Workload(
        case,
        device,
        [t],
        contenders(case, device),
        expected=lambda: answers(case, t, rows, d_checked),
        outputs=outputs,
        gradients=tuple(d_outputs),
        check_gradients=tuple(d_checked),
        stream_bytes=num_bytes({"base": t["base"], "deltas": t["deltas"]}),
        row_bytes=num_bytes({"x": t["x"], "outputs": d_outputs}),
        flops=2 * case.M * case.N * case.D * products,
        gemm=gemm_operands(draw, t["premixed"].detach()[:GEMM_OUTPUTS]),
        targets=goals(case),
        notes={name: "not installed" for name in PACKAGES if case.is_gpu and find_spec(PACKAGES[name]) is None},
    )


def contenders(case: Case, device: str) -> dict[str, Contender]:
    mixing, alone = case.trained("x", "deltas"), case.trained("x", "premixed")
    found = {
        OURS: Contender(ours(case), mixing),
        CEILING: Contender(lambda t: from_logits(plain(t), t["targets"], case.has_entropy), alone, CEILING),
    }
    if case.N <= MAX_MIXED or device == "cuda":
        found["concat"] = Contender(lambda t: from_logits(concat(t), t["targets"], case.has_entropy), mixing)
    fuses = device == "cuda" or case.N * case.D <= MAX_FUSED
    if fuses and not case.has_entropy and hasattr(F, "linear_cross_entropy"):
        found["linear_cross_entropy"] = Contender(cross_entropy, alone, CEILING)
    for name, package in PACKAGES.items():
        if case.is_gpu and device == "cuda" and find_spec(package) is not None:
            found[name] = Contender(FUSED[name], alone, CEILING)
    return found


def ours(case: Case) -> Callable[[Tensors], tuple[Tensor, ...]]:
    def call(t: Tensors) -> tuple[Tensor, ...]:
        arguments = (t["x"], t["base"], t["deltas"], t["c"], t["targets"])
        log_prob, entropy = mixed_linear_logprob(*arguments, row_map=t["row_map"], return_entropy=case.has_entropy)
        return (log_prob,) if entropy is None else (log_prob, entropy)

    return call


def plain(t: Tensors) -> Tensor:
    """Logits by F.linear on one weight: another result, the ceiling."""
    return F.linear(t["x"], t["premixed"])


def concat(t: Tensors) -> Tensor:
    """Logits by F.linear on the base plus the K-concatenated GEMM on c (x) x."""
    wide_x = (t["c_rows"][:, :, None] * t["x"][:, None, :]).flatten(1)
    return F.linear(t["x"], t["base"]) + F.linear(wide_x, t["deltas"].flatten(1).to(t["x"].dtype))


def from_logits(logits_MV: Tensor, targets_M: Tensor, has_entropy: bool) -> tuple[Tensor, ...]:
    log_probs_MV = logits_MV.log_softmax(1, dtype=torch.promote_types(logits_MV.dtype, torch.float32))
    picked_M = log_probs_MV.gather(1, targets_M[:, None]).squeeze(1)
    return (picked_M, -(log_probs_MV.exp() * log_probs_MV).sum(1)) if has_entropy else (picked_M,)


def cross_entropy(t: Tensors) -> Tensor:
    """torch's own head on one weight, in chunks of rows; without options it is what `plain` does."""
    options = torch.nn.LinearCrossEntropyOptions()
    loss_M = F.linear_cross_entropy(t["x"], t["premixed"], t["targets"], reduction="none", options=options)
    return -loss_M.float()


def liger(t: Tensors) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(t["premixed"], t["x"], t["targets"]).float()


def cut_cross_entropy(t: Tensors) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(t["x"], t["premixed"], t["targets"], reduction="none").float()


PACKAGES = {"liger": "liger_kernel", "cut_cross_entropy": "cut_cross_entropy"}  # heads on one weight, where installed
FUSED = {"liger": liger, "cut_cross_entropy": cut_cross_entropy}


def answers(case: Case, t: Tensors, rows: Tensor, d_outputs: Tensor) -> Answers:
    """What the checked rows give: their outputs and gradients, and some words' share of the weights' gradients."""
    words = sample(case.N, rows.device)
    knows = dict.fromkeys((*OUTPUTS, "d_x"), rows) | dict.fromkeys(("d_deltas", "d_premixed"), words)
    few = t | {name: t[name].detach()[rows] for name in ("x", "targets", "row_map")}

    def mixed(t: Tensors) -> Tensor:
        return mixed_linear_ref(t["x"], t["base"], t["deltas"], t["c"], row_map=t["row_map"])

    found = {}
    for answer, linear, weights in (("mix", mixed, ("base", "deltas")), (CEILING, plain, ("premixed",))):
        exact, own = (
            evaluate(case, few, linear, weights, words, d_outputs[:, rows].to(dtype))
            for dtype in (torch.float64, torch.float32)
        )
        found[answer] = {name: Expected(knows[name], exact[name], own[name]) for name in exact}
    return found


def evaluate(
    case: Case,
    t: Tensors,
    linear: Callable[[Tensors], Tensor],
    weights: Sequence[str],
    words: Tensor,
    d_outputs: Tensor,
) -> Tensors:
    """Return outputs and gradients in d_outputs' dtype. The vocabulary is widened by chunks: whole it is too big."""
    dtype = d_outputs.dtype
    x_RD = t["x"].to(dtype).requires_grad_()
    shared = t | {"x": x_RD, "c": t["c"].to(dtype)}

    def part(index: slice | Tensor) -> Tensors:
        return shared | {name: t[name].detach()[index].to(dtype) for name in weights}

    chunks = [slice(begin, begin + CHUNK) for begin in range(0, case.N, CHUNK)]
    with torch.no_grad():
        logits_RV = torch.cat([linear(part(chunk)) for chunk in chunks], 1)
    with torch.enable_grad():
        values = from_logits(logits_RV.requires_grad_(), t["targets"], case.has_entropy)
        named = {name: value.detach() for name, value in zip(OUTPUTS, values, strict=False)}
        if case.gradients == "none":
            return named
        (d_logits_RV,) = torch.autograd.grad(values, logits_RV, tuple(d_outputs))
        named["d_x"] = torch.zeros_like(x_RD)
        for chunk in chunks:
            named["d_x"] += torch.autograd.grad(linear(part(chunk)), x_RD, d_logits_RV[:, chunk])[0]
        if case.gradients == "all":
            some, trained = part(words), weights[-1]
            some[trained].requires_grad_()
            (named[f"d_{trained}"],) = torch.autograd.grad(linear(some), some[trained], d_logits_RV[:, words])
    return named
