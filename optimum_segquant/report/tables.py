"""Tables of a report: metrics of the images, layers, size and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from modelopt_ext.sensitivity import LayerSensitivity, SensitivityTable

from ..evaluation import Evaluation, MetricResult
from ..evaluation.perceptual import HIGHER_IS_BETTER
from ..layer_formats import LayerFormats
from . import numbers
from .plots import layer_group
from .summary import METRIC_LABELS


@dataclass(frozen=True)
class MetricRow:
    """One metric of the images; ``skipped`` says why there is none."""

    label: str
    value: str = ""
    worst: str = ""
    reference: str = ""
    better: str = ""
    of: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table; ``value`` is what a column of numbers is sorted by, empty where it is missing."""

    text: str
    kind: Literal["text", "code", "number"] = "text"
    value: str = ""


@dataclass(frozen=True)
class Table:
    """Titles of the columns after the first, rows of text, and what to know about them."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def metric_rows(metrics: Mapping[str, MetricResult]) -> list[MetricRow]:
    """The table of metrics."""
    return [_metric_row(name, result) for name, result in metrics.items()]


def _metric_row(name: str, result: MetricResult) -> MetricRow:
    label = METRIC_LABELS[name]
    if result.skipped:
        return MetricRow(label, skipped=result.skipped)
    higher = HIGHER_IS_BETTER[name]
    worst = (min if higher else max)(result.per_image) if result.per_image else None
    return MetricRow(
        label,
        value=numbers.metric(name, result.value),
        worst=numbers.metric(name, worst),
        reference=numbers.metric(name, result.reference),
        better="higher" if higher else "lower",
        of="; ".join(part for part in (result.network, result.note) if part) or "pixels",
    )


def unasked_metrics(metrics: Mapping[str, MetricResult]) -> str:
    """The metrics that the evaluation was not asked for, in a sentence; empty for none."""
    names = [label.partition(",")[0] for name, label in METRIC_LABELS.items() if name not in metrics]
    return f"Not asked for: {', '.join(names)}." if names else ""


LAYER_COLUMNS = (
    ("layer", "code"),
    ("kind", "text"),
    ("SQNR, dB", "number"),
    ("weights, %", "number"),
    ("multiply-adds, %", "number"),
    ("weights in", "text"),
    ("activations in", "text"),
    ("polarity", "text"),
)


def layer_rows(table: SensitivityTable, formats: Mapping[str, LayerFormats]) -> list[list[Cell]]:
    """A row for every quantized layer, in the model's order."""
    weights = sum(row.weights for row in table.layers)
    work = sum(row.multiply_adds for row in table.layers)
    return [_layer_row(row, formats.get(row.name), weights, work) for row in table.layers]


def _layer_row(row: LayerSensitivity, formats: LayerFormats | None, weights: int, work: float) -> list[Cell]:
    sqnr = Cell(numbers.decibels(row.local_sqnr), "number", _sortable(row.local_sqnr))
    done = f"{100 * row.multiply_adds / work:.2f}" if work else numbers.MISSING
    return [
        Cell(row.name, "code"),
        Cell(layer_group(row.name)),
        sqnr if row.rows else Cell("never called", "number"),
        Cell(f"{100 * row.weights / weights:.2f}", "number", _sortable(row.weights)),
        Cell(done, "number", _sortable(row.multiply_adds)),
        Cell(formats.weights if formats else numbers.MISSING),
        Cell(formats.activations if formats else numbers.MISSING),
        Cell(", ".join(formats.polarity) if formats else numbers.MISSING),
    ]


def _sortable(value: float) -> str:
    return repr(min(value, 1e300))  # infinity, above everything that is finite


def cost_table(evaluation: Evaluation, packed_bytes: int | None) -> Table:
    """Size and speed of both pipelines.

    Args:
        evaluation: of a quantized pipeline.
        packed_bytes: of its denoiser once it is packed, where that is known.
    """
    both = (evaluation.reference, evaluation.quantized)
    rows = [
        ["pipeline", *(facts.pipeline for facts in both)],
        ["denoiser", *(f"{facts.denoiser}, {facts.form}" for facts in both)],
        ["computes on", *(facts.device or numbers.MISSING for facts in both)],
        ["data type", *(facts.dtype or numbers.MISSING for facts in both)],
        ["denoiser's weights", *(numbers.size(facts.bytes) for facts in both)],
        *([["the same, packed", numbers.MISSING, numbers.size(packed_bytes)]] if packed_bytes else []),
        ["one denoising step", *(numbers.seconds(facts.seconds_per_step) for facts in both)],
        ["one image", *(numbers.seconds(facts.seconds_per_image) for facts in both)],
    ]
    notes = [
        f"A step works on {both[0].batch_size} prompts at once, the median without each call's first; an image is the "
        "wall time of the whole pipeline over the number of images."
    ]
    if both[1].form == "simulated":
        notes.append(
            "Quantization is simulated here: values are rounded, but stored and multiplied in full precision. Size and "
            "speed are those of the packed or exported model, not these."
        )
    if len({facts.device.partition(",")[0] for facts in both}) > 1:
        notes.append("The pipelines ran on different devices: their times do not compare.")
    return Table(("full precision", "quantized"), rows, notes)
