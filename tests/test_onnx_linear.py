"""Packed Linears in ONNX: every combination of formats, for all targets, against the packed reference."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from modelopt_ext.export.onnx import TARGETS, export_module, file_bytes, lowered
from modelopt_ext.export.tensorrt import check_tensorrt
from modelopt_ext.nn import SegLayout
from modelopt_ext.nn.packed import PackedLinear
from modelopt_ext.nn.packed_spec import FORMATS, PackedSpec
from optimum_segquant.exporters.compare import run, session
from optimum_segquant.exporters.cpu import is_exact_here, multiplies_signed_weights, runs_optimized

ONE = SegLayout((64,), (48,), (48,), ("none",))
DUAL = SegLayout((32, 64), (16, 32), (16, 32), ("none", "dual"))
DUAL8 = SegLayout((32, 64), (16, 32), (16, 32), ("none", "dual8"))
ROTATED = SegLayout((32, 64), (48,), (48,), ("none", "none"), (32, 16))
LAYOUTS = {"one": ONE, "dual": DUAL, "dual8": DUAL8, "rotated": ROTATED}
TYPES = ("int8", "int4", "float8_e4m3fn")


def packed_linear(spec: PackedSpec, seed: int = 0) -> PackedLinear:
    """Random codes of the full range and scales of a usual size."""
    generator = torch.Generator().manual_seed(seed)

    def rand(like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator)

    linear = PackedLinear(spec, bias=True).eval()
    weight = torch.randn(linear.out_features, linear.in_features, generator=generator)
    codes = weight / weight.abs().amax() * FORMATS[spec.weights].max_code
    linear.set_codes(codes if spec.weights == "float8_e4m3fn" else codes.round())
    linear.weight_scale.copy_((rand(linear.weight_scale) + 1) / FORMATS[spec.weights].max_code)
    linear.bias.data.copy_(torch.randn(linear.out_features, generator=generator))
    for name in ("input_scale", "input_scale_negative"):
        if (scale := getattr(linear, name)) is not None:
            # Clips a little: the largest of a few hundred normal numbers is near 3.
            scale.copy_((rand(scale) + 2) / FORMATS[spec.activations].max_code)
    if linear.inverse_smoothing is not None:
        linear.inverse_smoothing.copy_(rand(linear.inverse_smoothing) + 0.5)
    if linear.shift is not None:
        linear.shift.copy_(rand(linear.shift) - 0.5)
    if linear.low_rank_down is not None:
        linear.low_rank_down.copy_(rand(linear.low_rank_down) * 0.1)
        linear.low_rank_up.copy_(rand(linear.low_rank_up) * 0.1)
    return linear


def combinations(layout: SegLayout) -> list[PackedSpec]:
    found = []
    choices = itertools.product(TYPES, (*TYPES, None), (None, 16), (False, True))
    for index, (weights, activations, group, per_token) in enumerate(choices):
        # Smoothing, shift and branch with every other one, so that each format meets them.
        extras = (index + per_token) % 2 == 0
        if activations is None and (per_token or layout in (DUAL, DUAL8)):
            continue
        if activations == "float8_e4m3fn" and layout is DUAL8:
            continue
        found.append(PackedSpec(layout, weights, group, activations, per_token, extras, extras, 4 if extras else 0))
    return found


def largest_difference(path: Path, model: nn.Module, *shapes: tuple[int, ...], optimize: bool = True) -> float:
    runtime, worst = session(path, threads=1, optimize=optimize), 0.0
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        worst = max(worst, float((next(iter(run(runtime, {"input": x}).values())) - model(x)).abs().max()))
    return worst


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_combination_computes_what_the_packed_linear_does(layout: str, target: str, tmp_path: Path) -> None:
    path, refused, exported = tmp_path / "model.onnx", 0, 0
    for spec in combinations(LAYOUTS[layout]):
        model = nn.Sequential(packed_linear(spec))
        example = torch.randn(2, 3, spec.layout.in_features)
        try:
            export_module(model, path, {"input": example}, target=target)
        except ValueError as error:
            refused += 1
            if target == "tensorrt" and "SEGQUANT_" in str(error):
                continue
            raise
        exported += 1
        width = spec.layout.in_features
        # A code on a tie may round either way: one code is worth less than 0.1 here, and rounding errors under 1e-4.
        optimize = runs_optimized(TARGETS[target])
        assert largest_difference(path, model, (2, 3, width), (1, 7, width), optimize=optimize) < 1e-4, spec
        if target == "tensorrt":
            assert [str(v) for v in check_tensorrt(path) if v.severity == "error"] == [], spec
    assert exported >= 6
    assert (refused > 0) == (target == "tensorrt")


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (2, 3, 4, 64)], ids=str)
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_inputs_of_any_rank(shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    model = nn.Sequential(packed_linear(PackedSpec(ONE, kind, None, kind)))
    path = export_module(model, tmp_path / "model.onnx", {"input": torch.randn(shape)}, dynamic_axes={})
    assert largest_difference(path, model, shape) < 1e-4


def test_float8_after_operators_that_do_not_take_it(tmp_path: Path) -> None:
    """ONNX Runtime moves codes through views and clips before QuantizeLinear: here it must not."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = packed_linear(PackedSpec(ONE, "float8_e4m3fn", None, "float8_e4m3fn"))

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            x = input.relu().transpose(1, 2).flatten(2)
            return self.linear(x) + self.linear(x[:, 0].unsqueeze(1))

    model = Views().eval()
    path = export_module(model, tmp_path / "model.onnx", {"input": torch.randn(2, 8, 3, 8)}, dynamic_axes={})
    assert largest_difference(path, model, (2, 8, 3, 8)) < 1e-4


