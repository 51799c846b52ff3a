"""The benchmark suite refuses wrong outputs, sees memory, and runs every module's tiny cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import records
from bench.cases import Case
from bench.correctness import Expected, Part, check, expect, sample
from bench.measure import Plan, calls_made, is_hopeless
from bench.memory import measure_peak
from bench.targets import READS_AT_BANDWIDTH, faster_than
from bench.workload import Contender, make_rotation

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["ours", "a peer"])
@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_wrong_output_fails(name: str, wrong: float) -> None:
    exact = torch.linspace(0, 1, 7, dtype=torch.float64)
    own = exact.float()
    expected = {"y": Expected(slice(None), exact, own)}
    assert check(name, {"y": own}, expected, torch.float32) <= 1.0
    with pytest.raises(AssertionError, match=f"{name} is wrong in y"):
        check(name, {"y": own + wrong * (torch.arange(7) == 3)}, expected, torch.float32)
    with pytest.raises(AssertionError, match=f"{name} returned no y"):
        check(name, {}, expected, torch.float32)


def test_parts_know_the_whole_problems_outputs() -> None:
    """Sampled rows of y and dx, and sampled rows of dw, are those of the whole problem."""
    x, w, dy = torch.randn(40, 5), torch.randn(30, 5), torch.randn(40, 30)
    linear = Contender(lambda t: F.linear(t["x"], t["w"]), ("x", "w"))
    rows, outs = sample(40, "cpu"), sample(30, "cpu")
    by_rows = Part({"x": x[rows], "w": w}, (dy[rows],), {"y": rows, "d_x": rows})
    by_outs = Part({"x": x, "w": w[outs]}, (dy[:, outs],), {"d_w": outs})
    expected = expect({"mix": linear}, [by_rows, by_outs])["mix"]
    whole = {"y": x @ w.T, "d_x": dy @ w, "d_w": dy.T @ x}
    assert check("ours", whole, expected, torch.float32) <= 1.0
    for name in whole:
        with pytest.raises(AssertionError, match=f"wrong in {name}"):
            check("ours", {**whole, name: whole[name].flip(0)}, expected, torch.float32)


def test_peak_memory_counts_what_is_freed_again_and_not_what_is_returned() -> None:
    def call() -> dict[str, torch.Tensor]:
        scratch = torch.ones(16 * 2**18)
        return {"y": scratch[: 8 * 2**18].clone()}

    measure_peak(call, "cpu")
    peak = measure_peak(call, "cpu")
    assert peak["allocator"] == pytest.approx(16.0, abs=0.1)
    assert peak.get("resident", 16.0) == pytest.approx(16.0, abs=4.0)


def test_a_slow_peer_takes_part_in_its_share_of_rounds() -> None:
    functions = dict.fromkeys(("ours", "plain", "slow"), int)
    plan = Plan(rounds=10, functions=functions, strides={"ours": 1, "plain": 1, "slow": 4})
    for index in range(10):
        plan.run_others(index)
    assert {name: len(times) for name, times in plan.seconds.items()} == {"plain": 10, "slow": 3}


def test_slow_peers_make_a_seconds_calls_one_after_the_other_along_the_rotation() -> None:
    """Ours and the ceiling make all of theirs, however slow; so does a peer of up to a second."""
    found = calls_made({"ours": 9.0, "plain": 9.0, "quick": 1.0, "slow": 10.0, "slower": 30.0, "slowest": 2000.0}, 100)
    assert [found[name] for name in ("ours", "plain", "quick")] == [range(100)] * 3
    assert [found[name] for name in ("slow", "slower", "slowest")] == [range(11), range(11, 15), range(15, 16)]


def test_only_a_ceiling_that_is_slow_and_far_behind_is_hopeless() -> None:
    assert is_hopeless({"ours": 0.1, "plain": 14.0})
    assert not is_hopeless({"ours": 9.0, "plain": 8.0})  # a big problem
    assert not is_hopeless({"ours": 0.001, "plain": 0.1})  # soon done


def test_a_rotation_is_one_buffer_of_equal_sets() -> None:
    tensors = {"base": torch.randn(3, 5), "deltas": torch.randn(3, 2, 5).bfloat16()}
    buffer, sets = make_rotation(tensors, 3)
    assert len(sets) == 3
    for weights in sets:
        for name, tensor in tensors.items():
            assert torch.equal(weights[name], tensor)
            assert weights[name].untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


@pytest.mark.parametrize(("M", "S"), [(1, 1), (7, 3), (8, 8)])
def test_a_cases_segments_are_all_its_rows(M: int, S: int) -> None:
    rows = [row for segment in Case(M, 4, 4, 2, S).segments for row in range(segment.start, segment.stop)]
    assert rows == list(range(M))


def test_targets_are_judged_by_the_runs_own_figures() -> None:
    info = {"gigabytes_per_s": 5.0, "read_gigabytes_per_s": 5.4, "peer_time_over_ours": {"streams": 1.5}}
    assert READS_AT_BANDWIDTH.judge(info)["verdict"] == "PASS"
    assert faster_than("streams", 1.6).judge(info)["verdict"] == "MISS"
    assert faster_than("peft", 1.3).judge(info)["verdict"].startswith("NOT MEASURED")


def start_tiny_cases(modules: list[Path], folder: Path) -> subprocess.Popen[bytes]:
    """Start pytest on modules of the suite; its JSON, its records and what it prints go into a folder."""
    folder.mkdir()
    addopts = "addopts=--import-mode=importlib --strict-markers"
    flags = ["--suite=tiny", "--device=cpu", "--seconds=0.02", "--benchmark-only"]
    flags += [f"--benchmark-json={folder / 'tiny.json'}", f"--records={folder / 'records'}"]
    command = [sys.executable, "-m", "pytest", *map(str, modules), "-o", addopts, "-p", "no:cacheprovider", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "output").open("w") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, env=environment)


def test_every_module_runs_its_tiny_cases(tmp_path: Path) -> None:
    modules = sorted((ROOT / "bench").glob("bench_*.py"))
    # Two processes of one thread each, side by side: most cases are mixed_linear's.
    busiest = [path for path in modules if path.stem == "bench_mixed_linear"]
    shares = {"busiest": busiest, "rest": [path for path in modules if path not in busiest]}
    running = {name: start_tiny_cases(share, tmp_path / name) for name, share in shares.items()}
    ended = {name: process.wait() for name, process in running.items()}
    groups = [check_results(tmp_path / name, status) for name, status in ended.items()]
    assert set.union(*groups) == {path.stem.removeprefix("bench_") for path in modules}


def check_results(folder: Path, status: int) -> set[str]:
    """Check what a run wrote and printed; return the groups of its cases."""
    output = (folder / "output").read_text()
    assert status == 0, output[-4000:]
    loaded = json.loads((folder / "tiny.json").read_text())
    assert {"model", "flags", "caches", "threads"} <= loaded["machine_info"]["cpu"].keys()
    assert "processor:" in output
    for entry in loaded["benchmarks"]:
        info = entry["extra_info"]
        assert info["ratio_to_ceiling"]["ours"] == pytest.approx(info["median_us"]["ours"] / info["median_us"]["plain"])
        assert f"{entry['name']}:" in output
        assert all(share <= 1.0 for share in info["error_over_budget"].values())
    joined = records.join(folder / "records")
    assert joined["machine_info"]["cpu"] == loaded["machine_info"]["cpu"]
    assert joined["failed"] == {}
    by_name, infos = ({e["name"]: e["extra_info"] for e in f["benchmarks"]} for f in (joined, loaded))
    assert by_name == infos
    return {entry["group"] for entry in loaded["benchmarks"]}
