"""What steering costs: generation under one weighting per row, in tokens per second against the plain model's.

Legend: B rows, T prompt tokens, L new tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import targets
from bench.bench_overhead import SMOLLM2
from bench.clock import seconds_of
from bench.workload import synchronize

ROUNDS = 3
CHECKED_TOKENS = 4
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
OURS, PLAIN = "ours", "plain"


@dataclass(frozen=True)
class Steering:
    """rows: sequences of a batch, each under a weighting of its own; layers: of SmolLM2-135M's 30."""

    dtype: str
    rows: int
    prompt_tokens: int = 64
    new_tokens: int = 64
    layers: int = 30


def cases(suite: str, device: str) -> dict[str, Steering]:
    if suite == "tiny":
        return {"tiny-steering-f32-rows3": Steering("f32", 3, prompt_tokens=5, new_tokens=CHECKED_TOKENS, layers=1)}
    if suite != "steering":
        return {}
    return {f"steering-{dtype}-rows{rows}": Steering(dtype, rows) for dtype in DTYPES for rows in (1, 32)}


def test_steering(benchmark: Any, case: Steering, device: str, request: pytest.FixtureRequest) -> None:
    """Interleaved rounds of generation: ours, the plain model, and what a user would do without."""
    torch.manual_seed(0)
    contenders, error_share = build(case, device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}

    def others() -> None:
        for name, generate in contenders.items():
            if name != OURS:
                seconds[name].append(seconds_of(generate))

    for generate in contenders.values():
        generate()  # warm
    benchmark.group, benchmark.name = "steering", request.node.callspec.id
    benchmark.pedantic(contenders[OURS], setup=others, rounds=ROUNDS)
    seconds[OURS] = [benchmark.stats.stats.median]
    benchmark.extra_info.update(_describe(case, seconds, error_share))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + "\n".join(_format(benchmark.name, benchmark.extra_info)))


def _describe(case: Steering, seconds: dict[str, list[float]], error_share: float) -> dict[str, Any]:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    info: dict[str, Any] = {
        "case": vars(case),
        "median_us": {name: 1e6 * value for name, value in median.items()},
        "ratio_to_ceiling": {name: value / median[PLAIN] for name, value in median.items()},
        "tokens_per_s": {name: case.rows * case.new_tokens / value for name, value in median.items()},
        "error_over_budget": {OURS: error_share},
    }
    goals = [_rate_at_least(OURS, 0.70), _rate_at_least("folded", 0.80)]
    return info | {"targets": [goal.judge(info) for goal in goals]}


def _format(name: str, info: dict[str, Any]) -> list[str]:
    rates = info["tokens_per_s"]
    shares = ", ".join(f"{key} {rate:.1f} ({rate / rates[PLAIN]:.2f}x)" for key, rate in rates.items())
    return [f"{name}: tokens/s {shares}", *(f"    {targets.format_verdict(verdict)}" for verdict in info["targets"])]


def _rate_at_least(name: str, limit: float) -> targets.Target:
    text = f"{name}'s tokens/s / plain's"
    return targets.Target(text, lambda i: 1 / i["ratio_to_ceiling"][name], lambda _: limit, at_least=True)


