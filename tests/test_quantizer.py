"""SegQuantizer: from pipelines, models and prompts to quantized ones, reports and directories; what it refuses."""

from __future__ import annotations

import copy
import errno
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from optimum.quantization_base import OptimumQuantizer
from processes import in_processes
from tiny_pipelines import (
    tiny_controlnet_pipeline,
    tiny_flux_pipeline,
    tiny_sd3_pipeline,
    tiny_sdxl_pipeline,
    tiny_wan_pipeline,
)
from torch import nn

import modelopt_ext
from modelopt_ext import PackedLinear, SegLinear
from modelopt_ext.export.tensorrt import check_tensorrt
from modelopt_ext.sensitivity import quantized_layers
from optimum_segquant import CalibrationSettings, QuantizationResult, SegQuantizer, quantize_pipeline
from optimum_segquant.calibration import CalibrationMismatchError, record_calibration
from optimum_segquant.evaluation import sample_trajectories, velocity_sqnr
from optimum_segquant.quantization_report import QuantizationReport, model_bytes

PROMPTS = ["a red circle", "a blue square above a green triangle", "a large circle", "a small square"]
USE = {"guidance_scale": 4.0, "height": 16, "width": 16}
STATIC = {"preset": "SEGQUANT_CFG", "algorithm": {"alpha": 0.5, "clip_grid": [1.0], "samples": 64}}
FAST = {**STATIC, "algorithm": {**STATIC["algorithm"], "exclude": ["transformer_blocks.[12].*"]}}  # 25 of 50 Linears
DYNAMIC = "segquant_int8_dynamic"
SHAPES = Path(__file__).parent.parent / "examples" / "pipelines"


def settings(**fields: Any) -> CalibrationSettings:
    own = {"prompts": PROMPTS, "batch_size": 2, "num_inference_steps": 4, "steps": 2, "call_kwargs": USE}
    return CalibrationSettings(**{**own, **fields})


def quantize(pipeline: Any, *args: Any, components: Any = None, **options: Any) -> QuantizationResult:
    quantizer = SegQuantizer.from_pretrained(pipeline, components=components)
    return quantizer.quantize(*args, **{"calibration": settings(), "progress": False, **options})


