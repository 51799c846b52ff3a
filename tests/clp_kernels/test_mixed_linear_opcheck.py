"""The registered operators under torch's own checks: opcheck, gradcheck, torch.compile, autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import clp_kernels
from clp_kernels import mixed_linear, mixed_linear_ref

BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            clp_kernels.available_backends()[name] is not None, reason=str(clp_kernels.available_backends()[name])
        ),
    )
    for name in ("reference", "cpp")
]


def arguments(dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (2, 3, 5),
        "base": (4, 5),
        "deltas": (4, 2, 5),
        "coefficients": (2, 2),
        "bias": (4,),
        "bias_deltas": (4, 2),
    }
    return {
        name: torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(requires_grad)
        for name, shape in shapes.items()
    }


def flat(a: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    row_map = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32)
    return a["x"].detach().reshape(6, 5).requires_grad_(), a["base"], a["deltas"], a["coefficients"], row_map


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    a = arguments()
    x, base, deltas, c, row_map = flat(a)
    torch.library.opcheck(
        torch.ops.clp.mixed_linear.default, (x, base, deltas, c, row_map, a["bias"], a["bias_deltas"], backend)
    )
    torch.library.opcheck(torch.ops.clp.mixed_linear.default, (x, None, deltas, c, row_map, None, None, backend))
    x, base, deltas, c = (t.detach() for t in (x, base, deltas, c))
    bias, bias_deltas = a["bias"].detach(), a["bias_deltas"].detach()
    torch.library.opcheck(
        torch.ops.clp.mixed_linear_fwd.default, (x, base, deltas, c, row_map, bias, bias_deltas, backend)
    )
    dy = torch.randn(6, 4)
    torch.library.opcheck(torch.ops.clp.mixed_linear_backward_x.default, (dy, base, deltas, c, row_map, backend))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.clp.mixed_linear_backward_deltas.default, (dy, x, deltas, c, row_map, *needs, backend)
        )


@pytest.mark.parametrize("with_base", [True, False])
def test_gradcheck(with_base):
    a = arguments(torch.float64)

    def call(x, base, deltas, c, bias, bias_deltas):
        return mixed_linear(x, base if with_base else None, deltas, c, bias, bias_deltas=bias_deltas)

    assert torch.autograd.gradcheck(call, tuple(a.values()))


def test_double_backward_raises_by_name():
    a = arguments(torch.float64)
    (dx,) = torch.autograd.grad(mixed_linear(**a).sum(), a["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"mixed_linear has no second derivative; call mixed_linear_ref"):
        dx.sum().backward()
    (dx,) = torch.autograd.grad(mixed_linear_ref(**a).sum(), a["x"], create_graph=True)
    dx.sum().backward()
    assert a["deltas"].grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_breaks(backend):
    def call(a):
        return mixed_linear(**a).square().sum()

    compiled = torch.compile(call, fullgraph=True)
    eager, traced = arguments(), arguments()
    with clp_kernels.backend(backend):
        call(eager).backward()
        compiled(traced).backward()
        with torch.no_grad():
            assert compiled(arguments(requires_grad=False)).item() == pytest.approx(call(eager).item(), rel=1e-5)
    for name, tensor in eager.items():
        torch.testing.assert_close(traced[name].grad, tensor.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["x", "base", "deltas", "coefficients", "bias", "bias_deltas"])
def test_only_the_gradients_asked_for(backend, wanted):
    a = arguments(requires_grad=False)
    a[wanted].requires_grad_()
    mixed_linear(**a, backend=backend).sum().backward()
    expected = arguments(requires_grad=False)
    expected[wanted].requires_grad_()
    mixed_linear_ref(**expected).sum().backward()
    torch.testing.assert_close(a[wanted].grad, expected[wanted].grad, rtol=1e-5, atol=1e-6)
    assert all(t.grad is None for name, t in a.items() if name != wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_its_inputs_and_nothing_wider(backend):
    a = arguments()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mixed_linear(**a, backend=backend)
    widest = max(t.numel() for t in a.values())
    assert all(t.numel() <= widest for t in saved)
    assert {t.data_ptr() for t in saved} >= {a[name].data_ptr() for name in ("x", "base", "deltas")}


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_x_alone(backend):
    a = arguments()
    zero = {**a, "deltas": torch.zeros_like(a["deltas"]), "bias_deltas": torch.zeros_like(a["bias_deltas"])}
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed_linear(**a, backend=backend)
        plain = F.linear(a["x"], a["base"], a["bias"])
        assert torch.equal(mixed_linear(**zero, backend="reference"), plain)
    exact = mixed_linear_ref(**{**a, "x": a["x"].bfloat16().float()})
    # Rounded once or twice to bfloat16 (base alone, then the sum): 2 half-units in the last place of the larger term.
    torch.testing.assert_close(y.float(), exact, rtol=2**-7, atol=2**-7)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in a.values())


def test_backward_keeps_the_back_end_of_its_forward(monkeypatch):
    import clp_kernels.mixed_linear_ops as ops

    taken = []
    launcher = ops._launcher
    monkeypatch.setattr(ops, "_launcher", lambda name: taken.append(name) or launcher(name))
    a, b = arguments(), arguments()
    with clp_kernels.backend("reference"):
        y = mixed_linear(**a)
    mixed_linear(**b)  # another forward in between, under "auto"
    taken.clear()
    y.sum().backward()
    assert set(taken) == {"reference"}
