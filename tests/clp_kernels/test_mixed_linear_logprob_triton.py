"""mixed_linear_logprob by Triton against a float64 oracle: interpreted without a GPU, compiled (and bf16) on one."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from logprob_support import (
    BENT,
    BF16,
    F16,
    F32,
    PARAMETERS,
    PLAIN,
    compare,
    problem,
    values_and_gradients,
)
from mixed_linear_support import largest_allocation
from torch import Tensor

from clp_kernels import mixed_linear_logprob, mixed_linear_logprob_ref
from clp_kernels import mixed_linear_logprob_triton as launchers
from clp_kernels.mixed_linear_logprob_arguments import Head, Logits, Needs, Targets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [(F32, F32), (F16, F16), (F16, F32)] + ([(BF16, BF16), (BF16, F32)] if DEVICE == "cuda" else [])
HOW = pytest.mark.parametrize("how", [PLAIN, BENT], ids=["plain", "bent"])
# M, D, V, K: one row, one token, less than a tile of tokens, several tiles, splits and chunks with a rest, odd sizes.
SHAPES = [(1, 33, 7, 1), (3, 5, 40, 2), (17, 33, 1, 3), (40, 33, 300, 2)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills every torch.empty with NaN: an element that no program stores shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """A few programs, each of several tiles, and chunks of 128 tokens."""
    monkeypatch.setattr(launchers, "_PROGRAMS", 4)
    monkeypatch.setattr(launchers, "_CHUNK_ELEMENTS", 128)


def on_device(a: dict[str, Any]) -> dict[str, Any]:
    return {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in a.items()}


def check(a: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
    """`compare`; on a GPU a float32 operand beside 16-bit rows is cut to TF32, which their own rounding bounds."""
    x = a["hidden"].dtype
    roundoff = torch.finfo(x).eps if DEVICE == "cuda" and x != F32 else 0.0
    return compare(on_device(a), "triton", roundoff=roundoff, **kwargs)


@HOW
@pytest.mark.parametrize(("x_dtype", "deltas_dtype"), DTYPES)
@pytest.mark.parametrize(("M", "D", "V", "K"), SHAPES)
def test_values_and_gradients(M, D, V, K, x_dtype, deltas_dtype, how):
    check(problem(M, D, V, K, x_dtype, deltas_dtype, "shuffled", with_base=M != 3), **how)


@pytest.mark.parametrize("left_out", ["bias", "bias_deltas", "base"])
def test_optional_terms(left_out):
    check(problem(19, 33, 140, 2) | {left_out: None}, **BENT)


@pytest.mark.parametrize("wanted", PARAMETERS)
@pytest.mark.parametrize("return_entropy", [True, False])
def test_only_the_gradients_asked_for(wanted, return_entropy):
    check(problem(19, 9, 140, 2, rows="different"), wanted=(wanted,), return_entropy=return_entropy)


def test_what_nobody_asked_for_is_none():
    hidden, head, targets, by = arguments(on_device(problem(19, 9, 140, 2)))
    logprob, entropy, normalizer, formed = launchers.forward(hidden, head, targets, by, False, False)
    assert entropy is None
    assert formed is None
    nothing = Needs(False, False, False, False, False, False)
    of_rows = (normalizer, None, logprob, None)
    assert launchers.backward(hidden, head, targets, by, *of_rows, nothing) == (None,) * 6


@pytest.mark.parametrize("scale", [1.0, 3e3])
def test_huge_and_masked_logits(scale):
    """Logits of 1e4 and tokens that a bias of -inf removes, whole programs among them: no cancellation, no NaN."""
    a = problem(40, 8, 700, 2, rows="different") | {"bias_deltas": None}
    a["base"] = a["base"] * scale
    a["bias"] = torch.where(torch.arange(700) % 3 == 1, -torch.inf, a["bias"])
    a["bias"][:520] = -torch.inf
    a["targets"] = torch.where(a["targets"] == -100, -100, 521 + a["targets"] % 60 * 3)
    results = check(a, wanted=("hidden", "deltas"))
    assert all(torch.isfinite(value).all() for value in results.values())


def test_equal_logits_have_the_entropy_of_all_tokens():
    a = problem(5, 4, 331, 2)
    a = {**a, "base": a["base"] * 0, "deltas": a["deltas"] * 0, "bias": torch.full((331,), 1e4), "bias_deltas": None}
    logprob, entropy = mixed_linear_logprob(**on_device(a), backend="triton")
    expected = torch.where(a["targets"] != -100, torch.tensor(331.0).log(), 0.0)
    torch.testing.assert_close(entropy.cpu(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logprob.cpu(), -expected, rtol=1e-6, atol=0)


def test_rows_without_a_target():
    """They give exact zeros, and what is in them (NaN here) reaches no gradient."""
    a = on_device(problem(70, 9, 50, 2))
    is_ignored = a["targets"] == -100
    clean = values_and_gradients(mixed_linear_logprob, a, backend="triton")
    a["hidden"][is_ignored] = torch.nan
    poisoned = values_and_gradients(mixed_linear_logprob, a, backend="triton")
    for name, value in clean.items():
        assert torch.equal(poisoned[name], value), name
    for name in ("logprob", "entropy", "hidden"):
        assert (clean[name][is_ignored] == 0).all()
    a["targets"][:] = 7
    nothing = values_and_gradients(mixed_linear_logprob, a, backend="triton", ignore_index=7)
    assert all((value == 0).all() for value in nothing.values())


def test_no_rows():
    a = on_device(problem(3, 10, 30, 2))
    a |= {name: a[name][:0] for name in ("hidden", "targets", "row_map")}
    results = values_and_gradients(mixed_linear_logprob, a, backend="triton")
    assert results["logprob"].shape == results["entropy"].shape == (0,)
    for name in PARAMETERS:
        assert torch.equal(results[name], torch.zeros_like(a[name])), name


@pytest.mark.parametrize("dtype", [F32, F16])
def test_a_head_without_deltas(dtype):
    a = on_device(problem(30, 9, 150, 2, dtype))
    results = []
    for op, wide in ((mixed_linear_logprob, False), (mixed_linear_logprob_ref, True)):
        hidden, base, bias = ((t.float() if wide else t).clone() for t in (a["hidden"], a["base"], a["bias"]))
        backend = {} if wide else {"backend": "triton"}
        leaves = (hidden.requires_grad_(), base.requires_grad_())
        logprob, entropy = op(hidden, base, None, None, a["targets"], bias, **backend)
        results.append([logprob, entropy, *torch.autograd.grad(logprob.sum() + entropy.sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if ours.dtype == F32 else {"rtol": 2**-10, "atol": 1e-3}
        torch.testing.assert_close(ours.float(), expected, **tolerance)


def arguments(a: dict[str, Any]) -> tuple[Tensor, Head, Targets, Logits]:
    """The launchers' arguments."""
    head = Head(*(a[name] for name in ("base", "deltas", "coefficients", "row_map", "bias", "bias_deltas")))
    return a["hidden"], head, Targets(a["targets"], -100), Logits(**BENT)


