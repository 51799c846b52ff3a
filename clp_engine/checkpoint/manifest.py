"""clp_config.json: what a conditioned model's folder holds. It is written last, so its presence is the commit.

    clp_config.json              format_version, the base model by reference, the CLPConfig, every file with its hash
    clp_model-<hash>.safetensors `<module path>.<parameter>.<copy name>` -> tensor, in its own precision; in shards
                                 `clp_model-00001-of-00003-<hash>.safetensors` above a size
    README.md                    model card, outside the manifest: its owner may edit it
    prompt_template.json         how prompts were worded in training, where that is known; likewise

A tensor file's name carries the start of its SHA-256, so that a new one never takes the place of one that the manifest
on disk still names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from clp_engine.checkpoint.strict_json import decode, read_object, shown
from clp_engine.config import CLPConfig

FORMAT_VERSION = 2
CONFIG_FILE = "clp_config.json"
PROMPT_TEMPLATE_FILE = "prompt_template.json"
VERSION_1_WEIGHTS_FILE = "clp_model.safetensors"
HASH_IN_NAME = 16
TENSOR_FILE = re.compile(rf"clp_model(-\d{{5}}-of-\d{{5}})?-[0-9a-f]{{{HASH_IN_NAME}}}\.safetensors")
_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
REMEDY = "get the folder again from where it came, or save the model again"


@dataclass(frozen=True)
class TensorRecord:
    """One tensor's dtype, as safetensors names it, and shape."""

    dtype: str
    shape: list[int]

    def __post_init__(self) -> None:
        if self.dtype not in _ITEM_SIZES:
            raise ValueError(f"dtype is {shown(self.dtype)}, expected one of {sorted(_ITEM_SIZES)}")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"shape is {shown(self.shape)}, expected sizes >= 0")


@dataclass(frozen=True)
class FileRecord:
    """One tensor file: the SHA-256 of its bytes, its size in bytes, its tensors by name."""

    sha256: str
    size: int
    tensors: dict[str, TensorRecord]

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 is {shown(self.sha256)}, expected 64 hexadecimal digits")
        if self.size < 0:
            raise ValueError(f"size is {shown(self.size)}, expected bytes >= 0")


@dataclass(frozen=True)
class Manifest:
    """What a conditioned model's folder holds.

    Args:
        base_model_name_or_path: hub id or path of the base model, as it was loaded.
        base_revision: its commit on the hub; None for a folder.
        base_dtype: the precision it had; None where unknown (format version 1).
        base_fingerprint: see `fingerprint.base_fingerprint`.
        config: what is conditioned, on which rewards.
        files: the tensor files by name.
        format_version: of the folder, as it was read.
    """

    base_model_name_or_path: str
    base_revision: str | None
    base_dtype: str | None
    base_fingerprint: str
    config: CLPConfig
    files: dict[str, FileRecord]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not re.fullmatch("v[12]:[0-9a-f]{64}", self.base_fingerprint):
            raise ValueError(f"base_fingerprint is {shown(self.base_fingerprint)}, expected v2: and a SHA-256")
        for name in self.files:
            # No separators: a name never leads out of the folder.
            if not TENSOR_FILE.fullmatch(name) and name != VERSION_1_WEIGHTS_FILE:
                raise ValueError(f"files names {shown(name)}, expected names as clp_model-<hash>.safetensors")
        counts = Counter(name for record in self.files.values() for name in record.tensors)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"files hold the tensor {shown(min(twice))} twice")
        # Before anything is made for each of them: a config's length is nobody's memory.
        if self.config.num_copies > len(counts):
            raise ValueError(f"config has {self.config.num_copies} copies, files hold {len(counts)} tensors for them")

    @property
    def tensors(self) -> dict[str, TensorRecord]:
        """The tensors of all files by name."""
        return {name: tensor for record in self.files.values() for name, tensor in record.tensors.items()}

    def sizes_by_family(self) -> dict[str, tuple[int, int]]:
        """Number of tensors and bytes of each family of modules, as in "q_proj", in the files' order."""
        families: dict[str, tuple[int, int]] = {}
        for name, tensor in self.tensors.items():
            family = name.split(".")[-3:][0]  # <module path>.<parameter>.<copy name>
            count, size = families.get(family, (0, 0))
            families[family] = count + 1, size + math.prod(tensor.shape) * _ITEM_SIZES[tensor.dtype]
        return families

    def to_json(self) -> str:
        """The file's text, with a hash of its own content.

        Raises:
            ValueError: a name that could not be read back (control characters).
        """
        record = {"format_version": self.format_version, **dataclasses.asdict(self), "config": self.config.to_dict()}
        text = json.dumps(record | {"manifest_sha256": content_hash(record)}, indent=1) + "\n"
        from_record(record)
        return text


def read_manifest(directory: Path) -> Manifest:
    """Read and check `directory`'s manifest; the files that it names are not looked at (`loading.verify` does).

    A folder of an older format version is read as one of today's.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, altered, of a later release, or a field is out of range.
    """
    path = directory / CONFIG_FILE
    try:
        record = read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from error
    version = record.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"{path}: format_version is {shown(version)}, expected 1 to {FORMAT_VERSION}; {REMEDY}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {shown(version)}, this release reads 1 to {FORMAT_VERSION}: install a later one"
        )
    if version >= 2 and (recorded := record.pop("manifest_sha256", None)) != (found := content_hash(record)):
        raise ValueError(
            f"{path} was altered: its content has the SHA-256 {found}, manifest_sha256 is {shown(recorded)}; {REMEDY}"
        )
    for older in range(version, FORMAT_VERSION):
        record = _UPGRADES[older](record, directory)
    try:
        return dataclasses.replace(from_record(record), format_version=version)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {REMEDY}") from error


def from_record(record: dict[str, Any]) -> Manifest:
    """The manifest of a parsed JSON object.

    Raises:
        ValueError: a field is unknown, missing, of another type or out of range.
    """
    return decode(record, Manifest, "the manifest")


def content_hash(record: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, whatever its layout in the file."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_record(path: Path) -> FileRecord:
    """Record the safetensors file `path` as it is now.

    Raises:
        FileNotFoundError: there is no such regular file.
        ValueError: it is no safetensors file, or holds a dtype that copies never have.
    """
    return FileRecord(file_hash(path), path.stat().st_size, tensor_records(path))


def tensor_records(path: Path) -> dict[str, TensorRecord]:
    """What the header of the safetensors file `path` says of its tensors; errors as in `file_record`."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {name: TensorRecord(part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no file of copies: {error}; {REMEDY}") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        FileNotFoundError: there is no such regular file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or no regular file; {REMEDY}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _from_version_1(record: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Version 1 had one tensor file without a hash, and another fingerprint."""
    kept = {name: value for name, value in record.items() if name != "format_version"}
    if type(kept.get("base_fingerprint")) is str:
        kept["base_fingerprint"] = f"v1:{kept['base_fingerprint']}"
    files = {VERSION_1_WEIGHTS_FILE: dataclasses.asdict(file_record(directory / VERSION_1_WEIGHTS_FILE))}
    return {**kept, "base_revision": None, "base_dtype": None, "files": files, "format_version": 2}


_UPGRADES: dict[int, Callable[[dict[str, Any], Path], dict[str, Any]]] = {1: _from_version_1}
