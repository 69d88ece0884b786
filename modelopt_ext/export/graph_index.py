"""Looking things up in an ONNX graph: who makes a tensor, who reads it, its type and shape, its value if constant.

Reads files of any size: external data stay on the disk but for the few small constants that are asked for.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

DEFAULT_DOMAINS = ("", "ai.onnx")

# Shape inference serializes the model, which protobuf limits to 2 GB; shapes and axes are far below this size.
_LARGE = 1024
"""Elements of an initializer from which on shape inference does not need its values."""


class GraphIndex:
    """An ONNX model, indexed. Nodes of If and Loop bodies count as nodes of the graph; local functions are inlined.

    Args:
        source: a model in memory, or the path of one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an ONNX model.
    """

    def __init__(self, source: ModelProto | str | os.PathLike[str]) -> None:
        self._directory = ""
        if not isinstance(source, ModelProto):
            self._directory = str(Path(source).resolve().parent)
            source = _read(Path(source))
        self.model = onnx.inliner.inline_local_functions(source) if source.functions else source
        self.nodes: list[NodeProto] = list(_nodes(self.model.graph))
        self.initializers: dict[str, TensorProto] = {}
        inputs: set[str] = set()
        for graph in _graphs(self.model.graph):
            self.initializers |= {tensor.name: tensor for tensor in graph.initializer}
            inputs |= {value.name for value in graph.input}
        self._overridable = inputs & set(self.initializers)
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self._consumers: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
        for node in self.nodes:
            for position, name in enumerate(node.input):
                if name:
                    self._consumers[name].append((node, position))
        self.outputs = {value.name for value in self.model.graph.output}
        self._types = self._infer()

    @property
    def opset(self) -> int:
        """Version of the default operator set, 0 if the model names none."""
        return max((entry.version for entry in self.model.opset_import if entry.domain in DEFAULT_DOMAINS), default=0)

    def consumers(self, name: str) -> list[tuple[NodeProto, int]]:
        """The nodes that read tensor ``name``, each with the position of that input."""
        return self._consumers.get(name, [])

    def constant(self, name: str) -> TensorProto | None:
        """The constant that ``name`` stands for: an initializer or a Constant node, through Identity; else None.

        An initializer that is also an input of the graph may be given another value and is no constant.
        """
        while True:
            if name in self.initializers:
                return None if name in self._overridable else self.initializers[name]
            node = self.producers.get(name)
            if node is None or node.domain not in DEFAULT_DOMAINS:
                return None
            if node.op_type == "Constant":
                value = attribute(node, "value")
                return value if isinstance(value, TensorProto) else _constant_list(node)
            if node.op_type != "Identity":
                return None
            name = node.input[0]

    def value(self, name: str) -> np.ndarray | None:
        """The value of a constant, in its own dtype, read from the disk if need be; None if ``name`` is none."""
        tensor = self.constant(name)
        return None if tensor is None else onnx.numpy_helper.to_array(self._loaded(tensor))

    def element_type(self, name: str) -> int:
        """``TensorProto.DataType`` of a tensor, ``UNDEFINED`` (0) where inference does not know it."""
        if (tensor := self.constant(name)) is not None:
            return tensor.data_type
        return self._types.get(name, (TensorProto.UNDEFINED, None))[0]

    def shape(self, name: str) -> tuple[int | str | None, ...] | None:
        """The shape of a tensor: sizes, names of dynamic axes, None for unknown axes; None if the rank is unknown."""
        if (tensor := self.constant(name)) is not None:
            return tuple(tensor.dims)
        return self._types.get(name, (TensorProto.UNDEFINED, None))[1]

    def _infer(self) -> dict[str, tuple[int, tuple[int | str | None, ...] | None]]:
        inferred = onnx.shape_inference.infer_shapes(self._without_large_constants())
        types = {}
        for graph in _graphs(inferred.graph):
            for value in (*graph.value_info, *graph.input, *graph.output):
                kind = value.type.tensor_type
                if value.type.HasField("tensor_type"):
                    types[value.name] = (kind.elem_type, _dimensions(kind) if kind.HasField("shape") else None)
        return types

    def _loaded(self, tensor: TensorProto) -> TensorProto:
        """The tensor with its data, if those lie in another file."""
        if not uses_external_data(tensor):
            return tensor
        copy = TensorProto()
        copy.CopyFrom(tensor)
        load_external_data_for_tensor(copy, self._directory)
        return copy

    def _without_large_constants(self) -> ModelProto:
        """A copy in which large initializers are inputs of the same type and shape, and stale shapes are gone."""
        light = ModelProto()
        light.ir_version = max(self.model.ir_version, 4)  # before 4 every initializer had to be an input
        light.opset_import.extend(self.model.opset_import)
        graph, original = light.graph, self.model.graph
        graph.name = original.name
        graph.node.extend(original.node)
        graph.input.extend(original.input)
        graph.output.extend(original.output)
        inputs = {value.name for value in original.input}
        for tensor in original.initializer:
            if np.prod(tensor.dims) <= _LARGE:
                graph.initializer.append(self._loaded(tensor))
            elif tensor.name not in inputs:
                graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        return light


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute; strings as ``str``."""
    for entry in node.attribute:
        if entry.name == name:
            value = onnx.helper.get_attribute_value(entry)
            return value.decode() if isinstance(value, bytes) else value
    return default


def type_name(element_type: int) -> str:
    """Name of a ``TensorProto.DataType``, e.g. ``"FLOAT8E4M3FN"``."""
    return TensorProto.DataType.Name(element_type)


def label(node: NodeProto) -> str:
    """A node's name, or what tells an unnamed one apart."""
    return node.name or f"{node.op_type} -> {node.output[0] if node.output else '?'}"


def _read(path: Path) -> ModelProto:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: give the path of model.onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, which has no public name
        raise ValueError(f"{path} is not an ONNX model, or is damaged: export it again") from error
    if not model.HasField("graph"):
        raise ValueError(f"{path} holds no graph: it is not an ONNX model, or is damaged")
    return model


def _constant_list(node: NodeProto) -> TensorProto | None:
    for name, kind in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64)):
        if (value := attribute(node, name)) is not None:
            return onnx.numpy_helper.from_array(np.asarray(value, kind))
    if (value := attribute(node, "value_ints")) is not None:
        return onnx.numpy_helper.from_array(np.asarray(value, np.int64))
    return None


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for entry in node.attribute:
        if entry.type == AttributeProto.GRAPH:
            yield entry.g
        elif entry.type == AttributeProto.GRAPHS:
            yield from entry.graphs


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for body in _subgraphs(node):
            yield from _graphs(body)


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for part in _graphs(graph):
        yield from part.node


def _dimensions(kind: Any) -> tuple[int | str | None, ...]:
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param if dim.HasField("dim_param") else None)
        for dim in kind.shape.dim
    )
