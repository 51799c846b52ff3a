"""mixed_linear_logprob's values and gradients against a float64 oracle, within twice the reference's own error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from logprob_support import (
    BACKENDS,
    BENT,
    BF16,
    F16,
    F32,
    F64,
    HAS_CPP,
    PARAMETERS,
    PLAIN,
    compare,
    loss_weights,
    magnitudes,
    needs_cpp,
    problem,
    relative_error,
    values_and_gradients,
)

from clp_kernels import extension, mixed_linear, mixed_linear_logprob, mixed_linear_logprob_ref

ISAS = extension.available_isas() if HAS_CPP else ()

# M, D, V, K: one row, odd sizes, several chunks with a rest; a chunk is at most 1024 tokens.
SHAPES = [(1, 33, 7, 1), (3, 5, 40, 2), (17, 33, 1, 3), (130, 70, 1100, 4), (40, 33, 2051, 2)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills what torch allocates without initialising it with NaN: a value that a kernel forgot to write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS)
def isa(request):
    extension.set_isa(request.param)
    yield request.param
    extension.set_isa("best")


@needs_cpp
@pytest.mark.parametrize("rows", ["one", "segments", "shuffled", "different"])
@pytest.mark.parametrize(("x_dtype", "deltas_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)])
@pytest.mark.parametrize(("M", "D", "V", "K"), SHAPES)
def test_cpp(M, D, V, K, x_dtype, deltas_dtype, rows):
    with_base = (M + K) % 3 > 0
    a = problem(M, D, V, K, x_dtype, deltas_dtype, rows, with_base)
    for how in (PLAIN, BENT):
        compare(a, "cpp", **how)


@needs_cpp
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("rows", ["segments", "shuffled"])
@pytest.mark.parametrize(("M", "S"), [(1700, 3), (1700, 20), (700, 2), (90, 2)])
def test_segments_of_every_length(M, S, rows, dtypes):
    """Panels of a few long segments' mixes, and mixes made as the products go: blocks of eight segments or 512 rows."""
    a = problem(M, 40, 70, 3, *dtypes, rows, S=S)
    compare(a, "cpp", **BENT)
    for wanted in (("hidden",), ("base",), ("deltas",), ("base", "coefficients")):
        compare(a, "cpp", wanted=wanted, return_entropy=False)


@needs_cpp
@pytest.mark.parametrize("wanted", [PARAMETERS, ("base", "coefficients")], ids=["all", "no deltas"])
def test_segments_of_uneven_length(wanted):
    """One of more than 512 rows among short ones, which are not cut, and a last chunk of six tokens."""
    lengths = torch.tensor([20, 1100, 33, 9, 64, 1])
    a = problem(int(lengths.sum()), 40, 510, 3, S=6)
    a["row_map"] = torch.arange(6, dtype=torch.int32).repeat_interleave(lengths)
    compare(a, "cpp", wanted=wanted)


@needs_cpp
@pytest.mark.parametrize(("M", "S", "rows"), [(90, 3, "segments"), (90, 1, "one"), (90, 90, "different")])
def test_a_token_that_one_copy_removes(M, S, rows):
    """A bias of -inf in one copy, in the first of several chunks, reaches that token alone."""
    a = problem(M, 16, 1100, 2, rows=rows, S=S)
    a["coefficients"] = a["coefficients"].abs() + 0.1
    a["bias_deltas"][5, 0] = -torch.inf
    a["targets"] = torch.where(a["targets"] == 5, 6, a["targets"])
    results = compare(a, "cpp", wanted=("hidden", "base", "deltas", "bias", "bias_deltas"))
    for name, value in results.items():
        assert value.isfinite().all(), name


@needs_cpp
@pytest.mark.parametrize("S", [1, 3, 20])
def test_copies_without_weight_are_not_mixed(S):
    """Where rows share weightings, NaN in a copy of coefficient zero reaches that coefficient's gradient alone."""
    a = problem(400, 40, 600, 3, rows="segments", S=S)
    a["coefficients"][:, 1] = 0
    results = values_and_gradients(mixed_linear_logprob, a, backend="cpp")
    a["deltas"][:, 1] = torch.nan
    poisoned = values_and_gradients(mixed_linear_logprob, a, backend="cpp")
    for results_of_run in (results, poisoned):
        results_of_run["coefficients"] = results_of_run["coefficients"][:, [0, 2]]
    for name, value in results.items():
        assert torch.equal(poisoned[name], value), name


