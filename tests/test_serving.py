"""Model repositories for Triton: written from real exports, compared with them, run under the server's rules."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import onnxruntime
import pytest
import requests
import torch
from optimum.onnxruntime import ORTDiffusionPipeline
from tiny_pipelines import tiny_sd3_pipeline, tiny_sdxl_pipeline
from torch import nn
from triton_server import needs_server, running

import modelopt_ext
from optimum_segquant import export_native, export_onnx
from optimum_segquant.evaluation import sample_trajectories
from optimum_segquant.files import DamagedFilesError
from optimum_segquant.serving import (
    AxisRange,
    ConfigError,
    LocalModels,
    RequestError,
    ServingOptions,
    TritonClient,
    check_model_repository,
    describe_native,
    format_config,
    load_deployment,
    parse_config,
    read_config,
    seal_engines,
    serve_check,
    served_pipeline,
    write_model_repository,
)
from optimum_segquant.serving.graph import with_row_timesteps
from optimum_segquant.serving.pipeline_model import TritonPythonModel, generate
from optimum_segquant.serving.signature import signature_of

PROMPTS = ["a large red circle", "a green triangle"]
SD3 = {"image_sizes": [(16, 16), (8, 16)], "max_images": 2, "call_arguments": {"max_sequence_length": 16}}
SDXL = {"image_sizes": [(16, 16)], "max_images": 2}
ON_CPU = ServingOptions(device="cpu")


def exported(pipeline: Any, denoiser: str, directory: Path, target: str) -> Path:
    """Weights and activations in 8 bits; scales are found at run time, one call shows the segments."""
    calls = sample_trajectories(pipeline, PROMPTS[:1], num_inference_steps=1, height=16, width=16)
    mtq.quantize(getattr(pipeline, denoiser), modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG, calls.forward_loop)
    return export_onnx(pipeline, directory, target=target, verify=False)


@pytest.fixture(scope="module")
def sd3_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_sd3_pipeline(), "transformer", tmp_path_factory.mktemp("sd3") / "onnx", "onnxruntime")


@pytest.fixture(scope="module")
def sd3(sd3_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("sd3") / "repository"
    write_model_repository(sd3_export, repository, options=ON_CPU, **SD3)
    return repository


@pytest.fixture(scope="module")
def sdxl_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_sdxl_pipeline(), "unet", tmp_path_factory.mktemp("sdxl") / "onnx", "tensorrt")


@pytest.fixture(scope="module")
def sdxl(sdxl_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For TensorRT: what was exported for it."""
    repository = tmp_path_factory.mktemp("sdxl") / "repository"
    write_model_repository(sdxl_export, repository, backend="tensorrt", **SDXL)
    return repository


@pytest.fixture
def copy(sd3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd3, tmp_path / "repository"))


