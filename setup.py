"""Builds the compiled extension: shared objects in the libtorch stable ABI, loaded by torch.ops.load_library.

They hold no Python symbol, so one wheel (cp310-abi3) serves every Python. The CPU part is always built; the CUDA part
where a CUDA toolkit is found, by CUDA_HOME or nvcc on PATH, whether or not this machine has a GPU or torch is a CUDA
build.

CLP_SKIP_EXTENSION=1 builds neither (the reference and Triton back-ends remain), CLP_SKIP_CUDA=1 only the CPU part.
CLP_SANITIZE=1 instruments the CPU part for `make sanitize`; it loads only into a process that has the run-time loaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# The stable ABI as of torch 2.10: the built objects load in that release and in later ones.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
CUDA_ARCHITECTURES = (80, 90)
SANITIZERS = "-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"


def is_set(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        return str(nvcc) if nvcc.exists() else None
    return shutil.which("nvcc")


def find_compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "c++", "clang++"]:
        found = shutil.which(name.split()[0])
        if found:
            return found
    raise SystemExit(
        f"clp_engine: no C++ compiler found ({wanted or 'g++, c++, clang++'}). Install one, or set "
        "CLP_SKIP_EXTENSION=1 to install without the compiled kernels."
    )


class NinjaBuild(build_ext):
    """Writes one ninja file for all shared objects and runs it: sources compile side by side."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".abi3.so"

    def build_extensions(self) -> None:
        compiler = find_compiler()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)

        def build(extension: Extension) -> None:
            output = Path(self.get_ext_fullpath(extension.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            ninja = cuda_build if extension.name.endswith("_cuda") else cpu_build
            file = folder / f"{extension.name}.ninja"
            file.write_text(ninja(extension.sources, output, folder, compiler))
            self.run_ninja(extension.name, file)

        with ThreadPoolExecutor() as pool:  # the CUDA part beside the CPU part: nvcc takes as long as all of that
            list(pool.map(build, self.extensions))

    def run_ninja(self, name: str, file: Path) -> None:
        result = subprocess.run([*ninja_command(), "-f", str(file)], capture_output=True, text=True)
        if result.returncode == 0:
            return
        print(result.stdout, result.stderr, file=sys.stderr)
        if name.endswith("_cuda"):
            raise SystemExit(
                "clp_engine: the CUDA extension does not compile with this nvcc and torch (see above). "
                "Set CLP_SKIP_CUDA=1 to install without it, or CUDA_HOME to another toolkit."
            )
        raise SystemExit(
            "clp_engine: the C++ extension does not compile (see above). Set CLP_SKIP_EXTENSION=1 to install without "
            "the compiled kernels."
        )


def ninja_command() -> list[str]:
    try:
        import ninja
    except ImportError:
        return ["ninja"]
    return [str(Path(ninja.BIN_DIR) / "ninja")]


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(
    compile_line: str,
    link_line: str,
    sources: list[str],
    output: Path,
    folder: Path,
    codes: dict[str, str] | None = None,
) -> str:
    lines = [
        "rule compile",
        f"  command = {compile_line} $codes -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link_line}",
    ]
    objects = []
    for source in sources:
        obj = folder / (Path(source).name + ".o")
        objects.append(escape(obj))
        lines += [f"build {escape(obj)}: compile {escape(ROOT / source)}", f"  codes = {(codes or {}).get(source, '')}"]
    lines += [f"build {escape(output)}: link {' '.join(objects)}", f"default {escape(output)}", ""]
    return "\n".join(lines)


def include_flags() -> str:
    return f'-I"{torch_folder() / "include"}" -I"{ROOT / "csrc"}"'


def cpu_build(sources: list[str], output: Path, folder: Path, compiler: str) -> str:
    # -O3 and no -march: the kernels' own files name their instruction sets, the processor is asked at run time.
    # -Wno-psabi: vectors never cross a call of the built object's interface.
    flags = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wno-psabi -Wno-unknown-pragmas {' '.join(STABLE_ABI)}"
    library = torch_folder() / "lib"
    sanitizers = SANITIZERS if is_set("CLP_SANITIZE") else ""
    link = f'{compiler} {sanitizers} -shared $in -o $out -L"{library}" -ltorch_cpu -Wl,--as-needed'
    return ninja_file(f"{compiler} {flags} {sanitizers} {include_flags()}", link, sources, output, folder)


def torch_cuda_folder(folder: Path, compiler: str) -> Path:
    """The folder of libtorch_cuda.so; for torch's CPU build, which has none, of an empty one of that soname."""
    library = torch_folder() / "lib"
    if (library / "libtorch_cuda.so").exists():
        return library
    empty = folder / "torch_cuda"
    empty.mkdir(parents=True, exist_ok=True)
    name = "libtorch_cuda.so"
    command = [compiler, "-shared", f"-Wl,-soname,{name}", "-x", "c++", os.devnull, "-o", str(empty / name)]
    subprocess.run(command, check=True)
    return empty


def cuda_flags() -> str:
    # USE_CUDA opens the stream and device-guard part of the stable headers, also in torch's CPU build.
    return f"-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -DUSE_CUDA {' '.join(STABLE_ABI)}"


def cuda_build(sources: list[str], output: Path, folder: Path, compiler: str) -> str:
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    newest = CUDA_ARCHITECTURES[-1]
    # One thread for each of the codes. The Hopper kernels' instructions are of that architecture alone, without PTX.
    portable = f"--threads={len(codes) + 1} {' '.join(codes)} -gencode=arch=compute_{newest},code=compute_{newest}"
    hopper = "-gencode=arch=compute_90a,code=sm_90a"
    by_source = {source: hopper if source.endswith("_sm90.cu") else portable for source in sources}
    nvcc = find_nvcc()
    library = torch_folder() / "lib"
    # torch loads libtorch_cuda.so without making its symbols global, so the built object must name it. The CUDA runtime
    # is linked statically: torch brings its own, and a CPU-only torch has none.
    link = (
        f'{nvcc} -shared -ccbin {compiler} $in -o $out -L"{library}" -L"{torch_cuda_folder(folder, compiler)}" '
        "-Xlinker --no-as-needed -ltorch_cpu -ltorch_cuda -cudart static"
    )
    compile_line = f"{nvcc} -ccbin {compiler} {cuda_flags()} {include_flags()}"
    return ninja_file(compile_line, link, sources, output, folder, by_source)


class StableWheel(bdist_wheel):
    """Tags the wheel cp310-abi3: no shared object in it touches Python's C interface."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("cp310", "abi3", platform) if self.distribution.has_ext_modules() else (python, abi, platform)


def extensions() -> list[Extension]:
    if is_set("CLP_SKIP_EXTENSION"):
        print("clp_engine: CLP_SKIP_EXTENSION is set: no compiled kernels")
        return []
    cpu = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
    cuda = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cu"))
    found = [Extension("clp_kernels._cpu", cpu, py_limited_api=True)]
    if is_set("CLP_SKIP_CUDA"):
        print("clp_engine: CPU-only extension: CLP_SKIP_CUDA is set")
    elif find_nvcc() is None:
        print("clp_engine: CPU-only extension: no CUDA toolkit (nvcc by CUDA_HOME or on PATH)")
    elif cuda:
        print(f"clp_engine: CPU and CUDA extension, by {find_nvcc()}")
        found.append(Extension("clp_kernels._cuda", cuda, py_limited_api=True))
    return found


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild, "bdist_wheel": StableWheel})
