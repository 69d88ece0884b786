"""What TensorRT asks of a quantized ONNX graph, rule by rule.

Sources: TensorRT's documentation (Explicit Quantization, Quantization Schemes, the operators Quantize and Dequantize),
the checks of its ONNX parser (onnx-tensorrt, ``QuantDequantLinearHelper``) and, for the names of attention
projections, NVIDIA's Stable Diffusion demo (``fuse_mha_qkv_int8_sq``).

Every rule is a function that takes a :class:`QdqGraph` and yields :class:`Violation`; :data:`RULES` lists them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import NodeProto, TensorProto

from .graph_index import DEFAULT_DOMAINS, attribute, label, type_name
from .qdq_graph import Operand, QdqGraph, is_operator, zero_point_of

SMALLEST_OPSET = 19
"""QuantizeLinear and DequantizeLinear know FLOAT8E4M3FN from here on."""
SMALLEST_INT4_OPSET = 21
"""INT4 and block scales are from here on."""
INT4_BLOCKS = (64, 128)
"""Block sizes that TensorRT has for INT4."""

_QUANTIZED = (TensorProto.INT8, TensorProto.FLOAT8E4M3FN, TensorProto.INT4)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_INTEGER_OPERATORS = (
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "QLinearMatMul",
    "QLinearConv",
)
_ATTENTION = re.compile(r"(?P<attention>.*\battn(?P<number>\d+))[./]to_(?P<which>[qkv])\b")
_EXPECTED_NAME = re.compile(r".*/attn\d+/to_[qkv]/input_quantizer/DequantizeLinear_output_0")


@dataclass(frozen=True)
class Violation:
    """A finding in a graph.

    Attributes:
        rule: id of the rule.
        node: name of the node.
        message: what is wrong and what to do instead.
        severity: ``"error"``: TensorRT refuses the graph, or computes something else or slower than meant;
            ``"info"``: worth knowing, no reason to refuse.
    """

    rule: str
    node: str
    message: str
    severity: Literal["error", "info"] = "error"

    def __str__(self) -> str:
        return f"[{self.rule}] {self.node}: {self.message}"


# -- the graph as a whole ----------------------------------------------------------------------------------------------


def opset(graph: QdqGraph) -> Iterator[Violation]:
    """Opset 19, and 21 for INT4: before, the parser adds casts of its own and float8 has no standard form."""
    needed = SMALLEST_OPSET
    if any(graph.code_type(node) == TensorProto.INT4 for node in graph.quantizers):
        needed = SMALLEST_INT4_OPSET
    if graph.opset < needed:
        yield Violation(
            "opset", graph.model.graph.name, f"opset {graph.opset} is below {needed}: export with opset={needed}"
        )


def operators(graph: QdqGraph) -> Iterator[Violation]:
    """Standard operators only, and none of the integer ones, which TensorRT's parser does not have."""
    for node in graph.nodes:
        if node.domain not in DEFAULT_DOMAINS:
            yield Violation(
                "custom-op",
                label(node),
                f"{node.domain}::{node.op_type} is not a standard operator; write QuantizeLinear / DequantizeLinear "
                "with an INT8 or FLOAT8E4M3FN zero point, and the rest in standard operators",
            )
        elif node.op_type in _INTEGER_OPERATORS:
            rule = "dynamic-scale" if node.op_type == "DynamicQuantizeLinear" else "integer-op"
            yield Violation(
                rule,
                label(node),
                f"TensorRT's parser has no {node.op_type}; write constant scales in QuantizeLinear / DequantizeLinear "
                "around a float product",
            )


# -- each QuantizeLinear and DequantizeLinear --------------------------------------------------------------------------