@pytest.mark.parametrize(
    ("target", "kind", "offset"), [("onnxruntime", np.uint8, 128), ("onnxruntime-vnni", np.int8, 0)]
)
def test_weights_are_codes_and_products_are_integer(target: str, kind: type, offset: int, tmp_path: Path) -> None:
    packed = packed_linear(PackedSpec(ONE))
    inputs = {"input": torch.randn(1, 4, 64)}
    path = export_module(nn.Sequential(packed), tmp_path / "model.onnx", inputs, target=target)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    codes = tensors["0.weight_quantizer.codes"]
    assert codes.dtype == kind
    np.testing.assert_array_equal(codes.astype(int) - offset, packed.codes().numpy().T)
    session(path, optimized=tmp_path / "optimized.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "MatMulIntegerToFloat" in operators
    assert not {"Gemm", "MatMul", "FusedMatMul", "DequantizeLinear"} & set(operators)


def test_two_dimensional_inputs_keep_integer_products(tmp_path: Path) -> None:
    """ONNX Runtime makes a float Gemm of a 2-D MatMul and the Add of a vector; AdaLN reads such inputs."""
    model = nn.Sequential(packed_linear(PackedSpec(ONE)))
    path = export_module(model, tmp_path / "model.onnx", {"input": torch.randn(4, 64)})
    session(path, optimized=tmp_path / "optimized.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "MatMulIntegerToFloat" in operators
    assert "Gemm" not in operators


def test_weight_only_is_not_rounded_by_onnx_runtime(tmp_path: Path) -> None:
    """Not MatMulNBits, which rounds activations to 8 bits and is off by half a percent."""
    for spec in (PackedSpec(ONE, activations=None), PackedSpec(ONE, "int4", 16, None)):
        model = nn.Sequential(packed_linear(spec))
        path = export_module(model, tmp_path / "model.onnx", {"input": torch.randn(2, 3, 64)})
        assert largest_difference(path, model, (2, 300, 64)) < 1e-4
        session(path, optimized=tmp_path / "optimized.onnx")
        assert "MatMulNBits" not in {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-vnni"])
def test_extreme_codes_do_not_saturate(name: str, tmp_path: Path) -> None:
    """int8 by uint8 products of neighbours exceed 16 bits, where x86 CPUs without VNNI saturate."""
    if not is_exact_here(TARGETS[name]):
        pytest.skip("this CPU has no VNNI")
    packed = packed_linear(PackedSpec(ONE))
    packed.set_codes(torch.full((48, 64), 127))
    model = nn.Sequential(packed)
    path = export_module(model, tmp_path / "model.onnx", {"input": torch.randn(1, 4, 64)}, target=name)
    x = torch.full((1, 4, 64), 100.0)
    y = next(iter(run(session(path), {"input": x}).values()))
    expected = 127 * 127 * 64 * packed.input_scale[0, 0] * packed.weight_scale[:, 0] + packed.bias
    torch.testing.assert_close(y[0, 0], expected.detach(), rtol=1e-6, atol=1e-5)


@pytest.mark.skipif(not multiplies_signed_weights(), reason="this CPU has no VNNI")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_signed_weights_change_no_bit(layout: str, tmp_path: Path) -> None:
    for activations, per_token in (("int8", False), ("int8", True), ("int4", True)):
        spec = PackedSpec(LAYOUTS[layout], "int8", None, activations, per_token)
        model, x = nn.Sequential(packed_linear(spec)), torch.randn(2, 30, spec.layout.in_features)
        found = []
        for name in ("onnxruntime", "onnxruntime-vnni"):
            path = export_module(model, tmp_path / "model.onnx", {"input": x}, target=name)
            found.append(next(iter(run(session(path, threads=1), {"input": x}).values())))
        assert torch.equal(*found), spec


class _Saturating:
    """ONNX Runtime's product of codes on an x86 CPU without VNNI: sums of two neighbours have 16 bits."""

    def __init__(self, model: bytes, providers: list[str]) -> None:
        self.weight = numpy_helper.to_array(onnx.load_from_string(model).graph.initializer[0]).astype(int)

    def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        products = inputs["x"].astype(int)[:, :, None] * self.weight
        pairs = products.reshape(len(products), -1, 2, self.weight.shape[1]).sum(axis=2)
        return [pairs.clip(-(2**15), 2**15 - 1).sum(axis=1).astype(np.int32)]


def test_signed_weights_are_for_cpus_that_multiply_them_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    has = torch.cpu.get_capabilities()
    if has["architecture"] == "x86_64":
        vnni = any(has.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
        assert multiplies_signed_weights.__wrapped__() is vnni
    monkeypatch.setattr("onnxruntime.InferenceSession", _Saturating)
    assert not multiplies_signed_weights.__wrapped__()
    monkeypatch.setattr("optimum_segquant.exporters.cpu.multiplies_signed_weights", lambda: False)
    assert [name for name, target in TARGETS.items() if not is_exact_here(target)] == ["onnxruntime-vnni"]


def test_dual_shares_one_weight(tmp_path: Path) -> None:
    model = nn.Sequential(packed_linear(PackedSpec(SegLayout((64,), (48,), (48,), ("dual",)))))
    for target in TARGETS:
        path = export_module(model, tmp_path / "model.onnx", {"input": torch.randn(1, 4, 64)}, target=target)
        graph = onnx.load(path).graph
        weights = [tensor for tensor in graph.initializer if len(tensor.dims) == 2]
        assert len(weights) == 1
        readers = [node for node in graph.node if weights[0].name in node.input]
        assert [node.op_type for node in readers] == ["DequantizeLinear"]
        operators = [node.op_type for node in graph.node]
        assert operators.count("MatMul") == operators.count("QuantizeLinear") == 2
        assert {"Max", "Min"} <= set(operators)


@pytest.mark.parametrize(
    ("spec", "kind", "bits"),
    [
        (PackedSpec(ONE), TensorProto.UINT8, 8),
        (PackedSpec(ONE, "int4"), TensorProto.INT4, 4),
        (PackedSpec(ONE, "int4", 16, None), TensorProto.INT4, 4),
        (PackedSpec(ONE, "float8_e4m3fn", None, "float8_e4m3fn"), TensorProto.FLOAT8E4M3FN, 8),
    ],
    ids=["int8", "int4", "int4 groups", "float8"],
)
def test_bits_of_a_weight_in_the_file(spec: PackedSpec, kind: int, bits: int, tmp_path: Path) -> None:
    path = export_module(nn.Sequential(packed_linear(spec)), tmp_path / "model.onnx", {"input": torch.randn(1, 4, 64)})
    weights = [tensor for tensor in onnx.load(path).graph.initializer if "codes" in tensor.name]
    assert [tensor.data_type for tensor in weights] == [kind]
    assert len(weights[0].raw_data) == 64 * 48 * bits // 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_the_branch_stays_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    packed = packed_linear(PackedSpec(ONE, rank=4))
    packed.low_rank_down = packed.low_rank_down.to(dtype)
    packed.low_rank_up = packed.low_rank_up.to(dtype)
    if dtype is torch.bfloat16:  # out of float16's range
        packed.low_rank_down *= 2.0**-60
        packed.low_rank_up *= 2.0**60
    model = nn.Sequential(packed)
    path = export_module(model, tmp_path / "model.onnx", {"input": torch.randn(1, 4, 64)})
    branch = [tensor for tensor in onnx.load(path).graph.initializer if "low_rank" in tensor.name]
    wanted = TensorProto.FLOAT16 if dtype is torch.float16 else TensorProto.BFLOAT16
    assert [tensor.data_type for tensor in branch] == [wanted, wanted]
    assert largest_difference(path, model, (1, 4, 64)) < 1e-4


def test_tensors_beside_a_large_graph(tmp_path: Path) -> None:
    model = nn.Sequential(packed_linear(PackedSpec(ONE)))
    path = export_module(model, tmp_path / "model.onnx", {"input": torch.randn(1, 4, 64)}, largest_file=2048)
    data = tmp_path / "model.onnx_data"
    assert data.stat().st_size >= 64 * 48
    assert path.stat().st_size < 64 * 48
    assert file_bytes(path) == path.stat().st_size + data.stat().st_size
    assert largest_difference(path, model, (2, 5, 64)) < 1e-4
    # A smaller one that replaces it leaves nothing behind.
    export_module(model, path, {"input": torch.randn(1, 4, 64)})
    assert not data.exists()


def test_the_model_is_as_before(tmp_path: Path) -> None:
    model = nn.Sequential(packed_linear(PackedSpec(DUAL8, smoothing=True, shift=True, rank=4))).train()
    before, state = list(model.modules()), {name: value.clone() for name, value in model.state_dict().items()}
    export_module(model, tmp_path / "model.onnx", {"input": torch.randn(1, 4, 96)})
    assert [id(module) for module in model.modules()] == [id(module) for module in before]
    assert "forward" not in model.__dict__
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(RuntimeError, match="inside"), lowered(model, TARGETS["onnxruntime"]):
        raise RuntimeError("inside")
    assert isinstance(model[0], PackedLinear)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        (PackedSpec(ONE), {"opset": 13}, "opset 13 is not supported: use 19 to 21"),
        (PackedSpec(ONE), {"opset": 99}, "opset 99 is not supported"),
        (PackedSpec(ONE, "int4"), {"opset": 20}, "use opset=21, or a preset with int8"),
        (PackedSpec(ONE), {"target": "openvino"}, "use one of 'onnxruntime', 'onnxruntime-vnni', 'tensorrt'"),
        (PackedSpec(ONE, "int4", 16), {"target": "tensorrt"}, "SEGQUANT_W4A8_CFG"),
        (PackedSpec(ONE, "int4", 16, None), {"target": "tensorrt"}, "groups of 64 or 128"),
        (PackedSpec(ONE), {"dynamic_axes": {"input": {5: "length"}}}, "has 3 dimensions"),
        (PackedSpec(ONE), {"dynamic_axes": {"inputs": {0: "batch"}}}, "the inputs are input, the outputs output"),
        (PackedSpec(ONE), {"dynamic_axes": {"input": {0: "n", 1: "n"}}}, "different names"),
        (PackedSpec(ONE), {"output_names": ["a", "b"]}, "has 2 names, the model returns 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named_and_write_nothing(
    spec: PackedSpec, arguments: dict, message: str, tmp_path: Path
) -> None:
    model = nn.Sequential(packed_linear(spec))
    with pytest.raises(ValueError, match=message):
        export_module(model, tmp_path / "model.onnx", {"input": torch.randn(1, 4, 64)}, **arguments)
    assert list(tmp_path.iterdir()) == []
    assert isinstance(model[0], PackedLinear)


def test_unknown_and_missing_inputs(tmp_path: Path) -> None:
    model = nn.Sequential(packed_linear(PackedSpec(ONE)))
    with pytest.raises(ValueError, match="no parameters x: it takes input"):
        export_module(model, tmp_path / "model.onnx", {"x": torch.randn(1, 4, 64)})
    with pytest.raises(ValueError, match="inputs holds no tensor"):
        export_module(model, tmp_path / "model.onnx", {"input": 3})
    with pytest.raises(ValueError, match="no Linear of the model is quantized"):
        export_module(nn.Sequential(nn.Linear(4, 4)), tmp_path / "model.onnx", {"input": torch.randn(1, 4)})
