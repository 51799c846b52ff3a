"""The suite for GPUs as far as a CPU can tell: goals, records, what a peer's failure costs, the script's stages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    bench_low_rank_linear,
    bench_mixed_linear,
    bench_mixed_linear_logprob,
    bench_qwen2,
    records,
    table,
    targets,
)
from bench.cases import Case, shrunk
from bench.measure import measure
from bench.rooflines import reads_in_turn
from bench.workload import Contender, Tensors

ROOT = Path(__file__).resolve().parents[1]
FACTS = {
    "machine_info": {
        "device": "cuda",
        "gpu": {"name": "a GPU", "capability": "9.0", "l2_bytes": 2**20},
        "versions": {},
    },
    "commit_info": {"id": "0123456789abcdef"},
}


class Benchmark:
    """What a case needs of pytest-benchmark's fixture."""

    group = name = "group"
    stats = None

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            target()


def measure_with(**peers: Any) -> Benchmark:
    """Measure a small case with other peers beside its own; what it raises has the benchmark as `.benchmark`."""
    benchmark, work = Benchmark(), bench_mixed_linear.build(Case(3, 48, 40, 2, 3), "cpu")
    work.contenders |= {name: Contender(call) for name, call in peers.items()}
    try:
        measure(benchmark, work, 0.01, with_compiled=False)
    except AssertionError as error:
        error.benchmark = benchmark  # type: ignore[attr-defined]
        raise
    return benchmark


def test_a_peer_that_cannot_run_is_named_and_the_rest_is_measured() -> None:
    def absent(_: Tensors) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")

    info = measure_with(absent=absent).extra_info
    assert info["notes"] == {"absent": "RuntimeError: no kernel image"}
    assert {"streams", "concat"} <= info["peer_time_over_ours"].keys()
    assert "absent" not in info["median_us"]


def test_a_wrong_peer_fails_after_the_rest_was_measured() -> None:
    with pytest.raises(AssertionError, match="wrong is wrong in y") as raised:
        measure_with(wrong=lambda t: bench_mixed_linear.streams(t) + 1)
    info = raised.value.benchmark.extra_info  # type: ignore[attr-defined]
    assert "wrong is wrong" in info["notes"]["wrong"]
    assert info["median_us"]["ours"] > 0


def test_ours_is_wrong_at_once() -> None:
    with pytest.raises(AssertionError, match="ours is wrong in y") as raised:
        measure_with(ours=lambda t: bench_mixed_linear.streams(t) + 1)
    assert raised.value.benchmark.extra_info == {}  # type: ignore[attr-defined]


def test_a_stopped_run_keeps_the_cases_before_it(tmp_path: Path) -> None:
    path = tmp_path / "records"
    records.start(path, FACTS)
    done, wrong, broken = (Benchmark() for _ in range(3))
    done.extra_info = wrong.extra_info = {"median_us": {"ours": 1.0}}
    records.add_case(path, done, "done", None)
    records.add_case(path, wrong, "wrong", "AssertionError: a peer")
    records.add_case(path, broken, "broken", "RuntimeError: out of memory")
    whole = records.join(path)
    assert [entry["name"] for entry in whole["benchmarks"]] == ["done", "wrong"]
    assert whole["failed"] == {"group/wrong": "AssertionError: a peer", "group/broken": "RuntimeError: out of memory"}
    assert whole["machine_info"] == FACTS["machine_info"]
    path.write_bytes(path.read_bytes()[:-20])
    cut = records.join(path)
    assert cut["benchmarks"] == whole["benchmarks"]
    assert cut["failed"].keys() == {"group/wrong"}
    path.write_text("")
    with pytest.raises(ValueError, match="no case was reached"):
        records.join(path)


