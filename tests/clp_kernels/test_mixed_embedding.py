"""mixed_embedding's values and gradients against a float64 oracle, with torch's own error as the budget."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rows_support import (
    BACKENDS_AND_TRITON,
    ISAS,
    assert_within_budget,
    differentiate,
    instruction_set,
    is_float,
    needs_cpp,
    poisoned_memory,
    row_map,
)

from clp_kernels import mixed_embedding, mixed_embedding_ref

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F32, BF16), (F16, F32), (F16, F16)]
# M, V, D, K: one position, ids that repeat and ids that never occur, odd widths around each vector's.
SHAPES = [(1, 5, 33, 1), (3, 2, 64, 2), (17, 50, 7, 3), (70, 40, 40, 2), (300, 9, 129, 4), (9, 30, 1, 5)]


def problem(M, V, D, K, dtype=F32, deltas_dtype=F32, rows="segments", with_base=True):
    generator = torch.Generator().manual_seed(M * 7 + K)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    rows_M = row_map(M, rows)
    deltas = (0.1 * randn(V, K, D)).to(deltas_dtype)
    return {
        **({"base": randn(V, D).to(dtype)} if with_base else {}),
        "deltas": deltas,
        **({} if with_base else {"base": None}),
        "coefficients": randn(int(rows_M.max()) + 1, K),
        "ids": torch.randint(0, V, (M,), generator=generator),
        "row_map": rows_M,
    }


def sizes_of_terms(a, **settings):
    """For each result the sum of its terms' absolute values: the operator is linear in each argument."""
    b = {n: t.double().abs() if is_float(t) else t for n, t in a.items()}
    inputs = {n: t.requires_grad_() if is_float(t) else t for n, t in b.items()}
    y = mixed_embedding_ref(**inputs, **settings)
    y_dtype = (a["deltas"] if a["base"] is None else a["base"]).dtype
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y_dtype)
    y.backward(dy.double().abs())
    return {"y": y.detach(), **{n: t.grad for n, t in inputs.items() if is_float(t)}}


def check(a, backend, **settings):
    exact = differentiate(mixed_embedding_ref, a, F64, **settings)
    torchs = differentiate(mixed_embedding_ref, a, **settings)
    ours = differentiate(mixed_embedding, a, **settings, backend=backend)
    assert_within_budget(ours, torchs, exact, sizes_of_terms(a, **settings))
    return ours


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "deltas_dtype"), DTYPES)
@pytest.mark.parametrize(("M", "V", "D", "K"), SHAPES)
def test_cpp(isa, M, V, D, K, dtype, deltas_dtype):
    with instruction_set(isa), poisoned_memory():
        for rows in ("one", "segments", "shuffled", "different"):
            check(problem(M, V, D, K, dtype, deltas_dtype, rows, with_base=rows != "shuffled"), "cpp")