def build(case: Steering, device: str) -> tuple[dict[str, Callable[[], Tensor]], float]:
    """Contenders by name, each call generating the whole batch, and our error as a share of its budget.

    Copies are of the model's dtype, as one serves them; wide keeps those of a 16-bit model in float32, as trained.
    dera mixes the logits of K separate models at every step (DeRa's way); swapped serves each row by the one of K
    separate models that its weighting is nearest to, one after the other: no weighting in between exists there.
    """
    transformers = pytest.importorskip("transformers")
    import clp_engine as clp

    config = transformers.LlamaConfig(**SMOLLM2, num_hidden_layers=case.layers, eos_token_id=None, pad_token_id=0)
    plain = transformers.LlamaForCausalLM(config).to(device, DTYPES[case.dtype]).eval()
    model = clp.get_clp_model(copy.deepcopy(plain), clp.CLPConfig(rewards=["a", "b"], variant="attn"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=2e-3)
    first = torch.linspace(0, 1, case.rows) if case.rows > 1 else torch.tensor([0.3])
    w_B2 = torch.stack([first, 1 - first], dim=1)
    ids_BT = torch.randint(1, config.vocab_size, (case.rows, case.prompt_tokens), device=device)
    wide = copy.deepcopy(model) if plain.dtype != torch.float32 else None
    model.to(plain.dtype)
    error_share = _check(model, plain, ids_BT, w_B2)
    corners = [model.collapse({"a": 1.0, "b": 0.0}), model.collapse({"a": 0.0, "b": 1.0})]
    folded = model.fold()
    gc.collect()
    options = {"max_new_tokens": case.new_tokens, "do_sample": False, "pad_token_id": 0}
    mask_BT = torch.ones_like(ids_BT)

    def generate(policy: Any, rows: Tensor | slice = slice(None), **weighting: Any) -> Tensor:
        with torch.inference_mode():
            out = policy.generate(ids_BT[rows], attention_mask=mask_BT[rows], **options, **weighting)
        synchronize(device)
        return out

    nearest = [(first >= 0.5).nonzero().squeeze(1), (first < 0.5).nonzero().squeeze(1)]
    contenders = {
        OURS: lambda: generate(model, reward_weights=w_B2),
        PLAIN: lambda: generate(plain),
        "folded": lambda: generate(folded, reward_weights=w_B2),
        "dera": lambda: _mixed_logits(corners, ids_BT, w_B2.to(device), case.new_tokens, device),
        "swapped": lambda: torch.cat(
            [generate(m, rows) for m, rows in zip(corners, nearest, strict=True) if len(rows)]
        ),
    }
    if wide is not None:
        contenders["wide"] = lambda: generate(wide, reward_weights=w_B2)
    return contenders, error_share


def _check(model: Any, plain: Any, ids_BT: Tensor, w_B2: Tensor) -> float:
    """The reference is the plain model, and a row of the mixed batch is the row alone at its weighting."""
    with torch.inference_mode():
        base, want = (m(ids_BT[:1], **kw).logits for m, kw in ((model, {"kl_weight": 1.0}), (plain, {})))
        assert torch.equal(base, want), "the reference policy is not the plain model"
        row = len(ids_BT) // 2
        mixed = model(ids_BT[: row + 1], reward_weights=w_B2[: row + 1]).logits[row].float()
        alone = model.collapse(w_B2[row])(ids_BT[row : row + 1]).logits[0].float()
        steered = (alone - plain(ids_BT[row : row + 1]).logits[0].float()).norm()
    budget = 1e-3 if plain.dtype == torch.float32 else 0.5
    share = float((mixed - alone).norm() / (budget * steered))
    assert share <= 1, f"a row of the mixed batch is not the model at its weighting: {share} of the budget"
    return share


def _mixed_logits(models: list[Any], ids_BT: Tensor, w_B2: Tensor, new_tokens: int, device: str) -> Tensor:
    """Greedy decoding of the weighted sum of the models' logits, each with a KV cache of its own."""
    caches: list[Any] = [None] * len(models)
    inputs, out = ids_BT, [ids_BT]
    with torch.inference_mode():
        for _ in range(new_tokens):
            logits_BV = torch.zeros((), device=device)
            for k, m in enumerate(models):
                step = m(inputs, past_key_values=caches[k], use_cache=True, logits_to_keep=1)
                caches[k] = step.past_key_values
                logits_BV = logits_BV + w_B2[:, k, None] * step.logits[:, -1]
            inputs = logits_BV.argmax(dim=-1, keepdim=True)
            out.append(inputs)
    synchronize(device)
    return torch.cat(out, dim=1)