def code_types(graph: QdqGraph) -> Iterator[Violation]:
    """INT8, FLOAT8E4M3FN or (weights) INT4; the parser turns an unsigned or missing type into INT8."""
    for node in graph.quantizers:
        kind = graph.code_type(node)
        if kind == TensorProto.UNDEFINED and is_operator(node, "QuantizeLinear"):
            yield Violation(
                "code-type",
                label(node),
                "without a zero point ONNX means UINT8 and TensorRT takes INT8; give an INT8 or FLOAT8E4M3FN zero "
                "point of zeros",
            )
        elif kind not in (*_QUANTIZED, TensorProto.UNDEFINED):
            yield Violation(
                "code-type",
                label(node),
                f"codes are {type_name(kind)}, TensorRT has INT8, FLOAT8E4M3FN and, for weights, INT4; export with "
                "target='tensorrt', which stores signed codes",
            )


def zero_points(graph: QdqGraph) -> Iterator[Violation]:
    """Symmetric: zero points are constants of zeros."""
    for node in graph.quantizers:
        if not (name := zero_point_of(node)):
            continue
        value = graph.value(name)
        if value is None:
            yield Violation("zero-point", label(node), "the zero point is not a constant; make it a constant of zeros")
        elif np.asarray(value).astype(np.float32).any():
            yield Violation(
                "zero-point",
                label(node),
                "the zero point is not zero, and TensorRT is symmetric only; export with target='tensorrt', which "
                "writes a shift as a Sub before QuantizeLinear and into the bias",
            )


def scales(graph: QdqGraph) -> Iterator[Violation]:
    """Scales are constants, positive and finite."""
    for node in graph.quantizers:
        if graph.constant(node.input[1]) is None:
            yield Violation(
                "dynamic-scale",
                label(node),
                "the scale is computed in the graph, and TensorRT needs a constant; quantize activations with static "
                "scales (no per-token scales, embedders='as_configured'), or fold the constants first",
            )
            continue
        value = graph.scale(node)
        if value is not None and not (np.isfinite(value).all() and (value > 0).all()):
            yield Violation("scale-value", label(node), "every scale must be positive and finite; calibrate again")


def activation_granularity(graph: QdqGraph) -> Iterator[Violation]:
    """One scale for an activation tensor."""
    for node in graph.quantizers:
        value = graph.scale(node)
        if value is not None and value.size != 1 and not graph.reads_constant(node):
            yield Violation(
                "activation-per-tensor",
                label(node),
                f"an activation has {value.size} scales, and TensorRT takes one; cut the tensor into segments, each "
                "with a QuantizeLinear of its own",
            )


def types(graph: QdqGraph) -> Iterator[Violation]:
    """Strongly typed: nothing is cast unless the graph says so."""
    for node in graph.quantizers:
        data, scale = (graph.element_type(name) for name in node.input[:2])
        if scale not in (*_FLOATS, TensorProto.UNDEFINED):
            yield Violation("strong-types", label(node), f"the scale is {type_name(scale)}, not a 16- or 32-bit float")
        elif is_operator(node, "QuantizeLinear") and TensorProto.UNDEFINED not in (data, scale) and data != scale:
            yield Violation(
                "strong-types",
                label(node),
                f"the scale is {type_name(scale)}, the input {type_name(data)}; give the scale the input's type",
            )
        elif is_operator(node, "DequantizeLinear") and (zero := zero_point_of(node)):
            kind = graph.element_type(zero)
            if TensorProto.UNDEFINED not in (data, kind) and data != kind:
                yield Violation(
                    "strong-types",
                    label(node),
                    f"the zero point is {type_name(kind)}, the codes are {type_name(data)}; give both one type",
                )
    for node, _, _ in graph.products:
        kinds = {graph.element_type(name) for name in node.input if name} - {TensorProto.UNDEFINED}
        if len(kinds) > 1:
            names = ", ".join(sorted(type_name(kind) for kind in kinds))
            yield Violation(
                "strong-types",
                label(node),
                f"inputs of one product have the types {names}; give the scales of all DequantizeLinear before it, "
                "and the bias, one type",
            )


# -- pairs and products ------------------------------------------------------------------------------------------------


