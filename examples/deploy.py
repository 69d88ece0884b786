"""From one quantized checkpoint to everything that runs it: PyTorch, ONNX Runtime, TensorRT.

    python examples/deploy.py                                  # quantizes examples/pipelines/shapes-sd3 first
    python examples/deploy.py --checkpoint sd35-w8a8 --pipeline stabilityai/stable-diffusion-3.5-medium

writes into ``out/deploy``: ``segquant`` (the checkpoint, if none was given), ``onnx`` (for ONNX Runtime), ``tensorrt``
(ONNX for TensorRT, checked against its rules) and ``repository`` (a model repository for Triton, where ``trtexec``
builds the engines); prints the ``trtexec`` command lines; makes the same images from the same seeds with full
precision, the loaded checkpoint and both sets of graphs in ONNX Runtime, and draws them in ``deploy.png``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import score_shapes
import torch
from pictures import difference, draw_strips
from shapes_sampling import PIPELINE, sampling
from torch import Tensor

from optimum_segquant import CalibrationSettings, SegQuantizer, export_onnx
from optimum_segquant.calibration import default_prompts, held_out_prompts
from optimum_segquant.components import denoisers_of
from optimum_segquant.evaluation import generate_images, image_metrics
from optimum_segquant.pretrained import load_pretrained
from optimum_segquant.serving import write_model_repository

CALIBRATION_SEED, IMAGE_SEED = 1_000, 3_000


@dataclass(frozen=True)
class Deployed:
    """One way of running the pipeline.

    Attributes:
        name: of it.
        images: (P, 3, H, W) float32 in [0, 1].
        psnr: of the images against full precision, dB.
        seconds: an image.
        megabytes: of the denoiser's files.
    """

    name: str
    images: Tensor
    psnr: float
    seconds: float
    megabytes: float


def make_checkpoint(source: str, directory: Path, preset: str, prompts: Sequence[str], call: dict[str, Any]) -> None:
    """Quantize a pipeline into a ``segquant`` directory."""
    settings = CalibrationSettings(
        prompts=tuple(prompts),
        num_inference_steps=call["num_inference_steps"],
        batch_size=call["batch_size"],
        seed=CALIBRATION_SEED,
        call_kwargs={name: value for name, value in call.items() if name not in ("num_inference_steps", "batch_size")},
    )
    SegQuantizer.from_pretrained(source).quantize(directory, preset, calibration=settings)


def quiet(pipeline: Any) -> Any:
    """The pipeline without progress bars."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_onnx(directory: Path) -> Any:
    """The graphs of a directory in ONNX Runtime."""
    from optimum.onnxruntime import ORTDiffusionPipeline

    return quiet(ORTDiffusionPipeline.from_pretrained(directory, export=False))


def engine_commands(exported: Path, repository: Path, call: dict[str, Any], size: int, images: int) -> list[str]:
    """The ``trtexec`` lines for all models, to be run in ``repository``; sizes follow from how the pipeline is used."""
    given_elsewhere = ("num_inference_steps", "batch_size", "height", "width")
    usual = {name: value for name, value in call.items() if name not in given_elsewhere}
    deployment = write_model_repository(
        exported,
        repository,
        backend="tensorrt",
        image_sizes=[(size, size)],
        max_images=images,
        call_arguments=usual,
    )
    return [command.text for command in deployment.commands if command.text.startswith("trtexec")]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pipeline", default=str(PIPELINE), help="the full-precision pipeline, a directory or hub name"
    )
    parser.add_argument("--checkpoint", type=Path, help="its segquant directory; made first by default")
    parser.add_argument("--preset", default="SEGQUANT_CFG", help="for making it")
    parser.add_argument("--out", type=Path, default=Path("out/deploy"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--calibration-prompts", type=int, default=16)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Deployed]:
    """Make, load, compare, draw."""
    options = parse_arguments(arguments)
    original = quiet(load_pretrained(options.pipeline))
    prompts: Sequence[str]
    calibration: Sequence[str]
    if options.pipeline == str(PIPELINE):
        call = sampling(original, options.steps, batch_size=4)
        prompts = score_shapes.unseen_prompts(options.images, seed=IMAGE_SEED)
        calibration = score_shapes.unseen_prompts(options.calibration_prompts, seed=CALIBRATION_SEED)
    else:
        call = {"num_inference_steps": options.steps, "batch_size": 1}
        prompts = held_out_prompts(options.images)
        calibration = default_prompts(options.calibration_prompts)
    checkpoint = options.checkpoint
    if checkpoint is None:
        checkpoint = options.out / "segquant"
        make_checkpoint(options.pipeline, checkpoint, options.preset, calibration, call)

    denoiser = next(iter(denoisers_of(original)))
    reference = None
    rows: list[Deployed] = []

    def run(name: str, pipeline: Any, files: Path) -> None:
        nonlocal reference
        start = time.perf_counter()
        images = generate_images(pipeline, prompts, seeds=IMAGE_SEED, **call)
        seconds = (time.perf_counter() - start) / len(prompts)
        reference = images if reference is None else reference
        psnr = float("inf") if torch.equal(images, reference) else image_metrics(images, reference).psnr
        rows.append(Deployed(name, images, psnr, seconds, size_of(files / denoiser)))
        print(f"{name}: {psnr:.1f} dB, {seconds:.2f} s an image", flush=True)

    run("full precision", original, Path(options.pipeline))
    loaded = quiet(load_pretrained(checkpoint))
    run("segquant, PyTorch", loaded, checkpoint)
    run("ONNX Runtime", load_onnx(export_onnx(loaded, options.out / "onnx")), options.out / "onnx")
    for_engine = export_onnx(loaded, options.out / "tensorrt", target="tensorrt")
    # ONNX Runtime computes TensorRT's graphs, too: what the engine's images will be like, without its GPU.
    run("TensorRT's graphs, in ONNX Runtime", load_onnx(for_engine), for_engine)
    assert reference is not None
    commands = engine_commands(for_engine, options.out / "repository", call, reference.shape[-1], options.images)
    print(f"\nIn {options.out / 'repository'}, on the GPU that will run them:\n\n" + "\n\n".join(commands) + "\n")
    print(format_table(rows))
    draw(rows, prompts, options.out / "deploy.png")
    return rows


def size_of(directory: Path) -> float:
    """Megabytes of a model's weights and graph; 0 for a name on the hub."""
    kinds = (".safetensors", ".onnx", ".onnx_data")
    return sum(file.stat().st_size for file in directory.rglob("*") if file.suffix in kinds) / 1e6


def format_table(rows: Sequence[Deployed]) -> str:
    """The rows as a Markdown table."""
    lines = ["| runs as | denoiser, MB | PSNR, dB | s an image |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {row.megabytes:.1f} | {row.psnr:.1f} | {row.seconds:.2f} |" for row in rows]
    return "\n".join(lines)


def draw(rows: Sequence[Deployed], prompts: Sequence[str], path: Path) -> None:
    """All images and their differences from full precision, as one picture."""
    reference = rows[0].images
    strips = [(rows[0].name, reference)]
    for row in rows[1:]:
        strips += [(f"{row.name}\n{row.psnr:.1f} dB", row.images), difference(row.images, reference)]
    draw_strips(strips, prompts).save(path, optimize=True)
    print(f"{path} written")


if __name__ == "__main__":
    main()
