"""Records what the launchers of Triton kernels would launch on a GPU: signatures and constants, compiled elsewhere.

A recorder stands in for Triton's own launch while launchers run on meta tensors. `aot_launches` names the calls.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

KERNELS = Path(__file__).parents[1] / "kernels/clp_kernels"


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        backend, arch: as Triton names them.
        capability: major one, as torch reports it.
        shared_bytes: what one block may use.
    """

    backend: str
    arch: int | str
    capability: int
    shared_bytes: int

    @property
    def name(self) -> str:
        return f"{self.backend}:{self.arch}"


TARGETS = {
    target.name: target
    for target in (
        Target("cuda", 80, 8, 163 * 1024),
        Target("cuda", 90, 9, 227 * 1024),
        Target("cuda", 100, 10, 227 * 1024),
        Target("hip", "gfx942", 9, 64 * 1024),
    )
}


@dataclass
class Launch:
    """One launch that was recorded, and of what kind it is.

    Attributes:
        kernel: "<operator>.<function>", the operator by the kernel's module.
        label: of the call that launched it.
        rows: dtype of the rows; copies: K.
        is_hot: whether it is the one that stands for its kernel.
    """

    function: Any
    kernel: str
    label: str
    rows: torch.dtype
    copies: int
    is_hot: bool
    allows_tf32: bool
    signature: dict[str, str] = field(default_factory=dict)
    constexprs: dict[tuple[int], Any] = field(default_factory=dict)
    attrs: dict[tuple[int], list[list[Any]]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        """What the compiler sees: equal for launches that are one binary."""
        return repr((self.kernel, self.signature, self.constexprs, self.attrs, sorted(self.options.items())))


class Recorder:
    """Stands in for every kernel while `during` runs a call: keeps each launch, once.

    `only_hot`: keeps, of the calls that name hot kernels, the first launch of each of those, and runs no other call.
    """

    def __init__(self, target: Target, only_hot: bool) -> None:
        self.target, self.only_hot = target, only_hot
        self.launches: dict[str, Launch] = {}

    def during(
        self, call: Any, label: str, rows: torch.dtype, copies: int, hot: Iterable[str] = (), tf32: bool = False
    ) -> None:
        """Runs a call of launchers on meta tensors. hot: functions whose first launch in it stands for the kernel."""
        from triton import JITFunction

        left = set(hot)
        if self.only_hot and not left:
            return
        before = JITFunction.__getitem__

        def record(function: Any, *args: Any, **named: Any) -> None:
            name = function.__name__
            is_hot = name in left
            left.discard(name)
            if self.only_hot and not is_hot:
                return
            launch = Launch(function, kernel_name(function), label, rows, copies, is_hot, tf32)
            _specialise(launch, args, named)
            if is_hot or launch.key() not in self.launches:  # named by the call that it is the hot one of
                self.launches[launch.key()] = launch

        JITFunction.__getitem__ = lambda function, grid: functools.partial(record, function)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            call()
        finally:
            JITFunction.__getitem__ = before
            torch.backends.cuda.matmul.allow_tf32 = False
        assert not left, f"{label}: did not launch {left}"


def _specialise(launch: Launch, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Specialises as Triton's launcher does: None and 1 become constants, multiples of 16 are declared as such."""
    from triton.runtime.jit import mangle_type

    names = launch.function.arg_names
    constants = {name: value for name, value in named.items() if name in names}
    launch.options = {"debug": bool(launch.function.debug)}
    launch.options |= {name: value for name, value in named.items() if name not in constants}
    values = {**dict(zip(names, args, strict=False)), **constants}
    for index, name in enumerate(names):
        value = values[name]
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if name in constants or value is None or (is_int and value == 1):
            launch.signature[name], launch.constexprs[(index,)] = "constexpr", value
            continue
        launch.signature[name] = mangle_type(value)
        if not isinstance(value, float) and (not is_int or value % 16 == 0):
            launch.attrs[(index,)] = [["tt.divisibility", 16]]


def kernel_name(function: Any) -> str:
    return f"{_operator(function.__module__.rsplit('.', 1)[-1])}.{function.__name__}"


def _operator(module: str) -> str:
    return re.sub(r"_triton(_kernels)?$", "", module)


def shipped_kernels() -> set[str]:
    """Every kernel in the sources, as `kernel_name` names it: a jitted function whose name ends in _kernel."""
    found = set()
    for path in KERNELS.glob("*_triton*.py"):
        functions = re.findall(r"^@triton\.jit[^\n]*\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE)
        found |= {f"{_operator(path.stem)}.{name}" for name in functions}
    return found
