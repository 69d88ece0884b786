"""Plots of an evaluation: per timestep, per step, per layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from modelopt_ext.sensitivity import LayerSensitivity, SensitivityTable

from ..evaluation import LatentError, VelocitySQNR
from .style import BLUE, GREEN, MUTED, ORANGE, PURPLE, TEXT, styled

_WIDTH, _HEIGHT = 6.2, 3.0  # inches
_NUMBERED = 5  # layers with a number in the plot


def plot_velocity(velocity: VelocitySQNR) -> Figure | None:
    """SQNR of the denoiser's output over the timesteps, from noise to image; None where every output is bit-equal."""
    points = [(t, value) for t, value in velocity.per_timestep.items() if math.isfinite(value)]
    if not points:
        return None
    figure, axes = styled(_WIDTH, _HEIGHT)
    axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=4, linewidth=1.6)
    if math.isfinite(velocity.overall):
        label = f"overall, {velocity.overall:.1f} dB"
        axes.axhline(velocity.overall, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=label)
        axes.legend(fontsize=8.5, loc="best", frameon=False)
    axes.invert_xaxis()
    axes.set(xlabel="timestep, from noise to image", ylabel="SQNR, dB")
    axes.margins(y=0.15)
    return figure


def plot_latents(errors: Sequence[LatentError]) -> Figure | None:
    """SQNR of the latents after each step of both pipelines' own sampling; None where they never differ."""
    found = [error for error in errors if error.noise > 0]
    if not found:
        return None
    figure, axes = styled(_WIDTH, _HEIGHT)
    steps = [error.step + 1 for error in found]
    mean, worst = [error.sqnr for error in found], [-10 * math.log10(error.worst) for error in found]
    axes.plot(steps, mean, color=BLUE, marker="o", markersize=4, linewidth=1.6, label="all prompts")
    if worst != mean:  # of several prompts
        axes.fill_between(steps, worst, mean, color=BLUE, alpha=0.12, linewidth=0)
        axes.plot(steps, worst, color=ORANGE, marker="o", markersize=3, linewidth=1.2, label="prompt that drifted most")
        axes.legend(fontsize=8.5, loc="best", frameon=False)
    axes.set(xlabel="denoising step", ylabel="SQNR of the latents, dB")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.15)
    return figure


_GROUPS: Mapping[str, tuple[str, str]] = {
    "attention": (BLUE, r"attn|attention|to_[qkv]|qkv"),
    "feed-forward": (GREEN, r"ff|feed_forward|mlp"),
    "modulation": (PURPLE, r"norm|adaln|modulation|scale_shift"),
    "other": (ORANGE, r""),
}
"""Kinds of layers: colour, and a pattern of one part of the module's name; the first that fits."""


def layer_group(name: str) -> str:
    """The kind of a layer, by its module's name: a key of the plot's legend."""
    parts = name.split(".")
    # The last part that says anything decides: attn.norm is a norm, norm1.linear is one, too.
    for part in reversed(parts):
        for group, (_, pattern) in _GROUPS.items():
            if pattern and re.search(pattern, part):
                return group
    return "other"


def plot_layers(table: SensitivityTable) -> Figure | None:
    """Output SQNR of every layer alone, in the model's order, area by its multiply-adds; None without any error."""
    rows = [(index, row) for index, row in enumerate(table.layers) if row.rows and row.local_noise > 0]
    if not rows:
        return None
    figure, axes = styled(2 * _WIDTH, _HEIGHT + 0.6)
    most = max(row.multiply_adds for _, row in rows)
    crowd = min(1.0, 120 / len(rows))  # many layers, small marks
    for group, (colour, _) in _GROUPS.items():
        members = [(index, row) for index, row in rows if layer_group(row.name) == group]
        if members:
            axes.scatter(
                [index for index, _ in members],
                [row.local_sqnr for _, row in members],
                s=[crowd * (14 + 110 * row.multiply_adds / most) for _, row in members],
                color=colour,
                alpha=0.75,
                linewidth=0,
                label=group,
            )
    places = {row.name: index for index, row in rows}
    for number, row in enumerate(numbered_layers(table), start=1):
        place = places[row.name], row.local_sqnr
        axes.annotate(
            str(number),
            place,
            xytext=(0, -7),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            color=TEXT,
        )
    axes.set(xlabel="layer, in the model's order", ylabel="SQNR of its own output, dB")
    axes.margins(x=0.02, y=0.12)
    # Above the axes, where it hides no layer.
    legend = axes.legend(fontsize=8.5, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([36])
    return figure


def numbered_layers(table: SensitivityTable) -> list[LayerSensitivity]:
    """The layers that :func:`plot_layers` numbers 1, 2, ...: the worst ones, worst first."""
    return [row for row in table.ranking if row.rows and row.local_noise > 0][:_NUMBERED]
