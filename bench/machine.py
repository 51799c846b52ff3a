"""What a figure depends on: processor, flags, caches, threads, GPU, driver and versions."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
ASSUMED_CACHE_BYTES = 32 * 2**20  # where the system reports none


def facts() -> dict[str, Any]:
    """What every JSON file says about the machine."""
    packages = [name for name in ("torch", "triton", "peft", "transformers") if find_spec(name) is not None]
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"cpu": _cpu(), "gpu": _gpu(), "versions": versions, "torch": torch.__version__}


def describe() -> list[str]:
    """The lines that a run prints first."""
    found = facts()
    cpu = found["cpu"]
    caches = ", ".join(f"{name} {size}" for name, size in cpu["caches"].items()) or "not reported"
    lines = [
        f"processor: {cpu['model']} (family/model {cpu['family_model']}), {cpu['threads']} threads, caches {caches}",
        f"flags: {' '.join(cpu['flags']) or 'none of those that matter'}; torch uses {cpu['capability']}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
    ]
    return lines + ([f"GPU: {found['gpu']}"] if found["gpu"] else [])


def last_level_cache_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    return max((int(size[:-1]) * UNITS[size[-1]] for size in _caches().values()), default=ASSUMED_CACHE_BYTES)


def _cpu() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
    flags = fields.get("flags", "").split()
    return {
        "model": fields.get("model name", "unknown"),
        "family_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "flags": [flag for flag in FLAGS if flag in flags],
        "caches": _caches(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _caches() -> dict[str, str]:
    """Size by level and kind, as in {"L3 Unified": "32768K"}."""

    def text(path: Path) -> str:
        return path.read_text().strip()

    return {
        f"L{text(cache / 'level')} {text(cache / 'type')}": text(cache / "size")
        for cache in sorted(CACHES.glob("index*"))
    }


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        query = [smi, "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        found["driver_and_clocks"] = done.stdout.strip()
    return found
