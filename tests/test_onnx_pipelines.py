"""Quantized pipelines through Optimum: written, loaded by ORTDiffusionPipeline, and compared with PyTorch."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import onnx
import pytest
import torch
from denoisers import build
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from optimum.onnxruntime import ORTDiffusionPipeline
from tiny_pipelines import tiny_sd3_pipeline, tiny_tokenizer
from torch import nn
from transformers import Gemma2Config, Gemma2Model

import modelopt_ext
from modelopt_ext.export.onnx.export import dynamic_dimensions
from modelopt_ext.export.tensorrt import check_tensorrt
from modelopt_ext.nn.packed import PackedLinear
from optimum_segquant.evaluation import denoiser_of, sample_trajectories
from optimum_segquant.exporters import agreement, export_onnx, layer_parity, session, supported_pipelines
from optimum_segquant.exporters.compare import run
from optimum_segquant.exporters.cpu import multiplies_signed_weights
from optimum_segquant.exporters.verify import flat_tensors
from optimum_segquant.files import verify_manifest

SHAPES = Path(__file__).parent.parent / "examples" / "pipelines"
PROMPTS = ["a large red circle above a small blue square", "a green triangle"]


def sampling(pipeline: Any, size: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"num_inference_steps": 3, "height": size, "width": size, "guidance_scale": 4.0}
    if isinstance(pipeline, FluxPipeline):
        arguments.update(guidance_scale=1.0, true_cfg_scale=4.0, negative_prompt="")
    if not isinstance(pipeline, StableDiffusionXLPipeline):
        arguments.update(max_sequence_length=16)
    return arguments


def images(pipeline: Any, size: int) -> torch.Tensor:
    arguments = {**sampling(pipeline, size), "output_type": "np"}
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [""] * len(PROMPTS)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    pipeline.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipeline(PROMPTS, generator=generators, **arguments).images)


def quantized_sd3(config: dict[str, Any], **calibration: Any) -> tuple[StableDiffusion3Pipeline, Any]:
    pipeline = tiny_sd3_pipeline()
    trajectories = sample_trajectories(pipeline, PROMPTS * 4, batch_size=4, **sampling(pipeline, 16), **calibration)
    mtq.quantize(pipeline.transformer, config, trajectories.forward_loop)
    return pipeline, trajectories


@pytest.fixture(scope="module")
def sd3() -> tuple[StableDiffusion3Pipeline, Any]:
    """Without T5, static INT8 with every kind of polarity."""
    return quantized_sd3(modelopt_ext.SEGQUANT_CFG)


@pytest.fixture(scope="module")
def sd3_directory(sd3: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(sd3[0], tmp_path_factory.mktemp("sd3") / "onnx")


def test_optimum_knows_these_pipelines() -> None:
    known = {"FluxPipeline", "SanaPipeline", "StableDiffusion3Pipeline", "StableDiffusionXLPipeline"}
    assert known <= set(supported_pipelines())


def test_ort_pipeline_generates_the_images_of_simulated_quantization(sd3: tuple[Any, Any], sd3_directory: Path) -> None:
    pipeline = ORTDiffusionPipeline.from_pretrained(sd3_directory)
    assert pipeline.text_encoder_3 is None
    for size in (16, 8):
        close = agreement(images(sd3[0], size), images(pipeline, size))
        assert close.sqnr > 40, size  # dB; quantization itself is at 30 to 35 on this untrained model
    verify_manifest(sd3_directory)


def test_sizes_stay_dynamic(sd3_directory: Path) -> None:
    shapes = dynamic_dimensions(onnx.load(sd3_directory / "transformer" / "model.onnx"))
    assert shapes["hidden_states"] == ("batch_size", 4, "height", "width")
    assert shapes["encoder_hidden_states"] == ("batch_size", "sequence_length", 64)
    assert shapes["out_hidden_states"] == ("batch_size", 4, "height", "width")


def test_the_pipeline_is_as_before(sd3: tuple[Any, Any], sd3_directory: Path) -> None:
    pipeline, _ = sd3
    assert any(isinstance(module, modelopt_ext.SegLinear) for module in pipeline.transformer.modules())
    assert not hasattr(pipeline.transformer.config, "text_encoder_projection_dim")
    assert not hasattr(pipeline.text_encoder.config, "export_model_type")
    assert json.loads((sd3_directory / "model_index.json").read_text())["_class_name"] == "StableDiffusion3Pipeline"


def test_every_product_is_an_integer_product(sd3_directory: Path, tmp_path: Path) -> None:
    """With default session options; the MatMuls that remain are the attention's."""
    optimized = tmp_path / "optimized.onnx"
    session(sd3_directory / "transformer" / "model.onnx", optimized=optimized)
    written = onnx.load(sd3_directory / "transformer" / "model.onnx").graph
    readers = {name for node in written.node if node.op_type == "DequantizeLinear" for name in node.output}
    products = sum(node.op_type == "MatMul" and node.input[0] in readers for node in written.node)
    operators = [node.op_type for node in onnx.load(optimized).graph.node]
    assert operators.count("MatMulIntegerToFloat") == products > 60
    assert "DequantizeLinear" not in operators
    assert "Gemm" not in operators


