"""The sampler draws from the softmax, and only from it."""

import math

import pytest
import torch

from clp_engine.sampling import InverseCDFSampler

IDS = torch.zeros(1, 1, dtype=torch.long)


def drawn(logits_BV, temperature=1.0):
    scores = InverseCDFSampler(temperature)(IDS, logits_BV)
    assert scores.dtype == logits_BV.dtype
    assert ((scores == 0).sum(dim=1) == 1).all()
    assert torch.isneginf(scores[scores != 0]).all()
    return scores.argmax(dim=1)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_draws_have_the_distribution_of_the_softmax(temperature):
    torch.manual_seed(0)
    n, logits_V = 40_000, torch.randn(50) * 2
    counts_V = torch.bincount(drawn(logits_V.expand(n, -1), temperature), minlength=50)
    expected_V = n * (logits_V.double() / temperature).softmax(-1)
    likely = expected_V >= 5
    chi_squared = ((counts_V - expected_V)[likely].square() / expected_V[likely]).sum()
    assert chi_squared < 2.2 * likely.sum()  # the mean is 1 a cell; above 2.2 is less likely than 1e-4
    wrong_V = n * (logits_V.double() / temperature * 1.1).softmax(-1)
    assert ((counts_V - wrong_V)[likely].square() / wrong_V[likely]).sum() > 3 * likely.sum()


def test_rows_are_drawn_independently_and_by_the_seed():
    logits_BV = torch.zeros(2000, 2)
    torch.manual_seed(3)
    first = drawn(logits_BV)
    assert 900 < int(first.sum()) < 1100
    assert 900 < int((first[::2] == first[1::2]).sum()) * 2 < 1100
    torch.manual_seed(3)
    assert torch.equal(drawn(logits_BV), first)


def fixed_uniform(monkeypatch, value):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, value, **options))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53])
def test_impossible_tokens_are_never_drawn_not_even_at_the_ends(monkeypatch, uniform):
    torch.manual_seed(0)
    logits_BV = torch.full((3, 70_000), float("-inf"))
    logits_BV[:, 1000:60_000:7] = torch.randn(3, len(range(1000, 60_000, 7)))
    fixed_uniform(monkeypatch, uniform)
    tokens = drawn(logits_BV)
    assert torch.isfinite(logits_BV[torch.arange(3), tokens]).all()
    first, last = 1000, range(1000, 60_000, 7)[-1]
    assert {0.0: tokens == first, 0.5: (tokens > first) & (tokens < last)}.get(uniform, tokens == last).all()


def test_rare_tokens_of_a_long_vocabulary_keep_their_share(monkeypatch):
    """49 151 entries share 1e-5 of the probability: added to .99999 in float32, each of them would be nothing."""
    logits_BV = torch.zeros(1, 49_152)
    logits_BV[0, 0] = math.log(49_151 / 1e-5)
    fixed_uniform(monkeypatch, 1.0 - 0.5e-5)
    assert 24_000 < drawn(logits_BV).item() < 25_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_distribution_raise(bad):
    logits_BV = torch.zeros(2, 5)
    logits_BV[1, 2] = bad
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        drawn(logits_BV)


def test_a_temperature_that_is_not_positive_raises():
    with pytest.raises(ValueError, match="temperature is 0"):
        InverseCDFSampler(0.0)
