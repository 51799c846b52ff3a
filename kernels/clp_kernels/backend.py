"""Which back-ends this process can run, and which one a call asks for."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from clp_kernels import extension

_Function = TypeVar("_Function", bound=Callable[..., Any])

BACKENDS = ("reference", "cpp", "triton", "cuda")


# Read once per call of a public function, on the caller's thread. The name that it resolves to travels on as an
# argument of the registered op, so a backward pass (another thread, the block left) runs the back-end of its forward.
# A thread-local and not a ContextVar, which torch.compile cannot trace.
class _Requested(threading.local):
    name: str = "auto"


_requested = _Requested()


def _constant_when_compiled(function: _Function) -> _Function:
    """Return `function`, which torch.compile then calls once while it traces, for its result.

    torch.compiler.assume_constant_result sets the same mark, but imports torch._dynamo for it, and that Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def check_backend_name(name: str) -> str:
    """Return `name` if it names a back-end or "auto".

    Raises:
        ValueError: any other name.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Make `name` the back-end of every operator called inside the block that is not given one by keyword.

    Args:
        name: "reference", "cpp", "triton", "cuda" or "auto".

    Raises:
        ValueError: an unknown name. A known back-end that this process lacks raises where an operator is called.
    """
    outer = _requested.name
    _requested.name = check_backend_name(name)
    try:
        yield
    finally:
        _requested.name = outer


def requested_backend() -> str:
    """Return the name set by the surrounding `backend(...)` block, "auto" outside of any."""
    return _requested.name


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed: pip install triton"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        "torch sees no GPU; set TRITON_INTERPRET=1 before the first import to run Triton kernels in its CPU interpreter"
    )


@_constant_when_compiled
def missing_reason(name: str) -> str | None:
    """Return None if back-end `name` can run in this process, else why it cannot and what to do about it."""
    match name:
        case "reference":
            return None
        case "cpp":
            return extension.missing_reason("cpu")
        case "triton":
            return _triton_missing()
        case "cuda":
            return extension.missing_reason("cuda")
    raise ValueError(f"unknown back-end {name!r}")


@_constant_when_compiled
def available_backends() -> dict[str, str | None]:
    """Return every back-end's name with None if it can run in this process, else the reason and the remedy."""
    return {name: missing_reason(name) for name in BACKENDS}
