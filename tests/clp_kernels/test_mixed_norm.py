"""mixed_norm's values and gradients against a float64 oracle, with torch's own error as the budget."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rows_support import (
    BACKENDS,
    BACKENDS_AND_TRITON,
    ISAS,
    assert_within_budget,
    differentiate,
    instruction_set,
    needs_cpp,
    poisoned_memory,
    row_map,
)

from clp_kernels import mixed_norm, mixed_norm_ref

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F32, BF16), (F16, F32), (F16, F16)]
# M, D, K: one row, odd widths around each vector's, several chunks and blocks of rows with rests.
SHAPES = [(1, 33, 1), (3, 64, 2), (17, 7, 3), (70, 40, 2), (130, 129, 4), (9, 1, 5), (300, 96, 2)]
SETTINGS = {
    "rms": {"kind": "rms"},
    "llama": {"kind": "rms", "cast_before_scale": True},
    "gemma": {"kind": "rms", "offset": 1.0},
    "layer": {"kind": "layer", "eps": 1e-5},
}


def problem(M, D, K, dtype=F32, deltas_dtype=F32, rows="segments", bias=True, scale=0.1):
    generator = torch.Generator().manual_seed(M * 7 + K)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    rows_M = row_map(M, rows)
    arguments = {
        "x": (randn(M, D) + 0.3).to(dtype),
        "weight": (1 + 0.2 * randn(D)).to(dtype),
        "weight_deltas": (scale * randn(D, K)).to(deltas_dtype),
        "coefficients": randn(int(rows_M.max()) + 1, K),
        "row_map": rows_M,
    }
    biases = {"bias": randn(D).to(dtype), "bias_deltas": (scale * randn(D, K)).to(deltas_dtype)}
    return {**arguments, **biases} if bias else arguments


def sizes_of_terms(a, offset=0.0, kind="rms", eps=1e-6, **_):
    """For each result the sum of its terms' absolute values, by the formulas of mixed_norm_reference.backward."""
    x, W, dW, c = (a[n].double() for n in ("x", "weight", "weight_deltas", "coefficients"))
    b, db = (a[n].double() if n in a else torch.zeros(()) for n in ("bias", "bias_deltas"))
    index = a["row_map"].long()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(a["x"].dtype).double().abs()
    centre, centre_size = (v.mean(-1, keepdim=True) if kind == "layer" else torch.zeros(()) for v in (x, x.abs()))
    rstd = ((x - centre).square().mean(-1, keepdim=True) + eps).rsqrt()
    n, c_MK = (x.abs() + centre_size) * rstd, c.abs()[index]
    scale = abs(offset) + W.abs() + c_MK @ dW.abs().T
    g = dy * scale
    d_c = (dy * n) @ dW.abs() + (dy @ db.abs() if db.dim() else 0.0)
    sizes = {
        "y": n * scale + b.abs() + (c_MK @ db.abs().T if db.dim() else 0.0),
        "x": rstd * (g + g.mean(-1, keepdim=True) + n * (g * n).mean(-1, keepdim=True)),
        "weight": (dy * n).sum(0),
        "weight_deltas": (dy * n).T @ c_MK,
        "coefficients": torch.zeros_like(c).index_add(0, index, d_c),
    }
    return {**sizes, "bias": dy.sum(0), "bias_deltas": dy.T @ c_MK}


def check(a, settings, backend):
    exact = differentiate(mixed_norm_ref, a, F64, **settings)
    torchs = differentiate(mixed_norm_ref, a, **settings)
    ours = differentiate(mixed_norm, a, **settings, backend=backend)
    assert_within_budget(ours, torchs, exact, sizes_of_terms(a, **settings))


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("dtype", "deltas_dtype"), DTYPES)
@pytest.mark.parametrize(("M", "D", "K"), SHAPES)
def test_cpp(isa, M, D, K, dtype, deltas_dtype, settings):
    with instruction_set(isa), poisoned_memory():
        for rows in ("one", "segments", "shuffled", "different"):
            check(problem(M, D, K, dtype, deltas_dtype, rows, bias=rows != "shuffled"), settings, "cpp")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("dtype", "deltas_dtype"), [(F32, F32), (BF16, F32), (F16, F16)])
