"""Saves that are killed, collide or fail: the folder holds the old checkpoint or the new one."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from checkpoint_support import copies_of, is_equal, tiny_base, tiny_conditioned, to_version_1

import clp_engine as clp
from clp_engine import checkpoint
from clp_engine.checkpoint import folder_update, saving

SHARDS = {"max_shard_size": "4KB"}  # two tensor files
OTHERS = {"optimizer.pt": b"state", "trainer_state.json": b"{}"}


@pytest.fixture(scope="module")
def models():
    return tiny_conditioned(seed=1), tiny_conditioned(seed=2)


@pytest.fixture
def folder(tmp_path, models):
    """The first model's checkpoint, beside other people's files."""
    folder = tmp_path / "model"
    models[0].save_pretrained(folder, **SHARDS)
    for name, content in OTHERS.items():
        (folder / name).write_bytes(content)
    return folder


def fork(action) -> int:
    """Run `action` in a copy of this process, which has torch and the models ready; its pid."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def ending(pid: int) -> int:
    """0 where the child ended by itself, -9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def held(folder: Path, models) -> int:
    """Which of `models` the folder holds, bit for bit."""
    copies = copies_of(clp.CLPModel.from_pretrained(folder, base_model=tiny_base()))
    (index,) = [i for i, model in enumerate(models) if is_equal(copies, copies_of(model))]
    assert all((folder / name).read_bytes() == content for name, content in OTHERS.items() if index >= 0)
    return index


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(model, folder: Path, step: int) -> None:
    """Save, and be killed in the middle of the `step`-th thing that touches the disk: what was written is cut short."""
    count = 0

    def dying(function):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            is_last = count == step
            try:
                return function(*args, **kwargs)
            finally:
                if is_last:
                    for temporary in folder.glob(".clp_engine-*/*"):
                        os.truncate(temporary, temporary.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    touching = [(os, name) for name in ("replace", "fsync", "mkdir", "unlink", "rmdir")]
    for home, name in (*touching, (Path, "write_text"), (saving, "save_file")):
        setattr(home, name, dying(getattr(home, name)))
    model.save_pretrained(folder, **SHARDS)


@pytest.mark.parametrize("start", ["version 2", "version 1", "empty"])
def test_a_kill_at_every_step_leaves_the_old_or_the_new(start, folder, models, tmp_path):
    if start == "version 1":
        models[0].save_pretrained(folder)
        to_version_1(folder, checkpoint.base_fingerprint(models[0], scheme="v1").removeprefix("v1:"))
    elif start == "empty":
        folder = tmp_path / "empty"
        folder.mkdir()
        for name, content in OTHERS.items():
            (folder / name).write_bytes(content)
    found = []
    for step in range(1, 100):
        target = tmp_path / f"step-{step}"
        shutil.copytree(folder, target)
        was_killed = ending(fork(lambda step=step, target=target: save_and_die(models[1], target, step))) == -9
        is_nothing = start == "empty" and not checkpoint.is_conditioned(target)
        found.append(0 if is_nothing else held(target, models))
        models[1].save_pretrained(target, **SHARDS)  # the next save leaves nothing of the killed one
        assert len(list(target.iterdir())) == 2 + len(OTHERS) + 2
        if not was_killed:
            break
    else:
        pytest.fail("the save never came to its end")
    assert found == sorted(found)  # once the new one is there, it stays
    assert (found[0], found[-1]) == (0, 1)
    assert found.count(0) >= 10


def test_kills_at_random_moments_leave_the_old_or_the_new(folder, models):
    generator = random.Random(0)
    started, tell = os.pipe()

    def save_in_turn(turn):
        while True:
            os.write(tell, b".")
            models[turn].save_pretrained(folder, **SHARDS)
            turn = 1 - turn

    found, seconds = [0], 0.1
    for _ in range(40):
        pid = fork(lambda turn=1 - found[-1]: save_in_turn(turn))
        os.read(started, 1)
        if generator.random() < 0.5:  # one save comes to its end, the kill is for the second
            begin = time.perf_counter()
            os.read(started, 1)
            seconds = time.perf_counter() - begin
        time.sleep(generator.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        assert ending(pid) == -9
        os.set_blocking(started, False)
        with contextlib.suppress(BlockingIOError):
            os.read(started, 1000)
        os.set_blocking(started, True)
        found.append(held(folder, models))
    assert set(found) == {0, 1}
    models[0].save_pretrained(folder, **SHARDS)
    assert len(list(folder.iterdir())) == 2 + len(OTHERS) + 2


def test_saves_at_once_wait_for_each_other(folder, models):
    def save_often(model):
        for _ in range(10):
            model.save_pretrained(folder, **SHARDS)

    children = [fork(lambda model=model: save_often(model)) for model in models for _ in range(2)]
    assert [ending(pid) for pid in children] == [0] * 4
    held(folder, models)
    assert len(list(folder.iterdir())) == 2 + len(OTHERS) + 2


def test_a_failed_save_leaves_nothing_behind(folder, models, monkeypatch):
    before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    calls = 0

    def full_disk(tensors, path, metadata):
        nonlocal calls
        calls += 1
        saving_file(tensors, path, metadata)
        if calls == 2:
            raise OSError(28, "No space left on device")

    saving_file = saving.save_file
    monkeypatch.setattr(saving, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        models[1].save_pretrained(folder, **SHARDS)
    assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == before


def test_a_damaged_manifest_keeps_the_files_that_it_may_be_about(folder, models, monkeypatch):
    (folder / "clp_config.json").write_text("{")
    before = {entry.name for entry in folder.iterdir()}
    monkeypatch.setattr(saving, "save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models[1].save_pretrained(folder, **SHARDS)
    assert {entry.name for entry in folder.iterdir()} == before


def test_a_folder_without_locks_is_saved_to_and_only_named_files_go(folder, models, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folder_update.fcntl, "flock", no_locks)
    stray = folder / f".clp_engine-{'0' * 8}"  # perhaps another save's, which is at work
    stray.mkdir()
    (stray / "file").write_bytes(b"")
    models[1].save_pretrained(folder, **SHARDS)
    assert held(folder, models) == 1
    assert len(list(folder.iterdir())) == 2 + len(OTHERS) + 3
    models[0].save_pretrained(folder, **SHARDS)
    assert len(list(folder.iterdir())) == 2 + len(OTHERS) + 3
    monkeypatch.undo()
    models[0].save_pretrained(folder, **SHARDS)
    assert not stray.exists()


def test_contents_reach_the_disk_before_names_and_tensors_before_the_manifest(folder, models, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def note_replace(source, target):
        events.append(("replace", Path(source).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    models[1].save_pretrained(folder, **SHARDS)
    replaced = [event[2] for event in events if event[0] == "replace"]
    assert [name.split("-")[0] for name in replaced] == ["clp_model"] * 2 + ["clp_config.json", "README.md"]
    for i, event in enumerate(events):
        if event[0] == "replace":
            assert events[i - 1] == ("fsync", event[1])
    manifest = next(i for i, event in enumerate(events) if event[2:] == ("clp_config.json",))
    assert events[manifest - 2] == ("fsync", folder.name)  # the tensor files' names
    assert events[manifest + 1] == ("fsync", folder.name)
