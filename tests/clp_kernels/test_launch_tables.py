"""Tables of tiles: what is read is what was written, what is wrong is named, and a launch reads no file again."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clp_kernels import launch_configs, launch_tables
from clp_kernels.launch_configs import KERNELS, Invariance, Key, Tile, bucket_of, choose, observed
from clp_kernels.launch_tables import Entry, LaunchTableError, Table

DEVICE_NAME = "Made up 9000 (PCIe)"
OWN = Tile(rows=32, outs=64, reduced=32, num_warps=4, num_stages=3)
MEASURED = Tile(rows=16, outs=128, reduced=64, num_warps=8, num_stages=2)
STREAMS = Key("mixed_linear.streams", "float32", "float32", 2, 40, 48, 16)
NORM = Key("mixed_norm", "float16", "float32", 3, 1, 48, None)
ENTRIES = {STREAMS: Entry(MEASURED, 10.5, 12.0), NORM: Entry(Tile(rows=2, reduced=64, num_warps=2), 3.0, 4.0)}


@pytest.fixture(autouse=True)
def device(monkeypatch, tmp_path):
    """The CPU as a device of that name, with no packaged tables and a cache folder of its own."""
    monkeypatch.setattr(launch_configs, "device_name", lambda device: DEVICE_NAME)
    monkeypatch.setattr(launch_tables, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("CLP_ENGINE_CACHE", str(tmp_path / "cache"))
    launch_configs.forget()
    yield
    launch_configs.forget()


def table(entries=None, **changes) -> Table:
    made = Table(DEVICE_NAME, "2026-01-31", "2.13.0", launch_tables.triton_version(), entries or ENTRIES)
    return replace(made, **changes)


def chosen(kernel="mixed_linear.streams", M=5, D=48, dtype=torch.float32, **how) -> Tile:
    rows, deltas = torch.empty(M, D, dtype=dtype), torch.empty(40, 2, D)
    return choose(kernel, rows, deltas, (2, 40, D), lambda: OWN, **how)


def test_what_is_written_is_read():
    path = launch_tables.user_path(DEVICE_NAME)
    assert path.name == "made-up-9000-pcie.json"
    assert launch_tables.read(path, DEVICE_NAME) is None
    launch_tables.write(path, table())
    assert launch_tables.read(path, DEVICE_NAME) == table()
    entry = json.loads(path.read_text())["entries"][1]
    assert entry["tile"] == {"rows": 2, "reduced": 64, "num_warps": 2}  # what the kernel has, no more
    assert "max_rows" not in entry


def test_an_entry_holds_for_its_sizes_and_rows_alone():
    assert chosen() == OWN
    launch_tables.write(launch_tables.user_path(DEVICE_NAME), table())
    launch_configs.forget()
    assert [chosen(M=M) for M in (1, 16, 17)] == [MEASURED, MEASURED, OWN]
    assert chosen(D=49) == chosen(dtype=torch.float16) == chosen("mixed_linear.streams.dx") == OWN


def test_the_users_table_goes_over_the_packaged_one():
    other, rest = replace(MEASURED, num_stages=5), STREAMS._replace(max_rows=32)
    launch_tables.write(
        launch_tables.PACKAGED / "made-up-9000-pcie.json",
        table({STREAMS: Entry(other, 1.0, 2.0), rest: Entry(other, 1.0, 2.0)}),
    )
    assert (chosen(M=16), chosen(M=32)) == (other, other)
    launch_tables.write(launch_tables.user_path(DEVICE_NAME), table())
    launch_configs.forget()
    assert (chosen(M=16), chosen(M=32)) == (MEASURED, other)


def test_a_table_of_another_triton_is_left_out_and_said_so():
    launch_tables.write(launch_tables.user_path(DEVICE_NAME), table(triton="1.0"))
    assert chosen() == OWN
    assert "not used, measured with triton 1.0" in launch_tables.describe(DEVICE_NAME)
    launch_tables.write(launch_tables.user_path(DEVICE_NAME), table())
    assert launch_tables.describe(DEVICE_NAME).startswith("2 measured tiles of 2026-01-31, ")
    launch_tables.user_path(DEVICE_NAME).write_text("{")
    assert "Expecting" in launch_tables.describe(DEVICE_NAME)


def test_what_may_not_depend_on_the_rows_does_not_see_them():
    """Batch-invariant calls pass by every entry for a number of rows; theirs has none, and serves all."""
    one = replace(MEASURED, reduced=16)
    entries = {STREAMS._replace(max_rows=bucket_of(M)): Entry(MEASURED, 1.0, 2.0) for M in (1, 40, 1000)}
    launch_tables.write(launch_tables.user_path(DEVICE_NAME), table(entries))
    assert {chosen(M=M, batch_invariant=True) for M in (1, 40, 1000)} == {OWN}
    entries[STREAMS._replace(max_rows=None)] = Entry(one, 1.0, 2.0)
    launch_tables.write(launch_tables.user_path(DEVICE_NAME), table(entries))
    launch_configs.forget()
    assert {chosen(M=M, batch_invariant=True) for M in (1, 40, 1000)} == {one}
    assert {chosen(M=M) for M in (1, 40, 1000)} == {MEASURED}
    for kernel, of in KERNELS.items():
        with observed() as keys:
            for M in (1, 40, 1000):
                chosen(kernel, M=M)
                chosen(kernel, M=M, batch_invariant=True)
        wanted = {Invariance.NEVER: {16, 64, 1024}, Invariance.ASKED: {16, 64, 1024, None}, Invariance.ALWAYS: {None}}
        assert {key.max_rows for key in keys} == wanted[of.invariance], kernel


def test_a_launch_reads_no_file_again():
    path = launch_tables.user_path(DEVICE_NAME)
    launch_tables.write(path, table())
    opened: list[str] | None = []

    def listen(event: str, args: tuple) -> None:  # a hook stays for good: the test stops it
        if opened is not None and event == "open":
            opened.append(str(args[0]))

    sys.addaudithook(listen)
    assert chosen(M=16) == MEASURED
    first = list(opened)
    assert first.count(str(path)) == 1
    path.unlink()
    assert [chosen(M=16), chosen(M=3), chosen(M=17), chosen("mixed_norm")] == [MEASURED, MEASURED, OWN, OWN]
    again, opened = opened, None
    assert again == first


def test_a_kill_while_writing_leaves_the_old_table(monkeypatch):
    path = launch_tables.user_path(DEVICE_NAME)
    launch_tables.write(path, table())

    def die(*args):
        raise KeyboardInterrupt

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, die)
            with pytest.raises(KeyboardInterrupt):
                launch_tables.write(path, table({STREAMS: Entry(OWN, 1.0, 2.0)}))
        assert launch_tables.read(path, DEVICE_NAME) == table()
        assert os.listdir(path.parent) == [path.name]


ABSENT = object()


def change(content: dict, at: str, value: object) -> None:
    """Gives the field at a path such as "entries.0.K" a value, or takes it out."""
    *way, last = (int(part) if part.isdigit() else part for part in at.split("."))
    for part in way:
        content = content[part]
    if value is ABSENT:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        ("format_version", 2, r"format_version is 2, this version reads 1"),
        ("device", "Other", r"device is 'Other'"),
        ("entries", {}, r"the table\.entries is \{\}, expected a list"),
        ("author", "me", r"a field of the table is 'author'"),
        ("date", ABSENT, r"the table lacks the field 'date'"),
        ("entries.0.kernel", "mixed", r"entries\[0\]\.kernel is 'mixed', known are mixed_linear\.streams"),
        ("entries.0.dtype", "float64", r"entries\[0\]\.dtype is 'float64'"),
        ("entries.0.K", "2", r"entries\[0\]\.K is '2', expected an integer"),
        ("entries.0.K", True, r"entries\[0\]\.K is True, expected an integer"),
        ("entries.0.K", 0, r"entries\[0\]\.K is 0, expected 1 to"),
        ("entries.0.microseconds", 0, r"entries\[0\]\.microseconds is 0"),
        ("entries.0.microseconds", ABSENT, r"entries\[0\] lacks the field 'microseconds'"),
        ("entries.0.max_rows", 20, r"entries\[0\]\.max_rows is 20, expected a power of two"),
        ("entries.0.max_rows", 8, r"entries\[0\]\.max_rows is 8, expected 16 to 65536"),
        ("entries.1.max_rows", 16, r"entries\[1\]\.max_rows is 16, but mixed_norm has one tile for any number of rows"),
        ("entries.0.tile.rows", 24, r"entries\[0\]\.tile\.rows is 24, expected a power of two"),
        ("entries.0.tile.rows", 8, r"entries\[0\]\.tile\.rows is 8, expected 16 to 256"),
        ("entries.0.tile.warps", 4, r"a field of entries\[0\]\.tile is 'warps'"),
        ("entries.0.tile.num_warps", ABSENT, r"entries\[0\]\.tile lacks the field 'num_warps'"),
        ("entries.1.tile.outs", 16, r"a field of entries\[1\]\.tile is 'outs', known are rows, reduced, num_warps"),
        ("entries.0.kernel", "mixed_linear.segments.d_deltas", None),  # the same fields: as good as the first
    ],
)
def test_a_bad_table_names_file_field_and_remedy(at, value, words):
    path = launch_tables.user_path(DEVICE_NAME)
    launch_tables.write(path, table())
    content = json.loads(path.read_text())
    change(content, at, value)
    path.write_text(json.dumps(content))
    if words is None:
        assert launch_tables.read(path, DEVICE_NAME) is not None
        return
    with pytest.raises(LaunchTableError, match=words) as raised:
        chosen()
    assert str(path) in str(raised.value)
    assert "clp env --tune" in str(raised.value)


def test_a_file_that_holds_something_else_is_named():
    path = launch_tables.user_path(DEVICE_NAME)
    launch_tables.write(path, table())
    content = json.loads(path.read_text())
    twice = {**content, "entries": [content["entries"][0], content["entries"][0]]}
    without_rows = json.loads(path.read_text())
    without_rows["entries"][0]["kernel"] = "mixed_linear.segments"
    del without_rows["entries"][0]["max_rows"]
    for text in ("", "[]", '{"format_version": 1', json.dumps(twice), json.dumps(without_rows), "\udcff"):
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(LaunchTableError, match="json"):
            launch_tables.read(path, DEVICE_NAME)


def test_the_package_carries_its_tables():
    root = Path(__file__).resolve().parents[2]
    assert 'clp_kernels = ["py.typed", "tables/*.json"]' in (root / "pyproject.toml").read_text()
