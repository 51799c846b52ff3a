"""`clp env`: what a bug report or a benchmark needs to know about this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from clp_engine.cli import arguments

_PACKAGES = ("clp_engine", "torch", "triton", "transformers", "accelerate", "safetensors", "numpy")
_OPTIONAL = {"datasets": "train", "matplotlib": "eval", "moocore": "eval", "rouge_score": "eval", "gguf": "demo"}
_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16", "sve", "bf16")


def run(argv: Sequence[str]) -> None:
    """Print versions, processor, devices and back-ends."""
    parser = argparse.ArgumentParser(
        "clp env",
        description="Print versions, processor, devices and kernel back-ends.\n\nexample:\n  clp env",
        formatter_class=arguments.HelpFormatter,
    )
    parser.parse_args(argv)
    for section, lines in (("versions", _versions()), ("processor", _processor()), ("kernels", _kernels())):
        print(section)
        for name, value in lines.items():
            print(f"  {name:<14} {value}")


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

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = {"GPU": ", ".join(devices) or f"none seen (torch {torch.__version__}, CUDA {torch.version.cuda or 'no'})"}
    for name, reason in clp_kernels.available_backends().items():
        lines[name] = "available" if reason is None else f"missing: {reason}"
        if name == "cpp" and reason is None:
            lines[name] += f", instruction set {clp_kernels.extension.isa()}"
    return lines
