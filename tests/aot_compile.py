"""Compiles recorded launches of the Triton kernels for GPUs that need not be there; prints a JSON record per binary.

    python tests/aot_compile.py [hot|all] [TARGET ...]     targets: cuda:80 cuda:90 cuda:100 hip:gfx942 (all four)

A program of its own, because Triton's interpreter, which other tests use, and its compiler do not mix in one process,
and because PYTHONPATH may name another release of Triton. Binaries, and what was read from them, stay in Triton's own
cache, by the hash of kernel, constants and compiler. Compiles on as many processors as there are, up to WORKERS.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import gpu_binaries
from aot_launches import PROPERTIES, record_launches
from aot_recorder import TARGETS, Launch, Target

WORKERS = 4
JOBS: list[tuple[Target, Launch]] = []  # what the forked workers compile, by index: kernels cannot be pickled


def compile_launch(index: int) -> dict[str, Any]:
    """Compiles one launch for its target, and reads the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target, launch = JOBS[index]
    source = ASTSource(launch.function, launch.signature, launch.constexprs, launch.attrs)
    gpu = GPUTarget(target.backend, target.arch, 32 if target.backend == "cuda" else 64)
    compiled = triton.compile(source, target=gpu, options=launch.options)
    return {
        "target": target.name,
        "kernel": launch.kernel,
        "label": launch.label,
        "rows": str(launch.rows).removeprefix("torch."),
        "copies": launch.copies,
        "is_hot": launch.is_hot,
        "allows_tf32": launch.allows_tf32,
        "shared_bytes": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        **_facts(compiled, is_disassembled=bool(PROPERTIES.get(launch.kernel, {"dot"}) - {"asserts"})),
    }


def _facts(compiled: Any, is_disassembled: bool) -> dict[str, Any]:
    """What the binary says of itself, kept beside it: disassembling takes a third as long as compiling."""
    from triton.runtime.cache import get_cache_manager

    reader = Path(gpu_binaries.__file__).read_bytes()
    key = hashlib.sha256(f"{compiled.metadata.hash} {is_disassembled}".encode() + reader).hexdigest()
    manager = get_cache_manager(key)
    kept = manager.get_file("facts.json")
    if kept is not None:
        return json.loads(Path(kept).read_text())
    facts = gpu_binaries.read_binary(compiled.asm, is_disassembled)
    manager.put(json.dumps(facts), "facts.json", binary=False)
    return facts


def main(arguments: list[str]) -> None:
    os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported, with the first launcher
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
    only_hot = arguments[:1] != ["all"]
    for name in arguments[1:] or TARGETS:
        JOBS.extend((TARGETS[name], launch) for launch in record_launches(TARGETS[name], only_hot))
    workers = min(WORKERS, os.cpu_count() or 1)
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        records = list(pool.imap_unordered(compile_launch, range(len(JOBS))))
    import triton

    print(json.dumps({"triton": triton.__version__, "binaries": records}))


if __name__ == "__main__":
    main(sys.argv[1:])
