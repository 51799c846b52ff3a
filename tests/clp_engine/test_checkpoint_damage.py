"""500 damaged checkpoints: each raises ValueError or FileNotFoundError that names the file or field, or loads equal."""

from __future__ import annotations

import json
import os
import random
import shutil
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_support import (
    copies_of,
    is_equal,
    sign,
    sign_bytes,
    tensor_files,
    tiny_base,
    tiny_conditioned,
    write_tensors,
)
from safetensors.torch import load_file
from tests_support import tiny_llama

import clp_engine as clp
from clp_engine.checkpoint import base_fingerprint

MANIFEST = "clp_config.json"
Damage = Callable[[Path, random.Random], str]  # damages a folder, returns what the message must name


def pick(folder: Path, generator: random.Random, *names: str) -> Path:
    return generator.choice([entry for entry in sorted(folder.iterdir()) if entry.name.startswith(names)])


def truncated(folder: Path, generator: random.Random) -> str:
    path = pick(folder, generator, MANIFEST, "clp_model")
    os.truncate(path, generator.randrange(path.stat().st_size - 1))  # the manifest's last byte is a newline
    return path.name


def lengthened(folder: Path, generator: random.Random) -> str:
    path = pick(folder, generator, MANIFEST, "clp_model")
    path.write_bytes(path.read_bytes() + generator.randbytes(generator.randrange(1, 99)).replace(b" ", b"x"))
    return path.name


def overwritten(folder: Path, generator: random.Random) -> str:
    path = pick(folder, generator, MANIFEST, "clp_model")
    content = bytearray(path.read_bytes())
    start, length = generator.randrange(len(content) - 64), generator.randrange(1, 64)
    content[start : start + length] = generator.choice([b"\0", b"\xff"]) * length
    path.write_bytes(content)
    return path.name


def bit_flipped(folder: Path, generator: random.Random) -> str:
    path = pick(folder, generator, MANIFEST, "clp_model", "README.md")
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    return path.name


def replaced_by_no_file(folder: Path, generator: random.Random) -> str:
    path = pick(folder, generator, MANIFEST, "clp_model")
    path.unlink()
    kind = generator.randrange(4)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)  # opening it would wait for ever
    elif kind == 3:
        path.symlink_to("nowhere")
    return path.name


def other_tensors(folder: Path, generator: random.Random) -> str:
    """Whole files with right hashes, whose tensors are not those that base and config call for."""
    tensors = load_file(tensor_files(folder)[0])
    name, other = generator.sample(sorted(tensors), 2)
    kind = generator.randrange(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name + generator.choice(string.ascii_letters)] = tensors.pop(name)
    elif kind == 2:
        name = "stray.weight.long"
        tensors[name] = torch.zeros(generator.randrange(3))
    elif kind == 3:
        tensors[name] = tensors[name].T.repeat(1, 2).contiguous()
    elif kind == 4:
        tensors[name] = tensors[name].flatten()[generator.randrange(9) :].clone()
    elif kind == 5:
        name = tensor_files(folder)[0].name
        tensors[other] = tensors[other].to(generator.choice([torch.int64, torch.bool, torch.complex64]))
    elif kind == 6:
        tensors[name].view(-1)[generator.randrange(64)] = generator.choice([float("nan"), float("inf"), -float("inf")])
    else:
        tensors = {key: value for key, value in tensors.items() if key in (name, other)}
        name = "lacks 6 tensors"
    write_tensors(folder, tensors)
    return name


def other_base(folder: Path, generator: random.Random) -> str:
    digits = "".join(generator.choices("0123456789abcdef", k=64))
    sign(folder, lambda record: record.update(base_fingerprint=f"v{generator.randrange(1, 3)}:{digits}"))
    return "trained on another base model"


