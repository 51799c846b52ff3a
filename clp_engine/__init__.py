"""Conditional Language Policy: one language model steered by reward weights."""

from clp_engine.config import CLPConfig
from clp_engine.model import CLPModel, get_clp_model

__all__ = ["CLPConfig", "CLPModel", "get_clp_model"]
