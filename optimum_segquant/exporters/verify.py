"""Does an exported graph give PyTorch's numbers, also on inputs of other sizes?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from modelopt_ext.export.onnx import Target, lowered, specs_of
from modelopt_ext.export.onnx.export import dynamic_dimensions, split_inputs
from modelopt_ext.nn.packed_spec import PackedSpec

from .compare import agreement, run, session
from .cpu import runs_optimized

logger = logging.getLogger(__name__)

LOWEST_SQNR = 20.0
"""dB. Codes on a tie round either way and the difference travels on: 40 to 60 dB are usual with 8 bits. A size that was
taken for a constant, or a wrong scale, gives less than 10."""
LOWEST_SQNR_4_BIT = 8.0
"""The same with 4-bit activations, where one code is worth sixteen times as much."""

Axes = Mapping[str, Mapping[int, str]]


class ExportMismatchError(ValueError):
    """An exported graph does not compute what the model does."""


def verify_module(path: Path, model: nn.Module, inputs: Mapping[str, Any], target: Target) -> None:
    """Check the file of a single model against the model.

    Raises:
        ExportMismatchError: says on which input sizes and by how much.
    """
    tensors, _ = split_inputs(model, inputs)
    floor = _floor(specs_of(model))

    def reference(values: Mapping[str, Any]) -> Tensor:
        return _first_tensor(model(**values))

    with lowered(model, target), torch.no_grad():
        axes = _graph_axes(path, tensors)
        _verify(type(model).__name__, path, reference, dict(inputs), axes, floor, target)


def verify_pipeline(
    directory: Path,
    pipeline: DiffusionPipeline,
    specs: Mapping[str, Mapping[str, PackedSpec]],
    target: Target,
    done: Callable[[str], object] = lambda component: None,
) -> None:
    """Check the files of a pipeline's quantized models against its models, which are lowered already.

    Args:
        directory: of the files.
        pipeline: with lowered models.
        specs: formats by component and layer.
        target: whom the files are for.
        done: called with each component that is checked.

    Raises:
        ExportMismatchError: says which component on which input sizes.
    """
    exports = _optimum_exports(pipeline)
    for component, layers in specs.items():
        model, config = exports[component]

        def reference(values: Mapping[str, Any], model: Any = model, config: Any = config) -> Tensor:
            with config.patch_model_for_export(model):
                return _first_tensor(model(**values))

        inputs = config.rename_ambiguous_inputs(config.generate_dummy_inputs(framework="pt"))
        inputs = _map_tensors(inputs, lambda _, value: value.to(pipeline.device))
        with torch.no_grad():
            _verify(
                component,
                directory / component / "model.onnx",
                reference,
                inputs,
                config.inputs,
                _floor(layers),
                target,
            )
        done(component)


def _optimum_exports(pipeline: DiffusionPipeline) -> dict[str, tuple[nn.Module, Any]]:
    """Optimum's view of a pipeline: each model with what describes its inputs."""
    from optimum.exporters.onnx.utils import get_sana_models_for_export
    from optimum.exporters.utils import get_diffusion_models_for_export

    from .onnx import component_dtype

    if type(pipeline).__name__.startswith("Sana"):
        return get_sana_models_for_export(pipeline, float_dtype=component_dtype(pipeline))
    return get_diffusion_models_for_export(pipeline, float_dtype=component_dtype(pipeline))


def _verify(
    label: str,
    path: Path,
    reference: Callable[[Mapping[str, Any]], Tensor],
    inputs: Mapping[str, Any],
    axes: Axes,
    floor: float,
    target: Target,
) -> None:
    try:
        runtime = session(path, optimize=runs_optimized(target))
    except Exception as error:
        raise ExportMismatchError(
            f"{label}: ONNX Runtime does not take the graph that PyTorch's exporter made of the model; "
            f"fixed sizes may help (dynamic_axes={{}}) where inputs are given: {error}"
        ) from error
    for values in (inputs, _map_tensors(inputs, lambda name, value: _halved(value, axes.get(name, {})))):
        sizes = {name: tuple(value.shape) for name, value in flat_tensors(values).items()}
        try:
            expected = reference(values)
        except Exception as error:
            if values is inputs:
                raise
            # Sizes that depend on each other, or on a constant argument.
            logger.warning("%s: not verified on inputs half as large, which the model refuses: %s", sizes, error)
            continue
        try:
            found = next(iter(run(runtime, flat_tensors(values)).values()))
        except Exception as error:
            raise ExportMismatchError(
                f"{label}: ONNX Runtime can't run the graph on inputs of the sizes {sizes}, which PyTorch "
                f"takes: a size became a constant in the graph, or dynamic_axes leaves one out ({error})"
            ) from error
        if found.shape != expected.shape:
            raise ExportMismatchError(
                f"{label}: the graph gives {tuple(found.shape)}, the model {tuple(expected.shape)} on "
                f"inputs of the sizes {sizes}: a size became a constant in the graph"
            )
        close = agreement(expected, found)
        logger.info("%s: graph and model agree to %.1f dB on %s", label, close.sqnr, sizes)
        if not close.sqnr >= floor:
            raise ExportMismatchError(
                f"{label}: graph and model agree to {close.sqnr:.1f} dB only (at least {floor:g} expected) "
                f"on inputs of the sizes {sizes}: a size or value became a constant in the graph"
            )


def _floor(layers: Mapping[str, PackedSpec]) -> float:
    return LOWEST_SQNR_4_BIT if any(spec.activations == "int4" for spec in layers.values()) else LOWEST_SQNR


def _halved(value: Tensor, axes: Mapping[int, str]) -> Tensor:
    """The first half along every dynamic dimension: another batch and other sizes from one example."""
    for axis in axes:
        value = value.narrow(axis, 0, max(1, value.shape[axis] // 2))
    return value


def _graph_axes(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """The graph's dynamic dimensions, by input."""
    shapes = dynamic_dimensions(onnx.load(path, load_external_data=False))
    return {
        name: {axis: size for axis, size in enumerate(shapes[name]) if isinstance(size, str)}
        for name in tensors
        if name in shapes
    }


def flat_tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call's arguments by name, those of a dict argument by their key."""
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat_tensors(value))
        elif isinstance(value, Tensor):
            found[name] = value
    return found


def _map_tensors(values: Mapping[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    return {
        name: _map_tensors(value, change)
        if isinstance(value, Mapping)
        else change(name, value)
        if isinstance(value, Tensor)
        else value
        for name, value in values.items()
    }


def _first_tensor(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return next(value for value in (result.values() if isinstance(result, Mapping) else result))
