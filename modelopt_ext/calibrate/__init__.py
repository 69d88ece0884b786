"""Calibration: statistics, the search over each Linear's blocks, and the driver that applies it to a model."""

from .driver import Calibration, calibrate_model, embedders
from .search import LinearSolution, SearchOptions, solve_linear
from .statistics import LinearStatistics, collect

__all__ = [
    "Calibration",
    "LinearSolution",
    "LinearStatistics",
    "SearchOptions",
    "calibrate_model",
    "collect",
    "embedders",
    "solve_linear",
]
