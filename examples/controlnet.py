"""Quantize a pipeline with a ControlNet: the denoiser and the ControlNet together.

    python examples/controlnet.py
    python examples/controlnet.py --pipeline stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --controlnet lllyasviel/control_v11p_sd15_canny --prompts prompts.txt --conditions edges/ --size 512

Calibration data of a ControlNet needs a control image with every prompt: ``per_prompt_kwargs`` of the calibration's
settings. By default the pipeline is examples/pipelines/shapes-sdxl, the control images are the edges of drawn scenes,
and the ControlNet is made from the UNet, as one is at the beginning of its training, with small random weights where a
fresh one has zeros: it changes the images, but has not learnt to follow the edges. That is enough to see what
quantization does to it. ``out/controlnet`` gets the quantized pipeline, ``out/controlnet.png`` the images.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shapes
import torch
from diffusers import AutoPipelineForText2Image, ControlNetModel
from pictures import difference, draw_strips
from PIL import Image
from shapes_sampling import GUIDANCE, PIPELINES
from torch import Tensor
from torch.nn.functional import interpolate

from optimum_segquant import CalibrationSettings, QuantizationResult, SegQuantizer
from optimum_segquant.calibration import read_prompts
from optimum_segquant.evaluation import generate_images, image_metrics
from optimum_segquant.pretrained import load_pretrained

SCENES_SEED, CALIBRATION_SEED, HELD_OUT_SEED = 4_000, 5_000, 6_000
CHANNELS = (16, 32, 96, 256)  # of the layers that shrink the control image, as in the published ControlNets
UNTRAINED = 0.02  # standard deviation of the random weights that replace a fresh ControlNet's zeros


def edges(pictures: Tensor) -> Tensor:
    """Outlines of drawn pictures, white on black.

    Args:
        pictures: (P, 3, H, W) float in [0, 1].

    Returns:
        The same shape, float in [0, 1].
    """
    grey = pictures.mean(1, keepdim=True)
    across = (grey[..., :, 1:] - grey[..., :, :-1]).abs()
    down = (grey[..., 1:, :] - grey[..., :-1, :]).abs()
    strength = torch.zeros_like(grey)
    strength[..., :, 1:] += across
    strength[..., 1:, :] += down
    return (strength / strength.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)).expand_as(pictures).contiguous()


def untrained_controlnet(unet: Any, scale_factor: int) -> ControlNetModel:
    """A ControlNet with the UNet's weights, whose output convolutions are small and random.

    Args:
        unet: of the pipeline.
        scale_factor: pixels of an image per pixel of its latents, by which the control image has to shrink.
    """
    layers = round(math.log2(scale_factor)) + 1
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=CHANNELS[:layers])
    generator = torch.Generator().manual_seed(0)
    embedding = controlnet.controlnet_cond_embedding.conv_out
    for layer in (embedding, *controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=UNTRAINED, generator=generator)
    return controlnet.eval()


def load(source: str, controlnet: str | None) -> Any:
    """The pipeline with its ControlNet, of the class that goes with both."""
    if controlnet is not None:
        model = load_pretrained(controlnet)
    else:
        base = load_pretrained(source)
        if not hasattr(base, "unet"):
            raise SystemExit(f"{source} has no UNet to make a ControlNet from: name a trained one with --controlnet")
        model = untrained_controlnet(base.unet, base.vae_scale_factor)
    pipeline = AutoPipelineForText2Image.from_pretrained(source, controlnet=model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def control_data(options: argparse.Namespace) -> tuple[list[str], Tensor]:
    """Prompts and (P, 3, H, W) control images, float in [0, 1].

    Raises:
        SystemExit: prompts without images or the other way round, or too few of either.
    """
    count = options.calibration_prompts + options.images
    if (options.prompts is None) != (options.conditions is None):
        raise SystemExit("--prompts and --conditions belong together: one control image a prompt")
    if options.prompts is None:
        scenes, prompts = shapes.sample(SCENES_SEED, count)
        images = edges(shapes.draw(scenes))
        size = options.size or shapes.CANVAS
        return prompts, interpolate(images, size=(size, size), mode="nearest")
    size = options.size or 512
    files = sorted(file for file in options.conditions.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
    texts = read_prompts(options.prompts)
    if len(texts) != len(files) or len(texts) < count:
        raise SystemExit(
            f"{len(texts)} prompts and {len(files)} control images: give {count} or more of each, the images in the "
            "order of their names (or lower --calibration-prompts and --images)"
        )
    pixels = [torch.frombuffer(bytearray(_rgb(file, size)), dtype=torch.uint8) for file in files[:count]]
    return list(texts[:count]), torch.stack(pixels).view(count, size, size, 3).permute(0, 3, 1, 2) / 255


def _rgb(file: Path, size: int) -> bytes:
    return Image.open(file).convert("RGB").resize((size, size)).tobytes()


def quantize(
    pipeline: Any, prompts: Sequence[str], conditions: Tensor, options: argparse.Namespace
) -> QuantizationResult:
    """Quantize both models, each on what it reads; the last ``options.images`` prompts are only measured on."""

    def settings(part: slice, seed: int) -> CalibrationSettings:
        return CalibrationSettings(
            prompts=tuple(prompts[part]),
            num_inference_steps=options.steps,
            batch_size=4,
            seed=seed,
            call_kwargs={"guidance_scale": options.guidance},
            per_prompt_kwargs={"image": list(conditions[part])},
        )

    known = options.calibration_prompts
    quantizer = SegQuantizer(pipeline, components=("denoiser", "controlnet"))
    return quantizer.quantize(
        options.out,
        options.preset,
        calibration=settings(slice(known), CALIBRATION_SEED),
        held_out=settings(slice(known, None), HELD_OUT_SEED),
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=str(PIPELINES / "shapes-sdxl"), help="a directory or hub name")
    parser.add_argument("--controlnet", help="a trained ControlNet; by default one made from the pipeline's UNet")
    parser.add_argument("--preset", default="SEGQUANT_CFG")
    parser.add_argument("--prompts", help="file with prompts, with --conditions")
    parser.add_argument("--conditions", type=Path, help="folder with a control image for each of them")
    parser.add_argument("--size", type=int, help="pixels of the images' sides; by default 64, with --conditions 512")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--calibration-prompts", type=int, default=16)
    parser.add_argument("--images", type=int, default=4, help="prompts that are measured and drawn")
    parser.add_argument("--out", type=Path, default=Path("out/controlnet"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> QuantizationResult:
    """Quantize, load again, compare."""
    options = parse_arguments(arguments)
    prompts, conditions = control_data(options)
    pipeline = load(options.pipeline, options.controlnet)
    shown, control = prompts[options.calibration_prompts :], conditions[options.calibration_prompts :]
    call: dict[str, Any] = {
        "seeds": HELD_OUT_SEED,
        "batch_size": len(shown),  # one call, since control images are not dealt out
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "image": control,
    }
    reference = generate_images(pipeline, shown, **call)
    without = generate_images(pipeline, shown, **call, controlnet_conditioning_scale=0.0)
    result = quantize(pipeline, prompts, conditions, options)
    loaded = load_pretrained(options.out)
    loaded.set_progress_bar_config(disable=True)
    images = generate_images(loaded, shown, **call)
    psnr = image_metrics(images, reference).psnr
    print(result.report.summary())
    print(f"images of the loaded pipeline: {psnr:.1f} dB; without the ControlNet they would be", end=" ")
    print(f"{image_metrics(without, reference).psnr:.1f} dB")
    strips = [("control", control), ("full precision", reference), (f"{options.preset}\n{psnr:.1f} dB", images)]
    picture = options.out.with_name(f"{options.out.name}.png")
    draw_strips([*strips, difference(images, reference)], shown).save(picture, optimize=True)
    print(f"{options.out} and {picture} written")
    return result


if __name__ == "__main__":
    main()