def pairs(graph: QdqGraph) -> Iterator[Violation]:
    """A QuantizeLinear feeds DequantizeLinear of the same scale, and a DequantizeLinear reads codes."""
    for node in graph.quantizers:
        if is_operator(node, "QuantizeLinear"):
            yield from _pair(graph, node)
        else:
            _, source = graph.back_through_views(node.input[0])
            if graph.constant(source) is None and not is_operator(graph.producers.get(source), "QuantizeLinear"):
                yield Violation(
                    "qdq-pair",
                    label(node),
                    "reads neither a constant nor the output of a QuantizeLinear; put the pair next to each other",
                )


def _pair(graph: QdqGraph, node: NodeProto) -> Iterator[Violation]:
    readers = list(graph.forward_through_views(node.output[0]))
    others = [reader for reader in readers if not is_operator(reader, "DequantizeLinear")]
    if others or not readers:
        who = ", ".join(label(other) for other in others) or "nothing"
        yield Violation("qdq-pair", label(node), f"its codes are read by {who}; a DequantizeLinear must follow")
    mine = graph.scale(node)
    for reader in readers:
        theirs = graph.scale(reader) if is_operator(reader, "DequantizeLinear") else None
        if mine is not None and theirs is not None and not np.array_equal(mine.ravel(), theirs.ravel()):
            yield Violation(
                "qdq-pair",
                label(reader),
                f"its scale differs from that of {label(node)} before it; let both read one initializer",
            )


def one_pair_per_input(graph: QdqGraph) -> Iterator[Violation]:
    """Between a float tensor and a product there is one pair."""
    for node in graph.quantizers:
        if not is_operator(node, "QuantizeLinear"):
            continue
        _, source = graph.back_through_views(node.input[0])
        if is_operator(graph.producers.get(source), "DequantizeLinear"):
            yield Violation(
                "one-pair",
                label(node),
                f"quantizes what {label(graph.producers[source])} has just dequantized; leave one of the two pairs",
            )


def product_inputs(graph: QdqGraph) -> Iterator[Violation]:
    """Both inputs of a product are quantized, to one type, or only its INT4 weight."""
    for node, first, second in graph.products:
        quantized = [operand for operand in (first, second) if operand.dequantize is not None]
        kinds = [graph.code_type(operand.dequantize) for operand in quantized if operand.dequantize is not None]
        if len(quantized) == 2 and kinds[0] != kinds[1]:
            yield Violation(
                "mixed-types",
                label(node),
                f"multiplies {type_name(kinds[0])} with {type_name(kinds[1])} codes; quantize both to INT8 or both to "
                "FLOAT8E4M3FN, or leave the activations of an INT4 weight alone",
            )
        if len(quantized) == 1 and not quantized[0].constant:
            yield Violation(
                "unpaired-input",
                label(node),
                "one input is quantized, the other is not; quantize both or neither",
            )
        if len(quantized) == 1 and quantized[0].constant and kinds[0] != TensorProto.INT4:
            yield Violation(
                "weight-only",
                label(node),
                f"only the weight is quantized, to {type_name(kinds[0])}; TensorRT documents weight-only quantization "
                "for INT4: the product will run on floats",
                "info",
            )


# -- weights -----------------------------------------------------------------------------------------------------------


