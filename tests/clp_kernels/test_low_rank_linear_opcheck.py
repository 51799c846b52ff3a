"""The registered low_rank_linear under torch's own checks: opcheck, gradcheck, torch.compile, autocast; bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rows_support import BACKENDS, BACKENDS_AND_TRITON

import clp_kernels
from clp_kernels import low_rank_linear, low_rank_linear_ref
from clp_kernels.select import OperatorCall, select, unsupported_reason

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
MISSING = clp_kernels.available_backends()
SHAPES = {"x": (2, 3, 5), "base": (4, 5), "down": (6, 5), "up": (4, 6), "gates": (2, 6), "bias": (4,)}


def arguments(dtype: torch.dtype = F32, requires_grad: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(requires_grad)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
@pytest.mark.parametrize("with_base", [True, False])
def test_opcheck(backend, with_base):
    a = arguments()
    x = a["x"].detach().reshape(6, 5).requires_grad_()
    row_map = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32)
    base, bias = (a["base"], a["bias"]) if with_base else (None, None)
    inputs = (x, base, a["down"], a["up"], a["gates"], row_map, bias)
    torch.library.opcheck(torch.ops.clp.low_rank_linear.default, (*inputs, backend))
    inputs = tuple(None if t is None else t.detach() for t in inputs)
    torch.library.opcheck(torch.ops.clp.low_rank_linear_fwd.default, (*inputs, backend))
    dy, shrink = torch.randn(6, 4), torch.randn(6, 6)
    for needs in ((True, with_base, True, True, True), (True, False, False, False, False), (False,) * 4 + (True,)):
        torch.library.opcheck(
            torch.ops.clp.low_rank_linear_backward.default, (dy, shrink, *inputs[:6], *needs, backend)
        )
    if backend == "cpp":
        for keep_shrink in (True, False):
            torch.library.opcheck(torch.ops.clp.low_rank_linear_cpu_fwd.default, (*inputs, keep_shrink))


@pytest.mark.parametrize("with_base", [True, False])
def test_gradcheck(with_base):
    def call(x, base, down, up, gates, bias):
        return low_rank_linear(x, base if with_base else None, down, up, gates, bias)

    assert torch.autograd.gradcheck(call, tuple(arguments(F64).values()))


def test_double_backward_raises_by_name():
    a = arguments(F64)
    (dx,) = torch.autograd.grad(low_rank_linear(**a).sum(), a["x"], create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"low_rank_linear has no second derivative; call low_rank_linear_ref"
    ):
        dx.sum().backward()
    (dx,) = torch.autograd.grad(low_rank_linear_ref(**a).sum(), a["x"], create_graph=True)
    dx.sum().backward()
    assert a["down"].grad is not None


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_compile_without_breaks(backend):
    def call(a):
        return low_rank_linear(**a).square().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager, traced = arguments(), arguments()
    with clp_kernels.backend(backend):
        call(eager).backward()
        compiled(traced).backward()
        with torch.no_grad():
            assert compiled(arguments(requires_grad=False)).item() == pytest.approx(call(eager).item(), rel=1e-5)
    for name, tensor in eager.items():
        torch.testing.assert_close(traced[name].grad, tensor.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_by_inductor(backend):
    a = arguments(requires_grad=False)
    compiled = torch.compile(lambda a: low_rank_linear(**a, backend=backend) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(a), low_rank_linear_ref(**a) + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
@pytest.mark.parametrize("wanted", list(SHAPES))
def test_only_the_gradients_asked_for(backend, wanted):
    a, expected = arguments(requires_grad=False), arguments(requires_grad=False)
    a[wanted].requires_grad_()
    low_rank_linear(**a, backend=backend).sum().backward()
    expected[wanted].requires_grad_()
    low_rank_linear_ref(**expected).sum().backward()
    torch.testing.assert_close(a[wanted].grad, expected[wanted].grad, rtol=1e-5, atol=1e-6)
    assert all(t.grad is None for name, t in a.items() if name != wanted)


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_saves_its_arguments_and_the_shrink(backend):
    a = arguments()
    row_map = torch.zeros(2, 3, dtype=torch.int32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        low_rank_linear(**a, row_map=row_map, backend=backend)
    own = {t.data_ptr() for t in (*a.values(), row_map)}
    assert {a[name].data_ptr() for name in ("x", "base", "down", "up", "gates")} <= {t.data_ptr() for t in saved}
    assert [t.shape for t in saved if t.data_ptr() not in own] == [(6, 6)]


def allocated(call: Callable[[], object]) -> int:
    """The most bytes that `call` holds at once, as torch's allocator counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.skipif(MISSING["cpp"] is not None, reason=str(MISSING["cpp"]))
