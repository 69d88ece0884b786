"""Merging nodes that compute the same thing: Linears that share their inputs' treatment then read one tensor.

q, k and v with one shift and smoothing are exported with a Sub and a Mul each. Engines fuse the three products only if
they see one tensor in front of the quantizers, whose own nodes stay apart, because their names are looked for.
"""

from __future__ import annotations

from collections.abc import Iterable

from onnx import GraphProto, NodeProto, TensorProto

_MERGED = frozenset({"Cast", "Constant", "Mul", "Slice", "Sub"})


def merge_equal_nodes(graph: GraphProto) -> None:
    """Let one node stand for all of its kind with equal attributes and inputs, in place.

    Only what prepares the input of a quantizer is merged, and Identity nodes go. Initializers with equal values count
    as equal.

    Args:
        graph: its nodes sorted, as the standard asks.
    """
    names = _equal_initializers(graph)
    outputs = {output.name for output in graph.output}
    seen: dict[tuple[str, tuple[bytes, ...], tuple[str, ...]], str] = {}
    kept: list[NodeProto] = []
    for node in graph.node:
        _rename(node, names)
        if node.op_type == "Identity" and node.output[0] not in outputs:
            names[node.output[0]] = node.input[0]  # PyTorch's exporter says so that two constants are equal
            continue
        if node.op_type not in _MERGED or len(node.output) != 1 or node.output[0] in outputs:
            kept.append(node)
            continue
        attributes = tuple(sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute))
        key = (node.op_type, attributes, tuple(node.input))
        if key in seen:
            names[node.output[0]] = seen[key]
        else:
            seen[key] = node.output[0]
            kept.append(node)
    if len(kept) < len(graph.node):
        nodes = [_copy(node) for node in kept]
        del graph.node[:]
        graph.node.extend(nodes)


def _equal_initializers(graph: GraphProto) -> dict[str, str]:
    """Names of initializers to be replaced by that of an equal one: those that Sub, Mul or Slice read."""
    read = {name for node in graph.node if node.op_type in _MERGED for name in node.input}
    seen: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    names: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.name not in read or tensor.data_location == TensorProto.EXTERNAL:
            continue
        content = TensorProto()
        content.CopyFrom(tensor)
        content.name = ""
        key = (tensor.data_type, tuple(tensor.dims), content.SerializeToString(deterministic=True))
        if seen.setdefault(key, tensor.name) != tensor.name:
            names[tensor.name] = seen[key]
    return names


def _rename(node: NodeProto, names: dict[str, str]) -> None:
    """Replace the names of inputs, in subgraphs as well."""
    for index, name in enumerate(node.input):
        if name in names:
            node.input[index] = names[name]
    for attribute in node.attribute:
        bodies: Iterable[GraphProto] = (attribute.g, *attribute.graphs)
        for body in bodies:
            for inner in body.node:
                _rename(inner, names)


def _copy(node: NodeProto) -> NodeProto:
    """A node that outlives the list it is taken from."""
    copied = NodeProto()
    copied.CopyFrom(node)
    return copied