def images(pipeline: Any, **arguments: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    size = {"height": 16, "width": 16, "num_inference_steps": 3, "output_type": "np"}
    return pipeline(PROMPTS, generator=generators, **size, **arguments).images


# -- what is written --------------------------------------------------------------------------------------------------


def test_repository_of_onnx_models(sd3: Path) -> None:
    configs = check_model_repository(sd3)
    assert sorted(configs) == ["pipeline", "text_encoder", "text_encoder_2", "transformer", "vae_decoder"]
    transformer = configs["transformer"]
    assert (transformer.backend, transformer.platform) == ("onnxruntime", "onnxruntime_onnx")
    assert transformer.max_batch_size == 4  # two images with guidance
    assert configs["vae_decoder"].max_batch_size == 2
    tensors = {entry.name: entry for entry in transformer.input}
    assert list(tensors["hidden_states"].dims) == [4, -1, -1]
    assert list(tensors["timestep"].dims) == [1]
    assert tensors["timestep"].HasField("reshape")
    assert list(tensors["timestep"].reshape.shape) == []
    assert transformer.HasField("dynamic_batching")
    assert [(group.count, group.kind) for group in transformer.instance_group] == [(1, 2)]
    assert not list(sd3.rglob("*.onnx_data"))


def test_sizes_are_those_that_the_pipeline_uses(sd3: Path) -> None:
    sizes = load_deployment(sd3).sizes
    assert sizes["transformer"] == {
        "batch_size": AxisRange(1, 2, 4),
        "step": AxisRange(1, 2, 4),
        "height": AxisRange(4, 8, 8),
        "width": AxisRange(8, 8, 8),
        "sequence_length": AxisRange(32, 32, 32),  # two CLIPs' and the place of T5
    }
    assert sizes["vae_decoder"]["batch_size"] == AxisRange(1, 1, 2)


def test_engines_are_built_from_the_real_sizes(sdxl: Path) -> None:
    commands = {command.name: command.text for command in load_deployment(sdxl).commands}
    build = commands["build unet"]
    assert build.startswith(
        "trtexec --onnx=unet/1/model.onnx --saveEngine=unet/1/model.plan --stronglyTyped --minShapes="
    )
    assert "--minShapes=sample:1x4x8x8,timestep:1,encoder_hidden_states:1x16x64,text_embeds:1x32,time_ids:1x6" in build
    assert "--maxShapes=sample:4x4x8x8,timestep:4,encoder_hidden_states:4x16x64,text_embeds:4x32,time_ids:4x6" in build
    assert "--model-repository=/models" in commands["docker"]
    assert "--gpus=all" in commands["docker"]
    readme = (sdxl / "README.md").read_text()
    for text in commands.values():
        assert text in readme
    assert str(sdxl) not in readme  # run where it lies, wherever that is


def test_cpu_repository_asks_for_no_gpu(sd3: Path) -> None:
    commands = {command.name: command.text for command in load_deployment(sd3).commands}
    assert "--gpus" not in commands["docker"]
    assert not any(name.startswith("build") for name in commands)


def test_record_says_plan_config_versions_and_source(sd3: Path) -> None:
    deployment = load_deployment(sd3)
    part = deployment.source["components"]["transformer"]
    plan = modelopt_ext.SegmentPlan.from_dict(part["plan"])
    assert plan.linears["transformer_blocks.1.norm1.linear"].out_segments == (32,) * 6
    assert len(part["layers"]) == 50
    assert part["layers"]["proj_out"]["activations"] == "int8"
    assert part["config"]["segquant_calibrate"]["polarity"] == "auto"
    assert deployment.source["target"] == "onnxruntime"
    assert deployment.versions["torch"] == str(torch.__version__)
    assert {"nvidia-modelopt", "onnxruntime", "diffusers", "python"} <= set(deployment.versions)
    assert deployment.to_dict() == json.loads((sd3 / "deployment.json").read_text())


def test_unet_takes_one_timestep_for_each_row(sdxl_export: Path, sdxl: Path) -> None:
    exported = onnx.load(sdxl_export / "unet" / "model.onnx")
    assert signature_of(exported).batch_axes == ()
    served = signature_of(sdxl / "unet" / "1" / "model.onnx")
    assert served.batch_axes == ("batch_size", "step")
    assert with_row_timesteps(onnx.load(sdxl / "unet" / "1" / "model.onnx")) is None
    assert read_config(sdxl / "unet" / "config.pbtxt").max_batch_size == 4


def test_weights_in_a_file_of_their_own_stay_there(sdxl_export: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(sdxl_export, tmp_path / "onnx"))
    (source / "segquant_manifest.json").unlink()
    path = source / "unet" / "model.onnx"
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="weights", size_threshold=0)
    write_model_repository(source, tmp_path / "r", backend="tensorrt", components=["unet", "vae_decoder"], **SDXL)
    assert (tmp_path / "r" / "unet" / "1" / "weights").stat().st_size > 100_000
    assert (tmp_path / "r" / "unet" / "1" / "model.onnx").stat().st_size < path.stat().st_size
    assert [check.model for check in serve_check(tmp_path / "r", threads=1)] == ["unet", "vae_decoder"]


def test_scalar_that_is_used_otherwise_is_refused() -> None:
    node = onnx.helper.make_node("Mul", ["x", "scale"], ["y"])
    values = [("x", ["batch_size", 4]), ("scale", []), ("y", ["batch_size", 4])]
    x, scale, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in values)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x, scale], [y]))
    with pytest.raises(ValueError, match="the input scale has no axes and is not simply repeated"):
        with_row_timesteps(model)


# -- how it runs ------------------------------------------------------------------------------------------------------


