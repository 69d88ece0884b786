"""From a quantized module to one ONNX file, by PyTorch's TorchScript exporter."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn

from .graph import LARGEST_FILE, finish, save
from .lowering import check_layers, lowered, specs_of
from .target import Target, choose_opset, target_named

logger = logging.getLogger(__name__)

Axes = Mapping[str, Mapping[int, str]]
"""Input or output name to the names of its dynamic dimensions."""


def export_module(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Mapping[str, Any],
    *,
    target: str = "onnxruntime",
    opset: int | None = None,
    dynamic_axes: Axes | None = None,
    output_names: Sequence[str] | None = None,
    largest_file: int = LARGEST_FILE,
) -> Path:
    """Write a quantized model as ONNX: codes as constants, QuantizeLinear and DequantizeLinear of the standard.

    Args:
        model: calibrated by ``mtq.quantize``, or with packed Linears. It is the same afterwards.
        path: of the file; its tensors go beside it, to ``<name>_data``, if it is larger than protobuf can hold.
        inputs: arguments of the model's forward by name, as in a real call. Tensors, also those in a dict, become
            inputs of the graph; everything else is a constant in it.
        target: one of :data:`TARGETS`, see :class:`Target`.
        opset: 19 to 21; by default what the layers need.
        dynamic_axes: dimensions that may differ from ``inputs``; by default batch, sequence and image sizes.
        output_names: by default those of the model's output class, or ``output``.
        largest_file: bytes from which on tensors go into a file of their own.

    Returns:
        ``path``.

    Raises:
        ValueError: opset, dynamic axes or layers that do not fit, or an operator that PyTorch's exporter does not know;
            nothing was written.
    """
    chosen = target_named(target)
    specs = specs_of(model)
    if not specs:
        raise ValueError("no Linear of the model is quantized: call mtq.quantize first, or torch.onnx.export")
    check_layers(specs, chosen)
    version = choose_opset(opset, specs, chosen)
    tensors, constants = split_inputs(model, inputs)
    if dynamic_axes is not None:
        check_axes(dynamic_axes, tensors)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with lowered(model, chosen), _flat_forward(model, tensors, constants) as names, torch.no_grad():
        outputs = names(output_names)
        axes = dict(dynamic_axes if dynamic_axes is not None else default_axes(tensors))
        if dynamic_axes is None:
            axes.update({name: default_axes_of(name, value) for name, value in outputs.items()})
        else:
            check_names(dynamic_axes, tensors, outputs)
            check_axes(dynamic_axes, {**tensors, **outputs})
        _torch_export(model, tensors, path, version, list(outputs), axes)
    finish_file(path, chosen, len(specs), largest_file)
    return path


def finish_file(path: Path, target: Target, layers: int, largest_file: int = LARGEST_FILE) -> None:
    """Bring an exported file of a lowered model into its final form, see :mod:`.graph`."""
    model = onnx.load(path)
    finish(model, {"segquant.target": target.name, "segquant.layers": str(layers)})
    save(model, path, largest_file)


def split_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Sort a call's arguments into tensors, in the order of forward's parameters, and constants.

    Returns:
        Tensors by graph input name (an argument's own name, or its key in a dict), and the other arguments by name,
        with None in place of every tensor in a dict.

    Raises:
        ValueError: forward has no such parameter, there is no tensor, or a name is taken twice.
    """
    parameters = inspect.signature(model.forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        unknown = sorted(set(inputs) - set(parameters))
        if unknown:
            raise ValueError(
                f"{type(model).__name__}.forward has no parameters {', '.join(unknown)}: it takes "
                f"{', '.join(parameters)}"
            )
    order = [name for name in parameters if name in inputs] + [name for name in inputs if name not in parameters]
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name in order:
        value = inputs[name]
        found = {name: value} if isinstance(value, Tensor) else {}
        if isinstance(value, Mapping):
            found = {key: item for key, item in value.items() if isinstance(item, Tensor)}
            constants[name] = {key: None if key in found else item for key, item in value.items()}
        elif not isinstance(value, Tensor):
            constants[name] = value
        if taken := set(found) & set(tensors):
            raise ValueError(f"two inputs have the name {taken.pop()!r}: rename the key in the dict {name!r}")
        tensors.update(found)
    if not tensors:
        raise ValueError("inputs holds no tensor: give the arguments of a real call, by name")
    return tensors, constants


def check_axes(axes: Axes, tensors: Mapping[str, Tensor]) -> None:
    """Compare dynamic axes with example tensors; names of outputs, where not known yet, are let through.

    Raises:
        ValueError: a dimension that a tensor does not have, or two sizes under one name.
    """
    sizes: dict[str, tuple[str, int]] = {}
    for name, dimensions in axes.items():
        value = tensors.get(name)
        if value is None:
            continue
        for dimension, label in dimensions.items():
            if not -value.dim() <= dimension < value.dim():
                raise ValueError(
                    f"dynamic_axes: {name!r} has {value.dim()} dimensions, {tuple(value.shape)}, and none of number "
                    f"{dimension} ({label!r})"
                )
            first, size = sizes.setdefault(label, (name, value.shape[dimension]))
            if size != value.shape[dimension]:
                raise ValueError(
                    f"dynamic_axes: {label!r} is {size} in {first!r} and {value.shape[dimension]} in {name!r}: give "
                    "dimensions of different size different names"
                )


def check_names(axes: Axes, tensors: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    """Refuse dynamic axes of tensors that the graph does not have.

    Raises:
        ValueError: lists the names there are.
    """
    unknown = sorted(set(axes) - set(tensors) - set(outputs))
    if unknown:
        raise ValueError(
            f"dynamic_axes names {', '.join(unknown)}: the inputs are {', '.join(tensors)}, the outputs "
            f"{', '.join(outputs)}"
        )


def default_axes(tensors: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Batch, sequence and image sizes of each tensor, by its number of dimensions."""
    return {name: default_axes_of(name, value) for name, value in tensors.items() if value.dim()}


def default_axes_of(name: str, value: Tensor) -> dict[int, str]:
    """(B, C, H, W): batch, height, width; (B, T, C): batch and ``<name>_length``; (B, ...): batch."""
    if value.dim() == 4:
        return {0: "batch_size", 2: "height", 3: "width"}
    if value.dim() == 3:
        return {0: "batch_size", 1: f"{name}_length"}
    return {0: "batch_size"} if value.dim() else {}


@contextmanager
def _flat_forward(
    model: nn.Module, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]
) -> Iterator[Callable[[Sequence[str] | None], dict[str, Tensor]]]:
    """Let ``model.forward`` take the tensors one after the other and return a tuple of tensors.

    Not a wrapping module: the names of nodes and weights in the graph would change.

    Yields:
        A function that runs the model and returns its outputs by name.
    """
    original, had_own = model.forward, "forward" in model.__dict__
    order = list(tensors)

    def call(*values: Tensor) -> Any:
        given = dict(zip(order, values, strict=True))
        arguments: dict[str, Any] = {
            name: {key: given.pop(key) if item is None and key in given else item for key, item in value.items()}
            if isinstance(value, Mapping)
            else value
            for name, value in constants.items()
        }
        return original(**arguments, **given)

    def forward(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(_named_outputs(call(*values), None).values())

    def outputs(names: Sequence[str] | None) -> dict[str, Tensor]:
        return _named_outputs(call(*tensors.values()), names)

    training = model.training
    model.eval()
    model.forward = forward
    try:
        yield outputs
    finally:
        if had_own:
            model.forward = original
        else:
            del model.__dict__["forward"]
        model.train(training)


def _named_outputs(result: Any, names: Sequence[str] | None) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        found = {"output": result}
    elif isinstance(result, Mapping):
        found = {name: value for name, value in result.items() if isinstance(value, Tensor)}
    elif isinstance(result, tuple):
        tensors = [value for value in result if isinstance(value, Tensor)]
        found = {f"output_{index}" if len(tensors) > 1 else "output": value for index, value in enumerate(tensors)}
    else:
        raise ValueError(f"the model returns a {type(result).__name__}: only tensors, tuples and dicts are exported")
    if names is None:
        return {f"out_{name}" if name in ("sample", "hidden_states") else name: value for name, value in found.items()}
    if len(names) != len(found):
        raise ValueError(f"output_names has {len(names)} names, the model returns {len(found)} tensors: {list(found)}")
    return dict(zip(names, found.values(), strict=True))


def _torch_export(
    model: nn.Module, tensors: Mapping[str, Tensor], path: Path, opset: int, outputs: list[str], axes: Axes
) -> None:
    with warnings.catch_warnings():
        # The exporter's own notices: that it is the older one, and what it takes for constants.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model,
                tuple(tensors.values()),
                str(path),
                input_names=list(tensors),
                output_names=outputs,
                dynamic_axes={name: dict(value) for name, value in axes.items() if value},
                opset_version=opset,
                dynamo=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            path.unlink(missing_ok=True)
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"PyTorch's exporter can't write {type(model).__name__}: {reason}. Optimum replaces many such "
                "operators: export with optimum_segquant.exporters.export_onnx"
            ) from error


def dynamic_dimensions(model: ModelProto) -> dict[str, tuple[int | str, ...]]:
    """The shape of every input and output, names for dynamic dimensions."""
    return {
        value.name: tuple(dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        for value in (*model.graph.input, *model.graph.output)
    }
