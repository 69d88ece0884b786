"""``mtq.quantize(model, SEGQUANT_..., forward_loop)`` on unmodified diffusers models: every way in, every wrong way."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator

import modelopt.torch.quantization as mtq
import pytest
import torch
from diffusers import FluxTransformer2DModel
from modelopt.torch.quantization.nn import TensorQuantizer
from tiny_pipelines import tiny_sd3_transformer, tiny_unet
from torch import Tensor, nn

import modelopt_ext
from modelopt_ext import SegLinear, SegmentPlan
from modelopt_ext.calibrate import embedders
from modelopt_ext.presets import PER_TOKEN, linear_only

STATIC_INT8 = ({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None})


def sd3_inputs(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "hidden_states": normal(2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 6, 64),
        "pooled_projections": normal(2, 64),
        "timestep": torch.tensor([100.0 * (seed % 10), 500.0]).to(dtype),
    }


def loop_over(seeds: range, dtype: torch.dtype = torch.float32) -> Callable[[nn.Module], None]:
    def forward_loop(model: nn.Module) -> None:
        with torch.no_grad():
            for seed in seeds:
                model(**sd3_inputs(seed, dtype))

    return forward_loop


CALIBRATION = loop_over(range(12))


def outputs(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**sd3_inputs(seed, dtype))[0] for seed in range(100, 106)])


def sqnr(reference: Tensor, value: Tensor) -> float:
    reference, value = reference.double(), value.double()
    return float(10 * torch.log10(reference.square().sum() / (value - reference).square().sum()))


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return tiny_sd3_transformer()


@pytest.fixture
def model(original: nn.Module) -> nn.Module:
    return copy.deepcopy(original)


def quiet(config: dict, **algorithm: object) -> dict:
    return {**config, "algorithm": {**config["algorithm"], "progress": False, **algorithm}}


def quantizers(model: nn.Module) -> Iterator[TensorQuantizer]:
    return (module for module in model.modules() if isinstance(module, TensorQuantizer))


# Measured on this untrained model; the bounds leave 2 dB.
@pytest.mark.parametrize(
    ("preset", "bound"),
    [
        ("SEGQUANT_CFG", 42),
        ("SEGQUANT_INT8_CFG", 42),
        ("SEGQUANT_INT8_SVD_CFG", 45),
        ("SEGQUANT_INT8_PER_TENSOR_CFG", 40),
        ("SEGQUANT_INT8_DYNAMIC_CFG", 42),
        ("SEGQUANT_INT8_PER_TOKEN_CFG", 41),
        ("SEGQUANT_FP8_CFG", 29),
        ("SEGQUANT_FP8_PER_TENSOR_CFG", 30),
        ("SEGQUANT_FP8_PER_TOKEN_CFG", 28),
        ("SEGQUANT_FP8_SVD_CFG", 33),
        ("SEGQUANT_W4A8_CFG", 42),
        ("SEGQUANT_W4A8_GROUP_CFG", 42),
        ("SEGQUANT_W4A8_FP8_CFG", 32),
        ("SEGQUANT_W4A4_CFG", 39),
        ("SEGQUANT_W4A16_CFG", 46),
        ("SEGQUANT_W8A16_CFG", 56),
    ],
)
def test_presets(original: nn.Module, model: nn.Module, preset: str, bound: float):
    config = getattr(mtq, preset)
    assert config is getattr(modelopt_ext, preset)
    assert preset in mtq.config.choices
    before = copy.deepcopy(config)
    mtq.quantize(model, quiet(config), CALIBRATION)
    assert config == before, "the preset was mutated"
    assert sqnr(outputs(original), outputs(model)) > bound
    state, expected = model.state_dict(), original.state_dict()
    unchanged = all(torch.equal(state[name], value) for name, value in expected.items())
    assert unchanged != bool(config["algorithm"].get("gptq")), "GPTQ replaces weights, nothing else does"
    assert not any(quantizer._if_calib for quantizer in quantizers(model))


def test_seg_linears_have_the_recorded_cuts(model: nn.Module):
    """alpha fixed, so every output cut is made: 6 parts of AdaLN, 9 with dual attention, 2 in the last context norm."""
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG, alpha=0.5), CALIBRATION)
    layouts = {name: module.layout for name, module in model.named_modules() if isinstance(module, SegLinear)}
    assert layouts["transformer_blocks.0.norm1.linear"].out_groups == (32,) * 9
    assert layouts["transformer_blocks.1.norm1.linear"].out_groups == (32,) * 6
    assert layouts["transformer_blocks.2.norm1_context.linear"].out_groups == (32,) * 2
    plan = modelopt_ext.plan_of(model)
    assert plan is not None
    assert plan.linears["transformer_blocks.0.ff.net.2"].activations == ("gelu",)
    assert set(layouts) <= set(plan.linears)


def test_a_cut_that_changes_no_number_is_not_made(model: nn.Module):
    """Without smoothing all output segments read the same codes, and per-channel weight scales know no segments."""
    mtq.quantize(model, quiet(linear_only(*STATIC_INT8), alpha=None, polarity="none"), CALIBRATION)
    # The embedder of [cos, sin] has input segments, which do have scales of their own.
    assert [name for name, module in model.named_modules() if isinstance(module, SegLinear)] == [
        "time_text_embed.timestep_embedder.linear_1"
    ]
    per_tensor = linear_only({"num_bits": 8, "axis": None}, {"num_bits": 8, "axis": None}, alpha=None, polarity="none")
    mtq.quantize(model, quiet(per_tensor), CALIBRATION)
    layout = model.get_submodule("transformer_blocks.1.norm1.linear").layout
    assert layout.out_groups == (192,)
    assert layout.weight_segments == (32,) * 6


def test_static_scales_are_the_maxima_of_the_calibration_data(model: nn.Module):
    seen: dict[str, float] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, max(seen.get(name, 0), float(args[0].abs().max())))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    CALIBRATION(model)
    for handle in handles:
        handle.remove()
    config = linear_only(*STATIC_INT8, alpha=None, polarity="none", segments=False, clip_grid=(1.0,))
    mtq.quantize(model, quiet(config), CALIBRATION)
    for name, amax in seen.items():
        assert model.get_submodule(name).input_quantizer.amax.item() == pytest.approx(amax)


def test_repeatable(original: nn.Module):
    states = []
    for _ in range(2):
        twin = copy.deepcopy(original)
        torch.rand(3)  # the global random state must not matter
        mtq.quantize(twin, quiet(modelopt_ext.SEGQUANT_CFG), CALIBRATION)
        states.append(twin.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_quantizing_leaves_the_global_random_state_alone(model: nn.Module):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(original: nn.Module, dtype: torch.dtype):
    half = copy.deepcopy(original).to(dtype)
    mtq.quantize(half, quiet(modelopt_ext.SEGQUANT_CFG), loop_over(range(12), dtype))
    result = outputs(half, dtype)
    assert result.dtype == dtype
    assert sqnr(outputs(original), result) > 34
    assert half.get_submodule("transformer_blocks.0.norm1.linear").weight.dtype == dtype


@pytest.mark.parametrize("context", ["grad", "no_grad", "inference_mode", "autocast"])
def test_modes_of_the_forward_loop(original: nn.Module, model: nn.Module, context: str):
    contexts = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }

    def forward_loop(module: nn.Module) -> None:
        with contexts[context]():
            for seed in range(12):
                module(**sd3_inputs(seed))

    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), forward_loop)
    assert modelopt_ext.plan_of(model).linears["transformer_blocks.1.norm1.linear"].out_segments == (32,) * 6
    assert sqnr(outputs(original), outputs(model)) > 36


# -- without data -----------------------------------------------------------------------------------------------------


def test_dynamic_preset_needs_no_data(original: nn.Module, model: nn.Module):
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG))
    assert sqnr(outputs(original), outputs(model)) > 37
    plan = modelopt_ext.plan_of(model)
    assert plan is not None
    assert plan.linears["transformer_blocks.1.norm1.linear"].out_segments == (32,) * 6
    # AdaLN has one row: both signs get their own scale for next to nothing.
    assert model.get_submodule("transformer_blocks.1.norm1.linear").layout.polarity == ("dual8",)


def test_flux_input_segments_without_data():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG))
    assert model.get_submodule("single_transformer_blocks.0.proj_out").layout.in_segments == (32, 128)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (modelopt_ext.SEGQUANT_CFG, "static activation scales"),
        (modelopt_ext.SEGQUANT_FP8_CFG, "static activation scales"),
        (linear_only({"num_bits": 8, "axis": 0}, {"num_bits": 8, **PER_TOKEN}, alpha=0.5), "alpha=0.5"),
        (linear_only({"num_bits": 8, "axis": 0}, {"num_bits": 8, **PER_TOKEN}, alpha=None, polarity="shift"), "shift"),
    ],
)
def test_missing_forward_loop_names_what_does_without(original: nn.Module, model: nn.Module, config: dict, reason: str):
    with pytest.raises(ValueError, match=rf"(?s){reason}.*forward_loop.*SEGQUANT_INT8_DYNAMIC_CFG"):
        mtq.quantize(model, quiet(config))
    check_untouched(original, model)


def test_no_data_and_no_generated_inputs():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"can't generate inputs for Sequential: pass forward_loop"):
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG))


# -- policies ---------------------------------------------------------------------------------------------------------


def treatments(model: nn.Module, name: str) -> tuple[tuple[str, ...], bool]:
    module = model.get_submodule(name)
    return module.layout.polarity, module.input_quantizer.shift is not None


def test_polarity_policies(model: nn.Module, original: nn.Module):
    adaln, down, query = (f"transformer_blocks.1.{name}" for name in ("norm1.linear", "ff.net.2", "attn.to_q"))
    found = {}
    for policy in ("none", "dual", "dual8", "shift", "auto"):
        twin = copy.deepcopy(original)
        config = linear_only(*STATIC_INT8, alpha=0.5, polarity=policy)
        mtq.quantize(twin, quiet(config), CALIBRATION)
        found[policy] = {name: treatments(twin, name) for name in (adaln, down, query)}
    assert all(polarity == ("none",) and not shifted for polarity, shifted in found["none"].values())
    assert found["dual"][down] == (("dual",), False)
    assert found["dual"][query] == (("none",), False), "not behind an activation"
    assert found["dual8"][down] == (("dual8",), False)
    assert all(polarity == ("none",) for polarity, _ in found["shift"].values())
    assert found["shift"][down][1]
    assert found["auto"][down] == (("none",), True), "many rows: a second GEMM would cost as much as the first"


def test_dual8_on_fp8_is_refused(original: nn.Module, model: nn.Module):
    with pytest.raises(ValueError, match=r"dual8.*integer.*polarity='dual'"):
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_FP8_CFG, polarity="dual8"), CALIBRATION)
    check_untouched(original, model)


def test_embedders(original: nn.Module):
    found = {}
    for policy in ("as_configured", "per_token", "none"):
        twin = copy.deepcopy(original)
        mtq.quantize(twin, quiet(linear_only(*STATIC_INT8), embedders=policy), CALIBRATION)
        found[policy] = twin
    names = {
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.text_embedder.linear_1",
        "time_text_embed.text_embedder.linear_2",
        "context_embedder",
    }
    called = list(modelopt_ext.plan_of(found["none"]).linears)
    assert set(embedders(found["none"], called)) == names
    for name in names:
        assert not found["as_configured"].get_submodule(name).input_quantizer._dynamic
        assert found["per_token"].get_submodule(name).input_quantizer._dynamic
        assert not found["none"].get_submodule(name).input_quantizer.is_enabled
        assert not found["none"].get_submodule(name).weight_quantizer.is_enabled
    assert not found["per_token"].get_submodule("norm_out.linear").input_quantizer._dynamic


def test_outer_layers_in_eight_bits(model: nn.Module):
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_W4A4_CFG), CALIBRATION)
    plan = modelopt_ext.plan_of(model)
    assert plan is not None
    outer = [*embedders(model, list(plan.linears)), "norm_out.linear", "proj_out"]
    assert len(outer) == 7
    for name in plan.linears:
        layer = model.get_submodule(name)
        bits = 8 if name in outer else 4
        for bank in (layer.input_quantizer, layer.weight_quantizer):
            blocks = [block for block in bank.children() if isinstance(block, TensorQuantizer)]
            assert {quantizer.num_bits for quantizer in (bank, *blocks)} == {bits}, name
        assert layer.input_quantizer._dynamic


def test_nvfp4_on_a_cpu_is_refused(original: nn.Module, model: nn.Module):
    with pytest.raises(ValueError, match=r"NVFP4 weights, which ModelOpt rounds on a GPU only"):
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_NVFP4_CFG), CALIBRATION)
    check_untouched(original, model)


def test_weight_only(original: nn.Module, model: nn.Module):
    mtq.quantize(model, quiet(linear_only({"num_bits": 8, "axis": 0}, None)), CALIBRATION)
    assert sqnr(outputs(original), outputs(model)) > 42
    assert not model.get_submodule("transformer_blocks.0.attn.to_q").input_quantizer.is_enabled


def test_excluded_layers_stay_in_full_precision(model: nn.Module):
    config = copy.deepcopy(modelopt_ext.SEGQUANT_CFG)
    config["quant_cfg"].append({"quantizer_name": "*attn*", "enable": False})
    mtq.quantize(model, quiet(config), CALIBRATION)
    assert type(model.get_submodule("transformer_blocks.0.attn.to_q")).__name__ == "QuantLinear"
    assert not model.get_submodule("transformer_blocks.0.attn.to_q").weight_quantizer.is_enabled
    assert model.get_submodule("transformer_blocks.0.ff.net.2").input_quantizer.is_enabled


# -- with other configs -----------------------------------------------------------------------------------------------


def test_in_a_list_of_algorithms(original: nn.Module, model: nn.Module):
    config = quiet(modelopt_ext.SEGQUANT_CFG)
    listed = {**config, "algorithm": ["max", config["algorithm"]]}
    mtq.quantize(model, listed, CALIBRATION)
    twin = copy.deepcopy(original)
    mtq.quantize(twin, config, CALIBRATION)
    assert torch.equal(outputs(model), outputs(twin))


@pytest.mark.parametrize("first", ["INT8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "FP8_DEFAULT_CFG"])
def test_after_another_config(original: nn.Module, model: nn.Module, first: str):
    mtq.quantize(model, getattr(mtq, first), CALIBRATION)
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), CALIBRATION)
    twin = copy.deepcopy(original)
    mtq.quantize(twin, quiet(modelopt_ext.SEGQUANT_CFG), CALIBRATION)
    # Undoing SmoothQuant's division of the weights rounds them; codes may differ in a few places.
    assert sqnr(outputs(twin), outputs(model)) > 45
    name = "transformer_blocks.0.norm1.linear"
    stored = model.get_submodule(name)._parameters["weight"]
    torch.testing.assert_close(stored, original.get_submodule(name)._parameters["weight"], rtol=1e-6, atol=1e-8)


def test_convolutions_of_an_earlier_config_stay_quantized():
    unet = tiny_unet()

    def forward_loop(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for step in range(4):
                sample = torch.randn(2, 4, 8, 8, generator=generator)
                model(sample, 100 * step, torch.randn(2, 5, 16, generator=generator))

    mtq.quantize(unet, mtq.INT8_DEFAULT_CFG, forward_loop)
    config = quiet(linear_only(*STATIC_INT8))
    del config["quant_cfg"][0]  # the entry that disables everything else
    mtq.quantize(unet, config, forward_loop)
    assert unet.conv_in.input_quantizer.is_enabled
    assert all(q.amax is not None for q in unet.conv_in.modules() if type(q) is TensorQuantizer and q.is_enabled)
    geglu = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj")
    assert modelopt_ext.plan_of(unet).linears[
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    ].out_segments == (64, 64)
    assert geglu.weight_quantizer.is_enabled


def test_calibrating_again_uses_the_same_plan(original: nn.Module, model: nn.Module):
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), CALIBRATION)
    first = outputs(model)
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), CALIBRATION)
    assert torch.equal(outputs(model), first)
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG, alpha=0.5, polarity="dual"), loop_over(range(20, 30)))
    assert not torch.equal(outputs(model), first)
    assert sqnr(outputs(original), outputs(model)) > 30


def test_another_plan_on_a_segmented_model_is_refused(original: nn.Module, model: nn.Module):
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), CALIBRATION)
    other = modelopt_ext.plan_of(model).with_overrides({"transformer_blocks.0.norm1.linear": None})
    with pytest.raises(ValueError, match="segmented already, with another plan"):
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG, plan=other), CALIBRATION)
    check_untouched(original, model)
    with pytest.raises(ValueError, match="segmented already, with another plan"):
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG, segments=False), CALIBRATION)


def test_plan_and_overrides_in_the_config(original: nn.Module, model: nn.Module):
    name = "transformer_blocks.1.norm1.linear"
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG, alpha=0.5), CALIBRATION)
    plan = SegmentPlan.from_json(modelopt_ext.plan_of(model).to_json())
    twin = copy.deepcopy(original)
    mtq.quantize(
        twin,
        quiet(modelopt_ext.SEGQUANT_CFG, alpha=0.5, plan=plan, overrides={name: {"out_segments": [96, 96]}}),
        CALIBRATION,
    )
    assert twin.get_submodule(name).layout.out_groups == (96, 96)
    assert twin.get_submodule("transformer_blocks.0.norm1.linear").layout.out_groups == (32,) * 9


def test_print_quant_summary_shows_the_blocks(model: nn.Module, capsys: pytest.CaptureFixture[str]):
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG, alpha=0.5), CALIBRATION)
    mtq.print_quant_summary(model)
    printed = capsys.readouterr().out
    assert "transformer_blocks.1.norm1.linear.input_quantizer.block5_0" in printed
    assert "groups=[32, 32, 32, 32, 32, 32]" in printed


# -- wrong input: an error or a warning by name, and a model as it was ------------------------------------------------


def check_untouched(original: nn.Module, model: nn.Module) -> None:
    """Weights bit-equal, outputs full precision, nothing collects, no hook of ours is left."""
    expected = original.state_dict()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items() if "block" not in name)
    assert torch.equal(outputs(model), outputs(original))
    assert not any(quantizer._if_calib for quantizer in quantizers(model))
    assert all(quantizer._if_quant for quantizer in quantizers(model))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def broken_loop(model: nn.Module) -> None:
    model(**sd3_inputs(0))
    raise OSError("the disk of the data set is gone")


@pytest.mark.parametrize(
    ("forward_loop", "message"),
    [
        (lambda model: None, "never ran a quantized Linear"),
        (broken_loop, r"forward_loop raised OSError: the disk of the data set is gone.*mend it and call again"),
        (lambda model: model.norm_out.linear(torch.zeros(1, 32)), "never called the model itself"),
    ],
    ids=["never-calls", "raises", "calls-a-part"],
)
def test_bad_loops(original: nn.Module, model: nn.Module, forward_loop: Callable, message: str):
    with pytest.raises(ValueError, match=message):
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), forward_loop)
    check_untouched(original, model)
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), CALIBRATION)
    assert sqnr(outputs(original), outputs(model)) > 36


def test_interrupt_leaves_the_model_as_it_was(original: nn.Module, model: nn.Module):
    def forward_loop(module: nn.Module) -> None:
        module(**sd3_inputs(0))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), forward_loop)
    check_untouched(original, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_named(original: nn.Module, value: float):
    broken = copy.deepcopy(original)
    with torch.no_grad():
        broken.transformer_blocks[1].ff.net[2].weight[0, 0] = value
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.ff\.net\.2"):
        mtq.quantize(broken, quiet(linear_only({"num_bits": 8, "axis": 0}, None), alpha=None), CALIBRATION)


def test_bad_activations_are_named(original: nn.Module, model: nn.Module):
    def forward_loop(module: nn.Module) -> None:
        inputs = sd3_inputs(0)
        inputs["pooled_projections"][0, 0] = float("nan")
        with torch.no_grad():
            module(**inputs)

    with pytest.raises(ValueError, match=r"inputs of time_text_embed\.text_embedder\.linear_1 hold NaN or infinity"):
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), forward_loop)
    check_untouched(original, model)


def test_model_without_linears():
    model = nn.Sequential(nn.Conv1d(3, 3, 3))
    with pytest.raises(RuntimeError, match="no weight quantizer is enabled"):  # ModelOpt's own check
        mtq.quantize(model, modelopt_ext.SEGQUANT_CFG, lambda m: m(torch.zeros(1, 3, 8)))
    mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda m: m(torch.rand(1, 3, 8)))
    with pytest.raises(ValueError, match="found no Linear with an enabled quantizer"):
        mtq.calibrate(model, {"method": "segquant"}, lambda m: m(torch.zeros(1, 3, 8)))


def test_uncalled_linear_is_reported_and_left_alone(caplog: pytest.LogCaptureFixture):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Two().eval()
    with caplog.at_level(logging.WARNING):
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), lambda m: m(torch.randn(16, 8)))
    assert any("never reached unused" in record.message for record in caplog.records)
    assert not model.unused.weight_quantizer.is_enabled
    assert model.used.weight_quantizer.is_enabled


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.5}, r"alpha is a number in \[0, 1\]"),
        ({"alpha": "best"}, "alpha"),
        ({"alpha_grid": ()}, "at least one number"),
        ({"alpha_grid": (0.5, 2.0)}, r"each in \[0, 1\]"),
        ({"clip_grid": (0.0, 1.0)}, r"each in \(0, 1\]"),
        ({"samples": 0}, "samples"),
        ({"second_product_budget": -1}, "second_product_budget"),
        ({"polarity": "triple"}, "polarity"),
        ({"colour": "red"}, "colour"),
        ({"plan": {"linears": {}}}, "not a segment plan"),
        ({"layerwise": {"enable": True, "save_every": 2}}, "leave layerwise.save_every=1"),
    ],
)
def test_impossible_settings(model: nn.Module, fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG, **fields), CALIBRATION)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"no.such.layer": {"out_segments": [1]}}, "names no Linear"),
        ({"transformer_blocks.1.norm1.linear": {"out_segments": [100, 100]}}, "add up to 200, the Linear has 192"),
    ],
)
def test_impossible_overrides(original: nn.Module, model: nn.Module, overrides: dict, message: str):
    with pytest.raises(ValueError, match=message):
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG, overrides=overrides), CALIBRATION)
    check_untouched(original, model)


def test_plan_of_another_model_is_refused(original: nn.Module, model: nn.Module):
    plan = SegmentPlan({"elsewhere": modelopt_ext.LinearPlan((8,), (8,))})
    with pytest.raises(ValueError, match=r"elsewhere: no such module"):
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG, plan=plan), CALIBRATION)
    check_untouched(original, model)


def test_formats_that_segments_cannot_carry_are_named(original: nn.Module, model: nn.Module):
    config = linear_only({"num_bits": 4, "block_sizes": {-1: 16, -2: 16}}, None)
    with pytest.raises(ValueError, match=r"weight_quantizer: block_sizes=.* groups are for static integer weights"):
        mtq.quantize(model, quiet(config), CALIBRATION)
    sequence = linear_only({"num_bits": 8, "axis": 0}, None)
    sequence["quant_cfg"][1]["cfg"] = [{"num_bits": 4, "axis": 0}, {"num_bits": 8, "axis": 0}]
    with pytest.raises(ValueError, match="sequence of quantizers"):
        mtq.quantize(copy.deepcopy(original), quiet(sequence), CALIBRATION)


def test_folded_weights_are_refused(model: nn.Module):
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), CALIBRATION)
    mtq.fold_weight(model)
    with pytest.raises(ValueError, match=r"folded; run segquant on a freshly loaded model"):
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), CALIBRATION)


def test_no_warnings_of_ours(model: nn.Module):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), CALIBRATION)
    assert [str(w.message) for w in caught if "modelopt_ext" in str(w.filename)] == []
