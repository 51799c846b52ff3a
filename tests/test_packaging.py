"""The packaging files agree with each other: pyproject.toml, constraints.txt, Makefile, README.md, the tree."""

import ast
import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def requirements(extras: tuple[str, ...]) -> list[Requirement]:
    listed = [*PYPROJECT["build-system"]["requires"], *PYPROJECT["project"]["dependencies"]]
    for extra in extras:
        listed += EXTRAS[extra]
    return [r for r in map(Requirement, listed) if canonicalize_name(r.name) != "clp-engine"]


def pinned_version(name: str, python: str) -> str | None:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    versions = [
        next(iter(pin.specifier)).version
        for pin in pins()
        if canonicalize_name(pin.name) == canonicalize_name(name)
        and (pin.marker is None or pin.marker.evaluate(environment))
    ]
    assert len(versions) <= 1, f"{name} is pinned {len(versions)} times for Python {python}"
    return versions[0] if versions else None


def test_torch_and_triton_are_pinned_as_a_pair() -> None:
    assert [(pinned_version("torch", v), pinned_version("triton", v)) for v in PYTHONS] == [("2.13.0", "3.7.1")] * 4


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_exact_and_within_the_ranges(python: str) -> None:
    assert all(len(pin.specifier) == 1 and next(iter(pin.specifier)).operator == "==" for pin in pins())
    for requirement in requirements(("train", "eval", "demo", "dev")):
        version = pinned_version(requirement.name, python)
        assert version is not None, f"constraints.txt does not pin {requirement.name} for Python {python}"
        assert requirement.specifier.contains(version), f"{requirement} does not allow the pinned {version}"


def test_the_extras() -> None:
    assert set(EXTRAS) == {"train", "eval", "peft", "trl", "demo", "dev"}


def test_a_use_of_an_optional_package_names_an_extra_that_has_it() -> None:
    found = 0
    for path in (ROOT / "clp_engine").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("require") and node.args):
                continue
            if not isinstance(node.args[0], ast.Constant):
                continue
            extra = next((k.value for k in node.keywords if k.arg == "extra"), None) or node.args[1]
            assert isinstance(extra, ast.Constant)
            packages = {canonicalize_name(r.name) for r in map(Requirement, EXTRAS[str(extra.value)])}
            module = str(node.args[0].value).split(".")[0]
            assert canonicalize_name(module) in packages, f"{path}:{node.lineno}: {module} is not in [{extra.value}]"
            found += 1
    assert found >= 4


def test_every_package_folder_is_shipped() -> None:
    in_tree = {
        ".".join(init.parent.relative_to(root).parts)
        for root in (ROOT, ROOT / "kernels")
        for package in ("clp_engine", "clp_kernels")
        for init in (root / package).rglob("__init__.py")
    }
    assert in_tree == set(PYPROJECT["tool"]["setuptools"]["packages"])
    for package in ("clp_engine", "kernels/clp_kernels"):
        assert (ROOT / package / "py.typed").is_file()


def test_the_installed_version_is_the_projects() -> None:
    try:
        installed = importlib.metadata.version("clp_engine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("clp_engine is run from its source tree, not installed")
    assert installed == PYPROJECT["project"]["version"]


def test_the_command_line_entry_point_exists() -> None:
    module, _, function = PYPROJECT["project"]["scripts"]["clp"].partition(":")
    assert callable(getattr(__import__(module, fromlist=["_"]), function))


def test_documented_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md", ".ci/run", "Makefile"):
        named = set(re.findall(r"(?:^|[`\s])make ([a-z][a-z-]*)(?=[\s`,;:.)]|$)", (ROOT / document).read_text()))
        assert named <= targets, f"{document} names {sorted(named - targets)}"


def test_documented_commands_exist() -> None:
    from clp_engine.cli import COMMANDS

    for document in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"^(?:\.venv/bin/)?clp ([a-z]+)", (ROOT / document).read_text(), flags=re.MULTILINE))
        assert named <= set(COMMANDS), document


def test_no_project_file_names_a_registry() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run", "tests/wheel_smoke.sh"):
        text = (ROOT / name).read_text()
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links|/home/|/work/|/opt/", text), name
