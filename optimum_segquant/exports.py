"""Writing a quantized pipeline or model as a directory, in any of the forms that something reads."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from diffusers import ModelMixin
from torch import nn

import modelopt_ext
from modelopt_ext import PackedLinear
from modelopt_ext.export.native import unrepresentable_settings

from .checkpoints.native import export_native
from .checkpoints.save import save_segquant
from .components import modules_of
from .configs import NamedConfig, algorithm_of, is_segquant
from .evaluation import RecordedCalls
from .exporters import check_dtypes, export_onnx, supported_pipelines
from .exporters.verify import ExportMismatchError
from .files import check_replaceable
from .progress import written_bytes
from .quantization_report import model_bytes, packed_bytes

__all__ = ["ONNX_TARGETS", "ExportFormat", "check_config", "check_export", "expected_bytes", "write_export"]

logger = logging.getLogger(__name__)

ExportFormat = Literal["segquant", "native", "onnx", "onnx-vnni", "tensorrt"]
"""What a directory is for: PyTorch (packed), inference engines (stock keys), ONNX Runtime anywhere or on CPUs with VNNI
or AMX, TensorRT."""

ONNX_TARGETS = {"onnx": "onnxruntime", "onnx-vnni": "onnxruntime-vnni", "tensorrt": "tensorrt"}
"""Those that are ONNX, with the target of :func:`export_onnx`."""

_SMALLEST_SHARE = 8
"""Quantized weights take at least this part of full precision: int4 of float32."""


def check_export(
    model: Any, components: Mapping[str, nn.Module], save_dir: str | os.PathLike[str], export: str
) -> None:
    """Refuse what can't be written, before any work.

    Args:
        model: pipeline or single model.
        components: the models that are or will be quantized, by name.
        save_dir: where to.
        export: one of :data:`ExportFormat`.

    Raises:
        ValueError: an unknown format, or one that does not go with the model.
        ImportError: what the export needs is not installed.
        FileExistsError, NotADirectoryError: ``save_dir`` holds something that is not a model.
        OSError: the disk has less space than the smallest form of the model takes.
    """
    if export not in get_args(ExportFormat):
        raise ValueError(f"export must be one of {', '.join(get_args(ExportFormat))}, got {export!r}")
    if export in ("segquant", "native") and not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"a {type(model).__name__} has no save_pretrained, so no {export!r} directory can be written: export it to "
            "'onnx' or 'tensorrt', or leave save_dir out and save its state_dict"
        )
    if export == "native":
        for name, part in components.items():
            if not isinstance(part, ModelMixin):
                raise ValueError(
                    f"{name} is a {type(part).__name__}, and only models of diffusers have native checkpoints: leave "
                    "it out of the components, or use export='segquant'"
                )
    if export in ONNX_TARGETS:
        known = supported_pipelines()  # raises if optimum-onnx or onnxruntime is missing
        if type(model).__name__ in known:
            check_dtypes(model)
    target = Path(save_dir).expanduser().resolve()
    check_replaceable(target)
    _check_space(target, _modules(model, components), components)


def check_config(name: str, config: NamedConfig, export: str) -> None:
    """Refuse a config whose models the export can't hold, before any work.

    Args:
        name: of the component.
        config: for it.
        export: one of :data:`ExportFormat`.

    Raises:
        ValueError: names the settings and what would do.
    """
    if export == "native" and is_segquant(config.config):
        wrong = unrepresentable_settings(algorithm_of(config.config))
        if wrong:
            raise ValueError(
                f"{config.name} for {name}: native checkpoints can't hold "
                f"{', '.join(f'{field}={value!r}' for field, value in wrong.items())}; use one of the configs "
                "native_fp8, native_fp8_per_token, native_int8_per_token, or export='segquant'"
            )


def write_export(
    model: Any,
    components: Mapping[str, nn.Module],
    calls: Mapping[str, Any] | None,
    directory: Path,
    export: ExportFormat,
    *,
    progress: bool = True,
) -> None:
    """Write a directory; call it inside ``staged_directory``.

    A pipeline that Optimum has no ONNX form of has each of its quantized models written by itself, into a folder of its
    component's name: for inputs of any size, or, with a warning, of the calibration's where the model bakes sizes into
    its graph.

    Args:
        model: pipeline or single model.
        components: its quantized models by name; packed in place for ``segquant``. Models that accelerate offloads or
            has spread over devices lose its hooks, and their weights come back to where they were loaded to.
        calls: recorded calls by component, whose first one an ONNX export of a single model is traced with.
        directory: empty.
        export: its form.
        progress: show a bar.

    Raises:
        ValueError: a layer has what the form can't say, or a single model's inputs are not known.
        OSError: the disk is full.
    """
    for name, part in components.items():
        _take_off_hooks(name, part)
    if export in ONNX_TARGETS:
        _write_onnx(model, components, calls, directory, ONNX_TARGETS[export], progress)
        return
    if export == "segquant":
        for part in components.values():
            if not any(isinstance(module, PackedLinear) for module in part.modules()):
                modelopt_ext.compress(part, progress=progress)
    with written_bytes(directory, expected_bytes(model), progress=progress):
        if export == "native":
            export_native(model, directory)
        else:
            save_segquant(model, directory)


def expected_bytes(model: Any) -> int:
    """About what the files of a packed or simulated pipeline or model take, by which a bar counts."""
    parts = [model] if isinstance(model, nn.Module) else modules_of(model).values()
    return sum(packed_bytes(part) or model_bytes(part) for part in parts)


def _take_off_hooks(name: str, model: nn.Module) -> None:
    """Take accelerate's hooks off, whose weights nothing can be packed from."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)
        logger.info("accelerate's hooks were taken off %s for its export", name)


def _write_onnx(
    model: Any,
    components: Mapping[str, nn.Module],
    calls: Mapping[str, Any] | None,
    directory: Path,
    target: str,
    progress: bool,
) -> None:
    alone = isinstance(model, nn.Module)
    if not alone and type(model).__name__ in supported_pipelines():
        export_onnx(model, directory, target=target, progress=progress)
        return
    if not alone:
        logger.warning(
            "Optimum has no ONNX form of %s: %s written each by itself", type(model).__name__, ", ".join(components)
        )
    for name, part in components.items():
        found = None if calls is None else calls[name]
        if not isinstance(found, RecordedCalls):
            raise ValueError(
                f"exporting {name} by itself needs a recorded call: calibrate on prompts or recorded calls, or use "
                "export_onnx(model, directory, inputs=...)"
            )
        folder = directory if alone else directory / name
        inputs = next(iter(found)).inputs
        try:
            export_onnx(part, folder, target=target, inputs=inputs, progress=progress)
        except ExportMismatchError as error:
            logger.warning("%s is exported for the sizes it was calibrated on only, not for any: %s", name, error)
            export_onnx(part, folder, target=target, inputs=inputs, dynamic_axes={}, progress=progress)


def _modules(model: Any, components: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    return components if isinstance(model, nn.Module) else modules_of(model)


def _check_space(target: Path, modules: Mapping[str, nn.Module], components: Mapping[str, nn.Module]) -> None:
    least = sum(model_bytes(part) // (_SMALLEST_SHARE if name in components else 1) for name, part in modules.items())
    existing = next(folder for folder in (target, *target.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < least:
        raise OSError(
            errno.ENOSPC,
            f"the disk of {target} has {free / 2**30:.1f} GiB free, and the quantized models take at least "
            f"{least / 2**30:.1f}: free some, or save to another disk",
        )