def test_registered_reference_equals_plain_autograd(dtype, deltas_dtype, settings):
    check(problem(17, 33, 3, dtype, deltas_dtype, "shuffled"), settings, "reference")


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_parts_may_be_missing(backend):
    a = problem(12, 24, 2)
    for missing in ("weight", "bias", "bias_deltas"):
        b = {name: t for name, t in a.items() if name != missing}
        none = {"weight": None} if missing == "weight" else {}
        zero = torch.zeros_like(a[missing])
        ours = differentiate(mixed_norm, {**b, **none}, backend=backend)
        expected = differentiate(mixed_norm_ref, {**b, missing: zero})
        for name, value in ours.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def plain_modules(D: int, dtype: torch.dtype) -> dict[str, tuple[torch.nn.Module, dict[str, object]]]:
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    modules = {
        "llama": (LlamaRMSNorm(D, eps=1e-5), {"eps": 1e-5, "cast_before_scale": True}),
        "t5": (T5LayerNorm(D, eps=1e-6), {"cast_before_scale": True}),
        "olmo2": (Olmo2RMSNorm(D, eps=1e-6), {}),
        "gemma": (GemmaRMSNorm(D, eps=1e-6), {"offset": 1.0}),
        "cohere": (CohereLayerNorm(D, eps=1e-5), {"eps": 1e-5, "kind": "layer"}),
        "torch_rms": (torch.nn.RMSNorm(D, eps=1e-6), {}),
        "torch_layer": (torch.nn.LayerNorm(D, eps=1e-5), {"eps": 1e-5, "kind": "layer"}),
    }
    generator = torch.Generator().manual_seed(1)
    for module, _ in modules.values():
        for parameter in module.parameters():
            parameter.data = (parameter + 0.1 * torch.randn(D, generator=generator)).to(dtype)
    return modules