@pytest.mark.parametrize("M", [16, 300])
@pytest.mark.parametrize(
    ("dtype", "base_dtype", "adapters"),
    [(F32, F32, F32), (BF16, BF16, F32), (BF16, BF16, BF16), (BF16, F32, F32)],  # the last: autocast
    ids=lambda d: str(d)[6:],
)
def test_scratch_memory_is_bounded(M, dtype, base_dtype, adapters):
    """Beside y, the shrink and the gradients 4 MiB and a few [M, R]; the base in float32 would be 16 MiB."""
    x, dy, base = torch.randn(M, 2048, dtype=dtype), torch.randn(M, 2048, dtype=dtype), torch.randn(2048, 2048)
    base = base.to(base_dtype)
    down, up = torch.randn(16, 2048, dtype=adapters), torch.randn(2048, 16, dtype=adapters)
    inputs = (x, base, down, up, torch.rand(3, 16), torch.zeros(M, dtype=torch.int32))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        y, shrink = torch.ops.clp.low_rank_linear_cpu_fwd(*inputs, None, True)
        forward = allocated(lambda: torch.ops.clp.low_rank_linear_cpu_fwd(*inputs, None, True))
        needs = (True, False, True, True, True)
        backward = allocated(lambda: torch.ops.clp.low_rank_linear_cpu_backward(dy, shrink, *inputs, *needs))
    finally:
        torch.set_num_threads(before)
    scratch = 4 * 2**20 + 3 * shrink.nbytes
    assert y.nbytes <= forward <= y.nbytes + shrink.nbytes + scratch
    assert 0 < backward <= x.nbytes + down.nbytes + up.nbytes + scratch


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_x_alone(backend):
    a = arguments()
    with torch.autocast("cpu", BF16):
        y = low_rank_linear(**a, backend=backend)
        plain = F.linear(a["x"], a["base"], a["bias"])
        assert torch.equal(low_rank_linear(**{**a, "up": torch.zeros(4, 6)}, backend="reference"), plain)
    exact = low_rank_linear_ref(**{**a, "x": a["x"].bfloat16().float()})
    # The reference rounds twice, and its base to bfloat16.
    torch.testing.assert_close(y.float(), exact, rtol=2**-7, atol=2**-5 if backend == "reference" else 2**-7)
    assert y.dtype == BF16
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == F32 for t in a.values())


def test_backward_keeps_the_back_end_of_its_forward(monkeypatch):
    import clp_kernels.low_rank_linear_ops as ops

    taken = []
    launcher = ops._launcher
    monkeypatch.setattr(ops, "_launcher", lambda name: taken.append(name) or launcher(name))
    with clp_kernels.backend("reference"):
        y = low_rank_linear(**arguments())
    low_rank_linear(**arguments())  # another forward in between, under "auto"
    taken.clear()
    y.sum().backward()
    assert set(taken) == {"reference"}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("x", torch.randn(2, 3, 6), r"x must be \[\.\.\., D\] with D = 5"),
        ("x", torch.ones(2, 3, 5, dtype=torch.int64), "x is torch.int64"),
        ("x", torch.ones(2, 3, 5, dtype=F64), "float64 takes every argument in float64"),
        ("base", torch.randn(5, 5), r"base must be \[4, 5\] to fit up"),
        ("base", torch.randn(4, 5, device="meta"), "base is on meta, x on cpu"),
        ("down", torch.randn(6), r"down must be \[R, D\] and up \[N, R\]"),
        ("up", torch.randn(4, 7), r"with the same R ranks, got down \[6, 5\], up \[4, 7\]"),
        ("gates", torch.rand(2, 5), r"gates must end in R = 6, the ranks of down and up, got \[2, 5\]"),
        ("gates", torch.rand(3, 6), r"gates .*leading sizes \[3\] must be a prefix of x's \[2, 3\]"),
        ("gates", torch.rand(6, 6), r"\[6\] must be a prefix.*\[S, R\] with row_map"),  # never guessed
        ("gates", torch.rand(2, 6).bfloat16(), "gates are torch.bfloat16, must be torch.float32"),
        ("bias", torch.randn(4, 1), r"bias must be \[4\]"),
        ("row_map", torch.zeros(2, dtype=torch.int32), r"row_map must be \[2, 3\]"),
        ("row_map", torch.zeros(2, 3, dtype=torch.int64), "must be torch.int32"),
    ],
)
@pytest.mark.parametrize("op", [low_rank_linear, low_rank_linear_ref])
def test_bad_argument_is_named(op, field, value, says):
    with pytest.raises(ValueError, match=says):
        op(**{**arguments(requires_grad=False), field: value})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [-1, 2])
def test_row_map_out_of_range(backend, bad):
    row_map = torch.zeros(2, 3, dtype=torch.int32)
    row_map[1, 2] = bad
    with pytest.raises(IndexError, match=r"outside \[0, 2\)|out of range"):
        low_rank_linear(**arguments(requires_grad=False), row_map=row_map, backend=backend)


def problem(device: str, x: torch.dtype, adapters: torch.dtype = F32) -> OperatorCall:
    return OperatorCall("low_rank_linear", device, {"x": x, "base": x, "down": adapters, "up": adapters})


@pytest.mark.parametrize(
    ("device", "x", "adapters", "expected"),
    [
        ("cpu", F32, F32, "cpp"),
        ("cpu", BF16, F32, "cpp"),
        ("cpu", F16, F16, "cpp"),
        ("cpu", F64, F64, "reference"),
        ("cuda", BF16, F32, "triton"),
        ("cuda", F64, F64, "reference"),
        ("mps", F32, F32, "reference"),
    ],
)
def test_auto(device, x, adapters, expected):
    everything = dict.fromkeys(clp_kernels.available_backends())
    assert select(problem(device, x, adapters), everything) == expected
    nothing = dict.fromkeys(everything, "not built") | {"reference": None}
    assert select(problem(device, x, adapters), nothing) == "reference"


def test_unsupported_names_the_field():
    assert "x is torch.float64" in (unsupported_reason("cpp", problem("cpu", F64, F64)) or "")
    assert "down is torch.float64" in (unsupported_reason("cpp", problem("cpu", F32, F64)) or "")
    assert "its arguments are on 'cuda'" in (unsupported_reason("cpp", problem("cuda", F32)) or "")
    assert unsupported_reason("cuda", problem("cuda", F32)) == "low_rank_linear has no 'cuda' form"


def test_a_back_end_without_this_operator_raises(monkeypatch):
    monkeypatch.setattr("clp_kernels.select.missing_reason", lambda name: None)
    with pytest.raises(ValueError, match="low_rank_linear has no 'cuda' form; use backend='auto' or 'reference'"):
        low_rank_linear(**arguments(requires_grad=False), backend="cuda")
