from __future__ import annotations

import pytest
import torch

import clp_kernels
from clp_kernels.select import OperatorCall, Problem, select, unsupported_reason

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NOTHING = {"reference": None, "cpp": "not built", "triton": "no GPU", "cuda": "not built"}
ALL = dict.fromkeys(NOTHING)


def problem(device: str, x: torch.dtype, base: torch.dtype | None, deltas: torch.dtype) -> Problem:
    return Problem(device, x, base, deltas, M=16, D=64, N=48, K=2, S=4)


@pytest.mark.parametrize(
    ("device", "x", "base", "deltas", "missing", "expected"),
    [
        ("cpu", F32, F32, F32, ALL, "cpp"),
        ("cpu", BF16, BF16, F32, ALL, "cpp"),
        ("cpu", BF16, BF16, BF16, ALL, "cpp"),
        ("cpu", F32, None, F32, ALL, "cpp"),
        ("cpu", BF16, F32, F32, ALL, "cpp"),
        ("cpu", F16, F16, F32, ALL, "cpp"),
        ("cpu", F64, F64, F64, ALL, "reference"),
        ("cpu", F32, F32, F32, NOTHING, "reference"),
        ("cuda", BF16, BF16, F32, ALL, "triton"),
        ("cuda", BF16, None, BF16, ALL, "cuda"),
        ("cuda", F16, F16, F16, ALL, "cuda"),
        ("cuda", F16, F16, BF16, ALL, "triton"),
        ("cuda", BF16, F32, F32, ALL, "triton"),
        ("cuda", F32, F32, F32, ALL, "triton"),
        ("cuda", BF16, BF16, F32, {**ALL, "cuda": "not built"}, "triton"),
        ("cuda", F64, F64, F64, ALL, "reference"),
        ("cuda", BF16, BF16, F32, NOTHING, "reference"),
        ("mps", F32, F32, F32, ALL, "reference"),
    ],
)
def test_auto(device, x, base, deltas, missing, expected):
    assert select(problem(device, x, base, deltas), missing) == expected


@pytest.mark.parametrize(
    ("name", "device", "x", "base", "deltas", "says"),
    [
        ("cpp", "cpu", F64, F32, F32, "x is torch.float64"),
        ("cpp", "cpu", F32, F64, F32, "base is torch.float64"),
        ("cpp", "cpu", F32, F32, F64, "deltas is torch.float64"),
        ("cpp", "cuda", F32, F32, F32, "x is on 'cuda'"),
        ("cuda", "cpu", F32, F32, F32, "x is on 'cpu'"),
        ("cuda", "cuda", BF16, F32, F32, "base is torch.float32"),
        ("cuda", "cuda", BF16, BF16, F16, "deltas are torch.float16"),
        ("triton", "cuda", F64, F64, F64, "x is torch.float64"),
    ],
)
def test_unsupported_names_the_field(name, device, x, base, deltas, says):
    reason = unsupported_reason(name, problem(device, x, base, deltas))
    assert reason is not None
    assert says in reason


@pytest.mark.parametrize(
    ("name", "device"), [("reference", "mps"), ("triton", "cpu"), ("cpp", "cpu"), ("cuda", "cuda")]
)
def test_supported(name, device):
    assert unsupported_reason(name, problem(device, F32, F32, F32)) is None


@pytest.mark.parametrize(
    ("device", "dtypes", "missing", "expected"),
    [
        ("cpu", {"x": F32, "weight": BF16}, ALL, "cpp"),
        ("cpu", {"x": BF16, "weight": F16}, ALL, "cpp"),
        ("cpu", {"x": F64}, ALL, "reference"),
        ("cpu", {"x": F32}, NOTHING, "reference"),
        ("cuda", {"x": BF16, "weight": F32}, ALL, "triton"),
        ("cuda", {"x": F64}, ALL, "reference"),
        ("cuda", {"x": F32}, NOTHING, "reference"),
        ("mps", {"x": F32}, ALL, "reference"),
    ],
)
@pytest.mark.parametrize(
    "op", ["low_rank_linear", "mixed_embedding", "mixed_linear_logprob", "mixed_norm", "mixed_qkv"]
)
def test_auto_of_the_other_operators(op, device, dtypes, missing, expected):
    assert select(OperatorCall(op, device, dtypes), missing) == expected


@pytest.mark.parametrize(
    ("name", "device", "says"),
    [
        ("cpp", "cpu", "weight is torch.float64"),
        ("cpp", "cuda", "weight is torch.float64"),
        ("triton", "cuda", "weight is torch.float64"),
        ("cuda", "cuda", "mixed_norm has no 'cuda' form"),
    ],
)
def test_unsupported_row_by_row_operator_names_the_field(name, device, says):
    reason = unsupported_reason(name, OperatorCall("mixed_norm", device, {"x": F32, "weight": F64}))
    assert reason is not None
    assert says in reason


def test_row_by_row_operator_on_another_device():
    reason = unsupported_reason("cpp", OperatorCall("mixed_norm", "cuda", {"x": F32}))
    assert reason == "its arguments are on 'cuda'; back-end 'cpp' runs on 'cpu'"
    reason = unsupported_reason("triton", OperatorCall("mixed_norm", "mps", {"x": F32}))
    assert reason == "its arguments are on 'mps'; back-end 'triton' runs on 'cuda'"
    assert unsupported_reason("triton", OperatorCall("mixed_norm", "cpu", {"x": F32})) is None  # the interpreter
    assert unsupported_reason("reference", OperatorCall("mixed_norm", "mps", {"x": F64})) is None


def arguments() -> tuple[torch.Tensor, ...]:
    return torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 2, 3), torch.ones(2)


def test_keyword_beats_block_beats_auto():
    args = arguments()
    with clp_kernels.backend("reference"):
        assert clp_kernels.backend_for(*args) == "reference"
        if clp_kernels.available_backends()["cpp"] is None:
            assert clp_kernels.backend_for(*args, backend="cpp") == "cpp"
            with clp_kernels.backend("auto"):
                assert clp_kernels.backend_for(*args) == "cpp"
        assert clp_kernels.backend_for(*args) == "reference"


def test_block_is_left_after_an_error():
    with pytest.raises(KeyError), clp_kernels.backend("reference"):
        raise KeyError
    from clp_kernels.backend import requested_backend

    assert requested_backend() == "auto"


def test_unknown_name():
    with pytest.raises(ValueError, match="'fortran'"):
        clp_kernels.mixed_linear(*arguments(), backend="fortran")
    with pytest.raises(ValueError, match="'fortran'"), clp_kernels.backend("fortran"):
        pass


def test_missing_back_end_raises_with_the_remedy(monkeypatch):
    import clp_kernels.extension as extension

    monkeypatch.setitem(extension._missing, "cpu", "it was not built: pip install .")
    with pytest.raises(RuntimeError, match="'cpp' is not available: it was not built: pip install"):
        clp_kernels.mixed_linear(*arguments(), backend="cpp")
    assert clp_kernels.available_backends()["cpp"] == "it was not built: pip install ."
    assert clp_kernels.backend_for(*arguments()) == "reference"
    with pytest.raises(RuntimeError, match="extension is missing"):
        extension.set_isa("portable")


def test_by_name_and_unsupported():
    x, base, deltas, c = arguments()
    if clp_kernels.available_backends()["cpp"] is not None:
        pytest.skip("cpp is not built")
    with pytest.raises(ValueError, match=r"takes torch\.float32, torch\.bfloat16"):
        clp_kernels.mixed_linear(x.double(), base.double(), deltas.double(), c.double(), backend="cpp")
