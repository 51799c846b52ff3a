"""The compiled extension: loads its shared objects and says why one is missing."""

from __future__ import annotations

from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_FILES = {"cpu": "_cpu.abi3.so", "cuda": "_cuda.abi3.so"}
_ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")  # a processor that runs one runs those before it
_missing: dict[str, str] = {}


def _load(part: str) -> None:
    path = _FOLDER / _FILES[part]
    if part == "cuda" and torch.version.cuda is None:
        _missing[part] = "torch is built without CUDA; install a CUDA build of torch"
    elif part == "cuda" and "cpu" in _missing:
        _missing[part] = f"the CPU extension, which declares its operators, is missing: {_missing['cpu']}"
    elif not path.exists():
        skipped = "CLP_SKIP_EXTENSION=1" if part == "cpu" else "CLP_SKIP_CUDA=1, or without a CUDA toolkit"
        _missing[part] = (
            f"{path.name} was not built (installed with {skipped}?): reinstall with a "
            f"{'C++ compiler' if part == 'cpu' else 'CUDA toolkit (nvcc)'}, `pip install .`"
        )
    else:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:  # built for another libtorch or processor family
            # torch names the file only; the loader's own words are in the cause.
            _missing[part] = f"{path.name} does not load ({error.__cause__ or error}): reinstall with `pip install .`"


for _part in _FILES:
    _load(_part)


def missing_reason(part: str) -> str | None:
    """Return None if the "cpu" or "cuda" part of the extension is loaded, else why not and what to do."""
    return _missing.get(part)


def isa() -> str:
    """Return the instruction set that the CPU kernels use now: one of `available_isas()`.

    Raises:
        RuntimeError: the CPU part is not loaded.
    """
    _require_cpu()
    return torch.ops.clp.cpu_isa()


def set_isa(name: str) -> None:
    """Make the CPU kernels of the whole process use instruction set `name`, or "best", the processor's best.

    Raises:
        ValueError: an unknown name, or an instruction set that this processor lacks.
        RuntimeError: the CPU part is not loaded.
    """
    _require_cpu()
    if name != "best" and name not in available_isas():
        what = "this processor lacks it" if name in _ISAS else f"it must be one of {', '.join(_ISAS)} or best"
        raise ValueError(f"instruction set {name!r}: {what}; available here: {', '.join(available_isas())}")
    torch.ops.clp.cpu_set_isa(name)


def available_isas() -> tuple[str, ...]:
    """Return the instruction sets that this processor runs, the slowest first.

    All there are: "portable", "avx2", "avx512", "avx512_bf16" and "amx_bf16".

    Raises:
        RuntimeError: the CPU part is not loaded.
    """
    _require_cpu()
    return _ISAS[: _ISAS.index(torch.ops.clp.cpu_best_isa()) + 1]


def _require_cpu() -> None:
    if "cpu" in _missing:
        raise RuntimeError(f"the compiled CPU extension is missing: {_missing['cpu']}")
