"""``compress``: packed Linears give the numbers of simulated quantization, in a byte or half a byte a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.opt.conversion import ModeloptStateManager
from modelopt.torch.opt.dynamic import DynamicModule
from modelopt.torch.quantization.nn import TensorQuantizer
from test_quantize import loop_over, outputs, sd3_inputs, sqnr
from tiny_pipelines import tiny_sd3_transformer
from torch import Tensor, nn

import modelopt_ext
from modelopt_ext import PackedLinear, PackedSpec, SegLinear
from modelopt_ext.kernels import cuda, scaled_mm
from modelopt_ext.nn.packed_product import pack_int4, unpack_int4
from modelopt_ext.presets import PER_TOKEN, PRESETS, linear_only

PACKABLE = sorted(set(PRESETS) - {"SEGQUANT_NVFP4_CFG", "SEGQUANT_CFG"})
INT8 = {"num_bits": 8, "axis": 0}
STATIC = {"num_bits": 8, "axis": None}


def one_block() -> nn.Module:
    """Small enough to calibrate with every preset; the one dual-attention block has every kind of layer."""
    model = tiny_sd3_transformer()
    del model.transformer_blocks[1:-1]
    return model


@cache
def quantized(preset: str) -> nn.Module:
    """A calibrated model; never changed, so take a copy."""
    config = copy.deepcopy(PRESETS[preset])
    # Less searching than in earnest, every kind of result.
    config["algorithm"].update(samples=128, alpha_grid=[0.5], clip_grid=[1.0, 0.8])
    if config["algorithm"].get("weight_clip_grid"):
        config["algorithm"]["weight_clip_grid"] = [1.0, 0.8]
    return mtq.quantize(one_block(), config, loop_over(range(6)))


def compressed(preset: str) -> nn.Module:
    return modelopt_ext.compress(copy.deepcopy(quantized(preset)))


def recorded_inputs(model: nn.Module, seed: int = 100) -> dict[str, Tensor]:
    """What every Linear of the model reads."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach().clone()))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(**sd3_inputs(seed))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("preset", PACKABLE)
def test_every_layer_gives_the_numbers_of_the_simulation(preset: str) -> None:
    model = quantized(preset)
    packed = compressed(preset)
    inputs = recorded_inputs(model)
    layers = dict(packed.named_modules())
    assert sum(isinstance(layer, PackedLinear) for layer in layers.values()) == len(inputs)
    for name, module in model.named_modules():
        if name in inputs and isinstance(module, nn.Linear):
            with torch.no_grad():
                expected, found = module(inputs[name]), layers[name](inputs[name])
            assert sqnr(expected, found) > 60, name  # a tie that falls the other way; else 110 dB and more


@pytest.mark.parametrize("preset", PACKABLE)
def test_nothing_of_the_simulation_is_left(preset: str) -> None:
    packed = compressed(preset)
    assert not any(isinstance(module, TensorQuantizer | DynamicModule) for module in packed.modules())
    assert not ModeloptStateManager.is_converted(packed)
    assert sqnr(outputs(quantized(preset)), outputs(packed)) > 25  # ties are amplified from layer to layer


def test_weights_take_one_byte_or_half_of_one() -> None:
    plain = one_block()
    count = sum(module.weight.numel() for module in plain.modules() if isinstance(module, nn.Linear))
    for preset, bytes_a_weight in {"SEGQUANT_INT8_CFG": 1.0, "SEGQUANT_FP8_CFG": 1.0}.items():
        layers = [layer for layer in compressed(preset).modules() if isinstance(layer, PackedLinear)]
        assert sum(layer.weight.nbytes for layer in layers) == count * bytes_a_weight
    inner = [layer for layer in compressed("SEGQUANT_W4A8_CFG").modules() if isinstance(layer, PackedLinear)]
    assert {layer.spec.weights for layer in inner} == {"int4", "int8"}  # the outer layers keep 8 bits
    for layer in inner:
        half = 2 if layer.spec.weights == "int4" else 1
        assert layer.weight.nbytes * half == layer.in_features * layer.out_features