def test_served_pipeline_makes_the_images_of_the_export(sd3_export: Path, sd3: Path) -> None:
    expected = images(ORTDiffusionPipeline.from_pretrained(sd3_export), max_sequence_length=16)
    assert np.array_equal(images(served_pipeline(sd3), max_sequence_length=16), expected)


def test_served_unet_makes_the_images_of_the_export(sdxl_export: Path, sdxl: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = images(ORTDiffusionPipeline.from_pretrained(sdxl_export, session_options=options))
    assert np.array_equal(images(served_pipeline(sdxl)), expected)


def test_serve_check_runs_every_model(sd3: Path, sdxl: Path) -> None:
    for repository, denoiser in ((sd3, "transformer"), (sdxl, "unet")):
        found = {check.model: check for check in serve_check(repository, threads=1)}
        assert set(found) == set(load_deployment(repository).backends)
        assert found[denoiser].rows > 40  # dB: codes on a tie round either way
        assert found["vae_decoder"].outputs["sample"][1] == 3


def test_a_batch_is_cut_to_what_fits(sd3: Path) -> None:
    models = LocalModels(sd3, threads=1)
    decoder = models.model("vae_decoder")
    latents = np.random.default_rng(0).normal(size=(5, 4, 8, 8)).astype(np.float32)
    requests = list(decoder.requests({"latent_sample": latents}))
    assert [request["latent_sample"].shape[0] for request in requests] == [2, 2, 1]
    joined = decoder.response([models.infer("vae_decoder", request) for request in requests])["sample"]
    alone = models.infer("vae_decoder", {"latent_sample": latents[4:]})["sample"]
    np.testing.assert_allclose(joined[4:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {**r, "x": r["timestep"]}, "transformer has no input x; its inputs are hidden_states"),
        (lambda r: {k: v for k, v in r.items() if k != "timestep"}, "transformer: the request lacks timestep"),
        (lambda r: {**r, "timestep": r["timestep"].astype(np.float64)}, "timestep is float64, .* says TYPE_FP32"),
        (lambda r: {**r, "timestep": r["timestep"][:, 0]}, r"timestep is \[2\], .* says \[-1, 1\]"),
        (lambda r: {k: np.repeat(v, 3, 0) for k, v in r.items()}, "hidden_states has 6 rows, at most 4 fit"),
        (lambda r: {**r, "hidden_states": r["hidden_states"][:, :3]}, r"hidden_states is \[2, 3, 8, 8\]"),
        (lambda r: {**r, "hidden_states": r["hidden_states"][:, :, :5, :5]}, None),
    ],
    ids=["unknown", "missing", "type", "rank", "rows", "size", "any size of a dynamic axis"],
)
def test_requests_are_held_to_the_configuration(sd3: Path, change: Callable[[Any], Any], message: str | None) -> None:
    sizes = {
        "hidden_states": (4, 8, 8),
        "encoder_hidden_states": (32, 64),
        "pooled_projections": (64,),
        "timestep": (1,),
    }
    request = change({name: np.ones((2, *size), np.float32) for name, size in sizes.items()})
    models = LocalModels(sd3, threads=1)
    if message is None:
        assert models.infer("transformer", request)["out_hidden_states"].shape == (2, 4, 5, 5)
        return
    with pytest.raises(RequestError, match=message):
        models.infer("transformer", request)


# -- what goes wrong --------------------------------------------------------------------------------------------------


def edited(repository: Path, model: str, change: Callable[[Any], None]) -> None:
    path = repository / model / "config.pbtxt"
    config = read_config(path)
    change(config)
    path.write_text(format_config(config))


def input_named(config: Any, name: str) -> Any:
    return next(entry for entry in config.input if entry.name == name)


def rename(config: Any) -> None:
    config.name = "denoiser"


def wrong_type(config: Any) -> None:
    input_named(config, "hidden_states").data_type = 10


def wrong_size(config: Any) -> None:
    input_named(config, "hidden_states").dims[0] = 16


def wrong_rank(config: Any) -> None:
    input_named(config, "hidden_states").dims.append(1)


def no_reshape(config: Any) -> None:
    input_named(config, "timestep").ClearField("reshape")


def wrong_reshape(config: Any) -> None:
    input_named(config, "timestep").dims[0] = 2


