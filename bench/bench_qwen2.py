"""A whole model of Qwen2.5-1.5B's shape with random weights: decode and training steps, conditioned and plain.

Legend: B rows, T tokens of a row (or of its KV cache), K copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import targets
from bench.cases import DTYPES, Case
from bench.workload import CEILING, OURS, Contender, Info, Tensors, Workload

QWEN2 = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "num_hidden_layers": 28,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
DELTAS_STD = 2e-3


@dataclass(frozen=True)
class Step:
    """One step of a model: B rows of T tokens under S weightings; decode adds one token to rows that have T - 1."""

    B: int
    T: int
    S: int
    is_training: bool
    is_tiny: bool = False
    dtype: str = "bf16"
    is_graph: bool = False


def gpu_cases() -> dict[str, Step]:
    decode = Step(32, 256, 32, is_training=False, is_graph=True)
    return {"qwen2-decode-rows32": decode, "qwen2-train-8x4x512": Step(32, 512, 8, is_training=True)}


def cases(suite: str, device: str) -> dict[str, Step]:
    if suite != "tiny":
        return {}
    tiny = {"is_tiny": True, "dtype": "f32"}
    return {
        "tiny-qwen2-decode": Step(3, 5, 3, is_training=False, **tiny),
        "tiny-qwen2-train": Step(4, 6, 2, is_training=True, **tiny),
    }


def test_qwen2(measured: Callable[[Workload], None], case: Step, device: str) -> None:
    measured(build(case, device))


def build(case: Step, device: str) -> Workload:
    plain, ours = make_models(case, device)
    share = check(case, plain, ours)
    first_S = torch.linspace(0, 1, case.S)
    c_BK = torch.stack([first_S, 1 - first_S], dim=1).repeat_interleave(case.B // case.S, 0)
    if case.is_training:
        contenders = {
            CEILING: training_step(plain, attention(plain), {}),
            OURS: training_step(ours, copies(ours), {"coefficients": c_BK}),
        }
        goals = [targets.at_most_times_plain(1.15)]
    else:
        on_device = {"coefficients": c_BK.to(device)}  # a graph copies nothing from the host
        contenders = {CEILING: decode_step(case, plain, {}), OURS: decode_step(case, ours, on_device)}
        goals = [targets.at_most_times_plain(1.25)]
    ids_BT = torch.randint(1, plain.config.vocab_size, (case.B, case.T), device=device)
    plain_bytes, extra_bytes = size(plain.parameters()), size(copies(ours))
    num_weights = sum(p.numel() for p in plain.parameters())
    rows = case.B * case.T if case.is_training else case.B
    return Workload(
        Case(
            *(rows, plain.config.vocab_size, plain.config.hidden_size, 2, case.S, case.dtype),
            gradients="all" if case.is_training else "none",
            is_graph=case.is_graph,
            is_gpu=True,
        ),
        device,
        [{"x": ids_BT}],
        {name: Contender(call, answers=name) for name, call in contenders.items()},
        expected=lambda: {OURS: {}, CEILING: {}},
        gradients=None,
        stream_bytes=plain_bytes + extra_bytes,
        row_bytes=0,
        flops=2 * rows * num_weights * (3 if case.is_training else 1),
        targets=goals,
        calls=1,
        derived={
            "error of a mixed row over its budget": lambda _: share,
            "time / plain by bytes of weights alone": lambda _: 1 + extra_bytes / plain_bytes,
            "GiB of plain's weights and optimiser": lambda _: resident_bytes(plain, case, attention(plain)) / 2**30,
            "GiB of our weights and optimiser": lambda _: resident_bytes(ours, case, copies(ours)) / 2**30,
            "GiB above them, plain's peak": lambda i: peak_gib(i, CEILING),
            "GiB above them, our peak": lambda i: peak_gib(i, OURS),
        },
    )


def make_models(case: Step, device: str) -> tuple[Any, Any]:
    """The plain model, and attn-CLP of a copy of it with differences that matter."""
    transformers = pytest.importorskip("transformers")
    import copy

    import clp_engine as clp

    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{**QWEN2, **(TINY if case.is_tiny else {})})
    with torch.device(device):
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[case.dtype])
    plain.to(device).eval().requires_grad_(False)
    ours = clp.get_clp_model(copy.deepcopy(plain), clp.CLPConfig(rewards=["a", "b"], variant="attn"))
    ours.to(DTYPES[case.dtype])
    with torch.no_grad():
        for copies_of_layer in copies(ours):
            copies_of_layer.normal_(std=DELTAS_STD)
    return plain, ours


def attention(plain: Any) -> list[Tensor]:
    """The weights that plain fine-tuning of the attention trains."""
    return [p for name, p in plain.named_parameters() if ".self_attn." in name and name.endswith("weight")]


def copies(ours: Any) -> list[Tensor]:
    return [p for name, p in ours.named_parameters() if name.endswith("deltas")]


def check(case: Step, plain: Any, ours: Any) -> float:
    """Our error as a share of its budget: a row of a mixed batch is the model at its weighting, which steers.

    Raises:
        AssertionError: beyond the budget.
    """
    first = torch.linspace(0, 1, 3)
    w_B2 = torch.stack([first, 1 - first], dim=1)
    ids_BT = torch.randint(1, plain.config.vocab_size, (3, 8), device=plain.device)
    with torch.inference_mode():
        mixed = ours(ids_BT, reward_weights=w_B2).logits[1].float()
        alone = ours.collapse(w_B2[1])(ids_BT[1:2]).logits[0].float()
        steered = (alone - plain(ids_BT[1:2]).logits[0].float()).norm()
    budget = 1e-3 if case.dtype == "f32" else 0.5
    share = float((mixed - alone).norm() / (budget * steered))
    assert share <= 1, f"a row of a mixed batch is not the model at its weighting: {share} of the budget"
    return share


class FullCache:
    """A KV cache of T tokens whose last one every step writes again: each step reads all, and no size changes."""

    def __init__(self, case: Step, model: Any) -> None:
        config = model.config
        head = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, case.B, config.num_key_value_heads, case.T, head)
        self.keys_values = torch.randn(shape, dtype=model.dtype, device=model.device)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        stored = self.keys_values[layer]
        stored[0, :, :, -1:].copy_(keys)
        stored[1, :, :, -1:].copy_(values)
        return stored[0], stored[1]

    def get_seq_length(self, *_: Any) -> int:
        return self.keys_values.shape[4] - 1


def decode_step(case: Step, model: Any, weighting: dict[str, Tensor]) -> Callable[[Tensors], Tensor]:
    cache = FullCache(case, model)
    position_ids = torch.full((case.B, 1), case.T - 1, device=model.device)
    # A query of the last token sees everything: no mask, which transformers would make by reading the cache's length.
    no_mask = {"full_attention": None}

    def step(t: Tensors) -> Tensor:
        out = model(
            input_ids=t["x"][:, -1:],
            attention_mask=no_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **weighting,
        )
        return out.logits[:, -1]

    return step


def training_step(model: Any, trained: list[Tensor], weighting: dict[str, Tensor]) -> Callable[[Tensors], Tensor]:
    """Loss of the next tokens, backward, AdamW; gradients are gone after it."""
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step(t: Tensors) -> Tensor:
        loss = model(input_ids=t["x"], labels=t["x"], use_cache=False, **weighting).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def size(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def resident_bytes(model: Any, case: Step, trained: list[Tensor]) -> int:
    """Weights, and two moments of each trained one."""
    return size(model.parameters()) + (2 * size(trained) if case.is_training else 0)


def peak_gib(info: Info, name: str) -> float:
    return info["peak_mib_above_results"][name]["allocator"] / 2**10
