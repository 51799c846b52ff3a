"""Per-token log-probabilities of rollouts under a weighting, with and without gradient.

Legend: B sequences, G groups of n completions that share prompt and weighting, P prompt tokens, L completion tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from clp_engine.model import CLPModel
from clp_engine.rollout import Rollout, position_ids


def token_logprobs(
    model: CLPModel,
    rollout: Rollout,
    coefficients_GK: torch.Tensor,
    *,
    temperature: float = 1.0,
    share_prompts: bool = False,
) -> torch.Tensor:
    """Log-probability of each completion token, in float32 and with gradient where enabled.

    Equivalent to `log_softmax(logits[:, P-1:-1].float() / temperature, -1).gather(-1, completion_ids)`.

    Args:
        model: the conditioned model.
        rollout: prompts and completions.
        coefficients_GK: coefficients of each group (each row where num_generations is 1), see
            `CLPModel.coefficients`; zeros give the reference policy.
        temperature: of the policy, as the rollout was drawn with.
        share_prompts: run each group's prompt once, its completions side by side after it in one row under a block
            mask: G * (P + n * (L - 1)) instead of G * n * (P + L - 1) positions. For models that
            `shares_prompts_exactly` accepts; prompts and completions longer than a model's attention window take
            padded rows all the same, because the block mask replaces the window's.

    Returns:
        logprobs_BL: float32, 0 after the end of a completion.
    """
    width = rollout.prompt_ids_BP.shape[1] + rollout.completion_ids_BL.shape[1]
    if share_prompts and rollout.num_generations > 1 and width <= _attention_window(model):
        logprobs_BL = _shared_prompt_logprobs(model, rollout, coefficients_GK, temperature)
    else:
        logprobs_BL = _padded_logprobs(model, rollout, coefficients_GK, temperature)
    return logprobs_BL * rollout.completion_mask_BL


def _attention_window(model: Any) -> float:
    """The least number of positions that any layer attends to; infinite where all see everything."""
    config = getattr(model, "module", model).config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if window), default=float("inf"))


def _padded_logprobs(model: Any, rollout: Rollout, coefficients_GK: torch.Tensor, temperature: float) -> torch.Tensor:
    num_tokens = rollout.completion_ids_BL.shape[1]
    mask_BT = rollout.attention_mask_BT[:, :-1]
    logits_BLV = model(
        input_ids=rollout.input_ids_BT[:, :-1],
        attention_mask=mask_BT,
        position_ids=position_ids(mask_BT),
        coefficients=coefficients_GK.repeat_interleave(rollout.num_generations, dim=0),
        logits_to_keep=num_tokens,
        use_cache=False,
    ).logits
    return _target_logprobs(logits_BLV, rollout.completion_ids_BL, temperature)


def _shared_prompt_logprobs(
    model: Any, rollout: Rollout, coefficients_GK: torch.Tensor, temperature: float
) -> torch.Tensor:
    n, num_tokens = rollout.num_generations, rollout.completion_ids_BL.shape[1]
    prompt_ids_GP, prompt_mask_GP = rollout.prompt_ids_BP[::n], rollout.prompt_mask_BP[::n]
    groups = prompt_ids_GP.shape[0]
    targets_GnL = rollout.completion_ids_BL.view(groups, n, num_tokens)
    inputs_GC = targets_GnL[:, :, :-1].reshape(groups, -1)  # the last token of a completion predicts nothing
    prompt_length_G1 = prompt_mask_GP.sum(dim=1, keepdim=True)
    completion_positions = torch.arange(num_tokens - 1, device=inputs_GC.device).repeat(n)
    logits_GCV = model(
        input_ids=torch.cat([prompt_ids_GP, inputs_GC], dim=1),
        attention_mask=_group_mask(prompt_mask_GP, n, num_tokens - 1, model.dtype),
        position_ids=torch.cat([position_ids(prompt_mask_GP), prompt_length_G1 + completion_positions], dim=1),
        coefficients=coefficients_GK,
        logits_to_keep=inputs_GC.shape[1] + 1,
        use_cache=False,
    ).logits
    # The first token of all n completions comes from the one last prompt position.
    first_G1V = (logits_GCV[:, :1].float() / temperature).log_softmax(dim=-1)
    first_Gn = first_G1V.squeeze(1).gather(1, targets_GnL[:, :, 0])
    rest_GC = _target_logprobs(logits_GCV[:, 1:], targets_GnL[:, :, 1:].reshape(groups, -1), temperature)
    rest_GnL = rest_GC.view(groups, n, num_tokens - 1)
    return torch.cat([first_Gn.unsqueeze(-1), rest_GnL], dim=-1).view(groups * n, num_tokens)


def _group_mask(prompt_mask_GP: torch.Tensor, n: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [G, 1, T, T]: causal over the prompt, and each completion sees the prompt and itself."""
    groups, width = prompt_mask_GP.shape
    total = width + n * length
    block_T = torch.cat([torch.zeros(width), torch.arange(1, n + 1).repeat_interleave(length)]).to(
        prompt_mask_GP.device
    )
    causal = torch.ones(total, total, dtype=torch.bool, device=prompt_mask_GP.device).tril()
    same_block_or_prompt = (block_T[None, :] == block_T[:, None]) | (block_T[None, :] == 0)
    keys_GT = F.pad(prompt_mask_GP.bool(), (0, n * length), value=True)
    # A padding query attends to itself: a row without any key would be NaN and poison its neighbours' gradients.
    diagonal = torch.eye(total, dtype=torch.bool, device=prompt_mask_GP.device)
    visible = ((causal & same_block_or_prompt) & keys_GT[:, None, :]) | diagonal
    mask = torch.zeros(groups, 1, total, total, dtype=dtype, device=prompt_mask_GP.device)
    return mask.masked_fill_(~visible.unsqueeze(1), torch.finfo(dtype).min)


def _target_logprobs(logits_BLV: torch.Tensor, targets_BL: torch.Tensor, temperature: float) -> torch.Tensor:
    logits_MV = logits_BLV.flatten(0, 1).float()
    if temperature != 1.0:  # another tensor as large as the logits
        logits_MV = logits_MV / temperature
    flat = F.cross_entropy(logits_MV, targets_BL.flatten(), reduction="none")
    return -flat.view(targets_BL.shape)


@torch.no_grad()
def shares_prompts_exactly(model: Any, tolerance: float = 1e-3) -> bool:
    """Whether the model computes the same log-probabilities with shared prompts as with padded rows.

    Models that ignore a 4-D mask or the position ids (some attention back-ends, some position schemes) do not; this
    tries it on random ids, two groups of two completions with left padding, within the attention window.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(vocabulary, shape, generator=generator).to(model.device)

    prompt_mask = torch.ones(4, 5, dtype=torch.long, device=model.device)
    prompt_mask[2:, :2] = 0
    ones = torch.ones(4, 4, dtype=torch.long, device=model.device)
    probe = Rollout(
        draw(2, 5).repeat_interleave(2, dim=0), prompt_mask, draw(4, 4), ones, ones[:, 0].bool(), [""] * 4, 2
    )
    c_GK = model.coefficients(2, model.clp_config.default_weights(2)).to(model.device)
    try:
        shared = token_logprobs(model, probe, c_GK, share_prompts=True)
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        return False  # the model's forward does not take such a mask or position ids
    padded = token_logprobs(model, probe, c_GK)
    scale = 1.0 if model.dtype == torch.float32 else 100.0  # 16-bit forwards differ by their rounding alone
    return bool(torch.isfinite(shared).all() and (shared - padded).abs().max() <= tolerance * scale)