# F.layer_norm multiplies and adds the bias in one rounding or in two, as its vector code decides; Cohere's variance is
# a mean of squares where ours is F.layer_norm's. They are held to the budget alone.
SAME_BITS = ("llama", "t5", "olmo2", "gemma", "torch_rms")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_zero_coefficients_are_the_module(backend, dtype):
    D, K = 100, 2
    a = problem(40, D, K, dtype, F32, bias=False)
    a["coefficients"] = torch.zeros_like(a["coefficients"])
    for name, (module, settings) in plain_modules(D, dtype).items():
        bias = getattr(module, "bias", None)
        b = {**a, "weight": module.weight.detach(), **({} if bias is None else {"bias": bias.detach()})}
        plain = module(a["x"]).detach()
        assert plain.dtype == dtype
        y = mixed_norm(**b, **settings, backend=backend)
        if name in SAME_BITS and backend == "reference":
            assert torch.equal(y, plain), name
        wide = {n: t.double() if t.is_floating_point() else t for n, t in b.items()}
        exact = mixed_norm_ref(**wide, **settings)
        assert_within_budget({"y": y}, {"y": plain}, {"y": exact}, sizes_of_terms(b, **settings))


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e-4, 1e-3])
@pytest.mark.parametrize("cast_before_scale", [True, False])
def test_steering_effect_survives_bfloat16(isa, size, cast_before_scale):
    """y(c) - y(0) beside weights near 1: bfloat16 values there are 2**-7 apart, a mix rounded to it has no effect.

    Not beside weights of 1: with cast_before_scale, x times 1 is a bfloat16 value, and so is what it rounds back to.
    """
    M, D = 128, 4096
    generator = torch.Generator().manual_seed(2)
    x, c = torch.randn(M, D, generator=generator).bfloat16(), torch.tensor([0.7, 0.3])
    deltas = size * torch.randn(D, 2, generator=generator).sign()
    deltas[:, 1] = deltas[:, 0]
    settings = {"cast_before_scale": cast_before_scale, "backend": "cpp"}
    weight = (1 + 0.2 * torch.randn(D, generator=generator)).bfloat16()
    with instruction_set(isa):
        y, y_zero = (mixed_norm(x, weight, deltas, c * on, **settings).double() for on in (1, 0))
        alone = mixed_norm(x, torch.zeros_like(weight), deltas, c, **settings).double()
    n, mix = F.rms_norm(x.double(), (D,), eps=1e-6), deltas.double() @ c.double()
    effect = n * mix
    # y(c) - y(0) over `size` holds roundings of 0.0016 / size; they cancel in the mean over M D = 2**19 values, where
    # both factors are bfloat16 of 2**7 mantissas each only as over 2**14.
    tolerance = 0.01 + (2.5e-5 if cast_before_scale else 5e-6) / size
    assert ((y - y_zero) * effect).sum() / effect.square().sum() == pytest.approx(1, abs=tolerance)
    # To nearest, but where the product lies within a few float32 roundings of the middle of two neighbours.
    n = n.bfloat16().double() if cast_before_scale else n
    assert (y != (n * (weight.double() + mix)).bfloat16().double()).double().mean() <= 1e-3
    assert (alone - effect).norm() <= 2**-8 * effect.norm()


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", ["one", "segments", "different"])
def test_long_sums_err_no_more_than_torchs(isa, rows):
    """Sums over 4096 rows of one sign, whose partial sums grow, and rows of 4096 values."""
    for M, D in ((4096, 16), (3, 4096)):
        a = problem(M, D, 2, rows=rows)
        a = {n: t if n == "row_map" else t.abs() for n, t in a.items()}
        dy = torch.rand(M, D, generator=torch.Generator().manual_seed(5))
        results = []
        for op, dtype, settings in (
            (mixed_norm_ref, F64, {}),
            (mixed_norm_ref, F32, {}),
            (mixed_norm, F32, {"backend": "cpp"}),
        ):
            inputs = {n: t if n == "row_map" else t.to(dtype, copy=True).requires_grad_() for n, t in a.items()}
            with instruction_set(isa):
                op(**inputs, **settings).backward(dy.to(dtype))
            results.append({n: inputs[n].grad for n in ("weight", "weight_deltas", "bias", "bias_deltas", "x")})
        exact, torchs, ours = results
        for name, expected in exact.items():
            error, own = ((v[name].double() - expected).abs().max() for v in (ours, torchs))
            assert error <= 2 * own + torch.finfo(F32).eps * expected.abs().max(), name


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_the_number_of_threads(isa):
    threads = torch.get_num_threads()
    try:
        for M, rows, settings in ((1, "one", "llama"), (700, "segments", "layer"), (700, "shuffled", "rms")):
            a = problem(M, 200, 2, rows=rows)
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                with instruction_set(isa):
                    results.append(differentiate(mixed_norm, a, **SETTINGS[settings], backend="cpp"))
            assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    finally:
        torch.set_num_threads(threads)


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
def test_a_rows_bits_do_not_depend_on_its_neighbours(isa):
    a = problem(16, 100, 2, rows="different")
    with instruction_set(isa):
        whole = mixed_norm(**a, backend="cpp")
        for m in (0, 3, 15):
            one = {**a, "x": a["x"][m : m + 1], "row_map": a["row_map"][m : m + 1]}
            assert torch.equal(mixed_norm(**one, backend="cpp")[0], whole[m])


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
def test_what_has_no_part_is_not_read(isa):
    """A NaN in one row of x stays in it; one in a copy whose coefficients are all 0 is not seen."""
    a = problem(10, 40, 3)
    a["coefficients"][:, 1] = 0
    expected = mixed_norm_ref(**a)
    a["weight_deltas"][:, 1] = a["bias_deltas"][:, 1] = torch.nan
    a["x"][4, 7] = torch.nan
    with instruction_set(isa):
        y = mixed_norm(**a, backend="cpp")
    assert y[4].isnan().all()
    others = torch.arange(10) != 4
    torch.testing.assert_close(y[others], expected[others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS_AND_TRITON)
def test_strides_and_empty_batches(backend):
    a = problem(12, 10, 2)
    c = a["coefficients"][:3]
    x = torch.randn(10, 4, 3).permute(2, 1, 0).requires_grad_()  # [3, 4, 10]
    deltas = a["weight_deltas"].T.contiguous().T
    y = mixed_norm(x, a["weight"], deltas, c, backend=backend)
    torch.testing.assert_close(y, mixed_norm_ref(x, a["weight"], a["weight_deltas"], c), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for c in (torch.empty(0, 2), torch.ones(2)):
        inputs = [t.clone().requires_grad_() for t in (torch.empty(0, 4, 10), a["weight"], a["weight_deltas"], c)]
        empty = mixed_norm(*inputs, backend=backend)
        assert empty.shape == (0, 4, 10)
        empty.sum().backward()
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in inputs)