def image(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    use = {**USE, "num_inference_steps": 3, "output_type": "np"}
    return torch.from_numpy(pipeline(PROMPTS[1], generator=generator, **use).images)


# -- the whole way -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizationResult, Path]:
    """A tiny SD3 pipeline with static INT8 in the transformer and dynamic INT8 in a text encoder."""
    source, directory = (tmp_path_factory.mktemp("sd3") / name for name in ("original", "quantized"))
    tiny_sd3_pipeline().save_pretrained(source)
    configs = {"transformer": FAST, "text_encoder_2": DYNAMIC}
    components = ["denoiser", "text_encoder_2"]
    result = quantize(source, directory, configs, components=components, held_out=["a triangle", "a red square"])
    return result, directory


def test_a_directory_becomes_a_quantized_directory(written: tuple[QuantizationResult, Path]):
    result, directory = written
    assert result.directory == directory
    assert issubclass(SegQuantizer, OptimumQuantizer)
    assert any(isinstance(module, PackedLinear) for module in result.pipeline.transformer.modules())
    assert any(isinstance(module, PackedLinear) for module in result.pipeline.text_encoder_2.modules())
    assert not quantized_layers(result.pipeline.text_encoder)
    loaded = StableDiffusion3Pipeline.from_pretrained(directory, text_encoder_3=None, tokenizer_3=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(image(loaded), image(result.pipeline))
    assert 0 < (image(loaded) - image(tiny_sd3_pipeline())).abs().max() < 0.2


def test_the_report_says_what_was_done(written: tuple[QuantizationResult, Path]):
    result, directory = written
    report: QuantizationReport = result.report
    transformer, encoder = report.components
    original = tiny_sd3_pipeline()
    assert (transformer.name, transformer.model, transformer.config_name) == (
        "transformer",
        "SD3Transformer2DModel",
        "custom",
    )
    assert (encoder.name, encoder.config_name) == ("text_encoder_2", "SEGQUANT_INT8_DYNAMIC_CFG")
    assert transformer.bytes_before == model_bytes(original.transformer)
    assert transformer.bytes_after == model_bytes(result.pipeline.transformer)
    assert encoder.bytes_after == model_bytes(result.pipeline.text_encoder_2)
    assert transformer.bytes_after < 0.7 * transformer.bytes_before  # a good half of the weights
    assert transformer.parameters == sum(p.numel() for p in original.transformer.parameters())
    assert (transformer.layers.linears, transformer.layers.quantized) == (50, 25)
    assert transformer.layers.weights == {"int8": 25}
    assert sum(transformer.layers.activations.values()) == 25
    assert transformer.layers.activations["int8 per token"] == 5  # the embedders
    assert sum(transformer.layers.polarity.values()) >= 25  # input segments
    assert set(transformer.layers.polarity) <= {"none", "shift", "dual8"}
    assert "50 Linears: 7 with output segments" in (transformer.plan_summary or "")
    assert modelopt_ext.SegmentPlan.from_dict(transformer.plan).summary() == transformer.plan_summary
    assert (transformer.calls, transformer.timesteps) == (4, 2)
    assert encoder.calls == 4  # two batches, with and without the prompt
    assert 30 < transformer.sqnr < 70
    assert len(transformer.sqnr_by_timestep) == 2
    assert 25 < encoder.sqnr < 70
    assert set(report.seconds) == {"load", "sample", "sample held-out", "quantize", "evaluate", "export"}
    assert report.export == "segquant"
    files = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    assert 0 < files - report.exported_bytes < 100_000  # the report itself is not counted
    assert report.calibration["prompts"]["count"] == 4
    assert report.held_out["settings"]["seed"] == 4
    assert report.versions["torch"] == torch.__version__

    saved = json.loads((directory / "segquant_report.json").read_text())
    assert saved == report.to_dict()
    assert saved["components"][0]["config"]["algorithm"]["alpha"] == 0.5
    summary = report.summary()
    assert "transformer (SD3Transformer2DModel), custom: 25 of 50 Linears quantized" in summary
    assert f"held-out SQNR: {transformer.sqnr:.1f} dB" in summary


def test_without_a_directory_quantization_stays_simulated():
    pipeline = tiny_sdxl_pipeline()
    # Text encoders are recorded without denoising, so that prompts alone, with default settings, take no time.
    result = quantize_pipeline(pipeline, DYNAMIC, PROMPTS[:2], components="text_encoders", progress=False)
    assert result.pipeline is pipeline
    assert result.directory is None
    assert [part.name for part in result.report.components] == ["text_encoder", "text_encoder_2"]
    (unet,) = quantize(pipeline, config=DYNAMIC).report.components
    for part in (*result.report.components, unet):
        model = getattr(pipeline, part.name)
        assert any(isinstance(module, SegLinear) for module in model.modules())
        packed = modelopt_ext.compress(copy.deepcopy(model))
        assert part.bytes_after == pytest.approx(model_bytes(packed), rel=0.01)  # predicted before anything was packed
    assert image(pipeline).isfinite().all()


def test_native_checkpoint_of_flux(tmp_path: Path):
    use = {"height": 16, "width": 16, "max_sequence_length": 16}
    pipeline = tiny_flux_pipeline()
    result = quantize(
        pipeline,
        tmp_path / "flux",
        "native_fp8_per_token",
        calibration=settings(call_kwargs=use),
        export="native",
        held_out=settings(call_kwargs=use, seed=9, prompts=["a square"]),
    )
    config = json.loads((tmp_path / "flux" / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "modelopt"
    (part,) = result.report.components
    assert part.config_name == "NATIVE_FP8_PER_TOKEN_CFG"
    assert part.layers.weights == {"float8_e4m3fn": part.layers.quantized}
    assert part.sqnr > 15
    assert (tmp_path / "flux" / "segquant_report.json").is_file()


def test_a_controlnet_beside_its_unet():
    images = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    pipeline = tiny_controlnet_pipeline()
    own = settings(per_prompt_kwargs={"image": images})
    with pytest.raises(ValueError, match="image has one value a prompt: give held_out as CalibrationSettings"):
        quantize(pipeline, config=DYNAMIC, components=["unet", "controlnet"], calibration=own, held_out=PROMPTS)
    unseen = settings(prompts=["a circle"], per_prompt_kwargs={"image": images[:1]}, seed=50)
    result = quantize(pipeline, config=DYNAMIC, components=["unet", "controlnet"], calibration=own, held_out=unseen)
    assert [part.name for part in result.report.components] == ["unet", "controlnet"]
    assert all(25 < part.sqnr < 70 for part in result.report.components)


def test_onnx_of_models_by_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Optimum has no ONNX form of Wan: each quantized model is written on its own."""
    video = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
    own = settings(prompts=PROMPTS[:2], steps=None, call_kwargs=video)
    options = {"components": "transformer_2", "calibration": own, "export": "tensorrt", "progress": True}
    quantize(tiny_wan_pipeline(), tmp_path / "wan", DYNAMIC, **options)
    found = [path.relative_to(tmp_path / "wan").as_posix() for path in (tmp_path / "wan").rglob("*.onnx")]
    assert found == ["transformer_2/model.onnx"]
    assert not [one for one in check_tensorrt(tmp_path / "wan" / found[0]) if one.severity == "error"]
    assert "ONNX: 100%|" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("export", "target"), [("onnx", "onnxruntime"), ("onnx-vnni", "onnxruntime-vnni"), ("tensorrt", "tensorrt")]
)
def test_onnx_of_a_whole_pipeline(export: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which arguments go to export_onnx; that one has tests of its own."""
    given: list[Any] = []

    def write(model: Any, directory: Path, **options: Any) -> None:
        (directory / "model_index.json").write_text("{}")
        given.append((model, options))

    monkeypatch.setattr("optimum_segquant.exports.export_onnx", write)
    pipeline = tiny_sd3_pipeline()
    quantizer = SegQuantizer(pipeline, components="text_encoder")
    result = quantizer.quantize(tmp_path / "out", DYNAMIC, calibration=settings(), export=export, progress=False)
    assert given == [(pipeline, {"target": target, "progress": False})]
    assert result.report.export == export
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model_index.json", "segquant_report.json"}


@pytest.mark.slow
def test_a_trained_pipeline_keeps_its_quality(tmp_path: Path):
    """The shipped one, from its directory to a packed directory, on few prompts."""
    colours = ("red", "green", "blue", "yellow")
    prompts = [f"a large {colour} circle above a small {other} square" for colour in colours for other in colours]
    own = CalibrationSettings(
        prompts[:4],
        num_inference_steps=5,
        steps=3,
        call_kwargs={"guidance_scale": 4.0, "max_sequence_length": 32},
    )
    result = quantize(SHAPES / "shapes-sd3", tmp_path / "out", STATIC, calibration=own, held_out=prompts[4:6])
    (part,) = result.report.components
    assert part.sqnr > 25  # dB; with more data and the whole search 33
    assert part.bytes_after < 0.35 * part.bytes_before
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == "StableDiffusion3Pipeline"


# -- models without a pipeline -----------------------------------------------------------------------------------------


def test_a_model_by_itself(tmp_path: Path):
    pipeline = tiny_sd3_pipeline()
    pipeline.transformer.save_pretrained(tmp_path / "model")
    calls = sample_trajectories(pipeline, PROMPTS[:2], num_inference_steps=4, steps=2, **USE)
    quantizer = SegQuantizer.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    result = quantizer.quantize(tmp_path / "out", FAST, calibration=calls, progress=False)
    (part,) = result.report.components
    assert (part.name, part.calls) == ("model", 2)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "out").eval()
    assert 30 < velocity_sqnr(loaded, calls).overall < 70

    looped = SegQuantizer(copy.deepcopy(pipeline.transformer))
    second = looped.quantize(config=FAST, calibration=calls.forward_loop, progress=False)
    assert second.report.components[0].calls is None
    assert velocity_sqnr(second.pipeline, calls).overall == pytest.approx(velocity_sqnr(loaded, calls).overall, abs=1)

    with pytest.raises(ValueError, match="prompts need a pipeline to run, this is a single model"):
        SegQuantizer(copy.deepcopy(pipeline.transformer)).quantize(calibration=PROMPTS)
    with pytest.raises(ValueError, match="held_out prompts need a pipeline to run"):
        SegQuantizer(copy.deepcopy(pipeline.transformer)).quantize(calibration=calls, held_out=3)
    with pytest.raises(ValueError, match="need calibration data"):
        SegQuantizer(copy.deepcopy(pipeline.transformer)).quantize(progress=False)


def test_a_plain_module_without_data():
    model = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
    with pytest.raises(
        ValueError, match="a Sequential has no save_pretrained, so no 'segquant' directory can be written"
    ):
        SegQuantizer(model).quantize("anywhere", DYNAMIC)
    loop = lambda m: m(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))  # noqa: E731
    result = SegQuantizer(model).quantize(config=DYNAMIC, calibration=loop, progress=False)
    assert result.report.components[0].layers.quantized == 2
    with pytest.raises(ValueError, match="a Sequential has no components"):
        SegQuantizer(model, components="denoiser")
    with pytest.raises(TypeError, match=r"expected a diffusers pipeline or a torch\.nn\.Module, got a int"):
        SegQuantizer(3)


# -- resuming, full disks ----------------------------------------------------------------------------------------------


def test_sampled_data_and_solved_layers_are_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    expected = quantize(tiny_sd3_pipeline(), config=FAST).pipeline
    solve, solved = modelopt_ext.calibrate.driver.solve_linear, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        if len(solved) == 16:
            raise KeyboardInterrupt
        solved.append(1)
        return solve(*args, **kwargs)

    monkeypatch.setattr(modelopt_ext.calibrate.driver, "solve_linear", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_sd3_pipeline(), tmp_path / "out", FAST, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(
        modelopt_ext.calibrate.driver, "solve_linear", lambda *a, **k: solved.append(1) or solve(*a, **k)
    )
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "cache" / "solved_layers").is_dir()
    with caplog.at_level(logging.INFO, logger="optimum_segquant.calibration.recording"):
        result = quantize(tiny_sd3_pipeline(), tmp_path / "out", FAST, cache_dir=tmp_path / "cache")
    assert "0 of 2 batches are to be sampled" in caplog.text
    assert 25 <= len(solved) < 25 + 16  # the block that was begun is solved anew, the ones before it are not
    assert torch.equal(image(result.pipeline), image(modelopt_compressed(expected)))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["calibration"]

    # Layers solved on other data are passed over and removed; those of another run that shares the folder are not.
    solved.clear()
    monkeypatch.setattr(modelopt_ext.calibrate.driver, "solve_linear", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_sd3_pipeline(), config=FAST, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(modelopt_ext.calibrate.driver, "solve_linear", solve)
    foreign = tmp_path / "cache" / "solved_layers" / "transformer-of-another-run"
    foreign.mkdir()
    other = settings(prompts=PROMPTS[:2])
    quantize(
        tiny_sd3_pipeline(), tmp_path / "out", FAST, cache_dir=tmp_path / "cache", calibration=other, overwrite=True
    )
    assert list((tmp_path / "cache" / "solved_layers").iterdir()) == [foreign]

    with pytest.raises(CalibrationMismatchError, match=r"settings\.seed \(0 there, 1 here\)"):
        quantize(tiny_sd3_pipeline(), config=FAST, cache_dir=tmp_path / "cache", calibration=settings(seed=1))


def modelopt_compressed(pipeline: Any) -> Any:
    modelopt_ext.compress(pipeline.transformer)
    return pipeline


def test_a_full_disk_at_the_end_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = tmp_path / "out"
    tiny_sd3_pipeline().save_pretrained(directory)
    before = sorted((path, path.stat().st_size) for path in directory.rglob("*"))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    quantizer = SegQuantizer(tiny_sd3_pipeline())
    monkeypatch.setattr("optimum_segquant.exports.save_segquant", full)
    message = rf"No space left on device while {directory} was written, which is as before: free some, or save to"
    with pytest.raises(OSError, match=message) as caught:
        quantizer.quantize(directory, DYNAMIC, calibration=settings(), progress=False)
    assert "\n" not in str(caught.value)
    assert before == sorted((path, path.stat().st_size) for path in directory.rglob("*"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    # Nothing has to be calibrated again.
    assert quantizer.export(directory, progress=False) == directory
    assert quantizer.report is not None
    assert quantizer.report.export == "segquant"
    assert json.loads((directory / "segquant_report.json").read_text()) == quantizer.report.to_dict()


def test_too_small_a_disk_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipeline = tiny_sd3_pipeline()
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("optimum_segquant.exports.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"GiB free, and the quantized models take at least .*: free some, or save to"):
        quantize(pipeline, tmp_path / "out", DYNAMIC)
    assert not quantized_layers(pipeline.transformer)


def test_offloaded_models(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """As accelerate leaves them: weights on the meta device, fetched layer by layer."""
    expected = record_calibration(tiny_sd3_pipeline(), settings(), cache_dir=tmp_path / "cache", progress=False)
    pipeline = tiny_sd3_pipeline()
    cpu_offload(pipeline.transformer, execution_device=torch.device("cpu"))
    assert pipeline.transformer.proj_out.weight.is_meta
    data = record_calibration(pipeline, settings(), cache_dir=tmp_path / "cache", progress=False)
    assert (data.sampled, data.reused) == (0, 2)  # it is known by its weights, wherever they are
    quantizer = SegQuantizer(pipeline)
    own = {"calibration": data, "progress": False}
    with caplog.at_level(logging.WARNING):
        result = quantizer.quantize(tmp_path / "out", FAST, held_out=PROMPTS[:1], **own)
    assert "1 held-out prompts are calibrated on, too" in caplog.text
    assert 30 < result.report.components[0].sqnr < 70
    assert not pipeline.transformer.proj_out.weight.is_meta
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "transformer").eval()
    assert 30 < velocity_sqnr(loaded, expected["transformer"]).overall < 70


# -- several processes -------------------------------------------------------------------------------------------------


def distributed(folder: Path) -> dict[str, Any]:
    result = quantize(tiny_sd3_pipeline(), folder / "out", FAST, cache_dir=folder / "cache", held_out=["a triangle"])
    report = result.report
    return {
        "written": result.directory is not None,
        "processes": report.processes,
        "calls": report.components[0].calls,
        "sqnr": report.components[0].sqnr,
        "scales": {
            name: value.clone()
            for name, value in result.pipeline.transformer.state_dict().items()
            if name.endswith(("input_scale", "_amax"))
        },
    }


def test_two_processes_give_the_pipeline_of_one(tmp_path: Path):
    alone = quantize(tiny_sd3_pipeline(), tmp_path / "alone", FAST)
    first, second = in_processes(distributed, tmp_path)
    assert (first["written"], second["written"]) == (True, False)
    assert first["processes"] == second["processes"] == 2
    assert first["calls"] == second["calls"] == 4
    assert first["sqnr"] > 30
    assert second["sqnr"] is None
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    expected, found = alone.pipeline.transformer.state_dict(), loaded.state_dict()
    assert list(found) == list(expected)
    scales = [name for name in expected if name.endswith(("input_scale", "weight_scale", "smoothing", "shift"))]
    assert len(scales) > 60
    for name in scales:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untouched() -> Any:
    return tiny_sd3_pipeline()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"config": "SEGQUANT_W9_CFG"},
            ValueError,
            "there is no preset and no file 'SEGQUANT_W9_CFG', is 'SEGQUANT_CFG' meant",
        ),
        ({"config": {"preset": "SEGQUANT_CFG", "algorithm": {"alpa": 1}}}, ValueError, "alpa is unknown, is 'alpha'"),
        ({"config": "missing.yaml"}, FileNotFoundError, r"there is no config file missing\.yaml"),
        ({"config": {"unet": DYNAMIC}}, ValueError, r"config has an entry for 'unet', which is not among .*\(transfo"),
        ({"calibration": "missing.txt"}, FileNotFoundError, r"there is no prompts file missing\.txt"),
        ({"calibration": []}, ValueError, "the list of prompts has no prompts"),
        ({"calibration": {"unet": print}}, ValueError, "there is no calibration data for transformer: record it"),
        ({"held_out": 99}, ValueError, "the package has 32 such prompts, 99 were asked for"),
        ({"export": "onnx"}, ValueError, "export='onnx' needs save_dir, the directory to write"),
        ({"save_dir": "out", "export": None}, ValueError, "save_dir is given but export is None"),
        (
            {"save_dir": "out", "export": "gguf"},
            ValueError,
            "export must be one of segquant, native, onnx, onnx-vnni, tensorrt",
        ),
        (
            {"save_dir": "out", "export": "native"},
            ValueError,
            r"SEGQUANT_CFG for transformer: native checkpoints can't hold .*polarity='auto'.*native_int8_per_token",
        ),
        (
            {"save_dir": "out", "cache_dir": "out/cache"},
            ValueError,
            "cache_dir out/cache is in save_dir, which is repl",
        ),
        ({"save_dir": __file__}, NotADirectoryError, "is a file: give the name of a directory to save to"),
        ({"save_dir": Path(__file__).parent}, FileExistsError, "but no model .* save to an empty or new directory"),
        ({"calibration": settings(steps=[9])}, ValueError, r"steps must be indices from 0 to 3, got \[9\]"),
    ],
    ids=str,
)
def test_refused_before_anything_is_sampled(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    untouched: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)  # relative names are free there

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the pipeline was run")

    monkeypatch.setattr(type(untouched), "__call__", never)
    with pytest.raises(error, match=message) as caught:
        SegQuantizer(untouched).quantize(**{"calibration": settings(), "progress": False, **options})
    assert "\n" not in str(caught.value)


def test_the_original_is_not_replaced(tmp_path: Path):
    """A directory is written as a whole: neither the model's own nor one that it lies in."""
    tiny_sd3_pipeline().save_pretrained(tmp_path / "sd3")
    before = sorted(tmp_path.rglob("*"))
    for source in ("sd3", "sd3/transformer"):
        with pytest.raises(ValueError, match="would be replaced as a whole"):
            SegQuantizer.from_pretrained(tmp_path / source).quantize(tmp_path / "sd3", DYNAMIC)
    assert sorted(tmp_path.rglob("*")) == before


def test_components_that_are_not_there_or_quantized_already(untouched: Any):
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline has no unet; its models are text_encoder, text_enc"):
        SegQuantizer(untouched, components=["transformer", "unet"])
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline has no controlnet; its models are"):
        SegQuantizer(untouched, components="controlnet")
    with pytest.raises(ValueError, match="native checkpoints: leave it out of the components"):
        SegQuantizer(untouched, components=["transformer", "text_encoder"]).quantize("out", export="native")
    with pytest.raises(ValueError, match="torch_dtype: arguments for loading go with a directory or name"):
        SegQuantizer.from_pretrained(untouched, torch_dtype=torch.float16)
    with pytest.raises(ValueError, match="nothing is quantized yet: call quantize first"):
        SegQuantizer(untouched).export("out")
    with pytest.raises(ValueError, match="give calls or loops for each of transformer, text_encoder by name"):
        SegQuantizer(untouched, components=["transformer", "text_encoder"]).quantize(calibration=print)

    pipeline = tiny_sd3_pipeline()
    data = record_calibration(pipeline, settings(), progress=False)
    quantize(pipeline, config=DYNAMIC, calibration=data)
    with pytest.raises(ValueError, match="transformer is quantized already: load the original model again"):
        quantize(pipeline, config=DYNAMIC)


def test_an_error_in_one_component_says_what_became_of_the_others(caplog: pytest.LogCaptureFixture):
    pipeline = tiny_sd3_pipeline()
    quantizer = SegQuantizer(pipeline, components=["transformer", "text_encoder"])
    impossible = {"preset": "SEGQUANT_W4A8_CFG", "algorithm": {"low_rank": {"rank": 500, "over": "refuse"}}}
    with pytest.raises(ValueError, match="rank 500 is above the largest"):
        quantizer.quantize(
            config={"transformer": DYNAMIC, "text_encoder": impossible}, calibration=settings(), progress=False
        )
    assert "transformer had been quantized by then: load the original again to start anew" in caplog.messages
    assert not quantized_layers(pipeline.text_encoder)
    with pytest.raises(ValueError, match=r"transformer is quantized already: load the original model again$"):
        quantizer.quantize(config=DYNAMIC, calibration=settings(), progress=False)


def test_the_home_directory_has_its_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    model.save_pretrained = lambda directory, **_: (Path(directory) / "config.json").write_text("{}")  # type: ignore
    monkeypatch.setattr(
        "optimum_segquant.exports.save_segquant", lambda model, directory: model.save_pretrained(directory)
    )
    result = SegQuantizer(model).quantize("~/out", DYNAMIC, calibration=lambda m: m(torch.ones(4, 16)), progress=False)
    assert result.directory == tmp_path / "out"
    assert result.directory.is_dir()
