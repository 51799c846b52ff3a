from __future__ import annotations

import pytest
import torch

from clp_kernels import available_backends, mixed_linear, mixed_linear_ref

B, T, D, N, K = 2, 3, 5, 4, 2


def good() -> dict[str, object]:
    return {
        "x": torch.randn(B, T, D),
        "base": torch.randn(N, D),
        "deltas": torch.randn(N, K, D),
        "coefficients": torch.rand(B, K),
        "bias": torch.randn(N),
        "bias_deltas": torch.randn(N, K),
    }


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("x", torch.randn(B, T, D + 1), r"x must be \[\.\.\., D\] with D = 5"),
        ("x", torch.randn(()), "x must be"),
        ("x", torch.ones(B, T, D, dtype=torch.int64), "x is torch.int64"),
        ("x", torch.ones(B, T, D, dtype=torch.float64), "float64 takes every argument in float64"),
        ("base", torch.randn(N + 1, D), r"base must be \[4, 5\]"),
        ("base", torch.randn(N, D, device="meta"), "base is on meta, x on cpu"),
        ("deltas", torch.randn(N, D), r"deltas must be \[N, K, D\], got \[4, 5\]"),
        ("deltas", torch.randn(N, 0, D), "K = 0"),
        ("coefficients", torch.rand(B, K + 1), r"must end in K = 2.*got \[2, 3\]"),
        ("coefficients", torch.rand(()), "must end in K = 2"),
        ("coefficients", torch.rand(B + 1, K), r"\[3\] must be a prefix of x's \[2, 3\]"),
        ("coefficients", torch.rand(B * T, K), r"\[6\] must be a prefix"),  # never guessed by divisibility
        ("coefficients", torch.rand(B, T, D, K), "prefix"),
        ("coefficients", torch.rand(B, K).bfloat16(), "coefficients are torch.bfloat16, must be torch.float32"),
        ("bias", torch.randn(N, 1), r"bias must be \[4\]"),
        ("bias_deltas", torch.randn(K, N), r"bias_deltas must be \[4, 2\]"),
        ("row_map", torch.zeros(B, dtype=torch.int32), r"row_map must be \[2, 3\]"),
        ("row_map", torch.zeros(B, T, dtype=torch.int64), "must be torch.int32"),
    ],
)
@pytest.mark.parametrize("op", [mixed_linear, mixed_linear_ref])
def test_bad_argument_is_named(op, field, value, says):
    with pytest.raises(ValueError, match=says):
        op(**{**good(), field: value})


def test_row_map_wants_two_dimensional_coefficients():
    row_map = torch.zeros(B, T, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"must be \[S, K\] where row_map is given"):
        mixed_linear(**{**good(), "coefficients": torch.rand(K)}, row_map=row_map)


@pytest.mark.parametrize("bad", [-1, 2])
def test_row_map_out_of_range(bad):
    row_map = torch.zeros(B, T, dtype=torch.int32)
    row_map[1, 2] = bad
    for backend in ("cpp", "reference"):
        if available_backends()[backend] is None:
            with pytest.raises(IndexError, match=r"outside \[0, 2\)|out of range"):
                mixed_linear(**good(), row_map=row_map, backend=backend)


@pytest.mark.parametrize("shape", [(K,), (B, K), (B, T, K)])
def test_prefixes_mean_their_expansion(shape):
    arguments = good()
    c = torch.rand(shape)
    c_BTK = c.view(*shape[:-1], *(1,) * (3 - len(shape)), K).expand(B, T, K)
    expected = mixed_linear(
        **{**arguments, "coefficients": c_BTK.reshape(B * T, K)},
        row_map=torch.arange(B * T, dtype=torch.int32).view(B, T),
        backend="reference",
    )
    y = mixed_linear(**{**arguments, "coefficients": c}, backend="reference")
    assert torch.equal(y, expected)


def test_row_map_may_be_an_expanded_view():
    arguments = good()
    c_SK = torch.rand(3, K)
    view = torch.tensor([[2], [0]], dtype=torch.int32).expand(B, T)
    y = mixed_linear(**{**arguments, "coefficients": c_SK}, row_map=view)
    expected = mixed_linear(**{**arguments, "coefficients": c_SK[[2, 0]]})
    torch.testing.assert_close(y, expected)
