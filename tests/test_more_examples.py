"""Examples of whole pipelines: known models by name, ControlNets, deployment, the walk-through."""

from __future__ import annotations

import inspect
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import controlnet
import deploy
import diffusers
import pytest
import quantize_by_name
import shapes
import torch
from diffusers import DiffusionPipeline, StableDiffusionControlNetPipeline
from PIL import Image
from shapes_sampling import PIPELINES
from tiny_pipelines import (
    tiny_controlnet_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_wan_pipeline,
)

from modelopt_ext import PackedLinear
from optimum_segquant.files import DamagedFilesError
from optimum_segquant.pretrained import load_pretrained

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = "--num-prompts 2 --steps 2 --kept-steps 2 --held-out 1 --images 1 --device cpu".split()
FAST = """
preset: SEGQUANT_INT8_DYNAMIC_CFG
algorithm: {polarity: none}
"""
SIZE = ["height=16", "width=16"]
TEXT = [*SIZE, "max_sequence_length=16"]

TINY: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "sd35-medium": (tiny_sd3_pipeline, TEXT),
    "flux-schnell": (tiny_flux_pipeline, TEXT),
    "sdxl": (tiny_sdxl_pipeline, SIZE),
    "wan": (tiny_wan_pipeline, [*TEXT, "num_frames=5"]),
    "qwen-image": (tiny_qwen_image_pipeline, SIZE),
}


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config without a search."""
    path = tmp_path_factory.mktemp("config") / "fast.yaml"
    path.write_text(FAST)
    return str(path)


def cached(pipeline: Any, hub_name: str, folder: Path, variant: str | None) -> Path:
    """Put a pipeline where a download from the hub would have put it."""
    repository = folder / f"models--{hub_name.replace('/', '--')}"
    commit = "0" * 40
    pipeline.save_pretrained(repository / "snapshots" / commit, variant=variant)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return folder


@pytest.mark.parametrize("name", TINY)
def test_models_by_name(
    name: str, fast: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    make, call = TINY[name]
    defaults = quantize_by_name.MODELS[name]
    pipeline = make()
    assert type(pipeline).__name__ == defaults.pipeline
    cache = cached(pipeline, defaults.hub, tmp_path / "hub", defaults.load.get("variant"))
    # Without a network the files in the cache are taken; variant, types and class are looked up as with one.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    directory = quantize_by_name.main(
        [
            *("--model", name, "--preset", fast, "--out", str(tmp_path / "out"), *SMALL),
            *("--call", *call, "--load", f"cache_dir={cache}", "local_files_only=true"),
        ]
    )
    assert directory == tmp_path / "out" / f"{name}-fast"
    report = json.loads((directory / "segquant_report.json").read_text())
    assert [part["name"] for part in report["components"]] == list(defaults.components)
    assert all(30 < part["sqnr"] < 60 for part in report["components"])
    settings = report["calibration"]["settings"]
    assert settings["num_inference_steps"] == 2
    own = {key: value for key, value in defaults.call.items() if "guidance" in key or "cfg" in key}
    assert own
    assert own.items() <= settings["call_kwargs"].items()

    loaded = load_pretrained(directory, torch_dtype=defaults.load_arguments()["torch_dtype"])
    for component in defaults.components:
        assert any(isinstance(part, PackedLinear) for part in getattr(loaded, component).modules())
    assert loaded.vae.dtype == (torch.float32 if name == "wan" else getattr(torch, str(defaults.dtype)))
    page = (tmp_path / "out" / f"{name}-fast.html").read_text()
    assert "fast" in page
    assert ("data:image/png" in page or "data:image/webp" in page) != defaults.is_video  # a pair of images
    assert f"{2 * len(defaults.components)} files of models are as their checksums say" in capsys.readouterr().out

    weights = next((directory / defaults.components[0]).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedFilesError, match=weights.name):
        quantize_by_name.verified_files(directory)


def test_rows_name_classes_of_diffusers_and_arguments_that_they_take():
    for row in quantize_by_name.MODELS.values():
        pipeline = getattr(diffusers, row.pipeline)
        parameters = inspect.signature(pipeline.__call__).parameters
        assert set(row.call) <= set(parameters)
        assert set(row.components) <= set(inspect.signature(pipeline.__init__).parameters)
    assert quantize_by_name.MODELS["wan"].load_arguments()["torch_dtype"] == {
        "default": torch.bfloat16,
        "vae": torch.float32,
    }
    assert quantize_by_name.MODELS["sdxl"].load_arguments("float32") == {
        "variant": "fp16",
        "torch_dtype": torch.float32,
    }


def test_a_directory_is_used_like_the_row_of_its_class(tmp_path: Path):
    assert quantize_by_name.row_of(str(PIPELINES / "shapes-sdxl")) == "sdxl"
    source, defaults = quantize_by_name.defaults_of(str(PIPELINES / "shapes-flux"), "flux-schnell")
    assert source == str(PIPELINES / "shapes-flux")
    assert defaults.steps == 4
    with pytest.raises(SystemExit, match="is a FluxPipeline, which fits the rows flux-dev and flux-schnell: name the"):
        quantize_by_name.main(["--model", str(PIPELINES / "shapes-flux")])
    with pytest.raises(SystemExit, match="no pipeline in a directory or on the hub that can be reached"):
        quantize_by_name.main(["--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="flux-dev has a row of its own: leave it out"):
        quantize_by_name.main(["--model", "flux-dev", "--like", "sdxl"])
    with pytest.raises(SystemExit, match="'height' is no argument: write NAME=VALUE"):
        quantize_by_name.main(["--model", "flux-dev", "--call", "height"])
    with pytest.raises(ValueError, match="SEGQUANT_CFGG"):  # before anything is loaded
        quantize_by_name.main(["--model", "flux-dev", "--preset", "SEGQUANT_CFGG"])
    tiny_sd_pipeline().save_pretrained(tmp_path / "sd")
    with pytest.raises(SystemExit, match="is a StableDiffusionPipeline, which fits no row, they are sd35-medium"):
        quantize_by_name.main(["--model", str(tmp_path / "sd")])


def test_values_of_call_arguments_are_yaml():
    assert quantize_by_name.key_values(["height=512", "negative_prompt=' '", "guidance_scale=3.5", "a=b=c"]) == {
        "height": 512,
        "negative_prompt": " ",
        "guidance_scale": 3.5,
        "a": "b=c",
    }


# -- ControlNet --------------------------------------------------------------------------------------------------------

FEW = "--size 16 --steps 2 --calibration-prompts 2 --images 2".split()


def test_denoiser_and_controlnet(fast: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny_sd_pipeline().save_pretrained(tmp_path / "base")
    out = tmp_path / "out" / "quantized"
    result = controlnet.main(["--pipeline", str(tmp_path / "base"), "--preset", fast, "--out", str(out), *FEW])
    assert [part.name for part in result.report.components] == ["unet", "controlnet"]
    assert all(25 < part.sqnr < 70 for part in result.report.components)
    loaded = DiffusionPipeline.from_pretrained(out)
    assert isinstance(loaded, StableDiffusionControlNetPipeline)
    for model in (loaded.unet, loaded.controlnet):
        assert any(isinstance(part, PackedLinear) for part in model.modules())
    # Quantization changes the images less than leaving the ControlNet away would.
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("images of the loaded pipeline"))
    quantized, without = (float(part.split()[-1]) for part in line.split(" dB")[:2])
    assert quantized > without
    assert Image.open(tmp_path / "out" / "quantized.png").size == (180 + 2 * 36, 84 + 4 * 36)


def test_trained_controlnets_and_own_control_images(tmp_path: Path):
    tiny_sd_pipeline().save_pretrained(tmp_path / "base")
    trained = tiny_controlnet_pipeline().controlnet
    trained.save_pretrained(tmp_path / "own")
    loaded = controlnet.load(str(tmp_path / "base"), str(tmp_path / "own"))
    assert isinstance(loaded, StableDiffusionControlNetPipeline)
    assert torch.equal(loaded.controlnet.controlnet_mid_block.weight, trained.controlnet_mid_block.weight)
    for index in range(4):
        Image.new("RGB", (20, 20), (51 * index, 0, 255)).save(tmp_path / f"{index}.png")
    (tmp_path / "prompts.txt").write_text("a circle\na square\na red circle\na blue square\n")
    given = ["--prompts", str(tmp_path / "prompts.txt"), "--conditions", str(tmp_path)]
    prompts, images = controlnet.control_data(controlnet.parse_arguments([*FEW, *given]))
    assert prompts == ["a circle", "a square", "a red circle", "a blue square"]
    assert images.shape == (4, 3, 16, 16)
    assert images[3].mean(dim=(1, 2)).tolist() == pytest.approx([0.6, 0.0, 1.0])


def test_edges_are_where_the_picture_changes():
    pictures = torch.zeros(2, 3, 4, 4)
    pictures[0, :, :, 2:] = 0.5
    found = controlnet.edges(pictures)
    assert torch.equal(found[0, 0], torch.tensor([[0.0, 0.0, 1.0, 0.0]] * 4))
    assert not found[1].any()
    assert controlnet.edges(shapes.draw(shapes.sample(0, 1)[0])).shape == (1, 3, shapes.CANVAS, shapes.CANVAS)


def test_control_images_and_prompts_go_together(tmp_path: Path):
    with pytest.raises(SystemExit, match="--prompts and --conditions belong together"):
        controlnet.main(["--prompts", "prompts.txt"])
    (tmp_path / "prompts.txt").write_text("a circle\n")
    with pytest.raises(SystemExit, match="1 prompts and 0 control images: give 20 or more of each"):
        controlnet.main(["--prompts", str(tmp_path / "prompts.txt"), "--conditions", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no UNet to make a ControlNet from: name a trained one"):
        controlnet.load(str(PIPELINES / "shapes-sd3"), None)


# -- deployment and walk-through ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_checkpoint_everywhere(fast: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny_sd3_pipeline().save_pretrained(tmp_path / "tiny")
    out = tmp_path / "out"
    rows = deploy.main(
        [
            *("--pipeline", str(tmp_path / "tiny"), "--preset", fast, "--out", str(out)),
            *("--steps", "2", "--images", "2", "--calibration-prompts", "2"),
        ]
    )
    names = ["full precision", "segquant, PyTorch", "ONNX Runtime", "TensorRT's graphs, in ONNX Runtime"]
    assert [row.name for row in rows] == names
    assert rows[0].psnr == float("inf")
    assert all(30 < row.psnr < 80 for row in rows[1:])
    assert all((row.images - rows[1].images).abs().max() < 0.05 for row in rows[2:])
    printed = capsys.readouterr().out
    assert "trtexec --onnx=transformer/1/model.onnx --saveEngine=transformer/1/model.plan --stronglyTyped" in printed
    assert (out / "repository" / "transformer" / "1" / "model.onnx").is_file()
    width = rows[0].images.shape[-1] * 2 + 4
    assert Image.open(out / "deploy.png").size == (180 + 2 * width, 84 + 7 * width)


@pytest.mark.slow
def test_walk_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    small = "--steps 2 --kept-steps 2 --prompts 2 --images 1 --rows plain".split()
    monkeypatch.setattr("sys.argv", ["walk_through.py", *small, "--out", str(tmp_path)])
    found = runpy.run_path(str(EXAMPLES / "walk_through.py"))
    assert "transformer_blocks.{0-2}.norm1.linear          3      160:silu  9 x 160" in capsys.readouterr().out
    plots = sorted(path.name for path in tmp_path.iterdir())
    assert [name[:2] for name in plots] == ["1_", "2_", "3_", "4_", "5_", "6_", "7_"]
    for name in plots[:-1]:
        picture = Image.open(tmp_path / name).convert("L")
        assert picture.width > 1200
        assert (
            0.02 < (torch.tensor(list(picture.get_flattened_data())) < 250).float().mean() < 0.8
        )  # something is drawn
    # Each sign's own scale: what dual and dual8 give the negatives behind GELU, and the positives nothing but dual8.
    gelu = found["groups_by_layer"]["transformer_blocks.3.ff.net.2"]
    assert gelu["negatives"]["dual"] > gelu["negatives"]["symmetric"] + 20
    assert gelu["negatives"]["dual8"] == pytest.approx(gelu["negatives"]["dual"] + 6, abs=1.5)
    assert gelu["positives"]["dual"] == pytest.approx(gelu["positives"]["symmetric"])
    assert gelu["output"]["dual8"] > gelu["output"]["symmetric"] + 3
    segments = found["groups"].values()
    assert len(segments) == 9
    assert sum(part["a scale for each segment"] - part["one weight scale"] for part in segments) > 9
    assert found["results"]["plain"].sqnr.overall > 15
