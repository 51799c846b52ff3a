"""The choice of a back-end: a pure function of device, dtypes, shapes and availability, never of values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from clp_kernels import extension
from clp_kernels.backend import available_backends, check_backend_name, missing_reason, requested_backend

# Looked up once: a call of a tiny layer takes some microseconds.
_transforms_are_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling

CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # those of the GPU back-ends too


class Problem(NamedTuple):
    """What the choice may depend on: M rows, D in, N out, K copies, S distinct weightings.

    `batch_invariant`: whether a row's bits may depend on the rest of the batch (False) or not.
    """

    device_type: str
    x_dtype: torch.dtype
    base_dtype: torch.dtype | None
    deltas_dtype: torch.dtype
    M: int
    D: int
    N: int
    K: int
    S: int
    batch_invariant: bool = False


# Beside the reference.
FORMS: Mapping[str, tuple[str, ...]] = {
    "low_rank_linear": ("cpp", "triton"),
    "mixed_embedding": ("cpp", "triton"),
    "mixed_linear": ("cpp", "triton", "cuda"),
    "mixed_linear_logprob": ("cpp", "triton"),
    "mixed_norm": ("cpp", "triton"),
    "mixed_qkv": ("cpp", "triton"),
}


PANEL_ROWS = {torch.float32: 128, torch.bfloat16: 512, torch.float16: 512}
SEGMENT_ROWS = 256
DECODE_ROWS = 64

_ORDER_OF_SUMS = "batch_invariant is True; torch's GEMM sums a row in an order that depends on the number of rows"


class OperatorCall(NamedTuple):
    """The same for the other operators, whose forms `FORMS` lists: the floating arguments' dtypes."""

    op: str
    device_type: str
    dtypes: Mapping[str, torch.dtype]
    batch_invariant: bool = False


def unsupported_reason(name: str, problem: Problem | OperatorCall) -> str | None:
    """Return None if back-end `name` takes `problem`, else the field that it does not take.

    | back-end  | device    | x                          | base           | deltas               | batch_invariant |
    | --------- | --------- | -------------------------- | -------------- | -------------------- | --------------- |
    | reference | any       | any                        | any            | any                  | no              |
    | cpp       | cpu       | float32, bfloat16, float16 | the same three | the same three       | yes             |
    | triton    | cuda, cpu | the same three             | the same three | the same three       | yes             |
    | cuda      | cuda      | the same three             | x's dtype      | x's dtype or float32 | yes             |

    float64 (every argument then) is the reference's alone. Each takes a layer without a base. Each gradient has its
    input's dtype.
    """
    if isinstance(problem, OperatorCall):
        return _unsupported_call(name, problem)
    if name == "reference":
        return _ORDER_OF_SUMS if problem.batch_invariant else None
    for field, dtype in (("x", problem.x_dtype), ("base", problem.base_dtype), ("deltas", problem.deltas_dtype)):
        if dtype is not None and dtype not in CPP_DTYPES:
            return f"{field} is {dtype}; back-end {name!r} takes {', '.join(map(str, CPP_DTYPES))}"
    if name == "cuda" and problem.base_dtype not in (None, problem.x_dtype):
        return f"base is {problem.base_dtype}, x {problem.x_dtype}; back-end 'cuda' takes a base of x's dtype"
    if name == "cuda" and problem.deltas_dtype not in (problem.x_dtype, torch.float32):
        return f"deltas are {problem.deltas_dtype}; back-end 'cuda' takes x's dtype {problem.x_dtype} or torch.float32"
    return _unsupported_device("x is", name, problem.device_type)


def _unsupported_call(name: str, call: OperatorCall) -> str | None:
    if name == "reference":
        return _ORDER_OF_SUMS if call.batch_invariant else None
    if name not in FORMS[call.op]:
        return f"{call.op} has no {name!r} form"
    for field, dtype in call.dtypes.items():
        if dtype not in CPP_DTYPES:
            return f"{field} is {dtype}; back-end {name!r} takes {', '.join(map(str, CPP_DTYPES))}"
    return _unsupported_device("its arguments are", name, call.device_type)


