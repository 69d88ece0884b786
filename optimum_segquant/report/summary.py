"""The figures at the top of a report, and what is not among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..evaluation import Evaluation, MetricResult, PipelineFacts
from ..evaluation.perceptual import HIGHER_IS_BETTER
from . import numbers

METRIC_LABELS: Mapping[str, str] = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "fid": "FID",
    "clip_score": "CLIP score",
}


@dataclass(frozen=True)
class Card:
    """One figure of the summary."""

    label: str
    value: str
    unit: str = ""
    note: str = ""
    absent: bool = False


def cards(evaluation: Evaluation, packed_bytes: int | None) -> list[Card]:
    """The figures at the top of the page.

    Args:
        evaluation: of a quantized pipeline.
        packed_bytes: of its denoiser once it is packed, where that is known.
    """
    found = [_velocity_card(evaluation), _latents_card(evaluation), _layers_card(evaluation)]
    found += [_metric_card(name, result) for name, result in evaluation.metrics.items()]
    return [*found, *_cost_cards(evaluation.reference, evaluation.quantized, packed_bytes)]


def _absent(label: str, note: str = "not measured, see below") -> Card:
    return Card(label, "missing", note=note, absent=True)


def _velocity_card(evaluation: Evaluation) -> Card:
    label = "Velocity SQNR"
    if evaluation.velocity is None:
        return _absent(label)
    return Card(label, numbers.decibels(evaluation.velocity.overall), "dB", "of the denoiser's output on equal inputs")


def _latents_card(evaluation: Evaluation) -> Card:
    label = "Final latents"
    if not evaluation.latents:
        return _absent(label)
    last = evaluation.latents[-1]
    return Card(label, numbers.decibels(last.sqnr), "dB", f"after {last.step + 1} steps of its own sampling")


def _layers_card(evaluation: Evaluation) -> Card:
    label = "Worst layer"
    if evaluation.layers is None:
        return _absent(label)
    worst = evaluation.layers.ranking[0]
    return Card(label, numbers.decibels(worst.local_sqnr), "dB", worst.name)


def _metric_card(name: str, result: MetricResult) -> Card:
    label, _, unit = METRIC_LABELS[name].partition(", ")
    if result.skipped:
        return Card(label, "skipped", note="see the metrics", absent=True)
    against = f"full precision {numbers.metric(name, result.reference)}" if result.reference is not None else ""
    better = "higher is better" if HIGHER_IS_BETTER[name] else "lower is better"
    return Card(label, numbers.metric(name, result.value), unit, against or better)


def _cost_cards(reference: PipelineFacts, quantized: PipelineFacts, packed_bytes: int | None) -> list[Card]:
    label, note = "Denoiser's size", f"of {numbers.size(reference.bytes)}"
    simulated = quantized.form == "simulated"
    size = packed_bytes if simulated else quantized.bytes
    size_card = _absent(label, "known once the model is packed or exported")
    if size:
        packed = ", once packed" if simulated else ""
        size_card = Card(label, numbers.size(size), note=f"{numbers.ratio(size, reference.bytes)} {note}{packed}")
    label, step = "Time per step", quantized.seconds_per_step
    if simulated:
        return [size_card, _absent(label, "simulated quantization says nothing about speed")]
    if step is None:
        return [size_card, _absent(label, "the pipeline does not show its steps")]
    note = f"{numbers.ratio(step, reference.seconds_per_step)} of {numbers.seconds(reference.seconds_per_step)}"
    return [size_card, Card(label, numbers.seconds(step), note=note)]


def missing(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Parts and metrics without a number, each with its reason."""
    names = {"velocity": "velocity SQNR", "layers": "layer by layer", "latents": "latents"}
    found = [(names.get(name, name), reason) for name, reason in evaluation.missing.items()]
    found += [
        (METRIC_LABELS[name].partition(",")[0], result.skipped)
        for name, result in evaluation.metrics.items()
        if result.skipped
    ]
    return found