def hostile_header(folder: Path, generator: random.Random) -> str:
    """A tensor file with a right hash whose header lies."""
    (file,) = tensor_files(folder)
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    entry = header[generator.choice(sorted(set(header) - {"__metadata__"}))]
    kind = generator.randrange(9)
    if kind == 0:
        entry["shape"] = [2**62, 2**62]
    elif kind == 1:
        entry["data_offsets"] = [0, 2**63 - 1]
    elif kind == 2:
        entry["data_offsets"] = entry["data_offsets"][::-1]
    elif kind == 3:
        entry["data_offsets"] = [0, entry["data_offsets"][1] - entry["data_offsets"][0] + 4]
    elif kind == 4:
        entry["dtype"] = generator.choice(["F32x", "", "object", "pickle"])
    elif kind == 5:
        entry["shape"] = [-1, 16]
    text = json.dumps(header).encode()
    size = len(text)
    if kind == 6:
        size = generator.choice([2**63, 2**64 - 1, 10**9, len(whole)])
    elif kind == 7:
        text = generator.randbytes(length)
        size = length
    elif kind == 8:
        text = b"[" * 100_000
        size = len(text)
    file.write_bytes(size.to_bytes(8, "little") + text + body)
    sign_bytes(folder)
    return file.name


WRONG_TYPES = [None, True, -1, 1.5, "x", [], {}, [1], {"a": 1}, 10**400, 1e308, "\x1b[31m", "\ud800", "\0"]
FILE_NAMES = [
    *("../clp_model.safetensors", "/etc/passwd", "..", "", ".", "a/b.safetensors", "clp_model-\0.safetensors"),
    *("clp_model-0123456789abcdef.bin", "clp_model-0123456789ABCDEF.safetensors", "x" * 5000, "CON", "~/x"),
]


def places(record: dict, path: tuple = ()) -> Iterator[tuple]:
    """Where a manifest's record holds a value, as keys from the outside in."""
    for key, value in record.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def at(record: dict, path: tuple) -> dict:
    for key in path[:-1]:
        record = record[key]
    return record


def edited_json(folder: Path, generator: random.Random) -> str:
    """A manifest with a right hash and a wrong field."""

    def edit(record: dict) -> None:
        path = generator.choice(list(places(record)))
        holder, key = at(record, path), path[-1]
        kind = generator.randrange(4)
        if kind == 0:
            wrong = [v for v in WRONG_TYPES if type(v) is not type(holder[key]) and v is not None]
            holder[key] = generator.choice(wrong)
        elif kind == 1:
            holder[generator.choice(["colour", "__class__", "$ref", "x" * 5000])] = generator.choice(WRONG_TYPES)
        elif kind == 2 and path[0] != "config":  # a config may lack fields that a later release added
            holder.pop(key)
        else:
            name = generator.choice(sorted(record["files"]))
            record["files"][generator.choice(FILE_NAMES)] = record["files"].pop(name)

    sign(folder, edit)
    return MANIFEST


def out_of_range(folder: Path, generator: random.Random) -> str:
    """A manifest with a right hash, right types, and a value that cannot be."""
    edits = [
        ("format_version", 3, "format_version 3"),
        ("format_version", 10**30, "format_version 1000"),
        ("format_version", 0, "format_version is 0"),
        ("config.rewards", [], "rewards"),
        ("config.rewards", ["long", "long"], "rewards"),
        ("config.rewards", ["long", "other"], "other"),
        ("config.rewards", [f"r{i}" for i in range(10_000)], "10000 copies"),
        ("config.variant", "everything", "variant is 'everything'"),
        ("config.target_modules", ["q_proj"], "choose one"),
        ("config.parameterization", "__import__('os')", "parameterization"),
        ("config.min_kl_weight", 1.0, "min_kl_weight is 1.0"),
        ("config.min_kl_weight", -1e300, "min_kl_weight"),
        ("config.weight_domain", "cube", "weight_domain"),
        ("config.default_reward_weights", {"long": 0.5}, "missing: ['short']"),
        ("config.default_reward_weights", {"long": 1e308, "short": 1}, "reward_weights"),
        ("base_fingerprint", "v3:" + "0" * 64, "base_fingerprint"),
        ("files.*.sha256", "0" * 63 + "g", "sha256"),
        ("files.*.sha256", "0" * 64, "was altered"),
        ("files.*.size", -1, "size"),
        ("files.*.size", 2**70, "has 7024 bytes"),
        ("files.*.tensors", {}, "2 copies, files hold 0 tensors"),
        ("files.*.tensors.*.shape", [10**30, 10**30], "1000"),
        ("files.*.tensors.*.shape", [-1], "shape"),
        ("files.*.tensors.*.dtype", "O", "dtype"),
        ("files.*.tensors.*.dtype", "F64", "F64"),
        ("files", {}, "2 copies, files hold 0 tensors"),
    ]
    field, value, words = generator.choice(edits)

    def edit(record: dict) -> None:
        holder = record
        *path, last = field.split(".")
        for key in path:
            holder = holder[generator.choice(sorted(holder)) if key == "*" else key]
        holder[last] = value

    sign(folder, edit)
    return words