@needs_cpp
@pytest.mark.parametrize("S", [1, 3, 20])
def test_added_to_main_grad(S):
    a = problem(400, 40, 600, 3, BF16, BF16, S=S)
    deltas = a["deltas"].clone().requires_grad_()
    deltas.main_grad = torch.ones(deltas.shape)
    logprob, _ = mixed_linear_logprob(**(a | {"deltas": deltas}), return_entropy=False, backend="cpp")
    (loss_weights(logprob)[0] * logprob).sum().backward()
    assert deltas.grad is None
    wide = a | {"deltas": a["deltas"].float()}
    exact, own = (
        values_and_gradients(mixed_linear_logprob_ref, wide, dtype, ("deltas",), return_entropy=False)["deltas"] + 1
        for dtype in (F64, None)
    )
    size = magnitudes(a, return_entropy=False, **PLAIN)["deltas"] + 1
    budget = 2 * relative_error(own, exact, size) + torch.finfo(F32).eps / 2
    assert relative_error(deltas.main_grad, exact, size) <= budget


@needs_cpp
def test_cpp_at_random_shapes():
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for seed in range(60):
        size = {"M": draw(1, 90), "D": draw(0, 50), "V": draw(1, 300), "K": draw(1, 6)}
        rows = ("one", "segments", "shuffled", "different")[draw(0, 4)]
        dtypes = ((F32, F32), (BF16, F32), (BF16, BF16), (F32, BF16), (F16, F16))[draw(0, 5)]
        a = problem(*size.values(), *dtypes, rows, with_base=draw(0, 2) == 0, seed=seed)
        a |= {name: None for name in ("bias", "bias_deltas") if draw(0, 2) == 0}
        compare(a, "cpp", **(PLAIN, BENT)[draw(0, 2)])


@needs_cpp
@pytest.mark.parametrize("how", [PLAIN, BENT], ids=["plain", "bent"])
@pytest.mark.parametrize("rows", ["segments", "different"])
def test_cpp_on_every_instruction_set(isa, rows, how):
    for dtypes in ((F32, F32), (BF16, F32), (F16, F16)):
        a = problem(90, 37, 300, 2, *dtypes, rows)
        compare(a, "cpp", **how)
        compare(a, "cpp", wanted=("hidden",), return_entropy=False, **how)


@pytest.mark.parametrize("how", [PLAIN, BENT], ids=["plain", "bent"])
@pytest.mark.parametrize(("x_dtype", "deltas_dtype"), [(F32, F32), (BF16, F32), (F16, F16)])
def test_chunked_reference(x_dtype, deltas_dtype, how, monkeypatch):
    monkeypatch.setattr("clp_kernels.mixed_linear_logprob_reference._SMALLEST_CHUNK", 16)
    monkeypatch.setattr("clp_kernels.mixed_linear_logprob_reference._CHUNK_LOGITS", 16)
    compare(problem(17, 33, 70, 3, x_dtype, deltas_dtype, "shuffled"), "reference", **how)


@needs_cpp
@pytest.mark.parametrize("rows", ["segments", "shuffled", "different"])
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
def test_gradient_formed_in_the_forward(x_dtype, rows):
    """Only hidden needs a gradient and entropy none: no logits are made in the backward."""
    a = problem(130, 33, 1500, 2, x_dtype, F32, rows)
    for how in (PLAIN, BENT):
        compare(a, "cpp", wanted=("hidden",), return_entropy=False, **how)
    # Ascending logits: the largest one grows, and the gradient is rescaled, in every chunk.
    a["bias"] = torch.linspace(-40, 40, 1500).to(x_dtype)
    compare(a, "cpp", wanted=("hidden",), return_entropy=False)


