"""What an ONNX file takes and gives, in the words of a serving configuration."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto

__all__ = ["ModelSignature", "TensorSignature", "signature_of"]

STEP_AXIS = "step"
"""Optimum's name for the axis of a denoiser's timesteps: one for each row of the batch."""

TENSOR_TYPES: Mapping[int, str] = {
    TensorProto.BOOL: "TYPE_BOOL",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.UINT16: "TYPE_UINT16",
    TensorProto.UINT32: "TYPE_UINT32",
    TensorProto.UINT64: "TYPE_UINT64",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.INT16: "TYPE_INT16",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.STRING: "TYPE_STRING",
    TensorProto.BFLOAT16: "TYPE_BF16",
}


@dataclass(frozen=True)
class TensorSignature:
    """One input or output.

    Attributes:
        name: in the graph.
        data_type: Triton's name, e.g. ``"TYPE_FP32"``.
        shape: a size, or the name of a dynamic axis (``"<tensor>:<index>"`` where the graph names none).
    """

    name: str
    data_type: str
    shape: tuple[int | str, ...]

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape with -1 for dynamic axes."""
        return tuple(size if isinstance(size, int) else -1 for size in self.shape)


@dataclass(frozen=True)
class ModelSignature:
    """All inputs and outputs of a model, in the order of the graph."""

    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]

    @property
    def tensors(self) -> tuple[TensorSignature, ...]:
        """Inputs, then outputs."""
        return (*self.inputs, *self.outputs)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the inputs' dynamic axes, each once."""
        return tuple(dict.fromkeys(size for tensor in self.inputs for size in tensor.shape if isinstance(size, str)))

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Names of the axis along which a server may join requests, empty if it may not.

        Triton joins requests along the first axis of every input and output, so that all of them must have it. A
        denoiser's timesteps have an axis name of their own; position ids, as FLUX has, have no batch.
        """
        first = [tensor.shape[0] if tensor.shape else None for tensor in self.tensors]
        names = {size for size in first if size != STEP_AXIS}
        if len(names) != 1 or not isinstance(name := names.pop(), str):
            return ()
        return (name, STEP_AXIS) if STEP_AXIS in first else (name,)


def signature_of(model: ModelProto | str | os.PathLike[str]) -> ModelSignature:
    """Read a graph's inputs and outputs; weights in other files stay there.

    Args:
        model: the model, or the path of its file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no ONNX model, or a tensor without type or rank, or of a type that Triton does not know.
    """
    if not isinstance(model, ModelProto):
        model = load_graph(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    return ModelSignature(
        inputs=_tensors(value for value in model.graph.input if value.name not in constants),
        outputs=_tensors(model.graph.output),
    )


def load_graph(path: str | os.PathLike[str]) -> ModelProto:
    """An ONNX file without the weights that lie in other files.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an ONNX model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file: give the path of model.onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, which has no public name
        raise ValueError(f"{path} is not an ONNX model, or is damaged: export it again") from error
    if not model.HasField("graph"):
        raise ValueError(f"{path} holds no graph: it is not an ONNX model, or is damaged")
    return model


def _tensors(values: Iterable[ValueInfoProto]) -> tuple[TensorSignature, ...]:
    return tuple(_tensor(value) for value in values)


def _tensor(value: ValueInfoProto) -> TensorSignature:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise ValueError(f"{value.name} is no tensor of a known rank: export the model with its axes")
    if kind.elem_type not in TENSOR_TYPES:
        raise ValueError(
            f"{value.name} is {TensorProto.DataType.Name(kind.elem_type)}, which Triton has no type for: export the "
            "model with float32, float16 or integer inputs and outputs"
        )
    shape = tuple(
        dimension.dim_value
        if dimension.HasField("dim_value") and dimension.dim_value > 0
        else dimension.dim_param or f"{value.name}:{index}"
        for index, dimension in enumerate(kind.shape.dim)
    )
    return TensorSignature(value.name, TENSOR_TYPES[kind.elem_type], shape)
