"""`clp env`: what a bug report or a benchmark needs to know about this machine; tiles measured on its GPU."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clp_engine.cli import arguments, loading

_PACKAGES = ("clp_engine", "torch", "triton", "transformers", "accelerate", "safetensors", "numpy")
_OPTIONAL = {"datasets": "train", "matplotlib": "eval", "moocore": "eval", "rouge_score": "eval", "gguf": "demo"}
_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16", "sve", "bf16")


_DESCRIPTION = """Print versions, processor, devices, kernel back-ends and the launch tables in use.

With --tune: measure tiles of the Triton kernels on this machine's GPU, for a model's layers or for given sizes, and
write those that are faster than the kernels' own choice to a table in the cache folder. Every candidate's output is
compared with the reference first. Later processes read the table at their first launch; nothing is measured in them.
Every candidate is compiled, so it takes a while; what is measured of one shape is written before the next.

examples:
  clp env
  clp env --tune --model runs/demo/model
  clp env --tune --shapes 4096x4096x2 11008x4096x2 --rows 16 4096"""
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
_DTYPES = ("float32", "bfloat16", "float16")


def run(argv: Sequence[str]) -> None:
    """Print versions, processor, devices, back-ends and tables; or tune."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.tune:
        _tune(options)
        return
    for name in ("model", "shapes", "rows", "dtype", "deltas_dtype"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is for --tune: clp env --tune --{name} ...")
    for section, lines in (("versions", _versions()), ("processor", _processor()), ("kernels", _kernels())):
        print(section)
        for name, value in lines.items():
            print(f"  {name:<14} {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "clp env", description=_DESCRIPTION, formatter_class=arguments.HelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("tuning")
    group.add_argument("--tune", action="store_true", help="measure on this machine's GPU and write the table")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="MODEL", help="folder or hub id, steerable or plain: its conditioned layers")
    what.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="NxDxK", help="out, in, copies of mixed_linear (default: a few)"
    )
    group.add_argument("--rows", nargs="+", type=int, metavar="M", help="numbers of rows (default: 16 128 1024 4096)")
    group.add_argument("--dtype", choices=_DTYPES, help="of rows and base; not with --model (default: bfloat16)")
    group.add_argument("--deltas_dtype", choices=_DTYPES, help="of the copies; not with --model (default: float32)")
    return parser


def _shape(text: str) -> tuple[int, ...]:
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NxDxK, as in 4096x4096x2")
    return tuple(map(int, match.groups()))


def _tune(options: argparse.Namespace) -> None:
    from clp_kernels import tuning, tuning_clock

    device = tuning.find_gpu()
    if options.model is not None:
        if options.dtype or options.deltas_dtype:
            raise ValueError("--dtype and --deltas_dtype are the model's own: leave them out beside --model")
        loading.check_path(options.model, "--model")
        from clp_engine.operator_shapes import shapes_of_model

        shapes = shapes_of_model(options.model)
    else:
        shapes = _named_shapes(options)
    tuning.tune(shapes, options.rows or tuning.ROWS, device, tuning_clock.GPUClock(device))


def _named_shapes(options: argparse.Namespace) -> list[Any]:
    import torch

    from clp_kernels import tuning
    from clp_kernels.tuning_cases import OperatorShape

    dtypes = getattr(torch, options.dtype or "bfloat16"), getattr(torch, options.deltas_dtype or "float32")
    if options.shapes is None:
        return tuning.common_shapes(*dtypes)
    return [OperatorShape("mixed_linear", *dtypes, K, N, D) for N, D, K in options.shapes]


def _versions() -> dict[str, str]:
    lines = {"python": f"{platform.python_version()} on {platform.platform()}"}
    for package in _PACKAGES:
        lines[package] = _version(package) or "not installed"
    for package, extra in _OPTIONAL.items():
        lines[package] = _version(package) or f'not installed: pip install "clp_engine[{extra}]"'
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> dict[str, str]:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "flags": " ".join(flag for flag in _FLAGS if flag in flags) or "none of note",
        "caches": _caches() or "unknown",
        "threads": f"torch uses {torch.get_num_threads()} of {os.cpu_count()}",
    }


def _caches() -> str:
    """Sizes of the first processor's caches as the system reports them, as in "L1d 32K, L2 512K, L3 16384K"."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        found.append(f"L{level}{'' if kind == 'Unified' else kind[0].lower()} {size}")
    return ", ".join(found)


def _kernels() -> dict[str, str]:
    import torch

    import clp_kernels
    from clp_kernels import launch_tables

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = {"GPU": ", ".join(devices) or f"none seen (torch {torch.__version__}, CUDA {torch.version.cuda or 'no'})"}
    for name, reason in clp_kernels.available_backends().items():
        lines[name] = "available" if reason is None else f"missing: {reason}"
        if name == "cpp" and reason is None:
            lines[name] += f", instruction set {clp_kernels.extension.isa()}"
    for name in dict.fromkeys(devices):
        lines[f"tiles, {name}"] = launch_tables.describe(name)
    return lines
