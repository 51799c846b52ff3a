"""The attention blocks of a decode step, their norm, q, k, v and rotation by one mixed_qkv, one by one, and plain.

A block is input norm, projections, rotation, cache, attention and output projection, of each layer of a model of
SmolLM2-135M's shape with random weights, behind a prompt of 64 tokens. Legend: M rows, L layers, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import targets
from bench.bench_overhead import LAYERS, PROMPT_TOKENS, SMOLLM2
from bench.cases import DTYPES, Case
from bench.correctness import Expected
from bench.workload import CEILING, OURS, Contender, Draw, Tensors, Workload, num_bytes
from clp_engine.layers.decoder import MOST_ROWS

ONE_BY_ONE = "one_by_one"
SHAPE = {**SMOLLM2, "vocab_size": 64, "intermediate_size": 64}  # what is no attention does not run
TINY = {**SHAPE, "hidden_size": 48, "num_attention_heads": 6}


def test_mixed_qkv(measured: Callable[[Workload], None], case: Case, device: str) -> None:
    measured(build(case, device))


def cases(suite: str, device: str) -> dict[str, Case]:
    if device != "cpu":  # the only one whose decoder layers call it
        return {}
    if suite == "tiny":
        return {"tiny-qkv": Case(3, 48, 48, 2, 3)}
    if suite not in ("named", "full"):
        return {}
    row_counts = (1, 16) if suite == "named" else (1, 4, 8, 16, 32, 64)
    kinds = {"f32": ("f32", "f32"), "bf16": ("bf16", "bf16"), "bf16-deltas-f32": ("bf16", "f32")}
    return {
        f"qkv-smollm2-{kind}-M{M}": Case(M, 576, 576, 2, M, *dtypes)
        for kind, dtypes in kinds.items()
        for M in row_counts
    }


def build(case: Case, device: str) -> Workload:
    plain, ours = make_models(case, TINY if TINY["hidden_size"] == case.D else SHAPE)
    x_M1D = Draw(case, device).normal(case.M, 1, case.D, dtype=case.x_dtype)
    filled = Draw(case, device).normal(2, case.M, 3, PROMPT_TOKENS, case.D // plain.config.num_attention_heads,
                                       dtype=case.x_dtype)  # fmt: skip
    weights = {name: p for name, p in ours.named_parameters() if ".self_attn." in name}
    return Workload(
        case,
        device,
        [{"x": x_M1D}],
        {
            OURS: Contender(blocks(ours, filled, fused)),
            ONE_BY_ONE: Contender(blocks(ours, filled, one_by_one)),
            CEILING: Contender(blocks(plain, filled, one_by_one), answers=CEILING),
        },
        expected=lambda: {"mix": {"y": expect(ours, filled, x_M1D)}, CEILING: {}},
        gradients=None,
        stream_bytes=num_bytes(weights),
        row_bytes=num_bytes({"x": x_M1D}) * 2 * len(ours.model.layers),
        flops=2 * case.M * sum(p.numel() for p in weights.values()),
        targets=()
        if MOST_ROWS[device, case.x_dtype] < case.M
        else (
            targets.Target(
                "time / one by one",
                lambda i: i["median_us"][OURS] / i["median_us"][ONE_BY_ONE],
                lambda _: 0.9,
            ),
        ),
        calls=1,
    )


def make_models(case: Case, shape: dict[str, Any]) -> tuple[Any, Any]:
    """The plain model, and attn-CLP of a copy of it with differences that matter."""
    transformers = pytest.importorskip("transformers")
    import clp_engine as clp

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, num_hidden_layers=2 if shape is TINY else LAYERS)
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[case.dtype]).eval()
    plain.requires_grad_(False)
    ours = clp.get_clp_model(copy.deepcopy(plain), clp.CLPConfig(rewards=["a", "b"]))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("deltas"):
                parameter.data = (parameter.normal_() * 2e-3).to(case.deltas_dtype)
    return plain, ours


def expect(ours: Any, filled: Tensor, x_M1D: Tensor) -> Expected:
    """Every layer's block in float64, and what its parts give one by one in the case's dtype."""
    wide = copy.deepcopy(ours).double()
    with torch.no_grad():
        exact = blocks(wide, filled.double(), one_by_one)({"x": x_M1D.double()})
        own = blocks(ours, filled, one_by_one)({"x": x_M1D})
    return Expected(slice(None), exact, own)


Block = Callable[..., Tensor]


def blocks(model: Any, filled: Tensor, block: Block) -> Callable[[Tensors], Tensor]:
    """Every layer's block on the same rows, each with weights of its own in all of the call: [L, M, 1, D]."""
    import transformers

    cache = transformers.DynamicCache(config=model.config)
    layers = model.model.layers
    for layer in layers:
        cache.update(*filled, layer.self_attn.layer_idx)
    M, dtype = filled.shape[1], filled.dtype
    c_M2 = torch.stack([torch.linspace(0, 1, M), 1 - torch.linspace(0, 1, M)], dim=1).to(
        torch.promote_types(dtype, torch.float32)
    )
    tables = model.model.rotary_emb(filled, torch.full((1, 1), PROMPT_TOKENS))
    record = model._record(c_M2) if hasattr(model, "clp_config") else None

    def call(tensors: Tensors) -> Tensor:
        inputs = {"position_embeddings": tables, "attention_mask": None, "past_key_values": cache}
        if record is None:
            outputs = [block(layer, tensors["x"], inputs) for layer in layers]
        else:
            with model._active.use(record):
                outputs = [block(layer, tensors["x"], inputs) for layer in layers]
        cache.crop(-1)
        return torch.stack(outputs)

    return call


def fused(layer: Any, x_M1D: Tensor, inputs: dict[str, Any]) -> Tensor:
    """By one call also where the layer itself would not."""
    return layer.attend(x_M1D, layer.clp.active.record, **inputs)


def one_by_one(layer: Any, x_M1D: Tensor, inputs: dict[str, Any]) -> Tensor:
    return layer.self_attn(hidden_states=layer.input_layernorm(x_M1D), **inputs)[0]