def test_goals_are_judged_by_the_runs_own_figures() -> None:
    info = {
        "median_us": {"ours": 130.0, "ours-S2": 125.0, "ours-S4": 128.0, "ours-cuda": 900.0, "plain": 100.0},
        "read_gigabytes_per_s": 4000.0,
        "gemm_gigaflops_per_s": 800e3,
        "peer_time_over_ours": {"premix": 1.5, "compiled-premix": 0.9, "concat": 2.0},
    }
    hidden = targets.hidden_share(200_000_000)  # 50 us, of which 30 are to be seen
    assert hidden(info) == pytest.approx(0.4)
    seen = targets.plain_and_extra_bytes(200_000_000, plain=1.05, extra=0.5).judge(info)
    assert seen["limit"] == pytest.approx(0.130)
    assert targets.level_over_weightings(1.03).judge(info)["value"] == pytest.approx(130 / 125)
    assert targets.products_at_rate(52_000_000_000, 0.5).judge(info)["value"] == pytest.approx(0.5)
    premix = targets.faster_than_every("premix", 1.0).judge(info)
    assert (premix["value"], premix["verdict"]) == (0.9, "MISS")
    assert targets.faster_than_every("liger", 1.0).judge(info)["verdict"].startswith("NOT MEASURED")


def test_every_operators_goals_hold_for_its_cases() -> None:
    """Each case has goals, and those of bandwidth are the stricter ones from 128 MB on."""
    for module in (bench_mixed_linear, bench_low_rank_linear, bench_mixed_linear_logprob):
        for name, case in module.gpu_cases().items():
            assert case.is_gpu, name
            assert len(module.goals(case)) >= 2, name
    decode = bench_mixed_linear.gpu_cases()
    for name, share in (("decode-bf16-K2-M16-4096x4096", 0.90), ("decode-bf16-K4-M16-4096x4096", 0.95)):
        goal = bench_mixed_linear.goals(decode[name])[1]
        assert goal.limit({}) == share
    extra = {
        name: bench_mixed_linear.extra_bytes(decode[f"train-bf16-K2-M2048-{name}"]) for name in ("forward", "backward")
    }
    assert extra == {"forward": 3 * 2 * 4096**2, "backward": 5 * 2 * 4096**2}
    assert {name for name in bench_mixed_linear.COMPILED if "bf16" in name} <= decode.keys()
    assert len(shrunk(decode)) == 6
    assert all(step.B % step.S == 0 for step in bench_qwen2.gpu_cases().values())


def test_rows_under_other_numbers_of_weightings_are_checked_too() -> None:
    work = bench_mixed_linear.build(Case(8, 32, 40, 2, 8, is_gpu=True, counts=(1, 2)), "cpu")
    assert {"ours", "ours-S1", "ours-S2", "premix_in_turn"} <= work.contenders.keys()
    answers = work.expected()
    assert not torch.equal(answers["S1"]["y"].exact, answers["S2"]["y"].exact)
    measure(benchmark := Benchmark(), work, 0.01, with_compiled=False)
    assert max(benchmark.extra_info["error_over_budget"].values()) <= 1


def test_reads_in_turn_read_every_part() -> None:
    buffer = torch.arange(4 * 4096, dtype=torch.float32).view(torch.uint8)
    sums = reads_in_turn(buffer, 2, 3)["read-sum"]()
    assert isinstance(sums, list)
    assert [float(total) for total in sums] == [
        float(part.sum()) for part in buffer.view(torch.float32).view(2, -1)
    ] * 3


def test_the_read_kernel_reads_every_value() -> None:
    pytest.importorskip("triton")
    from bench.read_kernel import BLOCK, STEPS, add_up, make_sums

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.randn(3 * BLOCK * STEPS + 5, generator=torch.Generator().manual_seed(0)).to(device)
    sums = make_sums(values)
    add_up(values, sums)
    expected = values[: 3 * BLOCK * STEPS].view(3, -1).double().sum(1)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-3)