def static(bits: int | tuple[int, int], polarity: str) -> dict[str, Any]:
    one_scale = {"num_bits": bits, "axis": None}
    return modelopt_ext.presets.linear_only(one_scale, one_scale, alpha=0.5, clip_grid=(1.0,), polarity=polarity)


CONFIGS = {"SEGQUANT_CFG": None, "float8 dual": static((4, 3), "dual"), "int4 dual8": static(4, "dual8")}


@pytest.mark.parametrize(
    ("config", "target"),
    [
        *((config, "onnxruntime") for config in CONFIGS),
        *itertools.product(("SEGQUANT_CFG", "int4 dual8"), ("onnxruntime-vnni", "tensorrt")),
    ],
)
def test_layers_round_to_the_same_codes(config: str, target: str, sd3: tuple[Any, Any]) -> None:
    pipeline, trajectories = sd3 if CONFIGS[config] is None else quantized_sd3(CONFIGS[config])
    model = pipeline.transformer
    found = layer_parity(model, lambda: model(**trajectories[0].inputs), target)
    assert len(found) == 50
    codes, differing = sum(layer.codes for layer in found.values()), sum(layer.differing for layer in found.values())
    assert differing <= 1e-3 * codes
    assert max(layer.largest for layer in found.values()) <= 1
    assert max(layer.output for layer in found.values()) < 1e-4


def test_denoiser_differs_like_float32_from_float64(sd3: tuple[Any, Any], sd3_directory: Path) -> None:
    pipeline, trajectories = sd3
    wide = copy.deepcopy(pipeline.transformer).double()
    runtime = session(sd3_directory / "transformer" / "model.onnx")
    rounding = exported = signal = 0.0
    with torch.no_grad():
        for call in trajectories:
            narrow = pipeline.transformer(**call.inputs)[0].double()
            doubled = {
                name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                for name, value in call.inputs.items()
            }
            rounding += float((wide(**doubled)[0] - narrow).square().sum())
            output = next(iter(run(runtime, flat_tensors(call.inputs)).values())).double()
            exported += float((output - narrow).square().sum())
            signal += float(narrow.square().sum())
    assert exported**0.5 < 2 * max(rounding**0.5, 1e-3 * signal**0.5)


def test_tensorrt_export_obeys_its_rules(sd3: tuple[Any, Any], tmp_path: Path) -> None:
    directory = export_onnx(sd3[0], tmp_path / "onnx", target="tensorrt")
    path = directory / "transformer" / "model.onnx"
    assert [str(found) for found in check_tensorrt(path) if found.severity == "error"] == []
    kinds = {tensor.data_type for tensor in onnx.load(path).graph.initializer if "codes" in tensor.name}
    assert kinds == {onnx.TensorProto.INT8}


