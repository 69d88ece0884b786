"""A segment plan as a picture: every Linear a bar of its channels, cut where the plan cuts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from modelopt_ext import LinearPlan, SegmentPlan
from modelopt_ext.plan import PlanRow

from .style import BLUE, GREEN, GREY, MUTED, ORANGE, PURPLE, TEXT, styled

COLOURS: Mapping[str, str] = {"": GREY, "silu": ORANGE, "gelu": PURPLE, "gated": GREEN}
"""Of input segments, by what produced their values."""

_LABELS = {"": "not polar", "silu": "after SiLU", "gelu": "after GELU", "gated": "gated product"}
_OUTPUTS = (BLUE, "#8fb4f5")  # neighbouring output segments

_WIDTH = 11.0  # inches
_ROW = 0.27  # inches a bar
_BAR = 0.62  # of a row
_GAP = 0.08  # between inputs and outputs, of the width of one of them
_CHARACTER = 0.0098  # width of a character of a size, of the same


def draw_plan(plan: SegmentPlan, *, trivial: bool = False, max_rows: int = 60) -> Figure:
    """Draw the segments of a model's Linears; modules that differ in block numbers only share a row.

    Bars of one column have one scale: a channel is everywhere as wide. Input segments are coloured by what produced
    their values (behind SiLU, GELU and gated products negatives are few in range but many in number), output segments
    alternate in shade.

    Args:
        plan: of one model.
        trivial: whether Linears without cuts and tags are drawn, too.
        max_rows: rows to draw at most; how many are left out is said below.

    Returns:
        A matplotlib figure: ``draw_plan(plan).savefig("plan.png", dpi=150)``.

    Raises:
        ValueError: ``max_rows`` below one.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    rows = plan.rows(trivial=trivial)
    shown = rows[:max_rows]
    figure, axes = styled(_WIDTH, 1.1 + _ROW * max(len(shown), 1))
    axes.grid(False)
    axes.set_axis_off()
    axes.set(xlim=(0, 2 + _GAP), ylim=(max(len(shown), 1), -1.2))
    _titles(axes, shown)
    scales = _largest(shown)
    for line, row in enumerate(shown):
        _draw_row(axes, line, row, scales)
    if not shown:
        axes.text(0, 0.2, "No Linear has cuts or tags.", color=MUTED, va="center")
    tags = sorted({tag for row in shown for tag in _tags(row)}, key=list(COLOURS).index)
    handles = [Patch(color=COLOURS[tag], label=_LABELS[tag]) for tag in tags]
    if handles:
        axes.legend(handles=handles, ncols=4, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    axes.text(0, len(shown) + 0.55, _footer(plan, rows, shown, trivial), fontsize=8.5, color=MUTED, va="center")
    return figure


def _draw_row(axes: Any, line: int, row: PlanRow, scales: tuple[int, int]) -> None:
    label = row.pattern if len(row.names) == 1 else f"{row.pattern}  ({len(row.names)})"
    axes.text(-0.02, line, label, ha="right", va="center", fontsize=8.5, color=TEXT)
    inputs, outputs = _segments(row)
    colours = [COLOURS[tag] for tag in _tags(row)]
    _bar(axes, line, 0.0, scales[0], inputs, colours)
    if outputs:
        alternating = [_OUTPUTS[i % 2] for i in range(len(outputs))]
        _bar(axes, line, 1 + _GAP, scales[1], outputs, alternating)
    else:
        axes.text(1 + _GAP, line, "convolution", va="center", fontsize=8, color=MUTED)


def _bar(axes: Any, line: int, left: float, largest: int, sizes: Sequence[int], colours: Sequence[str]) -> None:
    ends = list(accumulate(sizes))
    for size, end, colour in zip(sizes, ends, colours, strict=True):
        width = size / largest
        start = left + (end - size) / largest
        axes.add_patch(
            Rectangle((start, line - _BAR / 2), width, _BAR, facecolor=colour, edgecolor="white", linewidth=1.2)
        )
        text = str(size)
        if width > _CHARACTER * (len(text) + 2):
            dark = colour in (GREY, _OUTPUTS[1])
            axes.text(
                start + width / 2,
                line,
                text,
                ha="center",
                va="center",
                fontsize=7.5,
                color=TEXT if dark else "white",
            )


def _titles(axes: Any, rows: Sequence[PlanRow]) -> None:
    if rows:
        for left, title in ((0.0, "input channels"), (1 + _GAP, "output channels")):
            axes.text(left, -0.85, title, fontsize=9, color=MUTED, va="center")


def _segments(row: PlanRow) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(row.plan, LinearPlan):
        return row.plan.in_segments, row.plan.out_segments
    return row.plan, ()


def _tags(row: PlanRow) -> tuple[str, ...]:
    return row.plan.activations if isinstance(row.plan, LinearPlan) else ("",) * len(row.plan)


def _largest(rows: Sequence[PlanRow]) -> tuple[int, int]:
    return (
        max((sum(_segments(row)[0]) for row in rows), default=1),
        max((sum(_segments(row)[1]) for row in rows), default=1) or 1,
    )


def _footer(plan: SegmentPlan, rows: Sequence[PlanRow], shown: Sequence[PlanRow], trivial: bool) -> str:
    parts = []
    plain = len(plan.linears) - len(plan.segmented)
    if plain and not trivial:
        parts.append(f"{plain} Linears without cuts and tags are not drawn")
    if len(shown) < len(rows):
        parts.append(f"{len(rows) - len(shown)} more rows are not drawn")
    if plan.uncalled:
        parts.append(f"{len(plan.uncalled)} Linears were never called")
    return "; ".join(parts)
