"""mixed_embedding as a registered operator under torch's own checks, its arguments and its choice of back-end."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rows_support import BACKENDS, BACKENDS_AND_TRITON

import clp_kernels
from clp_kernels import mixed_embedding, mixed_embedding_ref

B, T, V, D, K = 2, 3, 7, 5, 2
IDS = torch.tensor([[0, 6, 2], [2, 2, 5]])
ROW_MAP = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32)


def arguments(dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"base": (V, D), "deltas": (V, K, D), "coefficients": (B, K)}
    return {
        name: torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(requires_grad)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_opcheck(backend):
    base, deltas, c = arguments().values()
    ids = IDS.reshape(-1)
    torch.library.opcheck(torch.ops.clp.mixed_embedding.default, (ids, base, deltas, c, ROW_MAP, 2, backend))
    torch.library.opcheck(torch.ops.clp.mixed_embedding.default, (ids, None, deltas, c, ROW_MAP, -1, backend))
    base, deltas, c = (t.detach() for t in (base, deltas, c))
    torch.library.opcheck(torch.ops.clp.mixed_embedding_fwd.default, (ids, base, deltas, c, ROW_MAP, backend))
    for needs in ((True, True, True), (False, True, False), (False, False, True)):
        inputs = (torch.randn(6, D), ids, deltas, c, ROW_MAP, 2)
        torch.library.opcheck(torch.ops.clp.mixed_embedding_backward.default, (*inputs, *needs, backend))


@pytest.mark.parametrize("with_base", [True, False])
def test_gradcheck(with_base):
    def call(base, deltas, c):
        return mixed_embedding(IDS, base if with_base else None, deltas, c)

    assert torch.autograd.gradcheck(call, tuple(arguments(torch.float64).values()))


def test_double_backward_raises_by_name():
    a = arguments(torch.float64)
    loss = mixed_embedding(IDS, **a).square().sum()
    (d_deltas,) = torch.autograd.grad(loss, a["deltas"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; call mixed_embedding_ref"):
        d_deltas.sum().backward()
    loss = mixed_embedding_ref(IDS, **a).square().sum()
    (d_deltas,) = torch.autograd.grad(loss, a["deltas"], create_graph=True)
    d_deltas.sum().backward()
    assert a["coefficients"].grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_breaks(backend):
    def call(a):
        return mixed_embedding(IDS, **a, padding_idx=0).square().sum()

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
@pytest.mark.parametrize("wanted", ["base", "deltas", "coefficients"])
def test_only_the_gradients_asked_for(backend, wanted):
    a, expected = arguments(requires_grad=False), arguments(requires_grad=False)
    a[wanted].requires_grad_()
    expected[wanted].requires_grad_()
    mixed_embedding(IDS, **a, backend=backend).square().sum().backward()
    mixed_embedding_ref(IDS, **expected).square().sum().backward()
    torch.testing.assert_close(a[wanted].grad, expected[wanted].grad, rtol=1e-5, atol=1e-6)
    assert all(t.grad is None for name, t in a.items() if name != wanted)


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_saves_its_inputs_alone(backend):
    a, saved = arguments(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mixed_embedding(IDS, **a, backend=backend)
    floats = {t.data_ptr() for t in saved if t.is_floating_point()}
    assert floats == {a["deltas"].data_ptr(), a["coefficients"].data_ptr()}


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_autocast_casts_nothing(backend):
    a = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed_embedding(IDS, **a, backend=backend)
    assert torch.equal(y, mixed_embedding(IDS, **a, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
@pytest.mark.parametrize("bad", [-1, V])
def test_id_out_of_range(backend, bad):
    ids = IDS.clone()
    ids[1, 1] = bad
    with pytest.raises(IndexError, match=rf"ids hold {bad}, outside \[0, 7\) of the embedding's rows"):
        mixed_embedding(ids, **arguments(requires_grad=False), backend=backend)
    with pytest.raises(IndexError, match=rf"ids hold {bad}, outside \[0, 7\)"):
        mixed_embedding_ref(ids, **arguments())


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("ids", IDS.float(), "ids are torch.float32, must be torch.int64 or torch.int32"),
        ("ids", IDS.to("meta"), "ids are on meta, deltas on cpu"),
        ("base", torch.randn(V + 1, D), r"base must be \[7, 5\] to fit deltas \[7, 2, 5\], got \[8, 5\]"),
        ("base", torch.randn(V, D, dtype=torch.float64), "float64 takes every argument in float64"),
        ("deltas", torch.randn(V, D), r"deltas must be \[V, K, D\], got \[7, 5\]"),
        ("deltas", torch.randn(V, 0, D), "K = 0"),
        ("coefficients", torch.rand(B, K + 1), r"must end in K = 2.*got \[2, 3\]"),
        ("coefficients", torch.rand(B + 1, K), r"\[3\] must be a prefix of ids's \[2, 3\]"),
        ("coefficients", torch.rand(B, K).bfloat16(), "coefficients are torch.bfloat16, must be torch.float32"),
        ("row_map", torch.zeros(B, dtype=torch.int32), r"row_map must be \[2, 3\], one entry for each row of ids"),
        ("row_map", torch.zeros(B, T, dtype=torch.int64), "must be torch.int32"),
        ("padding_idx", V, r"padding_idx is 7, outside \[-7, 7\)"),
    ],
)
@pytest.mark.parametrize("op", [mixed_embedding, mixed_embedding_ref])
def test_bad_argument_is_named(op, field, value, says):
    with pytest.raises(ValueError, match=says):
        op(**{"ids": IDS, **arguments(requires_grad=False), field: value})


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_map_out_of_range(backend):
    row_map = torch.zeros(B, T, dtype=torch.int32)
    row_map[1, 2] = 2
    with pytest.raises(IndexError, match=r"outside \[0, 2\)|out of range"):
        mixed_embedding(IDS, **arguments(requires_grad=False), row_map=row_map, backend=backend)


def test_coefficients_of_each_shape():
    base, deltas, _ = arguments(requires_grad=False).values()
    for shape in ((K,), (B, K), (B, T, K)):
        c = torch.rand(shape)
        c_BTK = c.view(*shape[:-1], *(1,) * (3 - len(shape)), K).expand(B, T, K)
        expected = F.embedding(IDS, base) + torch.einsum("btk,btkd->btd", c_BTK, deltas[IDS])
        torch.testing.assert_close(mixed_embedding(IDS, base, deltas, c), expected)
    c_SK, row_map = torch.rand(3, K), torch.tensor([[2], [0]], dtype=torch.int32).expand(B, T)
    expected = mixed_embedding(IDS, base, deltas, c_SK[[2, 0]])
    torch.testing.assert_close(mixed_embedding(IDS, base, deltas, c_SK, row_map=row_map), expected)


def test_back_end_by_name(monkeypatch):
    import clp_kernels.select as select

    a = arguments(requires_grad=False)
    monkeypatch.setattr(select, "missing_reason", lambda name: None)
    with pytest.raises(ValueError, match="'cuda' does not take this call: mixed_embedding has no 'cuda' form"):
        mixed_embedding(IDS, **a, backend="cuda")
    doubles = {n: t.double() for n, t in a.items()}
    with pytest.raises(ValueError, match=r"base is torch.float64; back-end 'cpp' takes torch.float32, torch.bfloat16"):
        mixed_embedding(IDS, **doubles, backend="cpp")
    assert torch.equal(mixed_embedding(IDS, **doubles), mixed_embedding_ref(IDS, **doubles))
