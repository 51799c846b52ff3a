"""Folders of installed packages, found without importing the packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def package_folder(package: str) -> Path | None:
    """Return the folder of an installed top-level package, or None where it is absent; the package is not imported.

    Equivalent, but for the import: `Path(importlib.import_module(package).__file__).parent`. Packages that only carry
    a model file may import a runtime that is not installed, which is why theirs must not run.
    """
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a stub in sys.modules without a spec counts as absent
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
