"""Per-token log-probabilities of rollouts under a weighting, with and without gradient.

Legend: B sequences, G groups of n completions that share prompt and weighting, P prompt tokens, L completion tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from clp_engine.decoding import attention_window, may_vary_forwards, position_ids
from clp_engine.model import CLPModel
from clp_engine.rollout import Rollout

# Of a packed row's width. Groups of unlike sizes (a short answer's weighting beside a long one's) run in forwards of
# their own rather than padded to the longest.
MOST_PADDING = 1 / 8


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
        share_prompts: run each group's prompt once, its completions one after the other in its row under a block
            mask, equal ones once: at most G * (P + n * (L - 1)) instead of G * n * (P + L - 1) positions. For models
            that `shares_prompts_exactly` accepts; prompts and completions longer than a model's attention window take
            padded rows all the same, because the block mask replaces the window's.

    Returns:
        logprobs_BL: float32, 0 after the end of a completion.
    """
    width = rollout.prompt_ids_BP.shape[1] + rollout.completion_ids_BL.shape[1]
    if share_prompts and rollout.num_generations > 1 and width <= attention_window(model):
        logprobs_BL = _shared_prompt_logprobs(model, rollout, coefficients_GK, temperature)
    else:
        logprobs_BL = _padded_logprobs(model, rollout, coefficients_GK, temperature)
    return logprobs_BL * rollout.completion_mask_BL


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
    targets_GnL = rollout.completion_ids_BL.view(-1, n, num_tokens)
    mask_GnL = rollout.completion_mask_BL.view(-1, n, num_tokens).bool()
    first_Gn = _first_equal(targets_GnL, mask_GnL)
    is_first_Gn1 = (first_Gn == torch.arange(n, device=first_Gn.device)).unsqueeze(-1)
    # A completion's last token predicts nothing, and what follows its end is left out of the row.
    used_GnL = mask_GnL[:, :, 1:] & is_first_Gn1
    prompt_ids_GP, prompt_mask_GP = rollout.prompt_ids_BP[::n], rollout.prompt_mask_BP[::n]
    runs = [torch.arange(len(targets_GnL))]
    if may_vary_forwards(model):
        runs = _similar(prompt_mask_GP.sum(dim=1).tolist(), used_GnL.sum(dim=(1, 2)).tolist())
    parts = []
    for groups in runs:
        at = groups.to(targets_GnL.device)
        width = int(prompt_mask_GP[at].sum(dim=1).max())
        prompts = prompt_ids_GP[at, -width:], prompt_mask_GP[at, -width:]
        c_GK = coefficients_GK[groups.to(coefficients_GK.device)]
        parts.append(_packed_logprobs(model, prompts, targets_GnL[at], used_GnL[at], c_GK, temperature))
    logprobs_GnL = torch.cat(parts)[torch.cat(runs).argsort().to(targets_GnL.device)]
    return logprobs_GnL.gather(1, first_Gn.unsqueeze(-1).expand_as(logprobs_GnL)).flatten(0, 1)


def _first_equal(ids_GnL: torch.Tensor, mask_GnL: torch.Tensor) -> torch.Tensor:
    """For each completion the first of its group with the same tokens, [G, n]."""
    tokens_GnL = ids_GnL.masked_fill(~mask_GnL, -1)
    equal_Gnn = (tokens_GnL[:, :, None] == tokens_GnL[:, None, :]).all(dim=-1)
    return equal_Gnn.int().argmax(dim=-1)


def _similar(prompt_sizes: list[int], completion_sizes: list[int]) -> list[torch.Tensor]:
    """Cut the groups, by size, into forwards in which no row is padded by more than MOST_PADDING of its width.

    Prompts are padded on the left and completions on the right, each to its own longest.
    """
    sizes = [sum(pair) for pair in zip(prompt_sizes, completion_sizes, strict=True)]
    runs: list[list[int]] = []
    for group in sorted(range(len(sizes)), key=lambda group: -sizes[group]):
        longer = [*runs[-1], group] if runs else [group]
        width = max(prompt_sizes[i] for i in longer) + max(completion_sizes[i] for i in longer)
        if runs and sizes[group] >= (1 - MOST_PADDING) * width:  # the run's smallest
            runs[-1].append(group)
        else:
            runs.append([group])
    return [torch.tensor(run) for run in runs]