def test_a_gpus_table_has_every_case_and_what_failed() -> None:
    info = {
        "median_us": {"ours": 100.0, "plain": 80.0},
        "peer_time_over_ours": {"concat": 2.0},
        "gigabytes_per_s": 3000.0,
        "read_gigabytes_per_s": 4000.0,
        "gigaflops_per_s": 500e3,
        "gemm_gigaflops_per_s": 800e3,
        "peak_mib_above_results": {"ours": {"allocator": 3.0}},
        "derived": {"hidden share": 0.5},
        "targets": [targets.reads_at(0.9).judge({"gigabytes_per_s": 3000.0, "read_gigabytes_per_s": 4000.0})],
    }
    entry = {"group": "mixed_linear", "name": "decode", "extra_info": info}
    loaded = {**FACTS, "datetime": "2026-11-28T00:00:00", "benchmarks": [entry], "failed": {"head": "RuntimeError: x"}}
    lines = table.make_table(loaded).splitlines()
    assert lines[0].startswith("a GPU, compute capability 9.0, L2 1 MiB")
    goals = "MISS GB/s / same-bytes read's 0.75 (>= 0.9); hidden share: 0.5"
    assert f"| decode | 100 us | 80 us | 200 us (concat) | 3000, 4000 | 500, 800 | 3.0 | {goals} |" in lines
    assert "Failed: head: RuntimeError: x" in lines


def test_each_committed_table_is_that_of_its_file() -> None:
    for path in (ROOT / "bench/results").glob("*.md"):
        assert path.read_text() == table.make_table(json.loads(path.with_suffix(".json").read_text())) + "\n", path


STUB = """#!/bin/bash
case "$*" in
  *get_device_name*) echo {device}; [ -n "{device}" ] ;;
  *setup.py*) exec sleep 30 ;;
  *bench_mixed_linear.py*) cp {records} "${{@: -1}}" ;;
  *"-m pytest tests"*|*test_cuda_source*) echo "$@"; exit 1 ;;
  *ensure_smollm2*) exit 1 ;;
  *bench/records.py*|*bench/table.py*) exec {python} "$@" ;;
  -) cat > /dev/null ;;
esac
"""


def run_script(folder: Path, device: str, *stages: str, **environment: str) -> subprocess.CompletedProcess[str]:
    records_path, stub = folder / "given", folder / "python"
    records.start(records_path, {**FACTS, "datetime": "2026-11-28T00:00:00"})
    stub.write_text(STUB.format(device=device, records=records_path, python=sys.executable))
    stub.chmod(0o755)
    variables = {"PATH": "/usr/bin:/bin", "CUDA_HOME": str(folder), "PYTHON": str(stub)}
    variables |= {"RESULTS": str(folder / "results"), **environment}
    command = ["bash", str(ROOT / "bench/gpu.sh"), *stages]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})


def test_the_script_runs_every_stage_and_names_what_is_missing_or_late(tmp_path: Path) -> None:
    done = run_script(tmp_path, "a-gpu", "build", "test", "bench", "sanitize", "demo", LIMIT="1")
    assert done.returncode == 1, done.stderr
    verdicts = dict(line.split(": ", 1) for line in (tmp_path / "results/summary.txt").read_text().splitlines())
    assert verdicts.keys() == {"machine", "build", "test", "bench", "sanitize", "demo"}
    assert verdicts["machine"].startswith("ok")
    assert verdicts["build"].startswith("STOPPED by its time limit")
    assert verdicts["test"].startswith("FAILED (1)")
    assert verdicts["bench"].startswith("FAILED"), "no module has the time to start"
    assert verdicts["sanitize"].startswith("left out: compute-sanitizer is not there")
    assert verdicts["demo"].startswith("left out: the demo's model is not there")


def test_the_script_joins_what_was_measured(tmp_path: Path) -> None:
    done = run_script(tmp_path, "a-gpu", "bench")
    assert done.returncode == 0, done.stdout
    (result,) = (tmp_path / "results").glob("a-gpu-*.json")
    assert json.loads(result.read_text())["machine_info"]["gpu"]["name"] == "a GPU"
    assert result.with_suffix(".md").read_text().startswith("a GPU")


def test_the_script_refuses_unknown_stages_and_needs_a_gpu(tmp_path: Path) -> None:
    assert run_script(tmp_path, "a-gpu", "all").returncode == 2
    done = run_script(tmp_path, "")
    assert (done.returncode, "no torch that sees a GPU" in done.stderr) == (2, True)
