"""TensorRT's rules: for each a small graph that breaks it alone, and good graphs that break none."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from test_quantize import loop_over, sd3_inputs
from tiny_pipelines import tiny_sd3_transformer
from torch import nn

import modelopt_ext
from modelopt_ext.export.onnx import export_module
from modelopt_ext.export.tensorrt import TensorRTRuleError, assert_tensorrt, check_tensorrt, trtexec_command

K, N = 128, 6
RNG = np.random.default_rng(0)


class Builder:
    """A quantized Linear piece by piece; every piece can be replaced."""

    def __init__(self, opset: int = 21) -> None:
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self.extra_opsets: list[Any] = []
        self.types: dict[str, int] = {"x": TensorProto.FLOAT, "y": TensorProto.FLOAT}
        self.rank = 3

    def constant(self, name: str, value: Any, kind: int = TensorProto.FLOAT) -> str:
        array = np.asarray(value)
        self.constants.append(helper.make_tensor(name, kind, array.shape, array.ravel().tolist()))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"/{output}", **attributes))
        return output

    def quantize(
        self, x: str, prefix: str, scale: Any = 0.02, kind: int = TensorProto.INT8, zero: Any = None, **attributes: Any
    ) -> str:
        """QuantizeLinear and DequantizeLinear; returns what they give."""
        step = scale if isinstance(scale, str) else self.constant(f"{prefix}_scale", scale)
        zeros = (
            np.zeros_like(np.asarray(scale)) if zero is None and not isinstance(scale, str) else np.asarray(zero or 0)
        )
        point = self.constant(f"{prefix}_zero", zeros, kind)
        codes = self.node("QuantizeLinear", [x, step, point], f"{prefix}/QuantizeLinear_output_0", **attributes)
        return self.node("DequantizeLinear", [codes, step, point], f"{prefix}/DequantizeLinear_output_0", **attributes)

    def weight(
        self,
        prefix: str = "weight",
        kind: int = TensorProto.INT8,
        scale: Any = None,
        axis: int = 0,
        scale_kind: int = TensorProto.FLOAT,
        shape: tuple[int, int] = (N, K),
        **attributes: Any,
    ) -> str:
        """Codes (N, K) and their DequantizeLinear."""
        limit = 7 if kind == TensorProto.INT4 else 100
        codes = self.constant(prefix, RNG.integers(0, limit, shape), kind)
        step = self.constant(f"{prefix}_scale", np.full(N, 0.01) if scale is None else scale, scale_kind)
        name = f"{prefix}/DequantizeLinear_output_0"
        return self.node("DequantizeLinear", [codes, step], name, axis=axis, **attributes)

    def product(self, x: str, weight: str, output: str = "y") -> str:
        turned = self.node("Transpose", [weight], f"{weight}_{output}_T", perm=[1, 0])
        return self.node("MatMul", [x, turned], output)

    def model(self) -> ModelProto:
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "linear",
            [info("x", self.types["x"], ["batch", "tokens", K])],
            [info("y", self.types["y"], [None] * self.rank)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset), *self.extra_opsets]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def rules(model: ModelProto | Path) -> set[tuple[str, str]]:
    return {(violation.rule, violation.severity) for violation in check_tensorrt(model)}


def int8(opset: int = 19) -> Builder:
    builder = Builder(opset)
    builder.product(builder.quantize("x", "input"), builder.weight())
    return builder


def fp8() -> Builder:
    builder = Builder(19)
    kind = TensorProto.FLOAT8E4M3FN
    builder.product(builder.quantize("x", "input", kind=kind), builder.weight(kind=kind, scale=0.01))
    return builder


def channels_last() -> Builder:
    """A weight stored as (K, N), scales along axis 1."""
    builder = Builder(19)
    weight = builder.weight(shape=(K, N), axis=1)
    builder.node("MatMul", [builder.quantize("x", "input"), weight], "y")
    return builder


def int4_weight_only() -> Builder:
    builder = Builder(21)
    weight = builder.weight(kind=TensorProto.INT4, scale=np.full((N, 2), 0.01), axis=1, block_size=64)
    builder.product("x", weight)
    return builder


def segments() -> Builder:
    """Two input segments with scales of their own, each split by sign: four pairs, two weights, each with one DQ."""
    builder = Builder(19)
    zero = builder.constant("nought", 0.0)
    parts = []
    for index in range(2):
        half = K // 2
        bounds = [
            builder.constant(f"{name}{index}", [value], TensorProto.INT64)
            for name, value in (("start", index * half), ("end", (index + 1) * half), ("axis", -1))
        ]
        part = builder.node("Slice", ["x", *bounds], f"part{index}")
        weight = builder.weight(f"weight{index}", shape=(N, half))
        for sign, clip in (("positive", "Max"), ("negative", "Min")):
            clipped = builder.node(clip, [part, zero], f"{sign}{index}")
            pair = builder.quantize(clipped, f"{sign}{index}", scale=0.01 * (index + 1))
            parts.append(builder.product(pair, weight, f"product{sign}{index}"))
    builder.node("Sum", parts, "y")
    return builder


def gemm() -> Builder:
    builder = Builder(19)
    flat = builder.node("Reshape", ["x", builder.constant("shape", [-1, K], TensorProto.INT64)], "flat")
    inputs = [builder.quantize(flat, "input"), builder.weight(), builder.constant("bias", np.zeros(N))]
    builder.node("Gemm", inputs, "y", transB=1)
    builder.rank = 2
    return builder


def convolution() -> Builder:
    builder = Builder(19)
    image = builder.node("Unsqueeze", ["x", builder.constant("at", [2], TensorProto.INT64)], "image")
    turned = builder.node("Transpose", [image], "channels_first", perm=[0, 3, 1, 2])
    codes = builder.constant("kernel", RNG.integers(-100, 100, (N, K, 1, 1)), TensorProto.INT8)
    step = builder.constant("kernel_scale", np.full(N, 0.01))
    weight = builder.node("DequantizeLinear", [codes, step], "kernel_float", axis=0)
    builder.node("Conv", [builder.quantize(turned, "input"), weight], "y")
    builder.rank = 4
    return builder


def casts_that_do_nothing() -> Builder:
    builder = Builder(19)
    pair = builder.quantize(builder.node("Cast", ["x"], "same", to=TensorProto.FLOAT), "input")
    weight = builder.node("Cast", [builder.weight()], "same_weight", to=TensorProto.FLOAT)
    builder.product(builder.node("Cast", [pair], "same_pair", to=TensorProto.FLOAT), weight)
    return builder


GOOD = [int8, fp8, casts_that_do_nothing, channels_last, int4_weight_only, segments, gemm, convolution]


@pytest.mark.parametrize("build", GOOD, ids=lambda build: build.__name__)
def test_good_graphs_pass(build: Callable[[], Builder]) -> None:
    model = build().model()
    onnx.checker.check_model(model, full_check=True)
    assert check_tensorrt(model) == []
    assert_tensorrt(model)


# -- one rule each -----------------------------------------------------------------------------------------------------

BREAKS: dict[str, tuple[str, str, Callable[[], Builder]]] = {}


def breaks(rule: str, severity: str = "error") -> Callable[[Callable[[], Builder]], Callable[[], Builder]]:
    def register(build: Callable[[], Builder]) -> Callable[[], Builder]:
        BREAKS[build.__name__] = (rule, severity, build)
        return build

    return register


@breaks("opset")
def old_opset() -> Builder:
    return int8(opset=17)


@breaks("opset")
def int4_before_its_opset() -> Builder:
    builder = int4_weight_only()
    builder.opset = 20
    return builder


@breaks("custom-op")
def operator_of_a_domain() -> Builder:
    builder = Builder(19)
    builder.extra_opsets = [helper.make_opsetid("com.microsoft", 1)]
    hidden = builder.node("Gelu", ["x"], "hidden", domain="com.microsoft")
    builder.product(builder.quantize(hidden, "input"), builder.weight())
    return builder


@breaks("integer-op")
def integer_product() -> Builder:
    builder = int8()
    a = builder.constant("a", np.zeros((2, 2)), TensorProto.INT8)
    builder.node("MatMulInteger", [a, a], "integers")
    return builder


@breaks("dynamic-scale")
def per_token_scale() -> Builder:
    builder = Builder(19)
    size = builder.node("ReduceMax", ["x", builder.constant("axes", [-1], TensorProto.INT64)], "size", keepdims=0)
    builder.product(builder.quantize("x", "input", scale=size), builder.weight())
    return builder


@breaks("dynamic-scale")
def scale_that_is_an_input() -> Builder:
    class Overridable(Builder):
        def model(self) -> ModelProto:
            model = super().model()
            model.graph.input.append(helper.make_tensor_value_info("input_scale", TensorProto.FLOAT, []))
            return model

    builder = Overridable(19)
    builder.product(builder.quantize("x", "input"), builder.weight())
    return builder


@breaks("code-type")
def unsigned_activations() -> Builder:
    builder = Builder(19)
    builder.product(builder.quantize("x", "input", kind=TensorProto.UINT8), int8_like(builder))
    return builder


def int8_like(builder: Builder) -> str:
    """A weight of the type that the activations of the test have, so that only one rule is broken."""
    return builder.weight(kind=TensorProto.UINT8, scale=0.01)


@breaks("code-type")
def wide_float8() -> Builder:
    builder = Builder(19)
    kind = TensorProto.FLOAT8E5M2
    builder.product(builder.quantize("x", "input", kind=kind), builder.weight(kind=kind, scale=0.01))
    return builder


@breaks("zero-point")
def asymmetric() -> Builder:
    builder = Builder(19)
    builder.product(builder.quantize("x", "input", zero=-3), builder.weight())
    return builder


@breaks("scale-value")
def zero_scale() -> Builder:
    builder = Builder(19)
    scale = np.full(N, 0.01)
    scale[2] = 0
    builder.product(builder.quantize("x", "input"), builder.weight(scale=scale))
    return builder


@breaks("activation-per-tensor")
def per_channel_activations() -> Builder:
    builder = Builder(19)
    builder.product(builder.quantize("x", "input", scale=np.full(K, 0.02), axis=2), builder.weight())
    return builder


@breaks("strong-types")
def scale_of_another_type() -> Builder:
    builder = Builder(19)
    builder.types["x"] = TensorProto.FLOAT16
    builder.product(builder.quantize("x", "input"), builder.weight())
    return builder


@breaks("strong-types")
def product_of_two_types() -> Builder:
    builder = Builder(19)
    builder.product(builder.quantize("x", "input"), builder.weight(scale_kind=TensorProto.FLOAT16))
    return builder


@breaks("qdq-pair")
def codes_that_escape() -> Builder:
    builder = int8()
    codes = builder.nodes[0].output[0]
    builder.node("Cast", [codes], "escaped", to=TensorProto.INT32)
    return builder


@breaks("qdq-pair")
def two_scales_in_a_pair() -> Builder:
    builder = Builder(19)
    pair = builder.quantize("x", "input")
    builder.nodes[-1].input[1] = builder.constant("other_scale", 0.03)
    builder.product(pair, builder.weight())
    return builder


@breaks("qdq-pair")
def codes_from_elsewhere() -> Builder:
    builder = Builder(19)
    cast = builder.node("Cast", ["x"], "codes", to=TensorProto.INT8)
    plain = builder.node("DequantizeLinear", [cast, builder.constant("input_scale", 0.02)], "plain")
    builder.product(plain, builder.weight())
    return builder


@breaks("one-pair")
def two_pairs_in_a_row() -> Builder:
    builder = Builder(19)
    builder.product(builder.quantize(builder.quantize("x", "first"), "second"), builder.weight())
    return builder


@breaks("mixed-types")
def int8_times_fp8() -> Builder:
    builder = Builder(19)
    builder.product(builder.quantize("x", "input"), builder.weight(kind=TensorProto.FLOAT8E4M3FN, scale=0.01))
    return builder


@breaks("unpaired-input")
def float_weight_of_quantized_activations() -> Builder:
    builder = Builder(19)
    builder.product(builder.quantize("x", "input"), builder.constant("weight", np.zeros((N, K))))
    return builder


@breaks("weight-only", "info")
def int8_weight_only() -> Builder:
    builder = Builder(19)
    builder.product("x", builder.weight())
    return builder


@breaks("duplicate-weight")
def one_weight_dequantized_twice() -> Builder:
    builder = Builder(19)
    first = builder.weight()
    inputs = ["weight", "weight_scale"]
    second = builder.node("DequantizeLinear", inputs, "again", axis=0)
    pair = builder.quantize("x", "input")
    builder.node("Add", [builder.product(pair, first, "a"), builder.product(pair, second, "b")], "y")
    return builder


@breaks("unfolded-weight", "info")
def weight_in_full_precision() -> Builder:
    builder = Builder(19)
    weight = builder.constant("weight", RNG.normal(size=(N, K)))
    rounded = builder.quantize(weight, "weight", scale=np.full(N, 0.01), axis=0)
    builder.product(builder.quantize("x", "input"), rounded)
    return builder


@breaks("weight-axis")
def scales_of_input_channels() -> Builder:
    builder = Builder(19)
    builder.product(builder.quantize("x", "input"), builder.weight(scale=np.full(K, 0.01), axis=1))
    return builder


@breaks("weight-axis")
def something_between_weight_and_product() -> Builder:
    builder = Builder(19)
    shape = builder.constant("shape", [K, N], TensorProto.INT64)
    weight = builder.node("Reshape", [builder.weight(), shape], "reshaped")
    builder.node("MatMul", [builder.quantize("x", "input"), weight], "y")
    return builder


@breaks("block-scales")
def int8_in_blocks() -> Builder:
    builder = Builder(21)
    weight = builder.weight(scale=np.full((N, 2), 0.01), axis=1, block_size=64)
    builder.product(builder.quantize("x", "input"), weight)
    return builder


@breaks("int4-blocks")
def int4_per_channel() -> Builder:
    builder = Builder(21)
    builder.product("x", builder.weight(kind=TensorProto.INT4))
    return builder


@breaks("int4-blocks")
def int4_in_small_blocks() -> Builder:
    builder = Builder(21)
    weight = builder.weight(kind=TensorProto.INT4, scale=np.full((N, 4), 0.01), axis=1, block_size=32)
    builder.product("x", weight)
    return builder


@breaks("int4-blocks")
def int4_blocks_of_output_channels() -> Builder:
    builder = Builder(21)
    shape = (K, N)
    weight = builder.weight(kind=TensorProto.INT4, scale=np.full((2, N), 0.01), axis=0, block_size=64, shape=shape)
    turned = builder.node("Slice", ["x", *(builder.constant(n, [v], TensorProto.INT64) for n, v in SLICE)], "six")
    builder.product(turned, weight)
    return builder


SLICE = (("start", 0), ("end", N), ("axis", -1))


@breaks("int4-weights")
def int4_activations() -> Builder:
    builder = Builder(21)
    weight = builder.weight(kind=TensorProto.INT4, scale=np.full((N, 2), 0.01), axis=1, block_size=64)
    builder.product(builder.quantize("x", "input", kind=TensorProto.INT4), weight)
    return builder


def attention(names: str, scales: tuple[float, float, float]) -> Builder:
    builder = Builder(19)
    prefix = "/down_blocks.1/attentions.0/transformer_blocks.0/attn1"
    outputs = []
    for which, scale in zip("qkv", scales, strict=True):
        pair = builder.quantize("x", names.format(prefix=prefix, which=which), scale=scale)
        weight = builder.weight(f"{prefix}/to_{which}/weight")
        outputs.append(builder.product(pair, weight, f"{prefix}/to_{which}/MatMul_output_0"))
    builder.node("Sum", outputs, "y")
    return builder


EXPECTED = "{prefix}/to_{which}/input_quantizer"


@breaks("attention-names", "info")
def attention_of_other_names() -> Builder:
    return attention("{prefix}/{which}_in", (0.02, 0.02, 0.02))


@breaks("attention-scales", "info")
def attention_with_three_scales() -> Builder:
    return attention(EXPECTED, (0.02, 0.03, 0.02))


def test_attention_of_the_expected_names_passes() -> None:
    assert check_tensorrt(attention(EXPECTED, (0.02, 0.02, 0.02)).model()) == []


@pytest.mark.parametrize("name", BREAKS)
def test_each_rule_finds_what_breaks_it(name: str) -> None:
    rule, severity, build = BREAKS[name]
    model = build().model()
    found = check_tensorrt(model)
    assert {(violation.rule, violation.severity) for violation in found} == {(rule, severity)}
    assert all(violation.message and violation.node for violation in found)
    if severity == "info":
        assert_tensorrt(model)
    else:
        with pytest.raises(TensorRTRuleError, match=rf"\[{rule}\]") as raised:
            assert_tensorrt(model)
        assert list(raised.value.violations) == found


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    source = Path(__file__).parents[1] / "modelopt_ext/export/tensorrt_rules.py"
    named = {part.split('"')[1] for part in source.read_text().split("Violation(")[1:] if part.strip().startswith('"')}
    assert named <= {rule for rule, _, _ in BREAKS.values()}
    assert len(named) >= 20


def test_all_violations_are_reported_at_once() -> None:
    builder = Builder(17)
    builder.product(builder.quantize("x", "input", zero=5), builder.weight(scale=np.full(K, 0.01), axis=1))
    with pytest.raises(TensorRTRuleError) as raised:
        assert_tensorrt(builder.model())
    assert {violation.rule for violation in raised.value.violations} == {"opset", "zero-point", "weight-axis"}


def test_a_missing_zero_point_is_not_taken_for_int8() -> None:
    builder = int8()
    for node in builder.nodes[:2]:
        del node.input[2]
    found = check_tensorrt(builder.model())
    assert [violation.rule for violation in found if violation.node == builder.nodes[0].name] == ["code-type"]


# -- files -------------------------------------------------------------------------------------------------------------


def save_with_external_data(model: ModelProto, path: Path) -> None:
    """Every constant in a file of its own name."""
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)


def test_files_with_external_data(tmp_path: Path) -> None:
    rows = 16
    scale = np.full(rows, 0.01)
    for zero, expected in ((0, set()), (4, {("zero-point", "error")})):
        builder = Builder(19)
        builder.product(builder.quantize("x", "input", zero=zero), builder.weight(shape=(rows, K), scale=scale))
        folder = tmp_path / str(zero)
        folder.mkdir()
        save_with_external_data(builder.model(), folder / "model.onnx")
        assert (folder / "weight").stat().st_size == rows * K
        (folder / "weight").unlink()  # weights are not read
        assert rules(folder / "model.onnx") == expected


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no file"):
        check_tensorrt(tmp_path / "none.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(int8().model().SerializeToString()[:400])
    with pytest.raises(ValueError, match="damaged"):
        check_tensorrt(damaged)


def test_local_functions_are_looked_into() -> None:
    model = int8().model()
    node = helper.make_node("Twice", ["y"], ["z"], domain="local")
    body = helper.make_function("local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], OPSETS)
    model.functions.append(body)
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(node)
    assert check_tensorrt(model) == []


OPSETS = [helper.make_opsetid("", 19)]


# -- what the exporter writes ------------------------------------------------------------------------------------------


def test_exported_models(tmp_path: Path) -> None:
    """Segments, splits by sign and shifts keep the rules with target="tensorrt"; unsigned codes do not."""
    config = copy.deepcopy(modelopt_ext.SEGQUANT_INT8_CFG)
    config["algorithm"] |= {"samples": 128, "alpha": 0.5, "progress": False}
    model = tiny_sd3_transformer()
    mtq.quantize(model, config, loop_over(range(4)))
    for target in ("tensorrt", "onnxruntime"):
        path = export_module(model, tmp_path / f"{target}.onnx", sd3_inputs(0), target=target)
        broken = {violation.rule for violation in check_tensorrt(path) if violation.severity == "error"}
        assert broken == (set() if target == "tensorrt" else {"code-type", "zero-point"})
    graph = onnx.load(tmp_path / "tensorrt.onnx").graph
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    weights = {t.name for t in graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 2}
    readers = Counter(name for node in graph.node for name in node.input if name in weights)
    pairs = sum(node.op_type == "QuantizeLinear" for node in graph.node)
    # Cut layers have several weights, and layers split by sign more pairs than weights.
    assert linears < len(weights) < pairs
    assert set(readers.values()) == {1}


# -- trtexec -----------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    model = int8().model()
    model.graph.input.append(helper.make_tensor_value_info("timestep", TensorProto.FLOAT, [None]))
    model.graph.input.append(helper.make_tensor_value_info("fixed", TensorProto.FLOAT, [3, 2]))
    onnx.save(model, path)
    return path


def test_command_line(tmp_path: Path) -> None:
    path = saved(tmp_path)
    command = trtexec_command(
        path, {"batch": (1, 2, 4), "tokens": 77, "timestep:0": (1, 2, 4)}, extra=("--skipInference",)
    )
    assert command.split() == [
        "trtexec",
        f"--onnx={path}",
        f"--saveEngine={path.with_suffix('.plan')}",
        "--stronglyTyped",
        f"--minShapes=x:1x77x{K},timestep:1",
        f"--optShapes=x:2x77x{K},timestep:2",
        f"--maxShapes=x:4x77x{K},timestep:4",
        "--skipInference",
    ]


@pytest.mark.parametrize(
    ("sizes", "extra", "message"),
    [
        ({"batch": 1, "tokens": 2}, (), "without sizes: timestep:0"),
        ({"batch": 1, "tokens": 2, "timestep:0": 1, "width": 3}, (), "no axes width"),
        ({"batch": (4, 2, 1), "tokens": 2, "timestep:0": 1}, (), "sizes of batch"),
        ({"batch": 0, "tokens": 2, "timestep:0": 1}, (), "sizes of batch"),
        ({"batch": 1, "tokens": 2, "timestep:0": 1}, ("--int8",), "contradict --stronglyTyped"),
    ],
)
def test_command_line_refuses(tmp_path: Path, sizes: dict[str, Any], extra: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trtexec_command(saved(tmp_path), sizes, extra=extra)
