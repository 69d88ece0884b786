"""Plots of a report with what is written beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelopt_ext import SegmentPlan
from modelopt_ext.plan import PlanRow, fold_names
from modelopt_ext.sensitivity import SensitivityTable

from ..evaluation import Evaluation, LatentError, VelocitySQNR
from . import numbers
from .plan_drawing import draw_plan
from .plots import numbered_layers, plot_latents, plot_layers, plot_velocity
from .style import svg_uri


@dataclass(frozen=True)
class Plot:
    """A plot, or in ``caption`` the reason why there is none."""

    title: str
    image: str
    alt: str
    caption: str


@dataclass(frozen=True)
class LayerView:
    """The plot of the layers, the worst of them by their numbers in it, and what is shown."""

    image: str
    worst: Sequence[str]
    note: str


@dataclass(frozen=True)
class PlanView:
    """The drawing and the rows of a segment plan."""

    summary: str
    drawing: str
    rows: Sequence[PlanRow]
    notes: Sequence[str]


def trajectory(evaluation: Evaluation) -> list[Plot]:
    """The two plots over time."""
    return [
        _velocity_plot(evaluation.velocity, evaluation.missing.get("velocity", "")),
        _latents_plot(evaluation.latents, evaluation.missing.get("latents", "")),
    ]


def _velocity_plot(velocity: VelocitySQNR | None, reason: str) -> Plot:
    title = "Error of one call, by timestep"
    figure = None if velocity is None else plot_velocity(velocity)
    if velocity is None or figure is None:
        return Plot(title, "", "", reason or "both denoisers gave bit-equal outputs")
    return Plot(
        title,
        svg_uri(figure),
        f"SQNR of the denoiser's output over timesteps; overall {numbers.decibels(velocity.overall)} dB",
        "Energy of the denoiser's output over that of its error, on inputs recorded from full precision: both models "
        "read the same. 6 dB are one bit.",
    )


def _latents_plot(latents: Sequence[LatentError] | None, reason: str) -> Plot:
    title = "Accumulated error, step by step"
    figure = plot_latents(latents) if latents else None
    if not latents or figure is None:
        return Plot(title, "", "", reason or "both trajectories are bit-equal")
    return Plot(
        title,
        svg_uri(figure),
        f"SQNR of the latents after each step; at the end {numbers.decibels(latents[-1].sqnr)} dB",
        "Both pipelines sample on their own from the same noise, so that the error of every step goes into the next.",
    )


def layer_view(table: SensitivityTable) -> LayerView:
    """The plot of the layers, and the names of those that it numbers."""
    figure = plot_layers(table)
    worst = [f"{row.name}, {numbers.decibels(row.local_sqnr)} dB" for row in numbered_layers(table)]
    note = (
        f"{len(table.layers)} quantized layers: each one's own output, on what full precision feeds it, over "
        f"{table.calls} recorded calls of the denoiser. Larger marks do more multiply-adds."
    )
    return LayerView("" if figure is None else svg_uri(figure), worst, note)


def plan_view(plan: SegmentPlan) -> PlanView:
    """The drawing, the rows and the notes of a plan."""
    notes = [f"{name}: {note}." for name, note in _merged(plan.notes)]
    if plan.uncalled:
        notes.append(f"Never called, without segments: {', '.join(plan.uncalled)}.")
    return PlanView(plan.summary(), svg_uri(draw_plan(plan)), plan.rows(trivial=True), notes)


def _merged(notes: Mapping[str, str]) -> list[tuple[str, str]]:
    """Equal notes once, with the names that they are about."""
    by_text: dict[str, list[str]] = {}
    for name, note in notes.items():
        by_text.setdefault(note, []).append(name)
    return [(fold_names(names), note) for note, names in by_text.items()]
