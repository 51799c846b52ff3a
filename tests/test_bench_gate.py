"""The comparison of two benchmark files turns red and green where it should, on files that pytest-benchmark wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import table

ROOT = Path(__file__).resolve().parents[1]
MODULE = """
import pytest

RATIOS = {ratios}

@pytest.mark.parametrize("name", RATIOS)
def test_case(benchmark, name):
    benchmark.group, benchmark.name = "mixed_linear", name
    benchmark.pedantic(int, rounds=1)
    ratio = RATIOS[name]
    benchmark.extra_info.update(
        ratio_to_ceiling={{"ours": ratio, "plain": 1.0, "streams": 4.0}},
        median_us={{"ours": 100.0 * ratio, "plain": 100.0, "streams": 400.0}},
        peer_time_over_ours={{"streams": 4.0 / ratio}},
        gigabytes_per_s=20.0, read_gigabytes_per_s=25.0, gigaflops_per_s=50.0, gemm_gigaflops_per_s=None,
    )
"""
BEFORE = {"decode-f32-K2-M1": 3.0, "rows-f32-K2-M16": 2.0}


def write_results(folder: Path, name: str, ratios: dict[str, float]) -> Path:
    module, results = folder / f"bench_{name}.py", folder / f"{name}.json"
    module.write_text(MODULE.format(ratios=ratios))
    command = [sys.executable, "-m", "pytest", "-q", str(module), f"--benchmark-json={results}", f"--rootdir={folder}"]
    subprocess.run([*command, "-p", "no:cacheprovider", "-c", "/dev/null"], check=True, capture_output=True, cwd=folder)
    return results


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("before"), "before", BEFORE)


def run_gate(before: Path, after: Path, *flags: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "bench/gate.py"), str(before), str(after), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def change(path: Path, folder: Path, ratios: dict[str, float]) -> Path:
    """The same file with other ratios; a case that `ratios` does not name is dropped."""
    loaded = json.loads(path.read_text())
    loaded["benchmarks"] = [entry for entry in loaded["benchmarks"] if entry["name"] in ratios]
    for entry in loaded["benchmarks"]:
        entry["extra_info"]["ratio_to_ceiling"]["ours"] = ratios[entry["name"]]
    changed = folder / "after.json"
    changed.write_text(json.dumps(loaded))
    return changed


def test_green_where_nothing_is_past_the_threshold(before: Path, tmp_path: Path) -> None:
    after = write_results(tmp_path, "after", {**BEFORE, "rows-f32-K2-M16": 2.0 * 1.09, "decode-f32-K4-M4": 5.0})
    code, output = run_gate(before, after)
    assert code == 0, output
    assert "green" in output
    assert "new      mixed_linear/decode-f32-K4-M4" in output


def test_red_where_a_case_is_slower_and_names_it(before: Path, tmp_path: Path) -> None:
    after = change(before, tmp_path, {**BEFORE, "rows-f32-K2-M16": 2.0 * 1.11})
    code, output = run_gate(before, after)
    assert code == 1
    assert "SLOWER   mixed_linear/rows-f32-K2-M16" in output
    assert "SLOWER   mixed_linear/decode" not in output
    assert run_gate(before, after, "--threshold", "1.2")[0] == 0


def test_red_where_a_case_is_missing(before: Path, tmp_path: Path) -> None:
    code, output = run_gate(before, change(before, tmp_path, {"decode-f32-K2-M1": 3.0}))
    assert code == 1
    assert "MISSING  mixed_linear/rows-f32-K2-M16" in output


def test_faster_is_green(before: Path, tmp_path: Path) -> None:
    assert run_gate(before, change(before, tmp_path, {name: ratio / 2 for name, ratio in BEFORE.items()}))[0] == 0


def test_files_that_cannot_be_compared_are_neither(before: Path, tmp_path: Path) -> None:
    code, output = run_gate(before, change(before, tmp_path, {}))
    assert (code, "no case in common" in output) == (2, True)
    code, output = run_gate(before, tmp_path / "absent.json")
    assert (code, "absent.json" in output) == (2, True)
    (tmp_path / "other.json").write_text('{"benchmarks": [{"name": "other", "group": null, "extra_info": {}}]}')
    code, output = run_gate(before, tmp_path / "other.json")
    assert (code, "other has no ratio_to_ceiling" in output) == (2, True)


def test_another_machine_is_a_warning(before: Path, tmp_path: Path) -> None:
    after = change(before, tmp_path, BEFORE)
    loaded = json.loads(after.read_text())
    loaded["machine_info"]["cpu"]["model"] = "another"
    after.write_text(json.dumps(loaded))
    code, output = run_gate(before, after)
    assert (code, "warning: processor" in output) == (0, True)


def test_the_table_holds_the_files_figures(before: Path) -> None:
    loaded = json.loads(before.read_text())
    cpu = {"model": "a processor", "threads": 2, "flags": ["avx2"], "caches": {"L1 Data": "32K"}}
    loaded["machine_info"] |= {"cpu": cpu, "torch": "2.13.0"}
    lines = table.make_table(loaded).splitlines()
    assert lines[0].startswith("a processor, 2 threads, avx2, L1 Data 32K; torch 2.13.0")
    assert "| decode, 1 row | 300 us | 100 us | 400 us (streams) | 20, 25 | - |" in lines
    text = "above\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nbelow\n"
    once = table.insert(text, "r.json", "new")
    assert once == "above\n<!-- bench:begin r.json -->\nnew\n<!-- bench:end -->\nbelow\n"
    assert table.insert(once, "r.json", "new") == once
    with pytest.raises(ValueError, match="bench:begin"):
        table.insert("no markers", "r.json", "new")


def test_the_readmes_table_is_that_of_its_file() -> None:
    readme = (ROOT / "README.md").read_text()
    match = table.MARKED.search(readme)
    assert match is not None, "README.md has no bench markers"
    source = readme[match.start() :].split("-->")[0].removeprefix("<!-- bench:begin").strip()
    if source:
        written = table.insert(readme, source, table.make_table(json.loads((ROOT / source).read_text())))
        assert written == readme, f"run: bench/table.py {source} --write README.md"
    else:
        assert "|" not in match[0], "figures without the name of the file that they come from"
