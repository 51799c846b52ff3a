"""Batches as a forward's arguments describe them: how many sequences, and which tokens are whose in a packed row.

A packed row [1, T] holds several sequences one after the other: padding-free training batches (transformers'
DataCollatorWithFlattening), and continuous batching, where transformers packs the requests of a step.

Legend: B sequences, T tokens, S packed sequences, C coefficients of a row.
"""

from __future__ import annotations

from typing import Any

import torch

_INPUTS = ("input_ids", "inputs_embeds", "inputs", "attention_mask", "decoder_input_ids", "decoder_inputs_embeds")


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of rows of a forward's or generate's arguments; 1 where none tells."""
    encoder_outputs = kwargs.get("encoder_outputs")
    candidates = [*args[:1], *(kwargs.get(name) for name in _INPUTS), encoder_outputs and encoder_outputs[0]]
    for candidate in candidates:
        if isinstance(candidate, torch.Tensor):
            return candidate.shape[0]
    return 1


def packed_sequences(kwargs: dict[str, Any], num_weightings: int) -> torch.Tensor | None:
    """The sequence of each token of a packed row, int64 [1, T]; None where the batch's one row is one sequence.

    As in transformers' masks, a sequence starts where position_ids [1, T] do not go on by one, and only a forward
    without an attention mask and a KV cache is packed.

    Args:
        kwargs: of the forward.
        num_weightings: S, the weightings that the caller gives for the row.

    Raises:
        ValueError: the row holds several sequences, and not S.
    """
    position_ids = kwargs.get("position_ids")
    if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return None
    if not isinstance(position_ids, torch.Tensor) or position_ids.dim() != 2 or position_ids.shape[0] != 1:
        return None
    starts = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
    sequence_1T = starts.cumsum(dim=1)
    if torch.compiler.is_compiling():  # a compiled graph cannot branch on values
        if num_weightings == 1:
            return None
        torch._assert_async(
            sequence_1T[0, -1] + 1 == num_weightings, "packed sequences and weightings differ in number"
        )
        return sequence_1T
    found = int(sequence_1T[0, -1]) + 1
    if found > 1 and found != num_weightings:
        raise ValueError(
            f"position_ids restart for {found} packed sequences, and {num_weightings} weightings are given: give one "
            "row per sequence, or a single weighting for all of them"
        )
    return sequence_1T if found > 1 else None


def check_packed(model: Any, forward: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a packed row that `model` would not keep apart, and leave out the KV cache, which transformers' masks of
    packed rows exclude.

    Args:
        model: the conditioned model; it remembers the answer for its attention implementation.
        forward: the plain model's forward.
        kwargs: of the forward.

    Raises:
        ValueError: a KV cache is asked for.
        NotImplementedError: the sequences would see each other.
    """
    if kwargs.get("use_cache"):
        raise ValueError("use_cache=True with a packed row: its sequences have no cache of their own; leave it out")
    kwargs["use_cache"] = False
    implementation = model.config._attn_implementation
    known = model._isolates
    if implementation not in known:
        if torch.compiler.is_compiling():
            raise NotImplementedError("call the model on a packed row once before compiling it for such rows")
        known[implementation] = isolates_sequences(model, forward)
    if not known[implementation]:
        raise NotImplementedError(
            f"{type(model).__name__} with attn_implementation={implementation!r} lets the sequences of a packed row "
            "see each other: pad the batch instead"
        )


def is_paged(kwargs: dict[str, Any]) -> bool:
    """Whether a forward is a step of continuous batching."""
    return kwargs.get("logits_processor_args") is not None


def paged_rows(kwargs: dict[str, Any], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The requests of a step of continuous batching.

    Args:
        kwargs: of the forward. `logits_processor_args` [*, S] int32 holds in its last rows each request's coefficients
            (see `clp_engine.continuous_batching`), `cu_seq_lens_q` [S + 1] where its tokens end.
        width: C.

    Returns:
        c_SC: float32.
        sequence_1T: the request of each token. Tokens behind the last request are padding, and the last request's.

    Raises:
        RuntimeError: the step comes from a manager that knows no weightings.
    """
    arguments, bounds = kwargs["logits_processor_args"], kwargs["cu_seq_lens_q"]
    if arguments.shape[0] < width:
        raise RuntimeError(
            "continuous batching without weightings: take the manager from the conditioned model's "
            "init_continuous_batching, continuous_batching_context_manager or generate_batch"
        )
    c_SC = arguments[-width:].view(torch.float32).T.contiguous()
    tokens_T = torch.arange(kwargs["input_ids"].shape[1], dtype=bounds.dtype, device=bounds.device)
    sequence_T = torch.bucketize(tokens_T, bounds[1:], right=True).clamp_(max=c_SC.shape[0] - 1)
    return c_SC, sequence_T.unsqueeze(0)


@torch.no_grad()
def isolates_sequences(model: Any, forward: Any) -> bool:
    """Whether the sequences of a packed row do not see each other in `model`.

    Some models pass their position ids to no mask, or have recurrent states, which depends on the attention
    implementation too. So this tries it: the second sequence's logits must not change with the first one's tokens.

    Args:
        model: the model, for its modules and its vocabulary.
        forward: its forward.
    """
    ids_1T = torch.arange(8, device=model.device).unsqueeze(0) % model.get_input_embeddings().num_embeddings
    position_ids = torch.tensor([[0, 1, 2, 3] * 2], device=model.device)
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        first, second = (
            forward(input_ids=ids, position_ids=position_ids, use_cache=False).logits[:, 4:].float()
            for ids in (ids_1T, torch.cat([ids_1T[:, :4].flip(1), ids_1T[:, 4:]], dim=1))
        )
    except (TypeError, ValueError):
        return False  # a forward without position ids
    finally:
        for module, training in modes:
            module.training = training
    # Not equal bits: the tokens of a mixture's expert are multiplied together, and their number may change.
    return bool((first - second).abs().max() <= 8 * torch.finfo(model.dtype).eps * first.abs().max())
