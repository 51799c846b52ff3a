"""setup.py's decisions, and the built shared object: no Python symbol, no code of one instruction set in another."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from tests_support import load_setup

import clp_kernels

ROOT = Path(__file__).parents[1]
OBJECT = Path(clp_kernels.__file__).with_name("_cpu.abi3.so")
CUDA_OBJECT = OBJECT.with_name("_cuda.abi3.so")
needs_object = pytest.mark.skipif(
    not OBJECT.exists() or shutil.which("nm") is None, reason="no built extension, or no nm"
)


@pytest.fixture
def setup_py(monkeypatch) -> ModuleType:
    for name in ("CLP_SKIP_EXTENSION", "CLP_SKIP_CUDA", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return load_setup()


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def names(extensions) -> list[str]:
    return [extension.name for extension in extensions]


def test_no_toolkit_is_a_cpu_only_build(setup_py, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert names(setup_py.extensions()) == ["clp_kernels._cpu"]
    assert "CPU-only extension: no CUDA toolkit" in capsys.readouterr().out


@pytest.mark.parametrize("by", ["CUDA_HOME", "PATH"])
def test_the_toolkit_decides_not_the_gpu(setup_py, monkeypatch, tmp_path, by):
    program(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "bin" if by == "PATH" else tmp_path))
    if by == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if not list((ROOT / "csrc").glob("*.cu")):
        pytest.skip("no CUDA source yet")
    assert names(setup_py.extensions()) == ["clp_kernels._cpu", "clp_kernels._cuda"]
    monkeypatch.setenv("CLP_SKIP_CUDA", "1")
    assert names(setup_py.extensions()) == ["clp_kernels._cpu"]


def test_skip_extension(setup_py, monkeypatch):
    monkeypatch.setenv("CLP_SKIP_EXTENSION", "1")
    assert setup_py.extensions() == []


def test_no_compiler_names_the_way_out(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="CLP_SKIP_EXTENSION=1"):
        setup_py.find_compiler()


@pytest.mark.parametrize(
    ("name", "remedy"), [("clp_kernels._cuda", "CLP_SKIP_CUDA=1"), ("clp_kernels._cpu", "CLP_SKIP_EXT")]
)
def test_a_failing_compile_raises_and_installs_nothing(setup_py, tmp_path, name, remedy, capsys):
    from setuptools import Distribution

    source = tmp_path / "broken.cpp"
    source.write_text("this is not C++\n")
    output = tmp_path / "out.so"
    text = setup_py.ninja_file("c++", "c++ -shared $in -o $out", [str(source)], output, tmp_path)
    (tmp_path / "build.ninja").write_text(text)
    with pytest.raises(SystemExit, match=remedy):
        setup_py.NinjaBuild(Distribution()).run_ninja(name, tmp_path / "build.ninja")
    assert not output.exists()


@needs_object
def test_no_python_symbol():
    symbols = subprocess.run(["nm", "-D", str(OBJECT)], capture_output=True, text=True, check=True).stdout
    assert " Py" not in symbols
    assert " _Py" not in symbols


def test_no_source_asks_for_the_build_machines_processor():
    text = (ROOT / "setup.py").read_text()
    assert "-march=" not in text
    for file in (ROOT / "csrc").glob("mixed_linear_cpu_a[mv]x*.cpp"):
        # A standard header after (or without) the target pragma may leave AVX code in a function shared with others.
        assert "#include <vector>" not in file.read_text()
        assert "#include <string>" not in file.read_text()
    kernels = ("", "_kernels", "_vector", "_mix", "_dots", "_panels", "_rows", "_tiles", "_amx_panels")
    for header in (f"mixed_linear_cpu{name}.h" for name in kernels):
        included = [line for line in (ROOT / "csrc" / header).read_text().splitlines() if line.startswith("#include <")]
        assert set(included) <= {"#include <stddef.h>", "#include <stdint.h>"}


def needed_objects(path: Path) -> list[str]:
    dynamic = subprocess.run(["readelf", "-dW", path], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)


@pytest.mark.skipif(not CUDA_OBJECT.exists() or shutil.which("readelf") is None, reason="no CUDA part, or no readelf")
def test_the_cuda_object_names_the_library_of_the_symbols_it_uses():
    """Torch loads libtorch_cuda.so for itself alone: an object that does not name it finds none of its symbols."""
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed_objects(CUDA_OBJECT))


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_a_cpu_build_of_torch_links_against_an_empty_libtorch_cuda(setup_py, monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(setup_py, "torch_folder", lambda: tmp_path)
    folder = setup_py.torch_cuda_folder(tmp_path / "build", setup_py.find_compiler())
    header = subprocess.run(["readelf", "-dW", folder / "libtorch_cuda.so"], capture_output=True, text=True, check=True)
    assert "soname: [libtorch_cuda.so]" in header.stdout
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    assert setup_py.torch_cuda_folder(tmp_path / "build", "c++") == tmp_path / "lib"
