"""mixed_linear_logprob under torch's own checks, its memory, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from logprob_support import BACKENDS, HAS_CPP, PARAMETERS

import clp_kernels
from clp_kernels import mixed_linear_logprob, mixed_linear_logprob_ref

INTERPRETED = pytest.param(
    "triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="these tests' tensors are on the CPU")
)


def arguments(dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden": (2, 3, 5),
        "base": (7, 5),
        "deltas": (7, 2, 5),
        "coefficients": (2, 2),
        "bias": (7,),
        "bias_deltas": (7, 2),
    }
    a = {
        name: torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(requires_grad)
        for name, shape in shapes.items()
    }
    return a | {"targets": torch.tensor([[0, 6, -100], [3, 3, 1]])}


def flat(a: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    row_map = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32)
    hidden = a["hidden"].detach().reshape(6, 5).requires_grad_(a["hidden"].requires_grad)
    return (
        hidden,
        a["base"],
        a["deltas"],
        a["coefficients"],
        row_map,
        a["bias"],
        a["bias_deltas"],
        a["targets"].reshape(-1),
    )


NUMBERS = (-100, 0.7, 1.3, 4.0)


@pytest.mark.parametrize("backend", [*BACKENDS, INTERPRETED])
def test_opcheck(backend):
    inputs, fixed = flat(arguments()), flat(arguments(requires_grad=False))
    for flags in ((True, True, False), (True, False, False), (False, False, False)):
        torch.library.opcheck(torch.ops.clp.mixed_linear_logprob.default, (*inputs, *NUMBERS, *flags, backend))
        torch.library.opcheck(torch.ops.clp.mixed_linear_logprob_fwd.default, (*fixed, *NUMBERS, *flags, backend))
    if backend == "cpp":
        formed = (inputs[0], *fixed[1:], *NUMBERS, False, False, True, backend)
        torch.library.opcheck(torch.ops.clp.mixed_linear_logprob.default, formed)
    d_logprob, d_entropy = torch.randn(6), torch.randn(6)
    _, entropy, normalizer, _ = torch.ops.clp.mixed_linear_logprob_fwd(*fixed, *NUMBERS, True, True, False, backend)
    for needs in ([True] * 6, [False, True] * 3, [True, False] * 3):
        for of_entropy in ((entropy, d_logprob, d_entropy), (None, d_logprob, None)):
            torch.library.opcheck(
                torch.ops.clp.mixed_linear_logprob_backward.default,
                (*fixed, *NUMBERS, normalizer, *of_entropy, needs, backend),
            )


@pytest.mark.parametrize("how", [{}, {"softcap": 3.0, "temperature": 0.7, "logit_scale": 1.3}])
@pytest.mark.parametrize("with_base", [True, False])
def test_gradcheck(with_base, how):
    a = arguments(torch.float64)

    def call(hidden, base, deltas, c, bias, bias_deltas):
        return mixed_linear_logprob(
            hidden, base if with_base else None, deltas, c, a["targets"], bias, bias_deltas=bias_deltas, **how
        )

    assert torch.autograd.gradcheck(call, tuple(a[name] for name in PARAMETERS))


@pytest.mark.parametrize("only_hidden", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, INTERPRETED])
def test_double_backward_raises_by_name(backend, only_hidden):
    a = arguments(requires_grad=not only_hidden)
    a["hidden"].requires_grad_()
    logprob, _ = mixed_linear_logprob(**a, return_entropy=not only_hidden, backend=backend)
    (d_hidden,) = torch.autograd.grad(logprob.sum(), a["hidden"], create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative; call mixed_linear_logprob_ref"):
        d_hidden.sum().backward()
    logprob, _ = mixed_linear_logprob_ref(**a)
    (d_hidden,) = torch.autograd.grad(logprob.sum(), a["hidden"], create_graph=True)
    d_hidden.sum().backward()
    assert a["hidden"].grad is not None


@pytest.mark.parametrize("only_hidden", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, INTERPRETED])
def test_compile_without_breaks(backend, only_hidden):
    def call(a):
        logprob, entropy = mixed_linear_logprob(**a, return_entropy=not only_hidden)
        return logprob.square().sum() + (0.0 if entropy is None else entropy.square().sum())

    def inputs():
        a = arguments(requires_grad=not only_hidden)
        a["hidden"].requires_grad_()
        return a

    compiled = torch.compile(call, fullgraph=True)
    eager, traced = inputs(), inputs()
    with clp_kernels.backend(backend):
        call(eager).backward()
        compiled(traced).backward()
    for name in PARAMETERS:
        if eager[name].requires_grad:
            torch.testing.assert_close(traced[name].grad, eager[name].grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_hidden_alone(backend):
    a = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        logprob, entropy = mixed_linear_logprob(**a, backend=backend)
        (logprob.sum() + entropy.sum()).backward()
    rounded = {**a, "hidden": a["hidden"].detach().bfloat16().float()}
    expected, expected_entropy = mixed_linear_logprob_ref(**rounded)
    assert logprob.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprob, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    assert all(a[name].grad.dtype == torch.float32 for name in PARAMETERS)


@pytest.mark.parametrize("only_hidden", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_and_allocates_no_logits(backend, only_hidden):
    """Of the size of [rows, V] or [V, K, D] nothing is saved, and nothing made but the gradients asked for."""
    M, D, V, K = 64, 32, 120000, 2
    a = {
        "hidden": torch.randn(M, D, requires_grad=True),
        "base": torch.randn(V, D),
        "deltas": torch.randn(V, K, D, requires_grad=not only_hidden),
        "coefficients": torch.rand(4, K),
        "targets": torch.randint(0, V, (M,)),
        "row_map": torch.arange(M, dtype=torch.int32) // 16,
    }
    saved = []
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        logprob, _ = mixed_linear_logprob(**a, return_entropy=not only_hidden, backend=backend)
        logprob.sum().backward()
    inputs = {t.data_ptr() for t in a.values()}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in inputs) <= a["hidden"].nbytes + 64 * 1024
    gradients = sum(a[name].grad.nbytes for name in ("hidden", "deltas") if a[name].grad is not None)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert most > 0
    # Four panels and chunks of 1 to 4 MiB, where the logits are 30 MiB; the reference converts none here.
    assert most - gradients <= 0.5 * M * V * 4, f"{most - gradients} bytes"


def test_what_does_not_fit_is_refused():
    a = arguments(requires_grad=False)

    def refused(message, **changed):
        for op in (mixed_linear_logprob, mixed_linear_logprob_ref):
            with pytest.raises(ValueError, match=message):
                op(**{**a, **changed})

    for bad in (7, -1):
        refused(rf"targets hold {bad} \(row 4\), outside \[0, 7\)", targets=torch.tensor([[0, 6, -100], [3, bad, 1]]))
    refused("targets are torch.float32, must be torch.int64", targets=a["targets"].float())
    refused(r"targets must be \[2, 3\], hidden without its last size, got \[6\]", targets=a["targets"].reshape(-1))
    refused("temperature must be > 0, got 0.0", temperature=0.0)
    refused("softcap must be > 0, got -1.0", softcap=-1.0)
    refused("deltas and coefficients come together", deltas=None)
    refused("a head without deltas needs base", base=None, deltas=None, coefficients=None)
    refused(r"coefficients must end in K = 2", coefficients=torch.zeros(3))


def test_back_ends_by_name():
    wide = arguments(torch.float64, requires_grad=False)
    for name in ("cpp", "triton") if HAS_CPP else ("triton",):
        with pytest.raises(ValueError, match=rf"back-end '{name}' does not take this call: hidden is torch\.float64"):
            mixed_linear_logprob(**wide, backend=name)


def test_backward_keeps_the_back_end_of_its_forward(monkeypatch):
    import clp_kernels.mixed_linear_logprob_ops as ops

    taken = []
    launcher = ops._launcher
    monkeypatch.setattr(ops, "_launcher", lambda name: taken.append(name) or launcher(name))
    a, b = arguments(), arguments()
    with clp_kernels.backend("reference"):
        logprob, _ = mixed_linear_logprob(**a)
    mixed_linear_logprob(**b)  # another forward in between, under "auto"
    taken.clear()
    logprob.sum().backward()
    assert set(taken) == {"reference"}