def duplicated_weights(graph: QdqGraph) -> Iterator[Violation]:
    """One constant, one DequantizeLinear: products that share a weight share its dequantized tensor."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.quantizers:
        _, source = graph.back_through_views(node.input[0])
        if graph.constant(source) is not None:
            readers[source].append(node)
    for name, nodes in readers.items():
        if len(nodes) > 1:
            yield Violation(
                "duplicate-weight",
                label(nodes[1]),
                f"the weight {name} has {len(nodes)} {nodes[0].op_type} nodes; let every product read the output of "
                f"{label(nodes[0])}",
            )


def unfolded_weights(graph: QdqGraph) -> Iterator[Violation]:
    """Weights are stored as codes."""
    for node in graph.quantizers:
        if is_operator(node, "QuantizeLinear") and graph.reads_constant(node):
            yield Violation(
                "unfolded-weight",
                label(node),
                "the weight is stored in full precision and quantized when the engine is built; store its codes and "
                "leave DequantizeLinear only, for a file of a quarter of the size",
                "info",
            )


def weight_scales(graph: QdqGraph) -> Iterator[Violation]:
    """Per tensor, or per output channel of the product; for INT4 per block of input channels."""
    for node, first, second in graph.products:
        for position, operand in enumerate((first, second)):
            quantizer = operand.dequantize
            if quantizer is None or not operand.constant:
                continue
            value, shape = graph.scale(quantizer), graph.shape(quantizer.input[0])
            if value is None or shape is None or any(not isinstance(size, int) for size in shape):
                continue
            sizes = tuple(int(size) for size in shape if isinstance(size, int))
            if graph.code_type(quantizer) == TensorProto.INT4:
                yield from _int4(quantizer, value, sizes, _axis(node, operand, position, len(sizes), channel=False))
            elif value.size != 1:
                yield from _channels(quantizer, value, sizes, _axis(node, operand, position, len(sizes), channel=True))


def int4_weights_only(graph: QdqGraph) -> Iterator[Violation]:
    """INT4 is for weights."""
    for node in graph.quantizers:
        if graph.code_type(node) == TensorProto.INT4 and not graph.reads_constant(node):
            yield Violation(
                "int4-weights", label(node), "TensorRT has INT4 for weights only; quantize activations to INT8 or FP8"
            )


def _axis(product: NodeProto, operand: Operand, position: int, rank: int, channel: bool) -> int | None:
    """The axis of a stored weight that holds the output channels (or else the input channels) of a product.

    None if anything but Transpose stands between them.
    """
    if product.op_type == "MatMul":
        output, inputs = (rank - 1, rank - 2) if position else (rank - 2, rank - 1)
    elif product.op_type == "Gemm":
        turned = bool(attribute(product, "transB" if position else "transA", 0))
        output, inputs = (1, 0) if bool(position) != turned else (0, 1)
    else:
        output, inputs = (0, 1) if product.op_type == "Conv" else (1, 0)
    axis = output if channel else inputs
    for node in operand.path:
        if node.op_type == "Transpose":
            axis = list(attribute(node, "perm", range(rank - 1, -1, -1)))[axis]
        elif node.op_type not in ("Identity", "Cast"):
            return None
    return axis


def _channels(node: NodeProto, scale: np.ndarray, shape: tuple[int, ...], axis: int | None) -> Iterator[Violation]:
    if scale.ndim != 1:
        yield Violation(
            "block-scales",
            label(node),
            f"scales of the shape {scale.shape} are for INT4; give an INT8 or FP8 weight one scale, or one for each "
            "output channel",
        )
        return
    given = int(attribute(node, "axis", 1)) % len(shape)
    if axis is None:
        yield Violation(
            "weight-axis",
            label(node),
            "something other than Transpose stands between the weight's DequantizeLinear and its product; apply it to "
            "the constant instead",
        )
    elif given != axis:
        yield Violation(
            "weight-axis",
            label(node),
            f"the scales go along axis {given}, the output channels along axis {axis}; give one scale for each output "
            f"channel, axis={axis} (0 for a weight (N, K) that is transposed afterwards)",
        )
    elif scale.size != shape[given]:
        yield Violation("weight-axis", label(node), f"{scale.size} scales for {shape[given]} output channels")


def _int4(node: NodeProto, scale: np.ndarray, shape: tuple[int, ...], axis: int | None) -> Iterator[Violation]:
    remedy = f"quantize to INT4 with block_sizes={{-1: {INT4_BLOCKS[0]}, 'type': 'static'}}, or to INT8"

    def wrong(what: str) -> Violation:
        return Violation("int4-blocks", label(node), f"{what}; {remedy}")

    if scale.ndim != len(shape):
        yield wrong(f"INT4 needs scales per block of input channels, this weight has {scale.size}")
        return
    blocked = [index for index, (size, count) in enumerate(zip(shape, scale.shape, strict=True)) if size != count]
    if len(blocked) != 1 or shape[blocked[0]] % scale.shape[blocked[0]]:
        yield wrong(f"scales {scale.shape} do not divide the weight {shape} along one axis")
        return
    block = shape[blocked[0]] // scale.shape[blocked[0]]
    if int(attribute(node, "block_size", 0)) != block or int(attribute(node, "axis", 1)) % len(shape) != blocked[0]:
        yield wrong(f"scales {scale.shape} of the weight {shape} mean axis={blocked[0]}, block_size={block}")
    elif block not in INT4_BLOCKS:
        yield wrong(f"TensorRT has blocks of {' or '.join(map(str, INT4_BLOCKS))} for INT4, not of {block}")
    elif blocked[0] < len(shape) - 2 or (axis is not None and blocked[0] != axis):
        yield wrong(f"blocks must lie along the input channels, not along axis {blocked[0]}")
    elif np.prod(shape) % 2:
        yield wrong("INT4 needs an even number of weights")


# -- names -------------------------------------------------------------------------------------------------------------


def attention_names(graph: QdqGraph) -> Iterator[Violation]:
    """NVIDIA's SDXL demo finds what to fuse by the names of attention inputs, and takes q, k and v for alike."""
    found: dict[str, dict[str, Operand]] = defaultdict(dict)
    unnamed, total, example = 0, 0, ""
    for node, first, second in graph.products:
        match = _attention_projection(node, second)
        if match is None or first.dequantize is None or second.dequantize is None:
            continue
        found[match["attention"]][match["which"]] = first
        total += 1
        if not _EXPECTED_NAME.fullmatch(first.dequantize.output[0]):
            unnamed += 1
            example = example or label(node)
    if unnamed:
        yield Violation(
            "attention-names",
            example,
            f"{unnamed} of {total} attention projections do not read a tensor .../attn<N>/to_[qkv]/input_quantizer/"
            "DequantizeLinear_output_0, the name by which NVIDIA's SDXL demo fuses q, k and v; TensorRT itself does "
            "not need it",
            "info",
        )
    for attention, operands in found.items():
        yield from _alike(graph, attention, operands)