@pytest.mark.parametrize(("dtype", "deltas_dtype"), [(F32, F32), (BF16, F32), (F16, F16)])
def test_registered_reference_equals_plain_autograd(dtype, deltas_dtype):
    check(problem(40, 13, 33, 3, dtype, deltas_dtype, "shuffled"), "reference")


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_gets_no_gradient(backend, padding_idx):
    a = problem(60, 6, 20, 2)
    gradients = check(a, backend, padding_idx=padding_idx)
    unpadded = check(a, backend)
    for name in ("base", "deltas"):
        assert torch.equal(gradients[name][padding_idx], torch.zeros_like(gradients[name][padding_idx]))
        assert unpadded[name][padding_idx].abs().sum() > 0
    assert torch.equal(gradients["coefficients"], unpadded["coefficients"])
    assert torch.equal(gradients["y"], unpadded["y"])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_zero_deltas_give_the_plain_embeddings_bits(dtype):
    a = problem(60, 20, 33, 2, dtype)
    a["base"][:3] = -0.0
    plain = F.embedding(a["ids"], a["base"])
    integers = torch.int32 if dtype == F32 else torch.int16
    for zero in ("deltas", "coefficients"):
        y = mixed_embedding(**{**a, zero: torch.zeros_like(a[zero])}, backend="reference")
        assert torch.equal(y.view(integers), plain.view(integers))


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_zero_coefficients_read_the_base_alone(isa, dtype):
    a = problem(60, 20, 33, 2, dtype)
    a["coefficients"].zero_()
    a["deltas"].fill_(torch.nan)
    with instruction_set(isa):
        y = mixed_embedding(**a, backend="cpp")
    assert torch.equal(y, F.embedding(a["ids"], a["base"]))


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
def test_other_ids_are_not_read(isa):
    a = problem(60, 20, 33, 2)
    expected = mixed_embedding_ref(**a)
    unused = torch.ones(20, dtype=torch.bool).index_fill(0, a["ids"], False)
    assert unused.any()
    for name in ("base", "deltas"):
        a[name][unused] = torch.nan
    with instruction_set(isa):
        torch.testing.assert_close(mixed_embedding(**a, backend="cpp"), expected, rtol=1e-6, atol=1e-6)


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
def test_steering_effect_survives_bfloat16(isa, size):
    """The mix is formed in float32: it is rounded once, alone or with the base it is added to."""
    V, D = 64, 64
    ids = torch.arange(V).repeat(64)
    generator = torch.Generator().manual_seed(2)
    deltas = size * (1 + torch.rand(V, 2, D, generator=generator))
    base = (0.04 * torch.randn(V, D, generator=generator)).bfloat16()
    c = torch.rand(ids.numel(), 2, generator=generator)
    with instruction_set(isa):
        y, alone = (mixed_embedding(ids, b, deltas, c, backend="cpp").double() for b in (base, torch.zeros_like(base)))
    exact = mixed_embedding_ref(ids, None, deltas.double(), c.double())
    assert ((alone - exact).abs() <= 2**-8 * exact.abs()).all()
    # To nearest, but where the sum lies within a float32 rounding of the middle of two neighbours.
    nearest = (base.double()[ids] + exact).bfloat16()
    assert (y != nearest.double()).double().mean() <= 1e-3


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
def test_many_positions_of_one_id_err_no_more_than_torchs(isa):
    """Sums of one sign over 4096 positions, whose partial sums grow."""
    a = problem(4096, 2, 24, 2, rows="different")
    a = {n: t.abs() if is_float(t) else t for n, t in a.items()}
    dy = torch.rand(4096, 24, generator=torch.Generator().manual_seed(5))
    results = []
    for op, dtype, settings in (
        (mixed_embedding_ref, F64, {}),
        (mixed_embedding_ref, F32, {}),
        (mixed_embedding, F32, {"backend": "cpp"}),
    ):
        inputs = {n: t.to(dtype, copy=True).requires_grad_() if is_float(t) else t for n, t in a.items()}
        with instruction_set(isa):
            op(**inputs, **settings).backward(dy.to(dtype))
        results.append({n: inputs[n].grad for n in ("base", "deltas")})
    exact, torchs, ours = results
    for name, expected in exact.items():
        error, own = ((v[name].double() - expected).abs().max() for v in (ours, torchs))
        assert error <= 2 * own + torch.finfo(F32).eps * expected.abs().max(), name


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_the_number_of_threads(isa):
    threads = torch.get_num_threads()
    try:
        for M, V in ((1, 7), (900, 50), (900, 3000)):
            a = problem(M, V, 100, 2, rows="shuffled")
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                with instruction_set(isa):
                    results.append(differentiate(mixed_embedding, a, backend="cpp"))
            assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_strides_int32_and_empty_batches(backend):
    a = problem(12, 10, 6, 2)
    base, deltas = a["base"].T.contiguous().T, a["deltas"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not base.is_contiguous()
    assert not deltas.is_contiguous()
    ids = torch.randint(0, 10, (4, 3)).T
    y = mixed_embedding(ids, base, deltas, a["coefficients"][:3], backend=backend)
    expected = mixed_embedding_ref(ids, a["base"], a["deltas"], a["coefficients"][:3])
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(mixed_embedding(ids.int(), base, deltas, a["coefficients"][:3], backend=backend), y)
    for c in (torch.empty(0, 2), torch.ones(2)):
        inputs = [t.clone().requires_grad_() for t in (a["base"], a["deltas"], c)]
        y = mixed_embedding(torch.empty(0, 4, dtype=torch.int64), *inputs, backend=backend)
        assert y.shape == (0, 4, 6)
        y.sum().backward()
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in inputs)
