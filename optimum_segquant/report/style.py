"""Colours and figures that the plots of a report share: light background, one look."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

TEXT, MUTED, GRID = "#1f2430", "#667085", "#e4e7ec"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f6feb", "#e8793a", "#2a9d6f", "#8a5cd1", "#c3c9d4"

_SETTINGS: Any = {
    "font.size": 9.5,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.hashsalt": "segquant",  # equal figures are equal files
}


def styled(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of this size in inches, and its only axes; nothing of matplotlib's global state is used."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.tick_params(length=0)
    return figure, axes


def svg_uri(figure: Figure) -> str:
    """The figure as a ``data:`` address of an SVG image; text is drawn as outlines, no font is looked up."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
