"""mixed_qkv's values against a float64 oracle and transformers' layers, its arguments, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from qkv_support import check, converted, problem
from rows_support import BACKENDS, BACKENDS_AND_TRITON, ISAS, instruction_set, needs_cpp, poisoned_memory

import clp_kernels
from clp_kernels import Projection, mixed_qkv, mixed_qkv_ref

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F32, BF16), (F16, F32), (F16, F16)]
# B, T, D, H_q, H_k, E, K: one row, odd widths and halves around each vector's, more rows than a panel or tile has.
SHAPES = [(1, 1, 33, 1, 1, 2, 1), (3, 1, 7, 4, 2, 6, 2), (17, 1, 64, 3, 1, 34, 3), (8, 8, 96, 2, 2, 64, 2)]


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "deltas_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_cpp(isa, shape, dtype, deltas_dtype):
    with instruction_set(isa), poisoned_memory():
        for rows in ("one", "segments", "shuffled", "different"):
            check(problem(*shape, dtype, deltas_dtype, rows, rows != "one", rows != "segments"), backend="cpp")
        a = problem(*shape, dtype, deltas_dtype, "shuffled")
        check(a, backend="cpp", batch_invariant=True)


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_one_norm_or_bias_alone(backend):
    a = problem(5, 1, 24, 2, 1, 8, 2)
    a["q"], a["v"] = a["q"]._replace(bias=None), a["v"]._replace(bias_deltas=None)
    check({**a, "q_norm": None}, backend=backend)
    check({**a, "k_norm": None, "k": a["k"]._replace(bias=None, bias_deltas=None)}, backend=backend)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("norms", [False, True])
def test_zero_coefficients_are_transformers_layers(dtype, norms):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    a = problem(4, 3, 40, 4, 2, 10, 2, dtype, norms=norms)
    a["coefficients"] = torch.zeros_like(a["coefficients"])

    def norm(x, weight):
        module = LlamaRMSNorm(len(weight), eps=1e-6)
        module.weight.data = weight
        return module(x).detach()

    n = norm(a["x"], a["norm_weight"])
    query, key, value = (F.linear(n, a[p].base, a[p].bias).unflatten(-1, (-1, 10)) for p in "qkv")
    if norms:
        query, key = norm(query, a["q_norm"]), norm(key, a["k_norm"])
    query, key = apply_rotary_pos_emb(query, key, a["cos"], a["sin"], unsqueeze_dim=2)
    for ours, theirs in zip(mixed_qkv_ref(**a), (query, key, value), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_tables_of_each_shape(backend):
    a = problem(2, 3, 16, 2, 1, 8, 2)
    for index in (slice(0, 1), 0):  # [1, T, E], [T, E]
        b = {**a, "cos": a["cos"][index], "sin": a["sin"][index]}
        whole = {**a, "cos": a["cos"][:1].expand(2, 3, 8), "sin": a["sin"][:1].expand(2, 3, 8)}
        for ours, expected in zip(mixed_qkv(**b, backend=backend), mixed_qkv(**whole, backend=backend), strict=True):
            assert torch.equal(ours, expected)
    a["row_map"], a["coefficients"] = None, torch.randn(2, 2)
    check(a, backend=backend)


@pytest.mark.parametrize("backend", [b for b in BACKENDS_AND_TRITON if b != "reference"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_batch_invariant(backend, dtype):
    a = problem(40, 1, 48, 3, 1, 16, 2, dtype, rows="shuffled")
    how = {"backend": backend, "batch_invariant": True}
    whole = mixed_qkv(**a, **how)
    for rows in (slice(0, 1), slice(7, 12), slice(3, 40)):
        part = mixed_qkv(**{**a, **{name: a[name][rows] for name in ("x", "cos", "sin", "row_map")}}, **how)
        for ours, expected in zip(part, whole, strict=True):
            assert torch.equal(ours, expected[rows])


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
def test_steering_effect_survives_bfloat16(isa):
    """y(c) - y(0) of values, which nothing rotates, over many outputs: a mix rounded beside its base has no effect."""
    a = problem(16, 1, 256, 8, 8, 32, 2, BF16, bias=False, norms=False)
    size, generator = 1e-3, torch.Generator().manual_seed(1)
    deltas = size * torch.randn(256, 1, 256, generator=generator).sign().expand(256, 2, 256).contiguous()
    a["v"] = a["v"]._replace(deltas=deltas)
    with instruction_set(isa):
        steered, plain = (
            mixed_qkv(**{**a, "coefficients": torch.full_like(a["coefficients"], c)}, backend="cpp")[2].double()
            for c in (0.5, 0.0)
        )
    n = mixed_qkv_ref(**{**a, "v": Projection(torch.eye(256).to(BF16), deltas * 0)})[2].flatten(-2).double()
    effect = (n @ deltas[:, 0].double().T).view_as(plain)
    ratio = ((steered - plain) * effect).sum() / effect.square().sum()
    assert ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_opcheck(backend):
    a = problem(4, 1, 12, 2, 1, 4, 2)
    flat = {name: a[name].flatten(0, 1) for name in ("x", "cos", "sin", "row_map")}
    inputs = (flat["x"], a["norm_weight"], *a["q"], *a["k"], *a["v"], a["coefficients"], flat["row_map"])
    for norms in ((a["q_norm"], a["k_norm"]), (None, None)):
        arguments = (*inputs, flat["cos"], flat["sin"], *norms, 1e-6, False)
        torch.library.opcheck(torch.ops.clp.mixed_qkv.default, (*arguments, backend))
        if backend == "cpp":
            torch.library.opcheck(torch.ops.clp.mixed_qkv_cpu_fwd.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    a = problem(4, 1, 12, 2, 1, 4, 2)

    def call(x):
        return mixed_qkv(**{**a, "x": x}, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(a["x"]), call(a["x"]), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("field", ["x", "norm_weight", "q_norm", "coefficients"])
def test_gradients_are_refused(field):
    a = problem(2, 1, 12, 2, 1, 4, 2)
    a[field].requires_grad_()
    with pytest.raises(NotImplementedError, match="mixed_qkv has no gradient"):
        mixed_qkv(**a)
    with torch.no_grad():
        mixed_qkv(**a)
    a[field].requires_grad_(False)
    a["k"].deltas.requires_grad_()
    with pytest.raises(NotImplementedError, match="mixed_qkv has no gradient"):
        mixed_qkv(**a)
    mixed_qkv_ref(**a)[1].sum().backward()
    assert a["k"].deltas.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_map_out_of_range(backend):
    a = problem(3, 1, 12, 2, 1, 4, 2)
    a["row_map"] = a["row_map"] + 7
    with pytest.raises(IndexError, match=r"outside \[0, |out of range"):
        mixed_qkv(**a, backend=backend)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("x", torch.randn(3, 1, 13), r"x must be \[\.\.\., D\] and norm_weight \[D\]"),
        ("x", torch.ones(3, 1, 12, dtype=torch.int64), "x is torch.int64"),
        ("cos", torch.randn(3, 1, 3), "sin must be like cos"),
        ("norm_weight", torch.randn(12, device="meta"), "norm_weight is on meta, x on cpu"),
        ("q_norm", torch.randn(5), r"q_norm must be \[4\], the size of a head"),
        ("k", Projection(torch.randn(4, 12), torch.randn(4, 3, 12)), "k.deltas must be"),
        ("k", Projection(torch.randn(6, 12), torch.randn(6, 2, 12)), "no multiple of the size of a head 4"),
        ("v", Projection(torch.randn(4, 11), torch.randn(4, 2, 12)), r"v.base must be \[4, 12\]"),
        ("v", Projection(torch.randn(4, 12), torch.randn(4, 2, 12), torch.randn(3)), r"v.bias must be \[4\]"),
        ("q", Projection(torch.randn(8, 12).double(), torch.randn(8, 2, 12)), "q.base is torch.float64, x"),
        ("coefficients", torch.rand(3, 3), "must end in K = 2"),
        ("row_map", torch.zeros(3, dtype=torch.int32), r"row_map must be \[3, 1\]"),
        ("row_map", torch.zeros(3, 1, dtype=torch.int64), "must be torch.int32"),
    ],
)
@pytest.mark.parametrize("op", [mixed_qkv, mixed_qkv_ref])
def test_bad_argument_is_named(op, field, value, says):
    with pytest.raises(ValueError, match=says):
        op(**{**problem(3, 1, 12, 2, 1, 4, 2), field: value})


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_no_rows_or_no_contiguous_ones(backend):
    a = problem(3, 2, 12, 2, 1, 4, 2)
    none = {name: a[name][:0] for name in ("x", "cos", "sin", "row_map")}
    assert [t.shape for t in mixed_qkv(**{**a, **none}, backend=backend)] == [(0, 2, 2, 4), (0, 2, 1, 4), (0, 2, 1, 4)]
    other = {name: a[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("x", "cos", "sin", "row_map")}
    other["q"] = Projection(*(t.T.contiguous().T if t.dim() == 2 else t for t in a["q"]))
    strided = mixed_qkv(**{**a, **other}, backend=backend)
    for ours, expected in zip(strided, mixed_qkv(**a, backend=backend), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("shape", [(2, 1, 4), (3, 2, 4), (3, 4), (1, 3, 1, 4)])
def test_bad_table_is_named(shape):
    a = problem(3, 1, 12, 2, 1, 4, 2)
    table = torch.randn(shape)
    with pytest.raises(ValueError, match="must have x's leading sizes"):
        mixed_qkv(**{**a, "cos": table, "sin": table})


def test_back_end_by_name(monkeypatch):
    import clp_kernels.select as select

    a = problem(3, 1, 12, 2, 1, 4, 2)
    monkeypatch.setattr(select, "missing_reason", lambda name: None)
    with pytest.raises(ValueError, match="mixed_qkv has no 'cuda' form"):
        mixed_qkv(**a, backend="cuda")
    doubles = {name: converted(value, torch.Tensor.double) for name, value in a.items()}
    assert torch.equal(mixed_qkv(**doubles)[0], mixed_qkv_ref(**doubles)[0])
    with pytest.raises(ValueError, match="batch_invariant"):
        clp_kernels.mixed_qkv(**doubles, batch_invariant=True)