def _packed_logprobs(
    model: Any,
    prompts: tuple[torch.Tensor, torch.Tensor],
    targets_GnL: torch.Tensor,
    used_GnL: torch.Tensor,
    coefficients_GK: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Log-probs [G, n, L] of one forward: prompts (ids and mask [G, P]), the used inputs of completions behind them."""
    prompt_ids_GP, prompt_mask_GP = prompts
    dtype = getattr(model, "module", model).dtype  # DistributedDataParallel has none of its own
    packed = _Packed(used_GnL)
    inputs_GC = packed.gather(targets_GnL[:, :, :-1])
    positions_GC = prompt_mask_GP.sum(dim=1, keepdim=True) + packed.gather(packed.token_GnL)
    logits_GCV = model(
        input_ids=torch.cat([prompt_ids_GP, inputs_GC], dim=1),
        attention_mask=_group_mask(prompt_mask_GP, packed.gather(packed.block_GnL), dtype),
        position_ids=torch.cat([position_ids(prompt_mask_GP), positions_GC], dim=1),
        coefficients=coefficients_GK,
        logits_to_keep=inputs_GC.shape[1] + 1,
        use_cache=False,
    ).logits
    # The first token of all n completions comes from the one last prompt position.
    first_G1V = (logits_GCV[:, :1].float() / temperature).log_softmax(dim=-1)
    first_Gn1 = first_G1V.squeeze(1).gather(1, targets_GnL[:, :, 0]).unsqueeze(-1)
    rest_GC = _target_logprobs(logits_GCV[:, 1:], packed.gather(targets_GnL[:, :, 1:]), temperature)
    return torch.cat([first_Gn1, packed.scatter(rest_GC)], dim=-1)


class _Packed:
    """Where the used ones of [G, n, L] tokens go in G rows without gaps, as wide as the longest: [G, C]."""

    def __init__(self, used_GnL: torch.Tensor) -> None:
        groups, n, length = used_GnL.shape
        used_GN = used_GnL.reshape(groups, n * length)
        self._shape = used_GnL.shape
        self._from = used_GN.nonzero(as_tuple=True)
        self._to = self._from[0], (used_GN.cumsum(dim=1) - 1)[self._from]
        self._width = int(used_GN.sum(dim=1).max()) if n * length else 0
        device = used_GnL.device
        self.token_GnL = torch.arange(length, device=device).expand(used_GnL.shape)
        self.block_GnL = torch.arange(1, n + 1, device=device)[:, None].expand(used_GnL.shape)  # 0: no completion

    def gather(self, values_GnL: torch.Tensor) -> torch.Tensor:
        """Return [G, C], zero behind a row's end."""
        packed_GC = values_GnL.new_zeros(self._shape[0], self._width)
        return packed_GC.index_put(self._to, values_GnL.reshape(self._shape[0], -1)[self._from])

    def scatter(self, packed_GC: torch.Tensor) -> torch.Tensor:
        """Return [G, n, L], zero where no token is used."""
        values_GN = packed_GC.new_zeros(self._shape[0], self._shape[1] * self._shape[2])
        return values_GN.index_put(self._from, packed_GC[self._to]).view(self._shape)


def _group_mask(prompt_mask_GP: torch.Tensor, block_GC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [G, 1, T, T]: causal over the prompt, and each completion sees the prompt and itself."""
    prompt_GP = prompt_mask_GP.bool()
    block_GT = torch.cat([torch.zeros_like(prompt_mask_GP), block_GC], dim=1)
    keys_GT = torch.cat([prompt_GP, block_GC > 0], dim=1)
    total = block_GT.shape[1]
    causal_TT = torch.ones(total, total, dtype=torch.bool, device=block_GT.device).tril()
    in_prompt_GT = torch.cat([prompt_GP, torch.zeros_like(block_GC, dtype=torch.bool)], dim=1)
    sees_GTT = (block_GT[:, None, :] == block_GT[:, :, None]) | in_prompt_GT[:, None, :]
    # A padding query attends to itself: a row without any key would be NaN and poison its neighbours' gradients.
    diagonal_TT = torch.eye(total, dtype=torch.bool, device=block_GT.device)
    visible_GTT = (causal_TT & sees_GTT & keys_GT[:, None, :]) | diagonal_TT
    mask_GTT = torch.zeros(visible_GTT.shape, dtype=dtype, device=block_GT.device)
    return mask_GTT.masked_fill_(~visible_GTT, torch.finfo(dtype).min).unsqueeze(1)


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
    prompt_mask[2:, :1] = 0  # by so little that both groups go into one forward
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