def launch(a: dict[str, Any], main_grad: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Log-prob, entropy and the gradients in the order of `Needs`, of weights that the row alone decides."""
    inputs = arguments(a)
    logprob, entropy, normalizer, _ = launchers.forward(*inputs, True, False)
    weights = torch.linspace(-1, 1, 2 * len(logprob), device=DEVICE).view(-1, 2)
    needs = Needs(True, True, main_grad is None, True, True, True)
    of_rows = (normalizer, entropy, weights[:, 0], weights[:, 1])
    return logprob, entropy, *launchers.backward(*inputs, *of_rows, needs, main_grad)


def assert_same_bits(actual: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    for value, wanted in zip(actual, expected, strict=True):
        assert value is not None
        assert wanted is not None
        assert torch.equal(value, wanted)


def test_strided_inputs_give_the_bits_of_contiguous_ones():
    a = on_device(problem(19, 33, 140, 2))
    a["row_map"] = torch.full_like(a["row_map"], 1)
    strided = {
        **a,
        **{name: a[name].T.contiguous().T for name in ("hidden", "base", "coefficients", "bias_deltas")},
        **{name: torch.stack((a[name], a[name] * 0), 1)[:, 0] for name in ("targets", "bias")},
        "deltas": a["deltas"].permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "row_map": a["row_map"][:1].expand(19),
    }
    assert not any(strided[name].is_contiguous() for name in strided)
    assert_same_bits(launch(strided), launch(a))


def test_two_runs_give_the_same_bits():
    a = on_device(problem(40, 33, 300, 3, rows="shuffled"))
    assert_same_bits(launch(a), launch(a))


@pytest.mark.parametrize("M", [16, 40])
def test_a_row_does_not_depend_on_its_neighbours(M):
    a = on_device(problem(M, 70, 140, 2, rows="shuffled"))
    other = {**a, "hidden": torch.randn_like(a["hidden"]), "row_map": torch.full_like(a["row_map"], a["row_map"][6])}
    other["hidden"][6] = a["hidden"][6]
    other["targets"] = torch.where(torch.arange(M, device=DEVICE) == 6, a["targets"], 3)
    of_rows = slice(3)  # log-prob, entropy, gradient of hidden
    for actual, expected in zip(launch(other)[of_rows], launch(a)[of_rows], strict=True):
        assert torch.equal(actual[6], expected[6])


def test_main_grad_takes_the_gradient_of_the_deltas():
    a = on_device(problem(19, 9, 140, 2))
    start = torch.randn(a["deltas"].shape, device=DEVICE)
    main_grad = start.clone()
    with_buffer, plain = launch(a, main_grad), launch(a)
    deltas = 2 + Needs._fields.index("deltas")
    assert with_buffer[deltas] is None
    assert torch.equal(main_grad, start + plain[deltas])
    others = [index for index in range(len(plain)) if index != deltas]
    assert_same_bits(tuple(with_buffer[i] for i in others), tuple(plain[i] for i in others))


@pytest.mark.skipif(DEVICE == "cuda", reason="the measure is of the CPU's allocations")
def test_no_tensor_of_logits_exists():
    M, V, D = 40, 1200, 8
    a = problem(M, D, V, 2, rows="different")
    a["hidden"].requires_grad_()
    logits = M * V * 4
    assert largest_allocation(lambda: mixed_linear_logprob_ref(**a)) >= logits  # the measure sees them

    def forward_and_backward() -> None:
        logprob, entropy = mixed_linear_logprob(**a, backend="triton")
        (logprob.sum() + entropy.sum()).backward()

    assert largest_allocation(forward_and_backward) <= M * 128 * 4  # the scratch buffer of one chunk


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize(("x_dtype", "deltas_dtype"), [d for d in DTYPES if d in ((F16, F32), (BF16, F32))])
def test_steering_effect_survives_16_bits(x_dtype, deltas_dtype, size):
    """logprob(c) - logprob(0): neither mix nor logits are rounded to 16 bits."""
    a = problem(60, 64, 90, 2, x_dtype, deltas_dtype) | {"bias_deltas": None}
    a = on_device(a | {"deltas": a["deltas"] * (size / a["deltas"].std())})
    none = {**a, "coefficients": torch.zeros_like(a["coefficients"])}
    wide, wide_none = (
        {n: t.double() if n in PARAMETERS and t is not None else t for n, t in b.items()} for b in (a, none)
    )
    effect = mixed_linear_logprob(**a, backend="triton")[0] - mixed_linear_logprob(**none, backend="triton")[0]
    exact = mixed_linear_logprob_ref(**wide)[0] - mixed_linear_logprob_ref(**wide_none)[0]
    assert (effect - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.skipif(DEVICE == "cuda", reason="the untouched address space stands in for tensors of over 2^31 elements")
@pytest.mark.parametrize("name", ["hidden", "base", "deltas", "bias_deltas"])
def test_offsets_beyond_32_bits(name):
    a = problem(3, 16, 3, 1)
    stride = 2**30  # the third row or token starts at element 2^31
    no_reserve = 0x4000  # MAP_NORESERVE, which the mmap module does not name before Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    space = mmap.mmap(-1, 4 * (2 * stride + 16), flags=flags)
    far = torch.frombuffer(space, dtype=F32).as_strided(a[name].shape, (stride, *a[name].stride()[1:]))
    far.copy_(a[name])
    inputs, expected = arguments({**a, name: far}), arguments(a)
    actual = launchers.forward(*inputs, True, False)
    assert torch.equal(actual[0], launchers.forward(*expected, True, False)[0])
    of_rows = (actual[2], None, torch.ones(3), None)
    needs = Needs(name != "hidden", False, False, True, False, False)  # dx of far rows alone would be written far
    gradients, wanted = (launchers.backward(*given, *of_rows, needs) for given in (inputs, expected))
    for value, other in zip(gradients, wanted, strict=True):
        assert (value is None and other is None) or torch.equal(value, other)


def test_what_does_not_fit_is_refused():
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="raw bits"):
            mixed_linear_logprob(**problem(3, 5, 7, 2, BF16), backend="triton")
    else:
        with pytest.raises(ValueError, match="needs a GPU"):
            mixed_linear_logprob(**problem(3, 5, 7, 2), backend="triton")
