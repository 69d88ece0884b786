"""The report of a quantization, its configuration and the versions, as a page shows them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import numbers

MAIN_PACKAGES = ("python", "optimum-segquant", "torch", "nvidia-modelopt", "diffusers", "transformers", "optimum")


@dataclass(frozen=True)
class Component:
    """One quantized model: its heading, and what is known of it."""

    title: str
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class QuantizationView:
    """Quantized models, and other facts by heading."""

    components: Sequence[Component]
    tables: Sequence[tuple[str, Sequence[tuple[str, str]]]]


def quantization_view(report: Mapping[str, Any]) -> QuantizationView:
    """What ``QuantizationReport.to_dict()`` says; keys that are not known are shown as they are."""
    known = {"format", "version", "components", "versions", "pipeline", "export", "exported_bytes"}
    written = report.get("export")
    whole = [
        ("pipeline", str(report.get("pipeline", numbers.MISSING))),
        ("written as", f"{written}, {numbers.size(report.get('exported_bytes'))}" if written else "nothing"),
    ]
    tables: list[tuple[str, Sequence[tuple[str, str]]]] = [("Run", whole)]
    titles = {"calibration": "Calibration data", "held_out": "Held-out data", "seconds": "Seconds by stage"}
    for key, value in report.items():
        if key in known:
            continue
        if isinstance(value, Mapping) and value:
            tables.append((titles.get(key, key), _facts(value)))
        else:
            whole.append((key.replace("_", " "), _text(value)))
    return QuantizationView([_component(part) for part in report.get("components", ())], tables)


def _component(part: Mapping[str, Any]) -> Component:
    counts = part.get("layers") or {}
    before, after = part.get("bytes_before"), part.get("bytes_after")
    facts = [
        ("config", _text(part.get("config_name"))),
        ("parameters", f"{part['parameters']:,}" if part.get("parameters") else numbers.MISSING),
        ("size", f"{numbers.size(before)} before, {numbers.size(after)} packed ({numbers.ratio(after, before)})"),
        ("calibration", f"{_text(part.get('calls'))} calls at {_text(part.get('timesteps'))} timesteps"),
        ("time", numbers.seconds(part.get("seconds"))),
        ("SQNR on held-out data", f"{_text(part['sqnr'])} dB" if part.get("sqnr") is not None else "not measured"),
        ("plan", _text(part.get("plan_summary"))),
    ]
    facts += [(f"layers: {name.replace('_', ' ')}", _text(value)) for name, value in counts.items()]
    shown = {"name", "model", "config_name", "config", "parameters", "bytes_before", "bytes_after", "layers", "plan"}
    shown |= {"plan_summary", "calls", "timesteps", "seconds", "sqnr"}
    facts += [(key.replace("_", " "), _text(value)) for key, value in part.items() if key not in shown]
    return Component(f"{part.get('name', 'model')} ({part.get('model', 'unknown class')})", facts)


def _facts(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name).replace("_", " "), _text(value)) for name, value in mapping.items()]


def _text(value: Any) -> str:
    """Plain data in one line."""
    if value is None or value in ({}, []):
        return numbers.MISSING
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return str(value)


def config_texts(items: Iterable[tuple[str, Mapping[str, Any] | None]]) -> list[tuple[str, str]]:
    """Configurations as indented JSON, by heading."""
    return [(title, json.dumps(value, indent=2, default=str)) for title, value in items if value]


def ordered_versions(versions: Mapping[str, str]) -> list[tuple[str, str]]:
    """The main packages first."""
    first = [name for name in MAIN_PACKAGES if name in versions]
    return [(name, versions[name]) for name in (*first, *sorted(set(versions) - set(first)))]
