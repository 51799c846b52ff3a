"""The suite's options, the choice of cases, and what every JSON file records about the machine."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine, records
from bench.measure import measure
from bench.memory import measure_peak
from bench.report import format_case
from bench.workload import Workload


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption(
        "--suite",
        choices=("named", "full", "steering", "gpu", "tiny"),
        default="named",
        help="which cases (default: named)",
    )
    group.addoption("--device", choices=("cpu", "cuda"), default=None, help="default: cuda where torch sees a GPU")
    group.addoption(
        "--records", type=Path, help="a file that gets a line of JSON after every case; bench/records.py joins them"
    )
    group.addoption("--seconds", type=float, default=2.0, help="time for one case's rounds (default: 2)")
    group.addoption(
        "--compiled",
        choices=("listed", "all", "none"),
        default="listed",
        help="cases that time torch.compile of the two best peers: those listed for it where a C++ compiler is "
        "found (default), all, or none",
    )


def chosen_device(config: pytest.Config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


def pytest_report_header(config: pytest.Config) -> list[str]:
    return machine.describe()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a module's test its cases: `cases(suite, device)`, name -> case."""
    if "case" in metafunc.fixturenames:
        config = metafunc.config
        suite, module = config.getoption("--suite"), metafunc.module
        if suite == "gpu":
            cases = module.gpu_cases() if hasattr(module, "gpu_cases") else {}
        else:
            cases = module.cases(suite, chosen_device(config))
        metafunc.parametrize("case", list(cases.values()), ids=list(cases))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases that compile come last: a time limit loses the least."""
    if config.getoption("--suite") == "gpu":
        items.sort(key=lambda item: getattr(item, "callspec", None) is not None and is_listed(item))


def is_listed(item: Any) -> bool:
    return item.callspec.id in getattr(item.module, "COMPILED", ())


@pytest.fixture(scope="session", autouse=True)
def warm_profiler(request: pytest.FixtureRequest) -> None:
    """The profiler's first use allocates; the memory of a later one is the call's alone. A GPU's has none."""
    if chosen_device(request.config) == "cpu":
        measure_peak(lambda: {"y": torch.ones(1)}, "cpu")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return chosen_device(request.config)


@pytest.fixture
def measured(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Workload], None]:
    """A function that measures a workload under this test's id and prints its lines at once."""
    config, name = request.config, request.node.callspec.id
    if chosen_device(config) == "cuda":  # the last case's graphs held the memory of their calls
        gc.collect()
        torch.cuda.empty_cache()
    # Compiling takes a minute a case: only where it is listed and can work, or where it is asked for.
    has_compiler = any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++"))
    wants = has_compiler and is_listed(request.node)
    with_compiled = {"listed": wants, "all": True, "none": False}[config.getoption("--compiled")]

    def run(work: Workload) -> None:
        benchmark.group, benchmark.name = request.path.stem.removeprefix("bench_"), name
        measure(benchmark, work, config.getoption("--seconds"), with_compiled)
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n" + "\n".join(format_case(name, benchmark.extra_info)))

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Record the case that just ended, whatever becomes of the next one."""
    report = yield
    path, benchmark = item.config.getoption("--records"), getattr(item, "funcargs", {}).get("benchmark")
    if path is not None and call.when == "call" and benchmark is not None and not report.skipped:
        if not path.exists():
            records.start(path, session_facts(item.config))
        error = None if call.excinfo is None else call.excinfo.exconly()[:500]
        benchmark.group = benchmark.group or item.path.stem.removeprefix("bench_")
        records.add_case(path, benchmark, item.callspec.id, error)  # type: ignore[attr-defined]
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    verdicts = [
        target["verdict"].split()[0]
        for done in (session.benchmarks if session else [])
        for target in done.extra_info.get("targets", ())
    ]
    if verdicts:
        counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("PASS", "MISS", "NOT") if word in verdicts)
        terminalreporter.write_line(f"targets: {counts} (NOT: not measured; each is printed with its case)")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the host's name says nothing about the figures
    machine_info.update(machine_facts(config))


def machine_facts(config: pytest.Config) -> dict[str, Any]:
    return {**machine.facts(), "device": chosen_device(config)}


def session_facts(config: pytest.Config) -> dict[str, Any]:
    """What pytest-benchmark's file would say of the session."""
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    config.hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit)
    return {"machine_info": machine_facts(config), "commit_info": commit}


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info["suite"] = config.getoption("--suite")


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Drop the single rounds' times: medians and quartiles stay, and the file stays small enough to commit."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