def zero(config: Any) -> None:
    input_named(config, "hidden_states").dims[1] = 0


def misspelt(config: Any) -> None:
    input_named(config, "timestep").name = "timesteps"


def unknown_output(config: Any) -> None:
    config.output[0].name = "sample"


def twice(config: Any) -> None:
    config.input.append(config.input[0])


def no_batch(config: Any) -> None:
    config.max_batch_size = 0


def negative(config: Any) -> None:
    config.max_batch_size = -1


def preferred(config: Any) -> None:
    config.dynamic_batching.preferred_batch_size.append(64)


def gpus_of_a_cpu(config: Any) -> None:
    config.instance_group[0].gpus.append(0)


def platform(config: Any) -> None:
    config.platform = "tensorrt_plan"


def backend(config: Any) -> None:
    config.backend = "pytorch"


def no_outputs(config: Any) -> None:
    del config.output[:]


def no_dims(config: Any) -> None:
    del input_named(config, "hidden_states").dims[:]


def no_type(config: Any) -> None:
    input_named(config, "hidden_states").data_type = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "transformer: the configuration names the model 'denoiser', its directory must have that name"),
        (wrong_type, "input 'hidden_states' is TYPE_FP16, the graph has TYPE_FP32"),
        (wrong_size, "input 'hidden_states' has 16 as dim 0, the graph 4"),
        (wrong_rank, "'hidden_states' has 4 dims [4, -1, -1, 1], the graph 3 [4, -1, -1] beside the batch"),
        (no_reshape, "input 'timestep' has 1 dims [1], the graph 0 [] beside the batch"),
        (wrong_reshape, "input 'timestep' has 2 elements in dims and 1 in reshape"),
        (zero, "input 'hidden_states' has the size 0: write a size of 1 or more, or -1"),
        (misspelt, "the graph has no input 'timesteps'; it has hidden_states"),
        (misspelt, "the configuration lacks the input 'timestep' of the graph"),
        (unknown_output, "the graph has no output 'sample'; it has out_hidden_states"),
        (twice, "input 'hidden_states' is there 2 times"),
        (no_batch, "input 'timestep' has an empty reshape, which needs a batch"),
        (no_batch, "dynamic_batching without a max_batch_size above 1 does nothing"),
        (negative, "max_batch_size is -1, it must not be negative"),
        (preferred, "preferred_batch_size 64 is not between 1 and max_batch_size 4"),
        (gpus_of_a_cpu, "an instance group of KIND_CPU names GPUs"),
        (platform, "platform 'tensorrt_plan' does not go with backend 'onnxruntime'"),
        (backend, "backend 'pytorch' is none of onnxruntime, tensorrt"),
        (no_outputs, "it has no output"),
        (no_dims, "input 'hidden_states' has no dims"),
        (no_type, "input 'hidden_states' has no data_type"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_every_mismatch_is_found(copy: Path, change: Callable[[Any], None], message: str) -> None:
    edited(copy, "transformer", change)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_model_repository(copy)


def test_misspelt_fields_and_missing_files_are_found(copy: Path) -> None:
    config = copy / "transformer" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size", "max_batchsize"))
    (copy / "vae_decoder" / "1" / "model.onnx").unlink()
    (copy / "text_encoder" / "config.pbtxt").unlink()
    shutil.rmtree(copy / "text_encoder_2" / "1")
    (copy / "pipeline" / "1" / "model.py").unlink()
    with pytest.raises(ConfigError) as caught:
        check_model_repository(copy)
    for message in (
        'not a Triton model configuration: line 3:1: Message type "inference.ModelConfig" has no field named',
        "vae_decoder: 1/model.onnx is missing: write it again",
        "text_encoder/config.pbtxt is missing: write the model repository again",
        "text_encoder_2 has no version, a directory with a number as its name",
        "pipeline: 1/model.py is missing",
    ):
        assert message in str(caught.value)


def test_batches_that_the_graph_has_not_are_found(copy: Path) -> None:
    path = copy / "transformer" / "1" / "model.onnx"
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)
    with pytest.raises(ConfigError, match="max_batch_size is 4, but not every tensor of the graph has the batch"):
        check_model_repository(copy)


