"""The report: one HTML file that holds everything it shows and loads nothing."""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from modelopt_ext import SegmentPlan

from ..evaluation import Evaluation
from ..files import check_writable, full_disk_named, replaced_file
from ..versions import versions
from .drawings import LayerView, PlanView, Plot, layer_view, plan_view, trajectory
from .gallery import Pair, pairs_of
from .quantization_view import QuantizationView, config_texts, ordered_versions, quantization_view
from .summary import Card, cards, missing
from .tables import LAYER_COLUMNS, Cell, MetricRow, Table, cost_table, layer_rows, metric_rows, unasked_metrics

SECTIONS = (
    ("images", "Images"),
    ("metrics", "Metrics"),
    ("trajectory", "Trajectory"),
    ("layers", "Layers"),
    ("plan", "Segment plan"),
    ("cost", "Size and speed"),
    ("quantization", "Quantization"),
    ("setup", "Configuration"),
)

_NOT_EVALUATED = "no evaluation was given: write_report(path, evaluate(...))"


@dataclass(frozen=True)
class Page:
    """Everything that the template shows."""

    title: str
    subtitle: str
    date: str
    generator: str
    sections: Sequence[tuple[str, str]]
    cards: Sequence[Card]
    missing: Sequence[tuple[str, str]]
    pairs: Sequence[Pair]
    pairs_note: str
    pair_width: int
    metrics: Sequence[MetricRow]
    metrics_note: str
    trajectory: Sequence[Plot]
    layers: LayerView | None
    layer_columns: Sequence[tuple[str, str]]
    layer_rows: Sequence[Sequence[Cell]]
    layers_note: str
    plan: PlanView | None
    plan_note: str
    cost: Table | None
    cost_note: str
    quantization: QuantizationView | None
    quantization_note: str
    configs: Sequence[tuple[str, str]]
    config_note: str
    versions: Sequence[tuple[str, str]]


def write_report(
    path: str | os.PathLike[str],
    evaluation: Evaluation | None = None,
    *,
    quantization: Any = None,
    plan: SegmentPlan | None = None,
    config: Mapping[str, Any] | None = None,
    title: str | None = None,
    max_images: int = 16,
    image_size: int = 768,
) -> Path:
    """Write a page with images, errors, plan, sizes, configuration and versions; what is missing says why.

    The file holds its pictures, plots, styles and script, is opened by a double click, and asks no server for anything.

    Args:
        path: of the HTML file; its folder is made, an older file is replaced once the new one is whole.
        evaluation: from :func:`~optimum_segquant.evaluation.evaluate`.
        quantization: the report of ``SegQuantizer.quantize``, or its ``to_dict()``.
        plan: the segments; by default those of ``evaluation`` or ``quantization``.
        config: the ModelOpt config; by default that of ``quantization``.
        title: of the page.
        max_images: image pairs at most.
        image_size: pixels of an image's longer side, larger ones are scaled down.

    Returns:
        The path.

    Raises:
        ValueError: neither an evaluation nor a quantization report, or a limit that is not positive.
        IsADirectoryError, NotADirectoryError: ``path`` is a directory, or its folder a file.
        OSError: the disk is full; an older file is as before.
    """
    if evaluation is None and quantization is None:
        raise ValueError("nothing to report: give an evaluation, the report of a quantization, or both")
    report = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
    if report is not None and not isinstance(report, Mapping):
        raise ValueError(
            f"quantization is a {type(quantization).__name__}: give the report that SegQuantizer.quantize returns, or "
            "its to_dict()"
        )
    if max_images < 0 or image_size < 16:
        raise ValueError("max_images must not be negative, and image_size at least 16 pixels")
    target = check_writable(path, example="report.html", kind="an HTML file")
    text = render(_page(evaluation, report, plan, config, title, max_images, image_size))
    target.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_named(f"writing {target}", "free some space and write it again"), replaced_file(target) as partial:
        partial.write_text(text, encoding="utf-8")
    return target