def test_packed_models_export_alike(sd3: tuple[Any, Any], sd3_directory: Path, tmp_path: Path) -> None:
    pipeline = copy.copy(sd3[0])
    pipeline.register_modules(transformer=modelopt_ext.compress(copy.deepcopy(sd3[0].transformer)))
    assert any(isinstance(module, PackedLinear) for module in pipeline.transformer.modules())
    directory = export_onnx(pipeline, tmp_path / "onnx", verify=False)
    call = sd3[1][0]
    outputs = [
        next(iter(run(session(where / "transformer" / "model.onnx"), flat_tensors(call.inputs)).values()))
        for where in (sd3_directory, directory)
    ]
    assert torch.equal(*outputs)


def tiny_sana_pipeline() -> SanaPipeline:
    torch.manual_seed(0)
    text = Gemma2Config(
        head_dim=16,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    pipeline = SanaPipeline(
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=16,
        ).eval(),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
        ).eval(),
        text_encoder=Gemma2Model(text).eval(),
        tokenizer=tiny_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_sana(tmp_path: Path) -> None:
    pipeline = tiny_sana_pipeline()
    mtq.quantize(pipeline.transformer, modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG)
    loaded = ORTDiffusionPipeline.from_pretrained(export_onnx(pipeline, tmp_path / "onnx"))
    loaded.set_progress_bar_config(disable=True)
    use = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 16, "output_type": "np"}
    use |= {"complex_human_instruction": None, "use_resolution_binning": False}
    first, second = (
        torch.from_numpy(one(PROMPTS[0], generator=torch.Generator().manual_seed(0), **use).images)
        for one in (pipeline, loaded)
    )
    assert agreement(first, second).sqnr > 60  # dB


@pytest.mark.slow
def test_quantized_text_encoders(tmp_path: Path) -> None:
    """CLIP and T5, whose attention ModelOpt patches, beside a denoiser in full precision."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(SHAPES / "shapes-sd3")
    tokens = torch.tensor([[0, 5, 6, 1]])
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        mtq.quantize(getattr(pipeline, name), modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG, lambda model: model(tokens))
    loaded = ORTDiffusionPipeline.from_pretrained(export_onnx(pipeline, tmp_path / "onnx"))
    assert agreement(images(pipeline, 64), images(loaded, 64)).sqnr > 30  # dB


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes-sd3", "shapes-flux", "shapes-sdxl"])
def test_trained_pipelines(name: str, tmp_path: Path) -> None:
    """SD3 with T5, FLUX, SDXL: images of ONNX Runtime against those of simulated quantization."""
    kinds = {
        "shapes-sd3": StableDiffusion3Pipeline,
        "shapes-flux": FluxPipeline,
        "shapes-sdxl": StableDiffusionXLPipeline,
    }
    pipeline = kinds[name].from_pretrained(SHAPES / name)
    one_call = sample_trajectories(pipeline, PROMPTS, steps=1, **sampling(pipeline, 64))
    mtq.quantize(denoiser_of(pipeline), modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG, one_call.forward_loop)
    directory = export_onnx(pipeline, tmp_path / "onnx")
    close = agreement(images(pipeline, 64), images(ORTDiffusionPipeline.from_pretrained(directory), 64))
    assert close.sqnr > 30  # dB


# -- models by themselves, bad input -----------------------------------------------------------------------------------


def test_a_denoiser_by_itself(sd3: tuple[Any, Any], sd3_directory: Path, tmp_path: Path) -> None:
    pipeline, trajectories = sd3
    call = trajectories[0]
    directory = export_onnx(pipeline.transformer, tmp_path / "onnx", inputs=call.inputs)
    assert json.loads((directory / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"
    outputs = [
        next(iter(run(session(path), flat_tensors(call.inputs)).values()))
        for path in (directory / "model.onnx", sd3_directory / "transformer" / "model.onnx")
    ]
    assert agreement(*outputs).sqnr > 60


@pytest.mark.parametrize(
    ("name", "axes"),
    [("FluxTransformer2DModel", None), ("SanaTransformer2DModel", None), ("PixArtTransformer2DModel", {})],
    ids=["FLUX", "Sana", "PixArt, fixed sizes"],
)
def test_other_denoisers_by_themselves(name: str, axes: dict[str, Any] | None, tmp_path: Path) -> None:
    """Verified on export; PixArt, which Optimum does not know, has a view that PyTorch's exporter needs a size for."""
    model, inputs = build(name)
    mtq.quantize(model, modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG, lambda denoiser: denoiser(**inputs))
    path = export_onnx(model, tmp_path / "onnx", inputs=inputs, dynamic_axes=axes) / "model.onnx"
    with torch.no_grad():
        expected = model(**inputs)[0]
    # dB; quantization itself is at 35 to 45
    assert agreement(expected, next(iter(run(session(path), flat_tensors(inputs)).values()))).sqnr > 50


