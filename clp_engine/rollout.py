"""Rollouts: prompts in, completions out, drawn from exactly the policy whose log-probabilities are used later.

Legend: B sequences, G groups (a prompt under a weighting), P prompt and L completion tokens, T = P + L, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from clp_engine.decoding import decode
from clp_engine.model import CLPModel
from clp_engine.sampling import InverseCDFSampler
from clp_engine.weighting import KLWeight, RewardWeights


@dataclass(frozen=True)
class Rollout:
    """Completions of a batch; rows are prompt-major: prompt i gives rows i * n to i * n + n - 1.

    Attributes:
        prompt_ids_BP: left-padded prompts.
        prompt_mask_BP: 1 on prompt tokens.
        completion_ids_BL: completions, padded after their end.
        completion_mask_BL: 1 up to and including the end-of-sequence token.
        ended_B: whether the completion reached the end-of-sequence token.
        texts: decoded completions without special tokens.
        num_generations: n, completions per prompt.
        policy_logits_BLV: the policy's own logits at each completion position, where they were asked for.
    """

    prompt_ids_BP: torch.Tensor
    prompt_mask_BP: torch.Tensor
    completion_ids_BL: torch.Tensor
    completion_mask_BL: torch.Tensor
    ended_B: torch.Tensor
    texts: list[str]
    num_generations: int = 1
    policy_logits_BLV: torch.Tensor | None = None

    @property
    def input_ids_BT(self) -> torch.Tensor:
        """Prompts followed by completions."""
        return torch.cat([self.prompt_ids_BP, self.completion_ids_BL], dim=1)

    @property
    def attention_mask_BT(self) -> torch.Tensor:
        """1 on prompt tokens and on completion tokens up to the end."""
        return torch.cat([self.prompt_mask_BP, self.completion_mask_BL], dim=1)

    def completion_id_lists(self) -> list[list[int]]:
        """Token ids of each completion up to and including its end, as reward functions get them."""
        pairs = zip(self.completion_ids_BL.tolist(), self.completion_mask_BL.sum(dim=1).tolist(), strict=True)
        return [row[:length] for row, length in pairs]


def encode_prompts(
    processing_class: Any, prompts: Sequence[Any], max_prompt_length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenise prompts, left-padded to the longest.

    A string is tokenised as it is; a list of messages goes through the chat template, ready for the assistant's turn.

    Args:
        processing_class: the tokenizer.
        prompts: strings or message lists.
        max_prompt_length: keep the last tokens of longer prompts.

    Returns:
        prompt_ids_BP, prompt_mask_BP: int64.

    Raises:
        ValueError: no prompts, or one that has no tokens.
    """
    if not prompts:
        raise ValueError("no prompts were given: at least one is needed")
    rows = [_prompt_ids(processing_class, prompt)[-(max_prompt_length or 0) :] for prompt in prompts]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"prompt {empty[0]} has no tokens: {prompts[empty[0]]!r}")
    width, pad = max(map(len, rows)), pad_token_id(processing_class)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _prompt_ids(processing_class: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return processing_class(prompt)["input_ids"]
    text = processing_class.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return processing_class(text, add_special_tokens=False)["input_ids"]


def as_completion(prompt: Any, text: str) -> Any:
    """The completion in its prompt's form, as reward functions get it: a string, or the assistant's message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def pad_token_id(processing_class: Any) -> int:
    """The padding id: the tokenizer's own, else its end-of-sequence id (padding is always masked)."""
    if processing_class.pad_token_id is not None:
        return processing_class.pad_token_id
    return processing_class.eos_token_id or 0


@torch.no_grad()
def rollout(
    model: Any,
    processing_class: Any,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    do_sample: bool,
    reward_weights: RewardWeights | None = None,
    kl_weight: KLWeight | None = None,
    num_generations: int = 1,
    temperature: float = 1.0,
    max_prompt_length: int | None = None,
    return_logits: bool = False,
) -> Rollout:
    """Complete each prompt `num_generations` times under its own weighting, all in one batch.

    Sampling draws from `softmax(logits / temperature)` as it is (no top-k, no top-p, no penalties), whatever the
    model's generation_config says; only that config's end-of-sequence ids are kept. See `clp_engine.decoding.decode`.

    Args:
        model: a text policy: a CLPModel, or anything with its `generate`.
        processing_class: the tokenizer.
        prompts: strings or message lists, one per group.
        max_new_tokens: L at most.
        do_sample: False decodes greedily.
        reward_weights: one weighting, or one per prompt; see `CLPModel.forward`.
        kl_weight: a float, or one per prompt; 1.0 is the reference policy.
        num_generations: completions per prompt.
        temperature: of the sampled policy, > 0.
        max_prompt_length: keep the last tokens of longer prompts.
        return_logits: keep the policy's logits [B, L, V], as the model gives them.

    Returns:
        The completions, on the model's device.

    Raises:
        NotImplementedError: an encoder-decoder, whose completions do not follow their prompts in one row.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(f"rollouts of encoder-decoders ({type(model).__name__}) are not built: use generate")
    device = model.device
    ids_GP, mask_GP = (t.to(device) for t in encode_prompts(processing_class, prompts, max_prompt_length))
    weighting = {"reward_weights": reward_weights, "kl_weight": kl_weight}
    if isinstance(model, CLPModel):
        weighting = {"coefficients": model.coefficients(len(prompts), reward_weights, kl_weight).to(device)}
    sampler = InverseCDFSampler(temperature) if do_sample else None
    with _evaluating(model), _plain_decoding(model, processing_class):
        inputs = {"input_ids": ids_GP, "attention_mask": mask_GP, **weighting}
        completion_ids, logits_BLV = decode(model, inputs, num_generations, max_new_tokens, return_logits, sampler)
        eos_ids = model.generation_config.eos_token_id
    is_eos = torch.isin(completion_ids, torch.tensor(_as_list(eos_ids), device=completion_ids.device))
    before = is_eos.cumsum(dim=1) - is_eos.long()
    return Rollout(
        prompt_ids_BP=ids_GP.repeat_interleave(num_generations, dim=0),
        prompt_mask_BP=mask_GP.repeat_interleave(num_generations, dim=0),
        completion_ids_BL=completion_ids,
        completion_mask_BL=(before == 0).long(),
        ended_B=is_eos.any(dim=1),
        texts=_decode(processing_class, completion_ids, before == 0),
        num_generations=num_generations,
        policy_logits_BLV=logits_BLV,
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


@contextmanager
def _plain_decoding(model: Any, processing_class: Any) -> Iterator[None]:
    """Swap the model's generation_config for one that takes the likeliest token and changes no logit, whatever
    penalties its own names; where tokens are drawn, a sampler leaves one of them.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    eos = own.eos_token_id if own is not None and own.eos_token_id is not None else processing_class.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=eos, pad_token_id=pad_token_id(processing_class)
    )
    try:
        yield
    finally:
        model.generation_config = own


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [int(value)]


def _decode(processing_class: Any, ids_BL: torch.Tensor, keep_BL: torch.Tensor) -> list[str]:
    rows = [ids[keep].tolist() for ids, keep in zip(ids_BL, keep_BL, strict=True)]
    return processing_class.batch_decode(rows, skip_special_tokens=True)