def test_engines_that_are_not_built_are_named_and_sealed_when_they_are(sdxl: Path, tmp_path: Path) -> None:
    repository = Path(shutil.copytree(sdxl, tmp_path / "repository"))
    check_model_repository(repository, engines=False)
    with pytest.raises(ConfigError, match=r"unet: 1/model\.plan is missing: build it with the trtexec command"):
        seal_engines(repository)
    for version in repository.glob("*/1"):
        (version / "model.plan").write_bytes(b"engine")
    seal_engines(repository)
    (repository / "unet" / "1" / "model.plan").write_bytes(b"other!")
    with pytest.raises(DamagedFilesError, match=r"unet/1/model\.plan is altered"):
        load_deployment(repository)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("transformer/1/model.onnx", lambda path: path.write_bytes(path.read_bytes()[:-1]), "is truncated"),
        ("transformer/config.pbtxt", lambda path: path.write_text(path.read_text().replace("4", "8")), "is altered"),
        ("pipeline/1/model.py", lambda path: path.write_text("import os"), "pipeline/1/model.py is"),
        ("deployment.json", lambda path: path.write_text("{}"), "deployment.json is"),
        ("vae_decoder/1/model.onnx", lambda path: path.unlink(), "vae_decoder/1/model.onnx is missing"),
        ("segquant_manifest.json", lambda path: path.unlink(), "has no segquant_manifest.json"),
    ],
)
def test_tampered_files_are_named(copy: Path, file: str, damage: Callable[[Path], object], message: str) -> None:
    damage(copy / file)
    for use in (load_deployment, served_pipeline, serve_check):
        with pytest.raises(DamagedFilesError, match=message):
            use(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tensorrt"}, "was exported for onnxruntime and can't run in tensorrt: export it again"),
        ({"backend": "torch"}, "backend is 'torch': write one of onnxruntime, tensorrt"),
        (
            {"backend": {"vae_decoder": "onnxruntime"}},
            "backend says nothing for text_encoder, text_encoder_2, transformer",
        ),
        ({"backend": {"unet": "onnxruntime"}}, "backend names unet: the components are text_encoder"),
        ({"components": ["unet"]}, "has no unet: it holds text_encoder, text_encoder_2, transformer, vae_decoder"),
        ({"image_sizes": [(15, 16)]}, r"does not run with height=15, width=16.*divisible.*give image_sizes"),
        ({"call_arguments": {"guidance": 3.0}}, "unexpected keyword argument 'guidance'"),
        ({"max_images": 0}, "max_images is 0: at least one image is made"),
        ({"name": "x"}, "is a pipeline: its models have names and sizes"),
    ],
)
def test_nothing_is_written_for_wrong_arguments(
    sd3_export: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_model_repository(sd3_export, tmp_path / "repository", **{**SD3, **arguments})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu': write one of gpu, cpu"),
        ({"instances": 0}, "at least one instance must run"),
        ({"device": "cpu", "gpus": (0,)}, "instances on the CPU take no gpus"),
        ({"accelerator": "openvino"}, "the accelerator openvino runs on device='cpu' only"),
        ({"graph_level": 3}, "graph_level is 3"),
        ({"accelerator_parameters": {"a": "b"}}, "accelerator_parameters need an accelerator"),
        ({"max_queue_delay_us": -1}, "write microseconds"),
    ],
)
def test_options_that_triton_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingOptions(**arguments)


