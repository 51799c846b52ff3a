"""The clock of tuning: on a GPU with real times, without one in the order in which it asks the GPU for things."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton_support import DEVICE, F16, on_cpu_alone

from clp_kernels import launch_tables, tuning, tuning_clock
from clp_kernels.launch_configs import device_name, forget
from clp_kernels.tuning_cases import OperatorShape


@on_cpu_alone
def test_l2_is_flushed_and_the_host_runs_ahead(monkeypatch):
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 5.0  # milliseconds

    fakes = {"Event": Event, "_sleep": lambda cycles: log.append("sleep"), "device": lambda d: torch.device(d)}
    fakes["get_device_properties"] = lambda device: SimpleNamespace(L2_cache_size=40 * 2**20)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(tuning_clock, "MOST_ROUNDS", 1)
    clock = tuning_clock.GPUClock(torch.device("cpu"))
    assert clock.flushing.numel() == 80 * 2**20
    clock.flushing.fill_(1)
    assert clock({"run": lambda: log.append("run")}) == {"run": 5e-3}
    assert log == ["run", *["sleep", "record", "run", "record", "wait"] * 2]
    assert not clock.flushing.any()


@pytest.mark.skipif(DEVICE != "cuda", reason="its times are a GPU's")
def test_tuning_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CLP_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "MAX_STEPS", 1)
    forget()
    device, lines = tuning.find_gpu(), []
    shapes = [OperatorShape("mixed_norm", F16, F16, 2, 1, 1024), OperatorShape("mixed_linear", F16, F16, 2, 256, 256)]
    table = tuning.tune(shapes, [16], device, tuning_clock.GPUClock(device), lines.append)
    forget()
    name = device_name(device)
    assert launch_tables.read(launch_tables.user_path(name), name) == table
    assert len(lines) == 4  # the norm, the product with and without batch_invariant, the path
    assert not any("off the reference" in line for line in lines)
    assert all(entry.microseconds < entry.heuristic_microseconds for entry in table.entries.values())