@needs_cpp
def test_reported_entropy_keeps_the_formed_gradient(monkeypatch):
    a = problem(20, 16, 200, 2)
    calls = []
    backward = torch.ops.clp.mixed_linear_logprob_backward.default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    inputs = {**a, "hidden": a["hidden"].clone().requires_grad_()}
    with Watch():
        logprob, entropy = mixed_linear_logprob(**inputs, differentiate_entropy=False, backend="cpp")
        logprob.sum().backward()
    assert backward not in calls
    assert not entropy.requires_grad
    expected = {**a, "hidden": a["hidden"].clone().requires_grad_()}
    reference_logprob, reference_entropy = mixed_linear_logprob_ref(**expected)
    reference_logprob.sum().backward()
    torch.testing.assert_close(entropy, reference_entropy.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs["hidden"].grad, expected["hidden"].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", PARAMETERS)
@pytest.mark.parametrize("rows", ["segments", "different"])
def test_only_the_gradients_asked_for(backend, wanted, rows):
    a = problem(60, 9, 50, 2, rows=rows)
    for how in ({}, {"return_entropy": False}):
        compare(a, backend, wanted=(wanted,), **how)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", ["segments", "different"])
def test_huge_and_masked_logits(backend, rows):
    """Logits of 1e4 and tokens that a bias of -inf removes: entropy neither cancels nor becomes NaN."""
    a = problem(40, 8, 1300, 2, rows=rows)
    a["bias_deltas"] = None
    for scale in (1.0, 3e3):
        b = {**a, "base": a["base"] * scale}
        b["bias"] = torch.where(torch.arange(1300) % 3 == 1, -torch.inf, a["bias"])
        b["bias"][:1100] = -torch.inf  # a first chunk without any token
        b["targets"] = torch.where(a["targets"] == -100, -100, 1101 + a["targets"] % 60 * 3)
        results = compare(b, backend, wanted=("hidden", "deltas"))
        assert all(torch.isfinite(value).all() for value in results.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_have_the_entropy_of_all_tokens(backend):
    a = problem(5, 4, 1531, 2)
    a = {**a, "base": a["base"] * 0, "deltas": a["deltas"] * 0, "bias": torch.full((1531,), 1e4), "bias_deltas": None}
    logprob, entropy = mixed_linear_logprob(**a, backend=backend)
    is_kept = a["targets"] != -100
    expected = torch.where(is_kept, torch.tensor(1531.0).log(), 0.0)
    torch.testing.assert_close(entropy, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logprob, -expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_target(backend):
    """They give exact zeros, and what is in them (NaN here) reaches no gradient."""
    a = problem(70, 9, 50, 2)
    is_ignored = a["targets"] == -100
    clean = values_and_gradients(mixed_linear_logprob, a, backend=backend)
    a["hidden"][is_ignored] = torch.nan
    poisoned = values_and_gradients(mixed_linear_logprob, a, backend=backend)
    for name, value in clean.items():
        assert torch.equal(poisoned[name], value), name
    for name in ("logprob", "entropy", "hidden"):
        assert (clean[name][is_ignored] == 0).all()
    formed = values_and_gradients(mixed_linear_logprob, a, None, ("hidden",), backend=backend, return_entropy=False)
    assert (formed["hidden"][is_ignored] == 0).all()
    assert torch.isfinite(formed["hidden"]).all()
    a["targets"][:] = 7
    nothing = values_and_gradients(mixed_linear_logprob, a, backend=backend, ignore_index=7)
    assert all((value == 0).all() for value in nothing.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_strides_and_coefficients(backend):
    a = problem(12, 10, 30, 2)
    hidden = torch.randn(10, 4, 3).permute(2, 1, 0).requires_grad_()  # [3, 4, 10]
    deltas = a["deltas"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    targets = torch.randint(0, 30, (4, 3)).T
    for c in (torch.randn(2), torch.randn(3, 2), torch.randn(3, 4, 2)):
        ours = mixed_linear_logprob(hidden, a["base"], deltas, c, targets.int(), backend=backend)
        expected = mixed_linear_logprob_ref(hidden, a["base"], deltas, c, targets)
        for value, wanted in zip(ours, expected, strict=True):
            assert value.shape == (3, 4)
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(ours[0].sum() + ours[1].sum(), hidden)
        (wanted,) = torch.autograd.grad(expected[0].sum() + expected[1].sum(), hidden)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    a = problem(3, 10, 30, 2)
    deltas = a["deltas"].clone().requires_grad_()
    logprob, entropy = mixed_linear_logprob(
        torch.empty(0, 4, 10),
        a["base"],
        deltas,
        torch.empty(0, 2),
        torch.empty(0, 4, dtype=torch.int64),
        backend=backend,
    )
    assert logprob.shape == entropy.shape == (0, 4)
    (logprob.sum() + entropy.sum()).backward()
    assert torch.equal(deltas.grad, torch.zeros_like(deltas))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_head_without_deltas(backend, dtype):
    a = problem(30, 9, 50, 2, dtype)
    base = a["base"].clone().requires_grad_()
    hidden = a["hidden"].clone().requires_grad_()
    logprob, entropy = mixed_linear_logprob(hidden, base, None, None, a["targets"], a["bias"], backend=backend)
    (logprob.sum() + entropy.sum()).backward()
    wide, wide_base = (t.detach().float().requires_grad_() for t in (hidden, base))
    log_p = F.linear(wide, wide_base, a["bias"].float()).log_softmax(-1)
    is_kept = a["targets"] != -100
    expected = torch.where(is_kept, log_p.gather(1, a["targets"].clamp(min=0)[:, None]).squeeze(1), 0.0)
    expected_entropy = torch.where(is_kept, -(log_p.exp() * log_p).sum(-1), 0.0)
    (expected.sum() + expected_entropy.sum()).backward()
    torch.testing.assert_close(logprob, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == F32 else {"rtol": 2**-7, "atol": 1e-3}
    torch.testing.assert_close(hidden.grad.float(), wide.grad, **tolerance)
    torch.testing.assert_close(base.grad.float(), wide_base.grad, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", [PLAIN, BENT], ids=["plain", "bent"])
def test_equals_the_models_own_step_from_hidden_to_logits(backend, how):
    a = problem(50, 33, 200, 2)
    logits = how["logit_scale"] * mixed_linear(
        a["hidden"],
        a["base"],
        a["deltas"],
        a["coefficients"],
        a["bias"],
        bias_deltas=a["bias_deltas"],
        row_map=a["row_map"],
    )
    if how["softcap"] is not None:
        logits = how["softcap"] * torch.tanh(logits / how["softcap"])
    log_p = (logits / how["temperature"]).log_softmax(-1)
    is_kept = a["targets"] != -100
    expected = log_p.gather(1, a["targets"].clamp(min=0)[:, None]).squeeze(1)
    logprob, entropy = mixed_linear_logprob(**a, **how, backend=backend)
    torch.testing.assert_close(logprob[is_kept], expected[is_kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy[is_kept], -(log_p.exp() * log_p).sum(-1)[is_kept], rtol=1e-5, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("rows", ["segments", "different"])
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
def test_steering_effect_survives_bfloat16(rows, size):
    """logprob(c) - logprob(0) of a bfloat16 head: neither mix nor logits are rounded to bfloat16."""
    a = problem(60, 64, 90, 2, BF16, F32, rows)
    a["deltas"] = a["deltas"] * (size / a["deltas"].std())
    a["bias_deltas"] = None
    none = {**a, "coefficients": torch.zeros_like(a["coefficients"])}
    effect = mixed_linear_logprob(**a, backend="cpp")[0] - mixed_linear_logprob(**none, backend="cpp")[0]
    wide, wide_none = (
        {n: t.double() if n in PARAMETERS and t is not None else t for n, t in b.items()} for b in (a, none)
    )
    exact = mixed_linear_logprob_ref(**wide)[0] - mixed_linear_logprob_ref(**wide_none)[0]
    # Logits of a few units, in float32.
    assert (effect - exact).abs().max() <= 32 * 2**-24 * 8
    assert (effect - exact).norm() <= 0.05 * exact.norm()


@needs_cpp
def test_exp_and_tanh(isa):
    """Within the units in the last place that the kernel's header states."""
    x = torch.cat((torch.linspace(-87.3, 88, 200001), torch.linspace(-1e-3, 1e-3, 2001), torch.tensor([0.0, -0.0])))
    for is_tanh, exact, units in ((False, x.double().exp(), 1.5), (True, x.double().tanh(), 2.0)):
        value = torch.ops.clp.logprob_cpu_function(x, is_tanh)
        exponent = exact.abs().clamp(min=torch.finfo(F32).tiny).log2().floor()
        error = (value.double() - exact).abs() / torch.exp2(exponent - 23)
        assert error.max() <= units, f"{error.max():.3f} at {x[error.argmax()]}"
    special = torch.tensor([-torch.inf, -100.0, -1e30, torch.nan])
    assert torch.ops.clp.logprob_cpu_function(special, False)[:3].tolist() == [0.0, 0.0, 0.0]
    for is_tanh in (False, True):
        assert torch.ops.clp.logprob_cpu_function(special, is_tanh)[3].isnan()
    large = torch.ops.clp.logprob_cpu_function(torch.tensor([-torch.inf, torch.inf, -50.0]), True)
    assert large.tolist() == [-1.0, 1.0, -1.0]