def test_full_disk_leaves_the_old_repository(sd3_export: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_model_repository(sd3_export, copy, options=ON_CPU, **SD3)
    load_deployment(copy)
    assert [entry.name for entry in copy.parent.iterdir()] == ["repository"]


def test_tensorrt_inside_onnx_runtime(sdxl_export: Path, tmp_path: Path) -> None:
    options = ServingOptions(
        accelerator="tensorrt", accelerator_parameters={"trt_engine_cache_enable": "1"}, instances=2
    )
    others = {name: ServingOptions(max_queue_delay_us=100) for name in ("text_encoder", "vae_decoder")}
    write_model_repository(sdxl_export, tmp_path / "r", options={"unet": options, **others}, **SDXL)
    config = read_config(tmp_path / "r" / "unet" / "config.pbtxt")
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator[0]
    assert accelerator.name == "tensorrt"
    assert accelerator.parameters["precision_mode"] == "INT8"
    assert accelerator.parameters["trt_engine_cache_enable"] == "1"
    assert accelerator.parameters["trt_profile_max_shapes"].startswith("sample:4x4x8x8,timestep:4,")
    assert config.instance_group[0].count == 2
    delayed = read_config(tmp_path / "r" / "vae_decoder" / "config.pbtxt")
    assert delayed.dynamic_batching.max_queue_delay_microseconds == 100


def test_one_model_by_itself(tmp_path: Path) -> None:
    pipeline = tiny_sd3_pipeline()
    model = pipeline.transformer
    mtq.quantize(model, modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG, None)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 16, 64),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([1.0, 2.0]),
    }
    export_onnx(model, tmp_path / "onnx", inputs=inputs, verify=False, largest_file=1000)
    assert (tmp_path / "onnx" / "model.onnx_data").is_file()
    with pytest.raises(ValueError, match="is one model with dynamic axes: give sizes="):
        write_model_repository(tmp_path / "onnx", tmp_path / "r", name="denoiser")
    sizes = {
        "batch_size": (1, 2, 8),
        "height": (8, 8, 8),
        "width": (8, 8, 8),
        "encoder_hidden_states_length": (16, 16, 16),
    }
    deployment = write_model_repository(tmp_path / "onnx", tmp_path / "r", name="denoiser", sizes={"denoiser": sizes})
    assert deployment.pipeline is None
    assert (tmp_path / "r" / "denoiser" / "1" / "model.onnx_data").is_file()
    assert serve_check(tmp_path / "r", threads=1)[0].rows > 60
    with pytest.raises(ValueError, match="holds single models, no pipeline"):
        served_pipeline(tmp_path / "r")