def _attention_projection(node: NodeProto, weight: Operand) -> re.Match[str] | None:
    names = [node.name]
    if weight.dequantize is not None:
        names += [weight.dequantize.name, weight.dequantize.input[0]]
    return next((match for name in names if (match := _ATTENTION.match(name))), None)


def _alike(graph: QdqGraph, attention: str, operands: dict[str, Operand]) -> Iterator[Violation]:
    # attn1 is self-attention; in the others the query reads another tensor.
    wanted = "qkv" if attention.endswith("attn1") else "kv"
    sources = set()
    for which in wanted:
        operand = operands.get(which)
        if operand is None or operand.quantize is None:
            return
        scale = graph.scale(operand.quantize)
        _, source = graph.back_through_views(operand.quantize.input[0])
        sources.add((source, None if scale is None else tuple(scale.ravel().tolist())))
    if len(sources) > 1:
        yield Violation(
            "attention-scales",
            attention,
            f"{', '.join(wanted)} read different tensors or have different input scales, so NVIDIA's SDXL demo must "
            "not fuse them; share_inputs=True gives layers with one input one treatment and one scale",
            "info",
        )


RULES: tuple[Callable[[QdqGraph], Iterator[Violation]], ...] = (
    opset,
    operators,
    code_types,
    zero_points,
    scales,
    activation_granularity,
    types,
    pairs,
    one_pair_per_input,
    product_inputs,
    duplicated_weights,
    unfolded_weights,
    weight_scales,
    int4_weights_only,
    attention_names,
)
"""In the order in which findings are reported."""
