"""How far completions are from the reference policy: log-probabilities under both, and the exact KL per position.

The expensive part of an evaluation, so it computes as little as it can: the policy's logits come from generation
itself; each distinct prompt is run through the reference policy once and its KV cache repeated for all completions of
it, whatever their weightings (the reference is the same for all of them, so this is exact); equal completions of a
prompt, which greedy decoding under neighbouring weightings often gives, are run once.

Shapes: B completions, D distinct prompts, U distinct completions of one chunk, P prompt tokens, L completion tokens,
M token positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from clp_engine.decoding import position_ids, rows_can_be_selected, select_rows
from clp_engine.rollout import Rollout

# Reference logits of at most this many bytes per forward; at V = 49152 in float32 that is 256 positions.
CHUNK_BYTES = 48 * 2**20
# Softmax and KL of at most this many bytes per tensor, about five of which exist at once.
BLOCK_BYTES = 12 * 2**20


@dataclass(frozen=True)
class BaseScores:
    """Sums over the tokens of each completion, EOS included, float64 [B] on the CPU.

    Attributes:
        policy_logprob_B: log-probability under the policy that wrote it.
        base_logprob_B: log-probability under the reference policy.
        kl_B: KL(policy || reference) over the whole vocabulary at each position, in nats.
    """

    policy_logprob_B: torch.Tensor
    base_logprob_B: torch.Tensor
    kl_B: torch.Tensor


@torch.no_grad()
def score_against_base(model: Any, rollout: Rollout) -> BaseScores:
    """Score the completions of a rollout under the policy that wrote them and under the reference policy.

    Equivalent, with p and q the log-softmax of both policies' logits at the completion's positions, to
    `p.gather(-1, ids).sum()`, `q.gather(-1, ids).sum()` and `(p.exp() * (p - q)).sum()` over unmasked positions.
    Softmax in float32, sums in float64. Beside the rollout's own logits about 150 MB of logits exist at most.

    Args:
        model: the policy; called with `kl_weight=1.0` for the reference.
        rollout: prompts and completions, with the policy's logits (`rollout(..., return_logits=True)`).

    Raises:
        ValueError: the rollout carries no logits.
    """
    if rollout.policy_logits_BLV is None:
        raise ValueError("the rollout carries no policy logits: take it with return_logits=True")
    base = _BaseLogits(model, rollout)
    source_B = _first_equal_row(rollout)
    lengths_B = rollout.completion_mask_BL.sum(dim=1).cpu()
    totals_3B = torch.zeros(3, len(source_B), dtype=torch.float64)
    for rows_U in _chunks(source_B.unique(), lengths_B, rollout.policy_logits_BLV):
        base_ULV = base(rows_U, int(lengths_B[rows_U].max()))
        local_B = torch.full_like(source_B, -1)
        local_B[rows_U] = torch.arange(len(rows_U))
        local_B = local_B[source_B]  # where in the chunk each completion's logits lie, -1 for another chunk
        _add_positions(totals_3B, rollout, base_ULV, local_B)
    return BaseScores(*totals_3B)


def _first_equal_row(rollout: Rollout) -> torch.Tensor:
    """Return, per row, the first row with the same prompt and completion, int64 [B]."""
    first: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    pairs = zip(_prompt_keys(rollout), rollout.completion_id_lists(), strict=True)
    return torch.tensor([first.setdefault((prompt, tuple(ids)), row) for row, (prompt, ids) in enumerate(pairs)])


def _prompt_keys(rollout: Rollout) -> list[tuple[int, ...]]:
    lengths = rollout.prompt_mask_BP.sum(dim=1).tolist()
    return [tuple(ids[len(ids) - n :]) for ids, n in zip(rollout.prompt_ids_BP.tolist(), lengths, strict=True)]


def _chunks(rows: torch.Tensor, lengths_B: torch.Tensor, logits_BLV: torch.Tensor) -> Iterator[torch.Tensor]:
    """Cut rows into chunks of similar length whose logits stay within the budget; at least one row each."""
    row_positions = CHUNK_BYTES // (logits_BLV.shape[-1] * logits_BLV.element_size())
    ordered = rows[lengths_B[rows].argsort(stable=True)].tolist()
    chunk: list[int] = []
    for row in ordered:
        if chunk and (len(chunk) + 1) * int(lengths_B[row]) > row_positions:
            yield torch.tensor(chunk)
            chunk = []
        chunk.append(row)
    if chunk:
        yield torch.tensor(chunk)


def _add_positions(totals_3B: torch.Tensor, rollout: Rollout, base_ULV: torch.Tensor, local_B: torch.Tensor) -> None:
    """Add the figures of the completions whose reference logits are here to their rows of `totals_3B`."""
    logits_BLV, ids_BL = rollout.policy_logits_BLV, rollout.completion_ids_BL
    assert logits_BLV is not None
    here_BL = rollout.completion_mask_BL.bool() & (local_B >= 0).to(ids_BL.device).unsqueeze(1)
    row_M, position_M = here_BL.nonzero(as_tuple=True)
    local_M = local_B.to(ids_BL.device)[row_M]
    size = max(1, BLOCK_BYTES // (4 * logits_BLV.shape[-1]))
    for block in torch.arange(len(row_M), device=ids_BL.device).split(size):
        row, position, local = row_M[block], position_M[block], local_M[block]
        p_MV = logits_BLV[row, position].float().log_softmax(dim=-1)
        q_MV = base_ULV[local, position].float().log_softmax(dim=-1)
        target_M1 = ids_BL[row, position].unsqueeze(1)
        policy_M, base_M = p_MV.gather(1, target_M1).squeeze(1), q_MV.gather(1, target_M1).squeeze(1)
        kl_M = q_MV.neg_().add_(p_MV).mul_(p_MV.exp_()).sum(dim=-1)  # exp(p) * (p - q), in place
        figures_3M = torch.stack([policy_M, base_M, kl_M]).double().cpu()
        totals_3B.index_add_(1, row.cpu(), figures_3M)


class _BaseLogits:
    """The reference policy's logits at the completion positions of a rollout's rows, prompts run once each."""

    def __init__(self, model: Any, rollout: Rollout) -> None:
        self._model, self._rollout = model, rollout
        first: dict[tuple[int, ...], int] = {}
        self._prompt_B = torch.tensor([first.setdefault(key, len(first)) for key in _prompt_keys(rollout)])
        rows_D = torch.tensor([self._prompt_B.tolist().index(i) for i in range(len(first))])
        mask_DP = rollout.prompt_mask_BP[rows_D]
        outputs = model(
            input_ids=rollout.prompt_ids_BP[rows_D],
            attention_mask=mask_DP,
            position_ids=position_ids(mask_DP),
            kl_weight=1.0,
            use_cache=True,
            logits_to_keep=1,
        )
        self._first_D1V = outputs.logits
        self._cache = outputs.past_key_values if rows_can_be_selected(outputs.past_key_values) else None

    def __call__(self, rows_U: torch.Tensor, length: int) -> torch.Tensor:
        """Return logits [U, length, V]: entry l predicts completion token l."""
        if self._cache is None:
            return self._whole_forward(rows_U, length)
        prompt_U = self._prompt_B[rows_U]
        first_U1V = self._first_D1V[prompt_U]
        if length == 1:
            return first_U1V
        rollout = self._rollout
        width = rollout.prompt_mask_BP.shape[1]
        mask_UT = torch.cat([rollout.prompt_mask_BP[rows_U], rollout.completion_mask_BL[rows_U, : length - 1]], dim=1)
        outputs = self._model(
            input_ids=rollout.completion_ids_BL[rows_U, : length - 1],
            attention_mask=mask_UT,
            position_ids=position_ids(mask_UT)[:, width:],
            past_key_values=self._select(prompt_U),
            kl_weight=1.0,
            use_cache=True,
        )
        return torch.cat([first_U1V, outputs.logits], dim=1)

    def _select(self, prompt_U: torch.Tensor) -> Any:
        """Return a copy of the prompts' KV cache with one row per completion, tagged with its (zero) coefficients."""
        cache: Any = copy.deepcopy(self._cache)
        select_rows(cache, prompt_U.to(self._first_D1V.device))
        return cache

    def _whole_forward(self, rows_U: torch.Tensor, length: int) -> torch.Tensor:
        width = self._rollout.prompt_mask_BP.shape[1]
        stop = width + length - 1
        mask_UT = self._rollout.attention_mask_BT[rows_U, :stop]
        outputs = self._model(
            input_ids=self._rollout.input_ids_BT[rows_U, :stop],
            attention_mask=mask_UT,
            position_ids=position_ids(mask_UT),
            kl_weight=1.0,
            use_cache=False,
            logits_to_keep=length,
        )
        return outputs.logits
