"""Changing a checkpoint's folder so that a process killed at any moment leaves the old checkpoint or the new one.

New tensor files appear beside the old ones, then the manifest takes the old one's place in one step, then what only the
old one named goes. Files of others in the folder are never touched.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clp_engine.checkpoint.manifest import CONFIG_FILE, TENSOR_FILE, VERSION_1_WEIGHTS_FILE, read_manifest

_SCRATCH = ".clp_engine-"
# Names that nothing but a save gives: tensor files, those of format version 1, what TemporaryDirectory makes.
_OURS = re.compile(rf"{TENSOR_FILE.pattern}|{re.escape(VERSION_1_WEIGHTS_FILE)}|{re.escape(_SCRATCH)}[a-z0-9_]{{8}}")
# What file systems answer that have no locks, or no fsync of a folder.
_NOT_OFFERED = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class FolderUpdate:
    """One save's work on `directory`; `updating` makes it.

    Args:
        directory: the checkpoint's folder.
        scratch: a folder in it for files that are being written.
        descriptor: the open folder.
    """

    directory: Path
    scratch: Path
    descriptor: int

    def put(self, temporary: Path, name: str) -> None:
        """Bring a file of `scratch` to the disk, then let it appear in the folder as `name`, whole."""
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.directory / name)

    def put_text(self, text: str, name: str) -> None:
        """As `put`, for a text."""
        temporary = self.scratch / name
        temporary.write_text(text, encoding="utf-8")
        self.put(temporary, name)

    def sync(self) -> None:
        """Bring the names that were put so far to the disk."""
        _where_offered(lambda: os.fsync(self.descriptor))


@contextmanager
def updating(directory: Path) -> Iterator[FolderUpdate]:
    """Work on `directory`, made where missing, with no other save at work where the file system has locks.

    At the end, or after an error, what the manifest does not name is removed: files of the checkpoint before, of this
    save where it failed, and of killed ones.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        is_alone = _where_offered(lambda: fcntl.flock(descriptor, fcntl.LOCK_EX))
        before = _named_files(directory)
        try:
            # A folder of its own: save_file makes temporary files, and leaves them where it is killed.
            with TemporaryDirectory(prefix=_SCRATCH, dir=directory) as scratch:
                yield FolderUpdate(directory, Path(scratch), descriptor)
        finally:
            _remove_unnamed(directory, before, is_alone)
    finally:
        os.close(descriptor)


def _where_offered(call: Callable[[], Any]) -> bool:
    try:
        call()
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
        return False
    return True


def _named_files(directory: Path) -> set[str] | None:
    """The tensor files that `directory`'s manifest names; None where it cannot be read."""
    if not (directory / CONFIG_FILE).exists():
        return set()
    try:
        return set(read_manifest(directory).files)
    except (ValueError, OSError):
        return None


def _remove_unnamed(directory: Path, before: set[str] | None, is_alone: bool) -> None:
    named = _named_files(directory)
    if named is None:  # a damaged manifest stays as it is, with the files that it may be about
        return
    for entry in list(directory.iterdir()):
        # Without a lock, what no manifest names may be another save's that is at work.
        is_left_over = is_alone and _OURS.fullmatch(entry.name)
        if entry.name not in named and (is_left_over or entry.name in (before or ())):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
