"""Where exported files come from: source model, quantization config, segment plan, formats, versions.

An export writes this record beside its files, under :data:`EXPORT_RECORD`. Whoever serves the files months later finds
in it what was done to the model, and with which packages it can be done again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .versions import installed_versions

__all__ = ["EXPORT_RECORD", "component_record", "export_record", "read_export_record", "write_export_record"]

EXPORT_RECORD = "segquant_export.json"
_RECORD_VERSION = 1


def component_record(model: nn.Module) -> dict[str, Any]:
    """What quantization made of one model, as plain data.

    Returns:
        ``class``; ``layers``, the packed format of each quantized Linear; ``plan``, the segment plan, and ``config``,
        ModelOpt's settings, both None for a model that was loaded packed, whose layers say the segments.
    """
    from modelopt_ext import plan_of
    from modelopt_ext.export.onnx import specs_of

    plan = plan_of(model)
    return {
        "class": type(model).__name__,
        "layers": {name: dataclasses.asdict(spec) for name, spec in specs_of(model).items()},
        "plan": None if plan is None else plan.to_dict(),
        "config": _modelopt_config(model),
    }


def _modelopt_config(model: nn.Module) -> dict[str, Any] | None:
    from modelopt.torch.opt.conversion import ModeloptStateManager

    if not ModeloptStateManager.is_converted(model):
        return None
    return {mode: _plain(state["config"]) for mode, state in ModeloptStateManager(model).state_dict()}


def _plain(value: Any) -> Any:
    """Only what JSON knows; anything else by its text."""
    return json.loads(json.dumps(value, default=str))


def export_record(source: Any, components: Mapping[str, nn.Module], **about: Any) -> dict[str, Any]:
    """The record of an export.

    Args:
        source: the pipeline or model, for its class and the name it was loaded by.
        components: the quantized models by name.
        about: more to say, e.g. ``target="tensorrt"``.
    """
    return {
        "record_version": _RECORD_VERSION,
        "class": type(source).__name__,
        "source": _source_name(source),
        **about,
        "components": {name: component_record(model) for name, model in components.items()},
        "versions": installed_versions(),
    }


def _source_name(source: Any) -> str | None:
    """The name that a model was loaded by; of a local directory only its last part, since paths are private."""
    config = getattr(source, "config", None)
    name = getattr(source, "name_or_path", None) or (
        config.get("_name_or_path") if isinstance(config, Mapping) else None
    )
    if not name:
        return None
    return Path(name).name if Path(name).exists() or os.path.isabs(name) else str(name)


def write_export_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the record into an exported directory, before its manifest."""
    (directory / EXPORT_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_export_record(directory: Path) -> dict[str, Any] | None:
    """The record of an exported directory, None if it has none.

    Raises:
        ValueError: it is damaged.
    """
    path = directory / EXPORT_RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): export the model again") from error
    if not isinstance(record, dict) or record.get("record_version") != _RECORD_VERSION:
        raise ValueError(f"{path} was written by another release: export the model again, or update optimum-segquant")
    return record