def no_json_of_ours(folder: Path, generator: random.Random) -> str:
    path = folder / MANIFEST
    text = path.read_text()
    path.write_bytes(
        generator.choice(
            [
                *(b"", b"null", b"[]", b"3", b'"text"', b"{}", b"\xff\xfe{}", b"\xef\xbb\xbf" + text.encode()),
                *(b"[" * 200_000, b'{"a":' * 200_000, b'{"format_version": ' + b"9" * 5000 + b"}"),
                text.replace('"format_version": 2', '"format_version": 2, "format_version": 2').encode(),
                text.replace('"rewards"', '"variant": "attn", "rewards"').encode(),  # the first and the last differ
                text.replace("0.05", "NaN").encode(),
                text.replace("0.05", "1e999").encode(),
                text.replace("0.05", "-Infinity").encode(),
                text.encode("utf-16"),
            ]
        )
    )
    return MANIFEST


COUNTS: dict[Damage, int] = {
    truncated: 60,
    lengthened: 30,
    overwritten: 40,
    bit_flipped: 140,
    replaced_by_no_file: 20,
    other_tensors: 60,
    other_base: 10,
    hostile_header: 40,
    edited_json: 60,
    out_of_range: 60,
    no_json_of_ours: 30,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    model = tiny_conditioned()
    folder = tmp_path_factory.mktemp("sound") / "model"
    model.save_pretrained(folder)
    return folder, copies_of(model)


def test_there_are_500():
    assert sum(COUNTS.values()) >= 500


@pytest.mark.parametrize("damage", COUNTS, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_changes_no_model(damage, sound, tmp_path):
    folder, copies = sound
    base = tiny_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for seed in range(COUNTS[damage]):
        target = tmp_path / str(seed)
        shutil.copytree(folder, target)
        words = damage(target, random.Random(seed))
        try:
            loaded = clp.CLPModel.from_pretrained(target, base_model=base)
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
            assert words in message, f"seed {seed}: {words!r} is not in: {message}"
            assert len(message) < 3000, f"seed {seed}"
            assert message.isprintable(), f"seed {seed}: {message!r}"
            assert not isinstance(base, clp.CLPModel), f"seed {seed}"
        else:  # a flip in the card, or of an exponent's letter in the manifest
            assert damage is bit_flipped, f"seed {seed}: {words} loaded"
            assert is_equal(copies_of(loaded), copies), f"seed {seed}"
            assert loaded.clp_config == tiny_conditioned().clp_config
            base = tiny_base()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


OTHER_BASES = {
    "seed": {"seed": 5},
    "depth": {"num_hidden_layers": 2},
    "width": {"hidden_size": 32},
    "vocabulary": {"vocab_size": 64},
    "float16": {},
}


@pytest.mark.parametrize("change", OTHER_BASES)
def test_another_base_is_named_with_both_fingerprints(change, sound):
    folder, _ = sound
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    other = tiny_llama(**{**tiny, **OTHER_BASES[change]})
    if change == "float16":
        other.half()
    recorded = json.loads((folder / MANIFEST).read_text())["base_fingerprint"]
    with pytest.raises(ValueError, match="trained on another base model") as caught:
        clp.CLPModel.from_pretrained(folder, base_model=other)
    assert f"{recorded[:19]} in float32" in str(caught.value)
    found = f"{base_fingerprint(other)[:19]} in {'float16' if change == 'float16' else 'float32'}"
    assert found in str(caught.value)
    assert not isinstance(other, clp.CLPModel)
