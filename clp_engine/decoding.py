"""Decoding of a rollout's batch: what its rows share runs once, and rows that have ended leave it.

Legend: B sequences, G groups (a prompt under a weighting) of n sequences, P prompt and L completion tokens, K copies,
V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from clp_engine.generation import tag_cache
from clp_engine.model import CLPModel

if TYPE_CHECKING:
    from transformers import LogitsProcessor

# Tokens between two looks at which rows have ended: to drop a row copies the cache of the others, and each piece is a
# generate of its own (a few ms).
PIECE = 2


def decode(
    model: Any,
    inputs: dict[str, Any],
    num_generations: int,
    max_new_tokens: int,
    return_logits: bool,
    sampler: LogitsProcessor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Complete each prompt `num_generations` times by `model.generation_config`.

    Equivalent to `model.generate(**{name: t.repeat_interleave(n, 0) for name, t in inputs.items()})[:, P:]`, up to
    rounding and the order of random draws. A conditioned model whose cache can select rows runs a group's prompt once
    for all its completions, a prefix that all prompts share (a chat template's system message) once for each distinct
    weighting, and drops a row within `PIECE` tokens of its end.

    Args:
        model: anything with `generate`; only a CLPModel saves what is said above. Its generation_config names a
            `pad_token_id` and nothing that counts tokens from the start of a call: no min_new_tokens, no beams.
        inputs: generate's `input_ids` [G, P] (left-padded), `attention_mask` and what else it takes for each prompt;
            for a CLPModel `coefficients` [G, K].
        num_generations: n.
        max_new_tokens: L at most.
        return_logits: also return the logits that the tokens were drawn from.
        sampler: what draws from the logits, for a generation_config that decodes greedily; None leaves the choice to
            the config.

    Returns:
        completion_ids_BL, padded after their end, and the logits [B, L, V] or None; those of positions after the end
        mean nothing.
    """
    options = {"output_logits": return_logits, "logits_processor": None if sampler is None else [sampler]}
    if isinstance(model, CLPModel) and inputs["input_ids"].shape[1] > 1 and _saves(model):
        shared = _share_prefix(model, inputs, max_new_tokens)
        cache = _prefill(model, shared)
        if rows_can_be_selected(cache):
            cache.batch_repeat_interleave(num_generations)
            repeated = {**_repeat(shared, num_generations), "past_key_values": cache}
            tag_cache(cache, repeated["coefficients"])
            return _in_pieces(model, repeated, max_new_tokens, options)
    return _generate(model, _repeat(inputs, num_generations), max_new_tokens, options)[:2]


def rows_can_be_selected(cache: Any) -> bool:
    """Whether every layer of a KV cache can repeat and drop rows.

    Subclasses of these layers have recurrent or compressed states too, which the inherited methods leave as they are.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", None) or []
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def select_rows(cache: Any, rows: torch.Tensor) -> None:
    """Keep the cache's rows `rows`, in their order and as often as they are named, and its tag with them."""
    cache.batch_select_indices(rows)
    if (filled := getattr(cache, "clp_coefficients", None)) is not None:
        tag_cache(cache, filled[rows.to(filled.device)])


def position_ids(mask_BT: torch.Tensor) -> torch.Tensor:
    """Positions of padded rows: `(mask.cumsum(1) - 1).clamp(min=0)`, [B, T] int64."""
    return (mask_BT.cumsum(dim=1) - 1).clamp(min=0)


def attention_window(model: Any) -> float:
    """The least number of positions that any layer attends to; infinite where all see everything."""
    config = getattr(model, "module", model).config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if window), default=float("inf"))


