"""A quantized ONNX graph: its QuantizeLinear and DequantizeLinear nodes, and what its matrix products read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

import numpy as np
from onnx import NodeProto, TensorProto

from .graph_index import DEFAULT_DOMAINS, GraphIndex, attribute

_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_VIEWS = ("Transpose", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split")


@dataclass(frozen=True)
class Operand:
    """An input of a product, traced back to where it was quantized.

    Attributes:
        dequantize: the DequantizeLinear that it comes from, None if it is not quantized.
        quantize: the QuantizeLinear before that, None for a constant of codes.
        constant: whether it comes from a constant, i.e. is a weight.
        path: the nodes between ``dequantize`` (or the constant) and the product, last first.
    """

    dequantize: NodeProto | None
    quantize: NodeProto | None
    constant: bool
    path: tuple[NodeProto, ...]


class QdqGraph(GraphIndex):
    """An indexed graph with the notions that the rules share."""

    @cached_property
    def quantizers(self) -> list[NodeProto]:
        """All QuantizeLinear and DequantizeLinear nodes."""
        return [
            node for node in self.nodes if is_operator(node, "QuantizeLinear") or is_operator(node, "DequantizeLinear")
        ]

    @cached_property
    def products(self) -> list[tuple[NodeProto, Operand, Operand]]:
        """All matrix products and convolutions with their two operands."""
        return [
            (node, self.operand(node.input[0]), self.operand(node.input[1]))
            for node in self.nodes
            if node.op_type in _PRODUCTS and node.domain in DEFAULT_DOMAINS
        ]

    def operand(self, name: str) -> Operand:
        """Trace the input ``name`` of a product back."""
        path, source = self.back_through_views(name)
        node = self.producers.get(source)
        if not is_operator(node, "DequantizeLinear"):
            return Operand(None, None, self.constant(source) is not None, path)
        _, codes = self.back_through_views(node.input[0])
        quantize = self.producers.get(codes)
        if not is_operator(quantize, "QuantizeLinear"):
            return Operand(node, None, self.constant(codes) is not None, path)
        _, values = self.back_through_views(quantize.input[0])
        return Operand(node, quantize, self.constant(values) is not None, path)

    def back_through_views(self, name: str) -> tuple[tuple[NodeProto, ...], str]:
        """The views of which ``name`` is the result, last first, and the tensor that they look at."""
        path = []
        while (node := self.producers.get(name)) is not None and self._is_view(node):
            path.append(node)
            name = node.input[0]
        return tuple(path), name

    def _is_view(self, node: NodeProto) -> bool:
        if node.op_type == "Cast":
            return self.element_type(node.input[0]) == attribute(node, "to")  # a cast that does nothing
        return node.op_type in _VIEWS and node.domain in DEFAULT_DOMAINS

    def forward_through_views(self, name: str) -> Iterator[NodeProto]:
        """The nodes that read ``name`` or a view of it."""
        for node, position in self.consumers(name):
            if position == 0 and self._is_view(node):
                for output in node.output:
                    yield from self.forward_through_views(output)
            else:
                yield node

    def code_type(self, node: NodeProto) -> int:
        """The type of the codes of a QuantizeLinear or DequantizeLinear, UNDEFINED if nothing says it."""
        if is_operator(node, "DequantizeLinear"):
            return self.element_type(node.input[0])
        if zero := zero_point_of(node):
            return self.element_type(zero)
        return int(attribute(node, "output_dtype", TensorProto.UNDEFINED))

    def reads_constant(self, node: NodeProto) -> bool:
        """Whether a QuantizeLinear or DequantizeLinear works on a weight."""
        _, source = self.back_through_views(node.input[0])
        producer = self.producers.get(source)
        if is_operator(node, "DequantizeLinear") and is_operator(producer, "QuantizeLinear"):
            return self.reads_constant(producer)
        return self.constant(source) is not None

    def scale(self, node: NodeProto) -> np.ndarray | None:
        """The scale of a QuantizeLinear or DequantizeLinear as float32, None unless it is constant."""
        value = self.value(node.input[1])
        return None if value is None else np.asarray(value).astype(np.float32)


def is_operator(node: NodeProto | None, kind: str) -> TypeGuard[NodeProto]:
    """Whether ``node`` is the standard operator ``kind``."""
    return node is not None and node.op_type == kind and node.domain in DEFAULT_DOMAINS


def zero_point_of(node: NodeProto) -> str:
    """Name of the zero point of a QuantizeLinear or DequantizeLinear, empty if there is none."""
    return node.input[2] if len(node.input) > 2 else ""