def single(
    config: dict[str, Any], width: tuple[int, int] = (32, 24), dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[nn.Module, PackedLinear, Tensor]:
    """A Linear behind a GELU: the simulation, the packed form and unseen inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.GELU(), nn.Linear(*width, bias=bias)).to(dtype)
    data = (torch.randn(600, width[0]) * torch.linspace(0.2, 3, width[0])).to(dtype)
    mtq.quantize(model, config, lambda module: [module(part) for part in data[:512].split(64)])
    x = nn.functional.gelu(data[512:])
    packed = modelopt_ext.compress(copy.deepcopy(model))[1]
    assert isinstance(packed, PackedLinear)
    return model[1], packed, x


POLARITIES = ("none", "shift", "dual", "dual8")


@pytest.mark.parametrize("polarity", POLARITIES)
@pytest.mark.parametrize("activation", [STATIC, {"num_bits": 8, **PER_TOKEN}, {"num_bits": 4, **PER_TOKEN}])
def test_polarity(polarity: str, activation: dict[str, Any]) -> None:
    config = linear_only(INT8, activation, polarity=polarity, second_product=True)
    module, packed, x = single(config)
    assert packed.spec.layout.polarity == ("none" if polarity == "shift" else polarity,)
    if activation["num_bits"] == 4:
        assert packed.spec.shift == (polarity == "shift")
    assert sqnr(module(x), packed(x)) > 80


@pytest.mark.parametrize(
    "weights", [{"num_bits": 4, "block_sizes": {-1: 8, "type": "static"}}, {"num_bits": 4, "axis": 0}]
)
@pytest.mark.parametrize("activation", [None, {"num_bits": (4, 3), **PER_TOKEN}, {"num_bits": 8, **PER_TOKEN}])
def test_four_bit_weights(weights: dict[str, Any], activation: dict[str, Any] | None) -> None:
    module, packed, x = single(linear_only(weights, activation))
    assert packed.spec.weights == "int4"
    assert packed.weight.shape == (24, 16)
    assert sqnr(module(x), packed(x)) > 80


def test_an_odd_number_of_channels_and_no_bias() -> None:
    module, packed, x = single(linear_only({"num_bits": 4, "axis": 0}, STATIC, polarity="none"), (15, 10), bias=False)
    assert packed.weight.shape == (10, 8)
    assert packed.bias is None
    assert sqnr(module(x), packed(x)) > 80


def test_int4_codes_come_back() -> None:
    codes = torch.randint(-8, 8, (6, 11), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(codes), 11), codes)
    assert pack_int4(torch.tensor([[1, -1]], dtype=torch.int8)).item() == -15  # 0xF1: the even channel is low


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    module, packed, x = single(linear_only(INT8, STATIC), dtype=dtype)
    assert packed(x).dtype == dtype
    assert packed.bias is not None
    assert packed.bias.dtype == dtype
    assert sqnr(module(x).float(), packed(x).float()) > 40  # the simulation rounds its products to 16 bits, we do not


def test_under_autocast_outputs_are_half_precision() -> None:
    _, packed, x = single(linear_only(INT8, STATIC))
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16


@pytest.mark.parametrize("polarity", ["none", "dual8"])
def test_autocast_only_rounds_the_output(polarity: str) -> None:
    _, packed, x = single(linear_only(INT8, {"num_bits": 8, **PER_TOKEN}, polarity=polarity), (256, 24))
    rotated = PackedLinear(replace(packed.spec, layout=replace(packed.spec.layout, rotation=(16,))))
    rotated.load_state_dict(packed.state_dict())
    for layer in (packed, rotated):
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
        assert torch.equal(found, layer(x).to(torch.bfloat16))


@pytest.mark.parametrize("preset", ["SEGQUANT_INT8_CFG", "SEGQUANT_W4A4_CFG", "SEGQUANT_W8A16_CFG"])
def test_shapes_on_the_meta_device(preset: str) -> None:
    layer = next(module for module in compressed(preset).modules() if isinstance(module, PackedLinear)).to("meta")
    assert layer(torch.empty(2, 3, layer.in_features, device="meta")).shape == (2, 3, layer.out_features)


@pytest.mark.parametrize("preset", ["SEGQUANT_INT8_CFG", "SEGQUANT_W4A4_CFG", "SEGQUANT_FP8_SVD_CFG"])
def test_casting_keeps_codes_and_scales(preset: str) -> None:
    packed = compressed(preset)
    before = {name: value.clone() for name, value in packed.state_dict().items()}
    packed.to(torch.bfloat16)
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            for key in ("weight", *PackedLinear.FLOAT32):
                value = getattr(module, key)
                assert value is None or torch.equal(value, before[f"{name}.{key}"]), (name, key)
            assert module.bias is None or module.bias.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "preset", ["SEGQUANT_INT8_CFG", "SEGQUANT_FP8_SVD_CFG", "SEGQUANT_W4A4_CFG", "SEGQUANT_W4A16_CFG"]
)
def test_state_dict_and_deepcopy_give_the_same_numbers(preset: str) -> None:
    packed = compressed(preset)
    expected = outputs(packed)
    assert torch.equal(outputs(copy.deepcopy(packed)), expected)
    other = one_block()
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            spec = PackedSpec.from_dict(module.spec.to_dict())
            assert spec == module.spec
            other.set_submodule(name, PackedLinear(spec, module.bias is not None, device="meta"))
    other.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(outputs(other), expected)


@pytest.mark.parametrize("preset", ["SEGQUANT_W8A16_CFG", "SEGQUANT_W4A16_CFG"])
def test_dequantized_weight_only_layers_are_plain_linears_with_the_same_numbers(preset: str) -> None:
    for _, layer, x in _layers(compressed(preset)):
        assert sqnr(layer(x), layer.dequantize()(x)) > 90


@pytest.mark.parametrize("preset", ["SEGQUANT_INT8_CFG", "SEGQUANT_FP8_SVD_CFG", "SEGQUANT_W4A4_CFG"])
def test_dequantized_layers_only_lack_the_rounding_of_activations(preset: str) -> None:
    floor = {"SEGQUANT_INT8_CFG": 25.0, "SEGQUANT_FP8_SVD_CFG": 20.0, "SEGQUANT_W4A4_CFG": 8.0}[preset]
    for name, layer, x in _layers(compressed(preset)):
        plain = layer.dequantize()
        assert type(plain) is nn.Linear
        assert sqnr(plain(x), layer(x)) > floor, name


def _layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear, Tensor]]:
    inputs = recorded_inputs(model)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module, inputs[name]


def test_modelopts_own_algorithms_pack_too() -> None:
    model = one_block()
    config = linear_only(INT8, STATIC)
    mtq.quantize(model, {"quant_cfg": config["quant_cfg"], "algorithm": "smoothquant"}, loop_over(range(6)))
    packed = modelopt_ext.compress(copy.deepcopy(model))
    assert any(m.inverse_smoothing is not None for m in packed.modules() if isinstance(m, PackedLinear))
    assert sqnr(outputs(model), outputs(packed)) > 30


def test_excluded_layers_become_plain_linears_again() -> None:
    config = linear_only(INT8, STATIC, exclude=["*.attn.*", "proj_out"])
    model = modelopt_ext.compress(mtq.quantize(one_block(), config, loop_over(range(6))))
    modules = dict(model.named_modules())
    assert type(modules["proj_out"]) is nn.Linear
    assert type(modules["transformer_blocks.0.attn.to_q"]) is nn.Linear
    assert isinstance(modules["transformer_blocks.0.ff.net.2"], PackedLinear)


def disabled_weights(model: nn.Module) -> None:
    mtq.disable_quantizer(model, "*proj_out.weight_quantizer")


def folded(model: nn.Module) -> None:
    next(module for module in model.modules() if isinstance(module, SegLinear)).fold_weight()


def output_quantizers(model: nn.Module) -> None:
    mtq.enable_quantizer(model, "*proj_out.output_quantizer")


def nothing_quantized(model: nn.Module) -> None:
    mtq.disable_quantizer(model, "*")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (disabled_weights, "proj_out: its inputs are rounded but its weight is not"),
        (folded, "its weight was folded; compress the model as it was before"),
        (output_quantizers, "proj_out: it has an output_quantizer; disable it"),
        (nothing_quantized, "no Linear is quantized and calibrated; call mtq.quantize"),
    ],
)
def test_what_cannot_be_packed_is_named_and_nothing_changes(
    break_it: Callable[[nn.Module], None], message: str
) -> None:
    model = copy.deepcopy(quantized("SEGQUANT_INT8_CFG"))
    break_it(model)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        modelopt_ext.compress(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("weight", "activation", "message"),
    [
        ({"num_bits": 6, "axis": 0}, STATIC, "codes of 6 bits have no packed form"),
        (INT8, {"num_bits": 8, "type": "dynamic", "axis": None}, "one scale a call"),
        (INT8, {"num_bits": 8, "unsigned": True, "axis": None}, "unsigned codes for a whole tensor"),
    ],
)
def test_formats_without_a_packed_form_are_refused(
    weight: dict[str, Any], activation: dict[str, Any], message: str
) -> None:
    config = {**linear_only(weight, activation), "algorithm": "max"}
    model = mtq.quantize(nn.Sequential(nn.Linear(16, 8)), config, _feed)
    with pytest.raises(ValueError, match=message):
        modelopt_ext.compress(model)


def _feed(model: nn.Module) -> None:
    torch.manual_seed(0)
    for _ in range(8):
        model(torch.randn(32, 16))


def test_modelopts_svdquant_is_refused() -> None:
    algorithm = {"method": "svdquant", "lowrank": 4}
    model = mtq.quantize(nn.Sequential(nn.Linear(16, 8)), {**linear_only(INT8, STATIC), "algorithm": algorithm}, _feed)
    with pytest.raises(ValueError, match="0: it carries ModelOpt's SVDQuant branch"):
        modelopt_ext.compress(model)


def test_an_uncalibrated_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    mtq.quantize(model, {"quant_cfg": linear_only(INT8, STATIC)["quant_cfg"], "algorithm": None})
    with pytest.raises(ValueError, match="0: it is not calibrated"):
        modelopt_ext.compress(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "int5"}, "weights must be one of"),
        ({"rank": -1}, "rank must not be negative"),
        ({"group": 5}, "groups of 5 channels do not divide"),
        ({"extra": 1}, "has the keys"),
    ],
)
def test_a_wrong_description_is_refused(change: dict[str, Any], message: str) -> None:
    data = {**single(linear_only(INT8, STATIC))[1].spec.to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        PackedSpec.from_dict(data)


@pytest.mark.parametrize("channels", [-1, 1])
@pytest.mark.parametrize("activation", [STATIC, {"num_bits": 8, **PER_TOKEN}], ids=["static", "per token"])
def test_an_input_of_another_width_is_refused(activation: dict[str, Any], channels: int) -> None:
    _, packed, x = single(linear_only(INT8, activation))
    wrong = x.new_ones(3, x.shape[-1] + channels)
    with pytest.raises(ValueError, match=f"{wrong.shape[1]} channels does not fit a Linear of {x.shape[-1]}"):
        packed(wrong)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bits", [8, (4, 3)], ids=["int8", "fp8"])
@pytest.mark.parametrize("scales", [STATIC, PER_TOKEN], ids=["static", "per token"])
def test_gradients_through_codes_are_refused(scales: dict[str, Any], bits: Any, compiled: bool) -> None:
    _, packed, x = single(linear_only({**INT8, "num_bits": bits}, {**scales, "num_bits": bits}))
    run = torch.compile(packed, backend="aot_eager", fullgraph=True) if compiled else packed
    adapted = x.clone().requires_grad_()
    found = run(adapted)
    assert torch.equal(found, packed(x))
    found += 1
    # What goes around it has a gradient.
    with pytest.raises(RuntimeError, match="packed Linears are for inference"):
        (found.sum() + adapted.sum()).backward()


def test_scaled_mm_is_exact_for_integers() -> None:
    torch.manual_seed(0)
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((33, 200), (17, 200)))
    exact = a.long() @ b.long().t()
    one = torch.ones(1, 1)
    assert torch.equal(scaled_mm(a, b, one, torch.ones(17)), exact.float())
    shifted = (a.long() + 128) @ b.long().t()
    sums = b.sum(dim=1, dtype=torch.int32)
    assert torch.equal(scaled_mm(a, b, one, torch.ones(17), zero=-128, sum_b=sums), shifted.float())
    both = scaled_mm(a, b, one, torch.ones(17), a2=-a.clamp(min=-127), scale_a2=one * 2, sign=-1)
    assert torch.equal(both, exact.float() + 2 * (a.clamp(min=-127).long() @ b.long().t()).float())
    scales, bias = torch.rand(33, 1), torch.randn(17)
    found = scaled_mm(a, b, scales, torch.arange(17.0), bias, out_dtype=torch.bfloat16)
    assert torch.equal(found, (exact.float() * scales * torch.arange(17.0) + bias).to(torch.bfloat16))


@pytest.mark.parametrize(("start", "stop", "size"), [(16, 48, 32), (0, 120, 128), (120, 128, 16), (120, 136, 16)])
def test_parts_for_cublas_are_aligned_and_padded(start: int, stop: int, size: int) -> None:
    x = torch.randn(4, 144).to(torch.float8_e4m3fn)
    part = cuda._part(x, slice(start, stop))
    assert part.shape == (4, size)
    assert part.stride(0) % 16 == part.data_ptr() % 16 == 0
    assert torch.equal(part[:, : stop - start].float(), x[:, start:stop].float())
    assert not part[:, stop - start :].float().any()
    assert (part.data_ptr() == x.data_ptr() + start) == (start % 16 == stop % 16 == 0)


def test_any_batch_can_be_exported() -> None:
    """What is chosen by the rows on a GPU binds nobody elsewhere."""

    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor, one: Tensor, scale: Tensor) -> Tensor:
            return scaled_mm(a, b, one, scale)

    inputs = torch.ones(40, 8, dtype=torch.int8), torch.ones(6, 8, dtype=torch.int8), torch.ones(1, 1), torch.ones(6)
    exported = torch.export.export(Product(), inputs, dynamic_shapes=({0: torch.export.Dim("rows")}, None, None, None))
    assert exported.module()(torch.ones(200, 8, dtype=torch.int8), *inputs[1:]).shape == (200, 6)


def test_scaled_mm_passes_torchs_operator_checks() -> None:
    a, b = torch.randint(-9, 9, (4, 8), dtype=torch.int8), torch.randint(-9, 9, (6, 8), dtype=torch.int8)
    sums = b.sum(dim=1, dtype=torch.int32)
    arguments = (a, b, torch.rand(4, 1), torch.rand(6), torch.rand(6), -128, sums, a, torch.rand(4, 1), -1)
    torch.library.opcheck(torch.ops.segquant.scaled_mm.default, (*arguments, 1, 0, 8, torch.bfloat16))
    with pytest.raises(ValueError, match="multiplies int8 by int8"):
        scaled_mm(a, b.float(), torch.rand(4, 1), torch.rand(6))
    with pytest.raises(ValueError, match="7 channels do not go with a weight of 8"):
        scaled_mm(a[:, :7], b, torch.rand(4, 1), torch.rand(6))


def test_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    for config in (linear_only(INT8, STATIC, polarity="dual8"), linear_only(INT8, {"num_bits": 8, **PER_TOKEN})):
        _, packed, x = single(config)
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        assert sqnr(packed(x), compiled(x)) > 80
