"""mixed_norm as a registered operator under torch's own checks, its arguments and its choice of back-end."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rows_support import BACKENDS, BACKENDS_AND_TRITON, needs_cpp

import clp_kernels
from clp_kernels import mixed_norm, mixed_norm_ref

B, T, D, K = 2, 3, 5, 2
SETTINGS = [
    {"kind": "rms"},
    {"kind": "rms", "cast_before_scale": True},
    {"kind": "rms", "offset": 1.0},
    {"kind": "layer", "eps": 1e-5},
]


def arguments(dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (B, T, D),
        "weight": (D,),
        "weight_deltas": (D, K),
        "coefficients": (B, K),
        "bias": (D,),
        "bias_deltas": (D, K),
    }
    return {
        name: torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(requires_grad)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
@pytest.mark.parametrize("is_centered", [True, False])
def test_opcheck(backend, is_centered):
    a = arguments()
    row_map = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32)
    x = a["x"].detach().reshape(6, D).requires_grad_()
    parameters = (a["weight"], a["weight_deltas"], a["coefficients"], row_map, a["bias"], a["bias_deltas"])
    settings = (1e-5, is_centered, 0.0, False)
    torch.library.opcheck(torch.ops.clp.mixed_norm.default, (x, *parameters, *settings, backend))
    bare = (None, a["weight_deltas"], a["coefficients"], row_map, None, None)
    torch.library.opcheck(torch.ops.clp.mixed_norm.default, (x, *bare, *settings, backend))
    x, *parameters = (t.detach() for t in (x, *parameters))
    torch.library.opcheck(torch.ops.clp.mixed_norm_fwd.default, (x, *parameters, *settings, backend))
    weight, deltas, c, row_map, _, bias_deltas = parameters
    for needs in ((True,) * 6, (True, *(False,) * 5), (False, False, True, False, True, False)):
        inputs = (torch.randn(6, D), x, weight, deltas, c, row_map, bias_deltas)
        torch.library.opcheck(torch.ops.clp.mixed_norm_backward.default, (*inputs, *settings, *needs, backend))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradcheck(settings):
    names = list(arguments())

    def call(*tensors):
        return mixed_norm(**dict(zip(names, tensors, strict=True)), **settings)

    assert torch.autograd.gradcheck(call, tuple(arguments(torch.float64).values()))


def test_double_backward_raises_by_name():
    a = arguments(torch.float64)
    (dx,) = torch.autograd.grad(mixed_norm(**a).sum(), a["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"mixed_norm has no second derivative; call mixed_norm_ref"):
        dx.sum().backward()
    for kind in ("rms", "layer"):
        (dx,) = torch.autograd.grad(mixed_norm_ref(**a, kind=kind).square().sum(), a["x"], create_graph=True)
        dx.sum().backward()
    assert a["weight_deltas"].grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_breaks(backend):
    def call(a):
        return mixed_norm(**a, kind="layer").square().sum()

    compiled = torch.compile(call, fullgraph=True)
    eager, traced = arguments(), arguments()
    with clp_kernels.backend(backend):
        call(eager).backward()
        compiled(traced).backward()
        with torch.no_grad():
            assert compiled(arguments(requires_grad=False)).item() == pytest.approx(call(eager).item(), rel=1e-5)
    for name, tensor in eager.items():
        torch.testing.assert_close(traced[name].grad, tensor.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
@pytest.mark.parametrize("wanted", list(arguments()))
def test_only_the_gradients_asked_for(backend, wanted):
    a, expected = arguments(requires_grad=False), arguments(requires_grad=False)
    a[wanted].requires_grad_()
    expected[wanted].requires_grad_()
    mixed_norm(**a, backend=backend).square().sum().backward()
    mixed_norm_ref(**expected).square().sum().backward()
    torch.testing.assert_close(a[wanted].grad, expected[wanted].grad, rtol=1e-5, atol=1e-5)
    assert all(t.grad is None for name, t in a.items() if name != wanted)


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_saves_its_inputs_alone(backend):
    a, saved = arguments(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mixed_norm(**a, backend=backend)
    inputs = {t.data_ptr() for t in a.values()}
    assert {t.dtype for t in saved if t.data_ptr() not in inputs} == {torch.int32}  # the row map
    assert inputs - {t.data_ptr() for t in saved} == {a["bias"].data_ptr()}


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_autocast_casts_nothing(backend):
    a = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed_norm(**a, backend=backend)
    assert torch.equal(y, mixed_norm(**a, backend=backend))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("x", torch.randn(B, T, D + 1), r"x must be \[\.\.\., D\] with D = 5"),
        ("x", torch.randn(()), "x must be"),
        ("x", torch.ones(B, T, D, dtype=torch.int64), "x is torch.int64"),
        ("x", torch.ones(B, T, D, dtype=torch.float64), "float64 takes every argument in float64"),
        ("weight", torch.randn(D + 1), r"weight must be \[5\] to fit weight_deltas \[5, 2\], got \[6\]"),
        ("weight", torch.randn(D, device="meta"), "weight is on meta, x on cpu"),
        ("weight_deltas", torch.randn(D), r"weight_deltas must be \[D, K\], got \[5\]"),
        ("weight_deltas", torch.randn(D, 0), "must be at least 1"),
        ("coefficients", torch.rand(B, K + 1), r"must end in K = 2.*got \[2, 3\]"),
        ("coefficients", torch.rand(B + 1, K), r"\[3\] must be a prefix of x's \[2, 3\]"),
        ("coefficients", torch.rand(B, K).bfloat16(), "coefficients are torch.bfloat16, must be torch.float32"),
        ("bias", torch.randn(D, 1), r"bias must be \[5\]"),
        ("bias_deltas", torch.randn(K, D), r"bias_deltas must be \[5, 2\]"),
        ("row_map", torch.zeros(B, dtype=torch.int32), r"row_map must be \[2, 3\]"),
        ("row_map", torch.zeros(B, T, dtype=torch.int64), "must be torch.int32"),
        ("kind", "batch", "kind must be 'rms'.* got 'batch'"),
    ],
)
@pytest.mark.parametrize("op", [mixed_norm, mixed_norm_ref])
def test_bad_argument_is_named(op, field, value, says):
    with pytest.raises(ValueError, match=says):
        op(**{**arguments(requires_grad=False), field: value})


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_map_out_of_range(backend):
    row_map = torch.zeros(B, T, dtype=torch.int32)
    row_map[1, 2] = 2
    with pytest.raises(IndexError, match=r"outside \[0, 2\)|out of range"):
        mixed_norm(**arguments(requires_grad=False), row_map=row_map, backend=backend)


def test_coefficients_of_each_shape():
    a = arguments(requires_grad=False)
    x, weight, deltas = a["x"], a["weight"], a["weight_deltas"]
    for shape in ((K,), (B, K), (B, T, K)):
        c = torch.rand(shape)
        c_BTK = c.view(*shape[:-1], *(1,) * (3 - len(shape)), K).expand(B, T, K)
        expected = F.rms_norm(x, (D,), eps=1e-6) * (weight + c_BTK @ deltas.T)
        torch.testing.assert_close(mixed_norm(x, weight, deltas, c), expected)
    c_SK, row_map = torch.rand(3, K), torch.tensor([[2], [0]], dtype=torch.int32).expand(B, T)
    expected = mixed_norm(x, weight, deltas, c_SK[[2, 0]])
    torch.testing.assert_close(mixed_norm(x, weight, deltas, c_SK, row_map=row_map), expected)


def test_back_end_by_name(monkeypatch):
    import clp_kernels.select as select

    a = arguments(requires_grad=False)
    monkeypatch.setattr(select, "missing_reason", lambda name: None)
    with pytest.raises(ValueError, match="'cuda' does not take this call: mixed_norm has no 'cuda' form"):
        mixed_norm(**a, backend="cuda")
    doubles = {n: t.double() for n, t in a.items()}
    with pytest.raises(ValueError, match=r"x is torch.float64; back-end 'cpp' takes torch.float32, torch.bfloat16"):
        mixed_norm(**doubles, backend="cpp")
    assert torch.equal(mixed_norm(**doubles), mixed_norm_ref(**doubles))


@needs_cpp
def test_backward_keeps_the_back_end_of_its_forward(monkeypatch):
    import clp_kernels.mixed_norm_ops as ops

    taken = []
    launcher = ops._launcher
    monkeypatch.setattr(ops, "_launcher", lambda name: taken.append(name) or launcher(name))
    a, b = arguments(), arguments()
    with clp_kernels.backend("reference"):
        y = mixed_norm(**a)
    mixed_norm(**b)  # another forward in between, under "auto"
    taken.clear()
    y.sum().backward()
    assert set(taken) == {"reference"}
