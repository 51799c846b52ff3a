"""Shared prompts: equal completions and groups of unlike sizes cost what they must; values are the padded rows."""

from __future__ import annotations

import copy

import pytest
import torch

from clp_engine.layers import conditioned_layers
from clp_engine.logprobs import shares_prompts_exactly, token_logprobs
from clp_engine.rollout import Rollout

P, L, N = 4, 8, 3


def completions(lengths_Gn: list[list[int]], prompt_lengths: list[int], equal: tuple[tuple[int, int, int], ...] = ()):
    """Random completions of these lengths; each (group, a, b) makes b the same as a, but for what follows its end."""
    generator = torch.Generator().manual_seed(3)
    groups = len(lengths_Gn)
    lengths = torch.tensor(lengths_Gn)
    ids_GnL = torch.randint(5, 30, (groups, N, L), generator=generator)
    for group, a, b in equal:
        lengths[group, b] = lengths[group, a]
        ids_GnL[group, b, : lengths[group, a]] = ids_GnL[group, a, : lengths[group, a]]
    mask = (torch.arange(L) < lengths.view(-1, 1)).long()
    prompt_mask = (torch.arange(P) >= P - torch.tensor(prompt_lengths)[:, None]).long().repeat_interleave(N, dim=0)
    prompts = torch.randint(5, 30, (groups, P), generator=generator).repeat_interleave(N, dim=0)
    return Rollout(prompts, prompt_mask, ids_GnL.flatten(0, 1), mask, mask[:, 0].bool(), [""] * groups * N, N)


CASES = {
    "unlike": ([[8, 7, 8], [2, 1, 2], [7, 8, 8]], [4, 2, 3], ()),
    "equal": ([[8, 5, 3], [6, 6, 6]], [4, 4], ((0, 0, 1), (1, 0, 1), (1, 0, 2))),
    "one token": ([[1, 1, 1], [8, 8, 8]], [1, 4], ((0, 1, 2),)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_padded_rows(conditioned, case):
    out = completions(*CASES[case])
    w = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])[: len(out.texts) // N]
    values, gradients = [], []
    for share_prompts in (False, True):
        model = copy.deepcopy(conditioned)
        logprobs = token_logprobs(model, out, model.coefficients(len(w), w), share_prompts=share_prompts)
        # Equal completions have different advantages once their rewards or rows do.
        (logprobs * torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)).sum().backward()
        values.append(logprobs.detach())
        gradients.append([layer.deltas.grad for layer in conditioned_layers(model).values()])
    torch.testing.assert_close(values[1], values[0], atol=2e-5, rtol=1e-5)
    for padded, shared in zip(*gradients, strict=True):
        torch.testing.assert_close(shared, padded, atol=1e-4, rtol=1e-4)


@pytest.fixture
def shapes(conditioned, monkeypatch):
    """The shapes of the inputs of `conditioned`'s forwards so far."""
    seen, real = [], conditioned.model.forward

    def watched(*args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return real(*args, **kwargs)

    monkeypatch.setattr(conditioned.model, "forward", watched)
    return seen


def run(model, coefficients_of, out):
    w = torch.full((len(out.texts) // N, 2), 0.5)
    return token_logprobs(model, out, coefficients_of.coefficients(len(w), w), share_prompts=True)


def test_groups_of_unlike_sizes_are_not_padded_to_the_longest(conditioned, shapes):
    # Inputs of a group: its prompt and, of each completion, all tokens but the last.
    run(conditioned, conditioned, completions(*CASES["unlike"]))
    assert shapes == [(2, 4 + 20), (1, 2 + 2)]


def test_equal_completions_run_once(conditioned, shapes):
    run(conditioned, conditioned, completions(*CASES["equal"]))
    assert shapes == [(1, 4 + 7 + 2), (1, 4 + 5)]


def test_no_row_is_padded_by_more_than_an_eighth(conditioned, shapes):
    """Prompts are padded on the left, completions on the right: equal sums are not yet equal rows."""
    run(conditioned, conditioned, completions([[1, 1, 4], [1, 1, 1]], [1, 4]))
    assert shapes == [(1, 1 + 3), (1, 4)]


class Wrapper(torch.nn.Module):
    """What DistributedDataParallel is to its module: no attribute of it, and a forward that may talk to others."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_wrapped_models_take_one_forward(conditioned, shapes):
    """Other processes' groups are cut otherwise."""
    out = completions(*CASES["unlike"])
    wrapped = run(Wrapper(conditioned), conditioned, out)
    assert shapes == [(3, 4 + 20)]
    torch.testing.assert_close(wrapped, run(conditioned, conditioned, out))


def test_the_probe_of_shared_prompts_pads_a_row(conditioned, shapes):
    assert shares_prompts_exactly(conditioned)
    assert shapes[0] == (2, 5 + 6)  # both groups in one forward, the second behind a padded prompt