def render(page: Page) -> str:
    """The HTML text; every value of the page is escaped."""
    environment = Environment(
        loader=PackageLoader("optimum_segquant.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_template(name) for name in ("report.css", "report.js"))
    # Nothing but these two texts and inlined pictures: text that became markup by mistake could not run or load.
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    template = environment.get_template("report.html.j2")
    return template.render(page=page, style=Markup(style), script=Markup(script), policy=Markup(policy))


def _template(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _page(
    evaluation: Evaluation | None,
    quantization: Mapping[str, Any] | None,
    plan: SegmentPlan | None,
    config: Mapping[str, Any] | None,
    title: str | None,
    max_images: int,
    image_size: int,
) -> Page:
    parts = quantization.get("components", ()) if quantization else ()
    plan = plan or _plan_of(evaluation, parts)
    configs = [(f"Quantization config of {part.get('name', 'the model')}", part.get("config")) for part in parts]
    if config:
        configs = [("Quantization config", config)]
    call = [("Arguments of the pipeline calls", evaluation.call)] if evaluation else []
    pairs, pairs_note = pairs_of(evaluation, max_images, image_size) if evaluation else ([], _NOT_EVALUATED)
    table = evaluation.layers if evaluation else None
    packed = _packed_bytes(evaluation, parts)
    return Page(
        title=title or _title(evaluation, quantization),
        subtitle=_subtitle(evaluation, parts),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        generator=importlib.metadata.version("optimum-segquant"),
        sections=SECTIONS,
        cards=cards(evaluation, packed) if evaluation else [],
        missing=missing(evaluation) if evaluation else [("evaluation", _NOT_EVALUATED)],
        pairs=pairs,
        pairs_note=pairs_note,
        pair_width=_pair_width(evaluation),
        metrics=metric_rows(evaluation.metrics) if evaluation else [],
        metrics_note=unasked_metrics(evaluation.metrics) if evaluation else _NOT_EVALUATED,
        trajectory=trajectory(evaluation) if evaluation else [Plot("Error by timestep", "", "", _NOT_EVALUATED)],
        layers=layer_view(table) if table else None,
        layer_columns=LAYER_COLUMNS,
        layer_rows=layer_rows(table, evaluation.formats) if evaluation and table else [],
        layers_note=evaluation.missing.get("layers", "") if evaluation else _NOT_EVALUATED,
        plan=plan_view(plan) if plan else None,
        plan_note="the denoiser does not know its plan (packed and exported models do not): give plan=plan_of(model), "
        "called before compress",
        cost=cost_table(evaluation, packed) if evaluation else None,
        cost_note=_NOT_EVALUATED,
        quantization=quantization_view(quantization) if quantization else None,
        quantization_note="no report of the quantization was given: write_report(..., quantization=result.report)",
        configs=config_texts([*configs, *call]),
        config_note="" if any(value for _, value in configs) else "no quantization config was given: config=...",
        versions=ordered_versions(evaluation.versions if evaluation else versions()),
    )


def _plan_of(evaluation: Evaluation | None, parts: Sequence[Mapping[str, Any]]) -> SegmentPlan | None:
    """The evaluated denoiser's plan, or that of the first quantized model with one."""
    if evaluation is not None and evaluation.plan is not None:
        return evaluation.plan
    plan = next((part["plan"] for part in parts if part.get("plan")), None)
    return None if plan is None else SegmentPlan.from_dict(plan)


def _packed_bytes(evaluation: Evaluation | None, parts: Sequence[Mapping[str, Any]]) -> int | None:
    """Of the evaluated denoiser, from the report of its quantization."""
    if evaluation is None:
        return None
    return next((part.get("bytes_after") for part in parts if part.get("model") == evaluation.quantized.denoiser), None)


def _title(evaluation: Evaluation | None, quantization: Mapping[str, Any] | None) -> str:
    name = evaluation.quantized.denoiser if evaluation else str((quantization or {}).get("pipeline", "model"))
    return f"{name}, quantized"


def _subtitle(evaluation: Evaluation | None, parts: Sequence[Mapping[str, Any]]) -> str:
    names = ", ".join(dict.fromkeys(str(part["config_name"]) for part in parts if part.get("config_name")))
    told = [names] if names else []
    if evaluation is not None:
        count = len(evaluation.prompts)
        told.append(f"{evaluation.quantized.form} against {evaluation.reference.form}")
        told.append(f"{count} prompt{'s' if count > 1 else ''}")
        told.append(f"{evaluation.call.get('num_inference_steps')} steps")
        told.append(evaluation.quantized.device)
    return " · ".join(part for part in told if part)


def _pair_width(evaluation: Evaluation | None) -> int:
    """How wide images are shown at first, in pixels of the page."""
    return 220 if evaluation is None or evaluation.images.shape[-1] < 512 else 340