def test_a_size_left_out_of_the_dynamic_axes_stays_fixed(sd3: tuple[Any, Any], tmp_path: Path) -> None:
    pipeline, trajectories = sd3
    inputs = trajectories[0].inputs
    axes = {name: {0: "batch_size"} for name in flat_tensors(inputs)}
    directory = export_onnx(pipeline.transformer, tmp_path / "onnx", inputs=inputs, dynamic_axes=axes)
    shapes = dynamic_dimensions(onnx.load(directory / "model.onnx"))
    assert shapes["hidden_states"] == ("batch_size", 4, 8, 8)


class BakesItsSize(nn.Module):
    """Reads a size as a Python number, which tracing turns into a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.linear(input) + torch.arange(int(input.shape[1])).float()[:, None].tolist().__len__()


def test_dynamic_axes_that_the_model_does_not_keep_are_found(tmp_path: Path) -> None:
    model = nn.Sequential(BakesItsSize())
    x = torch.randn(2, 8, 32)
    mtq.quantize(model, modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG, lambda m: m(x))
    with pytest.raises(ValueError, match="a size or value became a constant in the graph"):
        export_onnx(model, tmp_path / "onnx", inputs={"input": x})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opset": 12}, "opset 12 is not supported: use 19 to 21"),
        ({"target": "coreml"}, "use one of 'onnxruntime', 'onnxruntime-vnni', 'tensorrt'"),
        ({"inputs": {}}, "a pipeline's inputs, axes and output names are Optimum's"),
    ],
    ids=str,
)
def test_bad_arguments(sd3: tuple[Any, Any], arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_onnx(sd3[0], tmp_path / "onnx", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("here", [True, False])
def test_signed_weights_are_verified_as_floats_where_sums_would_saturate(
    here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if here and not multiplies_signed_weights():
        pytest.skip("this CPU has no VNNI")
    monkeypatch.setattr("optimum_segquant.exporters.cpu.multiplies_signed_weights", lambda: here)
    optimized = []

    def noted(*arguments: Any, optimize: bool = True, **options: Any) -> Any:
        optimized.append(optimize)
        return session(*arguments, optimize=optimize, **options)

    monkeypatch.setattr("optimum_segquant.exporters.verify.session", noted)
    monkeypatch.setattr("optimum_segquant.exporters.parity.session", noted)
    model, x = nn.Sequential(nn.Linear(64, 48)), torch.randn(2, 9, 64)
    mtq.quantize(model, modelopt_ext.SEGQUANT_INT8_CFG, lambda layers: layers(x))
    parity = layer_parity(model, lambda: model(x), "onnxruntime-vnni")
    assert parity["0"].differing <= 1
    directory = export_onnx(model, tmp_path / "onnx", target="onnxruntime-vnni", inputs={"input": x})
    assert set(optimized) == {here}
    assert ("compared as floats only" in caplog.text) is not here
    assert json.loads((directory / "segquant_export.json").read_text())["target"] == "onnxruntime-vnni"


def test_what_is_not_quantized_or_not_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no Linear of the pipeline is quantized: call mtq\.quantize"):
        export_onnx(tiny_sd3_pipeline(), tmp_path / "onnx")
    with pytest.raises(ValueError, match="needs inputs="):
        export_onnx(nn.Linear(4, 4), tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_old_one(
    sd3: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "onnx"
    directory.mkdir()
    (directory / "model_index.json").write_text("{}")

    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modelopt_ext.export.onnx.export.save", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(sd3[0], directory)
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    assert [path.name for path in directory.iterdir()] == ["model_index.json"]
    assert any(isinstance(module, modelopt_ext.SegLinear) for module in sd3[0].transformer.modules())
