"""Sweeps of steerable policies over weightings, and the Pareto fronts that they trace."""

from clp_engine.evaluation.front import BasePolicy, Front, mean_hypervolume_difference
from clp_engine.evaluation.pareto import hypervolume, is_non_dominated, kendall_tau_b, sweep_grid
from clp_engine.evaluation.plot import plot_fronts
from clp_engine.evaluation.report import results, side_by_side, table
from clp_engine.evaluation.sweep import sweep, write

__all__ = [
    "BasePolicy",
    "Front",
    "hypervolume",
    "is_non_dominated",
    "kendall_tau_b",
    "mean_hypervolume_difference",
    "plot_fronts",
    "results",
    "side_by_side",
    "sweep",
    "sweep_grid",
    "table",
    "write",
]