def _unsupported_device(what: str, name: str, device_type: str) -> str | None:
    wanted = "cpu" if name == "cpp" else "cuda"
    # "triton" by name runs on the CPU too, in Triton's interpreter.
    if device_type == wanted or (name == "triton" and device_type == "cpu"):
        return None
    return f"{what} on {device_type!r}; back-end {name!r} runs on {wanted!r}"


def resolve(requested: str | None, problem: Problem | OperatorCall) -> str:
    """Return the back-end's name: the keyword, else the surrounding block's, else what `select` takes for "auto".

    Raises:
        ValueError: an unknown name, or a back-end that does not take `problem`.
        RuntimeError: a back-end asked for by name that this process lacks.
    """
    name = requested_backend() if requested is None else check_backend_name(requested)
    if name == "auto":
        name = select(problem, available_backends())
    reason = missing_reason(name)
    if reason is not None:
        raise RuntimeError(f"back-end {name!r} is not available: {reason}")
    reason = unsupported_reason(name, problem)
    if reason is not None:
        remedy = "call without it" if name == "reference" else "use backend='auto' or 'reference'"
        raise ValueError(f"back-end {name!r} does not take this call: {reason}; {remedy}")
    return name


def runs_compiled(x: Tensor, backend: str | None) -> bool:
    """Return whether to try the compiled CPU operator at once, for calls that `resolve` gives it for the most part.

    torch.compile takes the registered operators instead: the compiled graph has none of their Python. torch.func's
    transforms get torch's own error there: they have no rule for custom operators.
    """
    return (
        x.is_cpu
        and (requested_backend() if backend is None else backend) in ("auto", "cpp")
        and extension.missing_reason("cpu") is None
        and not _transforms_are_active()
        and not _is_compiling()
    )


def select(problem: Problem | OperatorCall, missing: Mapping[str, str | None]) -> str:
    """Return the back-end that "auto" means for `problem`.

    Args:
        problem: device, dtypes and shapes of the call.
        missing: back-end -> None if it can run, else the reason, as `available_backends()` returns it.
    """
    candidates = {"cpu": ["cpp"], "cuda": ["triton"]}.get(problem.device_type, [])
    if isinstance(problem, Problem) and candidates == ["triton"] and _is_decoding(problem):
        candidates = ["cuda", "triton"]
    for name in candidates:
        if missing[name] is None and unsupported_reason(name, problem) is None:
            return name
    return "reference"


def select_form(
    M: int, S: int, dtypes: tuple[torch.dtype, torch.dtype | None], batch_invariant: bool, rounds_mix: bool
) -> str:
    """Return how a GPU product of M rows under at most S weightings runs: "streams", "segments" or "panels".

    With t the time of a plain product of these rows and b that of reading one weight:
    streams: (K + 1) t or (K + 1) b, whatever the weightings.
    segments: 2 t, or t where the mix is rounded, for tiles of rows of one weighting; as much again for each further
    weighting in a tile. panels: (K + 2) b + t, at cuBLAS's rate.

    Args:
        M: Rows.
        S: Capacity of distinct weightings.
        dtypes: Of the rows and of the base (None without one).
        batch_invariant: Streams alone take one tile for any number of rows.
        rounds_mix: Whether base and deltas may be rounded as one weight; float32 always may.
    """
    rows, base = dtypes
    if batch_invariant or base not in (None, rows):
        return "streams"
    is_wide = rows == torch.float32
    if S == 1 and PANEL_ROWS.get(rows, 512) <= M and (is_wide or rounds_mix):
        return "panels"
    return "segments" if not is_wide and M >= SEGMENT_ROWS * S else "streams"


def _is_decoding(problem: Problem) -> bool:
    """Return whether the CUDA decode kernel is the faster one: few rows, on the tensor cores.

    On an H200 in bfloat16, a row, K = 2: 10.3 us at N = D = 2048, Triton 26.6. Not where the batch may not matter: the
    choice itself depends on the number of rows.
    """
    return (
        problem.M <= DECODE_ROWS
        and not problem.batch_invariant
        and problem.x_dtype.itemsize == 2
        and problem.base_dtype in (None, problem.x_dtype)
        and problem.deltas_dtype == problem.x_dtype
    )
