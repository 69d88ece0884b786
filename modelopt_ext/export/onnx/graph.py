"""What is done to an exported graph before it is saved: types that the exporter does not know, and large files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from .linear import BRANCH_NAME, CAST_INT4_SUFFIX, INT4_SUFFIX
from .merge import merge_equal_nodes

LARGEST_FILE = 2**31 - 1
"""Bytes that protobuf can hold; what is larger goes into a file of its own beside the graph."""

_BRANCH = re.compile(rf"(^|\.){BRANCH_NAME}\.\d+\.(down|up)$")
_SMALLEST_EXTERNAL = 1024
"""Bytes from which on a tensor is kept in the file beside; shapes and scales stay readable in the graph."""


def finish(model: ModelProto, properties: Mapping[str, str]) -> None:
    """Narrow what is stored wider than it needs to be, merge equal nodes, note how the graph was made; in place.

    Args:
        model: with all its tensors in memory.
        properties: written to the model's metadata.
    """
    for tensor in list(model.graph.initializer):
        if tensor.name.endswith((INT4_SUFFIX, CAST_INT4_SUFFIX)):
            _store_int4(model.graph, tensor, cast=tensor.name.endswith(CAST_INT4_SUFFIX))
        elif _BRANCH.search(tensor.name) and tensor.data_type == TensorProto.FLOAT:
            _store_16_bit(model.graph, tensor)
    merge_equal_nodes(model.graph)
    _drop_unused(model.graph)
    helper.set_model_props(model, {**{entry.key: entry.value for entry in model.metadata_props}, **properties})


def _store_int4(graph: GraphProto, tensor: TensorProto, cast: bool) -> None:
    codes = numpy_helper.to_array(tensor)
    if codes.dtype != np.int8 or codes.min(initial=0) < -8 or codes.max(initial=0) > 7:
        raise ValueError(f"{tensor.name} holds no int4 codes")
    packed = numpy_helper.from_array(codes.astype(ml_dtypes.int4), tensor.name)
    if cast:
        _cast(graph, tensor, packed, TensorProto.INT8)
    else:
        tensor.CopyFrom(packed)


def _store_16_bit(graph: GraphProto, tensor: TensorProto) -> None:
    """Store float32 numbers that came from 16 bits as what they were; others stay."""
    values = numpy_helper.to_array(tensor)
    for kind in (np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            narrow = values.astype(kind)
        if np.array_equal(narrow.astype(np.float32), values):
            _cast(graph, tensor, numpy_helper.from_array(narrow, tensor.name), TensorProto.FLOAT)
            return


def _cast(graph: GraphProto, tensor: TensorProto, stored: TensorProto, to: int) -> None:
    """Replace an initializer by a narrower one and a Cast that has its name."""
    name = tensor.name
    stored.name = f"{name}.stored"
    tensor.CopyFrom(stored)
    graph.node.insert(0, helper.make_node("Cast", [stored.name], [name], name=f"{name}/Cast", to=to))


def _drop_unused(graph: GraphProto) -> None:
    used = {name for node in _all_nodes(graph) for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def _all_nodes(graph: GraphProto) -> Iterable[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _all_nodes(body)


def save(model: ModelProto, path: str | os.PathLike[str], largest_file: int = LARGEST_FILE) -> None:
    """Write a model, its tensors into ``<name>_data`` beside it if it is larger than ``largest_file`` bytes.

    Raises:
        onnx.checker.ValidationError: the graph is not valid ONNX.
        OSError: the disk is full, for one.
    """
    path = Path(path)
    data = path.with_name(f"{path.name}_data")
    data.unlink(missing_ok=True)
    # Slack for what surrounds the tensors.
    if tensor_bytes(model) < largest_file - (largest_file >> 6):
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=_SMALLEST_EXTERNAL)
    onnx.checker.check_model(str(path), full_check=False)


def tensor_bytes(model: ModelProto) -> int:
    """Bytes of the model's initializers."""
    return sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in model.graph.initializer)


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a saved model, with the file beside it."""
    path = Path(path)
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}_data")) if file.is_file())