def test_graphs_for_cpus_with_vnni(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are served where they belong, and refused where their sums would saturate."""
    model, x = nn.Sequential(nn.Linear(64, 48)), torch.randn(2, 9, 64)
    mtq.quantize(model, modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG, lambda layers: layers(x))
    source = export_onnx(
        model, tmp_path / "onnx", target="onnxruntime-vnni", inputs={"input": x}, dynamic_axes={}, verify=False
    )
    written = {name: tmp_path / name for name in ("cpu", "gpu")}
    for device, repository in written.items():
        options = ServingOptions(device=device)
        deployment = write_model_repository(source, repository, name="layer", sizes={"layer": {}}, options=options)
        purposes = " ".join(command.purpose for command in deployment.commands)
        assert ("on a CPU with VNNI or AMX" in purposes) == (device == "cpu")
        assert ("VNNI" in (repository / "README.md").read_text()) == (device == "cpu")
    with pytest.raises(ValueError, match=r"exported for onnxruntime-vnni and can't run in tensorrt.*'onnxruntime'"):
        write_model_repository(source, tmp_path / "r", backend="tensorrt", name="layer", sizes={"layer": {}})
    for here in (True, False):
        monkeypatch.setattr("optimum_segquant.exporters.cpu.multiplies_signed_weights", lambda here=here: here)
        models = LocalModels(written["cpu"], threads=1)
        if here:
            found = models.infer("layer", {"input": x.numpy()})["output"]
            assert np.abs(found - model(x).detach().numpy()).max() < 0.05
        else:
            with pytest.raises(RequestError, match="for CPUs with VNNI or AMX, and this one has neither"):
                models.infer("layer", {"input": x.numpy()})


def test_stock_keys_are_described_for_vllm_omni(tmp_path: Path) -> None:
    from modelopt_ext.export.native import native_config

    pipeline = tiny_sd3_pipeline()
    with pytest.raises(ValueError, match="holds no pipeline"):
        describe_native(tmp_path)
    mtq.quantize(pipeline.transformer, native_config("int8_per_token"), None)
    export_native(pipeline, tmp_path / "native")
    deployment = describe_native(tmp_path / "native")
    assert deployment.backends == {"transformer": "vLLM-Omni (int8)"}
    assert deployment.commands[0].text == "vllm serve . --omni --port 8091"
    assert load_deployment(tmp_path / "native") == deployment
    assert "vllm serve" in (tmp_path / "native" / "README.md").read_text()
    # A model card that somebody has written is theirs.
    (tmp_path / "native" / "README.md").write_text("# My model\n")
    for _ in range(2):
        describe_native(tmp_path / "native")
    assert (tmp_path / "native" / "README.md").read_text() == "# My model\n"
    assert "vllm serve" in (tmp_path / "native" / "SERVING.md").read_text()
    weights = tmp_path / "native" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(DamagedFilesError, match=r"diffusion_pytorch_model\.safetensors is truncated"):
        load_deployment(tmp_path / "native")


def test_configurations_are_protobuf_text() -> None:
    text = """
      name: "a"  # as Triton's documentation writes it
      input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 4 ] } ]
      instance_group [ { count: 2 kind: KIND_GPU gpus: [ 0, 1 ] } ]
      version_policy: { latest: { num_versions: 2 } }
      parameters { key: "execution_mode" value: { string_value: "0" } }
    """
    config = parse_config(text)
    assert list(config.input[0].dims) == [-1, 4]
    assert config.parameters["execution_mode"].string_value == "0"
    assert parse_config(format_config(config)) == config
    with pytest.raises(ConfigError, match=r'line 1:1: .*no field named "sequence_batching"'):
        parse_config("sequence_batching { }")


def test_the_pipelines_model_names_arguments_that_it_sets() -> None:
    request = {"prompt": np.array(["a red circle"], object), "arguments": np.array(['{"output_type": "pil"}'], object)}
    with pytest.raises(RequestError, match="output_type can't be among the arguments: leave it out"):
        generate(tiny_sd3_pipeline(), request)


def test_a_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def silent(url: str, timeout: float) -> None:
        waited.append(timeout)
        raise requests.ConnectTimeout

    client = TritonClient("http://localhost:1")
    monkeypatch.setattr(client._session, "get", silent)
    assert not client.ready()
    assert waited == [10.0]


# -- a server ---------------------------------------------------------------------------------------------------------


class FakeTensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    @classmethod
    def from_dlpack(cls, name: str, tensor: torch.Tensor) -> FakeTensor:
        return cls(name, tensor.numpy())

    def to_dlpack(self) -> Any:
        return torch.from_numpy(self.array).__dlpack__()

    def as_numpy(self) -> np.ndarray:
        return self.array


class FakeBackend:
    """``triton_python_backend_utils`` as far as the pipeline's model uses it, in front of the repository's models."""

    Tensor = FakeTensor

    class TritonError(Exception):
        def message(self) -> str:
            return str(self)

    def __init__(self, repository: Path) -> None:
        self.models = LocalModels(repository, threads=1)

    def InferenceRequest(self, model_name: str, requested_output_names: list[str], inputs: list[FakeTensor]) -> Any:  # noqa: N802
        backend = self

        class Request:
            def exec(self) -> Any:
                try:
                    found = backend.models.infer(model_name, {tensor.name: tensor.array for tensor in inputs})
                except RequestError as error:
                    return backend.InferenceResponse([], error=backend.TritonError(str(error)))
                return backend.InferenceResponse([FakeTensor(name, found[name]) for name in requested_output_names])

        return Request()

    @staticmethod
    def InferenceResponse(output_tensors: list[FakeTensor], error: Any = None) -> Any:  # noqa: N802
        class Response:
            def __init__(self) -> None:
                self.tensors = {tensor.name: tensor for tensor in output_tensors}

            def has_error(self) -> bool:
                return error is not None

            def error(self) -> Any:
                return error

        return Response()

    @staticmethod
    def get_input_tensor_by_name(request: dict[str, np.ndarray], name: str) -> FakeTensor | None:
        return FakeTensor(name, request[name]) if name in request else None

    @staticmethod
    def get_output_tensor_by_name(response: Any, name: str) -> FakeTensor:
        return response.tensors[name]


@pytest.fixture
def pipeline_model(sd3: Path, monkeypatch: pytest.MonkeyPatch) -> TritonPythonModel:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", FakeBackend(sd3))
    model = TritonPythonModel()
    model.initialize({"model_repository": str(sd3 / "pipeline"), "model_version": "1"})
    return model


def request(**changes: Any) -> dict[str, np.ndarray]:
    fields = {
        "prompt": np.array([prompt.encode() for prompt in PROMPTS], object),
        "height": np.array([16], np.int32),
        "width": np.array([16], np.int32),
        "num_inference_steps": np.array([3], np.int32),
        "seed": np.array([0], np.int64),
        "arguments": np.array([json.dumps({"max_sequence_length": 16})], object),
    }
    return {**fields, **changes}


def test_pipeline_model_answers_each_request_by_itself(sd3: Path, pipeline_model: TritonPythonModel) -> None:
    broken = request(arguments=np.array(["{"], object))
    unknown = request(arguments=np.array(['{"nonsense": 1}'], object))
    uneven = request(height=np.array([15], np.int32))
    responses = pipeline_model.execute([request(), broken, unknown, uneven])
    expected = images(served_pipeline(sd3, threads=1), max_sequence_length=16)
    found = responses[0].tensors["images"].array
    assert found.dtype == np.uint8
    assert np.array_equal(found, (expected * 255).round().astype(np.uint8))
    messages = [response.error().message() for response in responses[1:]]
    assert messages[0].startswith("arguments is no JSON object")
    assert "has no nonsense; it takes prompt" in messages[1]
    assert "divisible" in messages[2]


class InferenceHandler(BaseHTTPRequestHandler):
    """The protocol's endpoints in front of :class:`LocalModels`."""

    models: LocalModels

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v2/health/ready" else 404)
        self.end_headers()

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        length = int(self.headers["Inference-Header-Content-Length"])
        start, arrays = length, {}
        kinds = {"FP32": np.float32, "INT64": np.int64, "INT32": np.int32}
        for tensor in json.loads(content[:length])["inputs"]:
            size = tensor["parameters"]["binary_data_size"]
            data = np.frombuffer(content[start : start + size], kinds[tensor["datatype"]])
            arrays[tensor["name"]] = data.reshape(tensor["shape"])
            start += size
        try:
            found = self.models.infer(self.path.split("/")[3], arrays)
        except RequestError as error:
            return self._send(400, json.dumps({"error": str(error)}).encode(), {})
        outputs = [
            {
                "name": name,
                "datatype": "FP32",
                "shape": list(array.shape),
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, array in found.items()
        ]
        header = json.dumps({"outputs": outputs}).encode()
        body = b"".join([header, *(array.tobytes() for array in found.values())])
        return self._send(200, body, {"Inference-Header-Content-Length": str(len(header))})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(sd3: Path) -> Iterator[str]:
    handler = type("Handler", (InferenceHandler,), {"models": LocalModels(sd3, threads=1)})
    with HTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_client_runs_the_pipeline_on_a_server(sd3: Path, server: str) -> None:
    expected = images(served_pipeline(sd3, threads=1), max_sequence_length=16)
    assert np.array_equal(images(served_pipeline(sd3, server), max_sequence_length=16), expected)
    with pytest.raises(RequestError, match=r"text_encoder: the server says: text_encoder: input_ids is int32"):
        TritonClient(server).infer("text_encoder", {"input_ids": np.zeros((1, 16), np.int32)})


def test_no_server(sd3: Path) -> None:
    with pytest.raises(RequestError, match=r"no server is ready at http://127\.0\.0\.1:9"):
        served_pipeline(sd3, "http://127.0.0.1:9")
    with pytest.raises(RequestError, match=r"no answer from http://127\.0\.0\.1:9"):
        TritonClient("http://127.0.0.1:9").infer("x", {})


@needs_server
@pytest.mark.slow
def test_real_server(sd3: Path, tmp_path: Path) -> None:
    expected = images(served_pipeline(sd3, threads=1), max_sequence_length=16)
    with running(sd3, tmp_path) as client:
        found = client.infer("pipeline", request())["images"]
        assert np.array_equal(found, (expected * 255).round().astype(np.uint8))
        assert np.array_equal(images(served_pipeline(sd3, client.url), max_sequence_length=16), expected)
        with pytest.raises(RequestError, match="has no nonsense"):
            client.infer("pipeline", request(arguments=np.array(['{"nonsense": 1}'], object)))
        with pytest.raises(RequestError, match=r"input_ids.*INT64"):
            client.infer("text_encoder", {"input_ids": np.zeros((1, 16), np.int32)})
