"""Conditional Language Policy: one language model steered by reward weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clp_engine import data, evaluation, rewards, training
    from clp_engine.config import CLPConfig
    from clp_engine.model import CLPModel, get_clp_model
    from clp_engine.training import CLPTrainer, CLPTrainingConfig

# Imported at first use: `clp --help` must not wait for torch, nor `import clp_engine` for transformers' Trainer.
_HOMES = {
    "CLPConfig": "clp_engine.config",
    "CLPModel": "clp_engine.model",
    "CLPTrainer": "clp_engine.training",
    "CLPTrainingConfig": "clp_engine.training",
    "get_clp_model": "clp_engine.model",
}
_PACKAGES = ("data", "evaluation", "rewards", "training")

__all__ = [
    "CLPConfig",
    "CLPModel",
    "CLPTrainer",
    "CLPTrainingConfig",
    "data",
    "evaluation",
    "get_clp_model",
    "rewards",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"clp_engine.{name}")
    raise AttributeError(f"module 'clp_engine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