def _repeat(inputs: dict[str, Any], times: int) -> dict[str, Any]:
    return {
        name: value.repeat_interleave(times, dim=0) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def may_vary_forwards(model: Any) -> bool:
    """Whether the number of forwards is this process's own affair: where a forward gathers parameters from other
    processes or sends them buffers, all must run as many.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    is_gathered = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return isinstance(model, CLPModel) and not is_gathered


def _saves(model: Any) -> bool:
    """Whether the model may run forwards as it likes (generate sees to those of several processes), its cache can
    select rows, and no row depends on its batch's longest, as under rotations whose frequencies do.
    """
    from transformers import DynamicCache

    if not may_vary_forwards(model):
        return False
    return rows_can_be_selected(DynamicCache(config=model.config)) and not _rope_types(model) & {"dynamic", "longrope"}


def _rope_types(model: Any) -> set[str]:
    """The kinds of rotation by which positions enter; empty where they enter otherwise."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one, or one for each type of layer
    return {kind["rope_type"] for kind in kinds if "rope_type" in kind}


def _share_prefix(model: Any, inputs: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Fill a cache with the tokens that all prompts begin with, each distinct weighting once, and move the padding
    behind them. Positions come from the mask, but a window counts places in the cache: it must hold them all.
    """
    ids_GP, mask_GP, c_GK = inputs["input_ids"], inputs["attention_mask"], inputs["coefficients"]
    c_SK, row_map_G = c_GK.unique(dim=0, return_inverse=True)
    size, fits = _common_prefix(ids_GP, mask_GP), ids_GP.shape[1] + max_new_tokens <= attention_window(model)
    if size == 0 or len(c_SK) == len(c_GK) or not fits or not _rope_types(model):
        return inputs
    # Stable: what is no padding stays in order. Prefix 0, padding 1, the rest 2.
    place_GP = torch.where(mask_GP.bool(), 2, 1).masked_fill((mask_GP.cumsum(dim=1) <= size) & mask_GP.bool(), 0)
    order_GP = place_GP.argsort(dim=1, stable=True)
    moved = {**inputs, "input_ids": ids_GP.gather(1, order_GP), "attention_mask": mask_GP.gather(1, order_GP)}
    first = {name: moved[name][: len(c_SK), : size + 1] for name in ("input_ids", "attention_mask")}
    cache = _prefill(model, {**first, "coefficients": c_SK})
    if not rows_can_be_selected(cache):  # a cache of the model's own
        return inputs
    select_rows(cache, row_map_G)
    return {**moved, "past_key_values": cache}


def _common_prefix(ids_GP: torch.Tensor, mask_GP: torch.Tensor) -> int:
    """The number of tokens that all prompts begin with, short of any prompt's last."""
    lengths = mask_GP.sum(dim=1).tolist()
    rows = [row[len(row) - length :] for row, length in zip(ids_GP.tolist(), lengths, strict=True)]
    first, last = min(rows), max(rows)  # what the least and the greatest share, all share
    size = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(lengths))
    return min(size, min(lengths) - 1)


def _prefill(model: Any, inputs: dict[str, Any]) -> Any:
    """The cache of all but the last token of each row, from where the cache in `inputs` ends."""
    ids_BT, mask_BT, cache = inputs["input_ids"], inputs["attention_mask"], inputs.get("past_key_values")
    start, stop = cache.get_seq_length() if cache is not None else 0, ids_BT.shape[1] - 1
    if start == stop:
        return cache
    outputs = model(
        input_ids=ids_BT[:, start:stop],
        attention_mask=mask_BT[:, :stop],
        coefficients=inputs["coefficients"],
        position_ids=position_ids(mask_BT[:, :stop])[:, start:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return outputs.past_key_values


def _generate(
    model: Any, inputs: dict[str, Any], max_new_tokens: int, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    out = model.generate(**inputs, **options, max_new_tokens=max_new_tokens, return_dict_in_generate=True)
    new_ids = out.sequences[:, inputs["input_ids"].shape[1] :]
    return new_ids, torch.stack(out.logits, dim=1) if options["output_logits"] else None, out.past_key_values


def _in_pieces(
    model: Any, inputs: dict[str, Any], max_new_tokens: int, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    eos_ids, pad_id = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    ends = torch.tensor([] if eos_ids is None else eos_ids, device=inputs["input_ids"].device).flatten()
    rows = torch.arange(len(inputs["input_ids"]), device=inputs["input_ids"].device)
    ids_BL = torch.full((len(rows), max_new_tokens), pad_id, device=rows.device)
    logits_BLV, done = None, 0
    while done < max_new_tokens and len(rows):
        size = min(PIECE, max_new_tokens - done)
        new_ids, logits, cache = _generate(model, inputs, size, options)
        stop = done + new_ids.shape[1]
        ids_BL[rows, done:stop] = new_ids
        if logits is not None:
            if logits_BLV is None:
                logits_BLV = logits.new_zeros(len(ids_BL), max_new_tokens, logits.shape[-1])
            logits_BLV[rows, done:stop] = logits
        inputs = {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], new_ids], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new_ids)], dim=1),
        }
        done = stop
        going = ~torch.isin(new_ids, ends).any(dim=1)
        if not going.all():
            rows = rows[going]
            select_rows(cache, going.nonzero().squeeze(1))
            for name in ("input_ids", "attention_mask", "coefficients"):
                inputs[name] = inputs[name][going.to(inputs[name].device)]
        inputs["past_key_values"] = cache
    return ids_BL[:, :done], None if logits_BLV is None else logits_BLV[:, :done]
