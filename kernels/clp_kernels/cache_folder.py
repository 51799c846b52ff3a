"""Where this project keeps what it can make again: launch tables here, the converted demo model in clp_engine."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """Return the cache folder: `$CLP_ENGINE_CACHE`, else `$XDG_CACHE_HOME/clp_engine`, else `~/.cache/clp_engine`."""
    own = os.environ.get("CLP_ENGINE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "clp_engine"
