"""What every benchmark file records about the machine: processor, caches, versions, GPU and driver."""

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


def cpu_facts() -> dict[str, Any]:
    facts: dict[str, Any] = {"threads": torch.get_num_threads()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        facts["model"] = fields.get("model name", "unknown")
        facts["flags"] = [flag for flag in FLAGS if flag in fields.get("flags", "").split()]
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    facts["caches"] = {
        f"L{(cache / 'level').read_text().strip()} {(cache / 'type').read_text().strip()}": (
            (cache / "size").read_text().strip()
        )
        for cache in caches
    }
    return facts


def gpu_facts() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    facts: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        query = [smi, "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        facts["driver_and_clocks"] = done.stdout.strip()
    return facts


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["cpu"] = cpu_facts()
    machine_info["gpu"] = gpu_facts()
    machine_info["torch"] = torch.__version__
    if find_spec("triton") is not None:
        import triton

        machine_info["triton"] = triton.__version__
