"""What a call of mixed_linear costs before it computes anything: tiny shapes, in each of torch's modes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import targets
from bench.bench_mixed_linear import build
from bench.cases import Case
from bench.workload import CEILING, OURS, Contender, Tensors, Workload

CALLS = 500
LAYERS = 30
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
PROMPT_TOKENS = 64
MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
LIMITS_US = {"inference": 3.0, "no_grad": 3.0, "grad": 8.0}


@dataclass(frozen=True)
class Overhead:
    """mode: of MODES ("grad": a forward that records a graph), or "step": `layers` against a model's decode step."""

    mode: str
    layers: int = LAYERS


def test_overhead(measured: Callable[[Workload], None], case: Overhead, device: str) -> None:
    measured(build_step(case.layers, device) if case.mode == "step" else build_calls(case.mode, device))


def cases(suite: str, device: str) -> dict[str, Overhead]:
    if suite == "tiny":
        return {"tiny-overhead-grad": Overhead("grad"), "tiny-overhead-step": Overhead("step", layers=1)}
    return {f"overhead-{mode}": Overhead(mode) for mode in MODES} | {"overhead-smollm2-step": Overhead("step")}


def build_calls(mode: str, device: str) -> Workload:
    work = build(Case(1, 64, 64, 2, 1, gradients="all" if mode == "grad" else "none"), device)
    work.contenders = {name: work.contenders[name] for name in (OURS, CEILING)}
    work.check_gradients, work.gradients = work.gradients, None  # the check alone runs the backward
    work.mode, work.calls = MODES[mode], CALLS
    work.targets = (targets.overhead_at_most(LIMITS_US[mode]),)
    return work


def build_step(layers: int, device: str) -> Workload:
    """attn-CLP's calls of one decode step (q, k, v, o) on tiny shapes, beside a decode step of a plain model."""
    work = build(Case(1, 64, 64, 2, 1), device)
    expected, calls = work.expected, 4 * layers

    def repeated(contender: Contender) -> Contender:
        def call(tensors: Tensors) -> Any:
            for _ in range(calls - 1):
                contender.call(tensors)
            return contender.call(tensors)

        return Contender(call, answers=contender.answers)

    work.contenders = {name: repeated(work.contenders[name]) for name in (OURS, CEILING)}
    work.contenders["model-step"] = Contender(_decode_step(layers, device), answers="model")
    work.expected = lambda: {**expected(), "model": {}}
    work.mode, work.calls = torch.inference_mode, 1
    work.targets = (
        targets.Target(
            f"{calls} calls above plain / decode step",
            lambda i: (i["median_us"][OURS] - i["median_us"][CEILING]) / i["median_us"]["model-step"],
            lambda _: 0.05,
        ),
    )
    return work


def _decode_step(layers: int, device: str) -> Callable[[Tensors], Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SMOLLM2, num_hidden_layers=layers)
    model = transformers.LlamaForCausalLM(config).eval().to(device)
    prompt = torch.arange(PROMPT_TOKENS, device=device)[None]
    cache = transformers.DynamicCache(config=config)
    with torch.inference_mode():
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step(_: Tensors) -> Tensor:
        logits = model(prompt[:, :1], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits[:, -1].log_softmax(-1)

    return step
