"""Optional dependencies: imported where they are used, named with their pip line where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Return the imported optional `module`, the same as `import module`.

    Args:
        module: import name, dotted names included.
        extra: the extra of clp_engine's distribution that installs it.

    Raises:
        ImportError: the module is missing; the message holds the pip line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise  # the optional package is there, one of its own imports is not
        raise ImportError(f'{module} is needed here and not installed: pip install "clp_engine[{extra}]"') from error
