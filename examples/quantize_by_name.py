"""Quantize a known model by its name: Stable Diffusion 3.5, FLUX.1, SDXL, Wan or Qwen-Image.

    python examples/quantize_by_name.py --model sd35-medium
    python examples/quantize_by_name.py --model wan --preset SEGQUANT_W4A8_CFG --offload --cache-dir cache
    python examples/quantize_by_name.py --model my/flux --like flux-dev --prompts prompts.txt --export onnx
    python examples/quantize_by_name.py --model examples/pipelines/shapes-sdxl --dtype float32 --steps 8 \\
        --num-prompts 8 --call height=64 width=64 guidance_scale=4

loads the pipeline in the type of its weights, samples calibration prompts as the model is meant to be used (steps,
guidance, size), quantizes every denoiser (Wan 2.2 has two) and writes ``out/NAME-PRESET/``, whose files are then
checked against their checksums, and ``out/NAME-PRESET.html``, a page with what was done. Image pipelines also get pairs
of images before and after.

``--model`` takes a name of the table below, a directory or any other name on the hub. For the latter two the table's
row of the same pipeline class says how the model is used; ``--like`` chooses where several have that class.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from diffusers import DiffusionPipeline

from optimum_segquant import CalibrationSettings, SegQuantizer, write_report
from optimum_segquant.calibration import held_out_prompts
from optimum_segquant.configs import resolve_config
from optimum_segquant.evaluation import Evaluation, Samples, evaluate_samples, sample_reference
from optimum_segquant.exports import ExportFormat
from optimum_segquant.files import MANIFEST_NAME, check_replaceable, verify_manifest
from optimum_segquant.serving import describe_native

IMAGE_SEED = 10_000


@dataclass(frozen=True)
class ModelDefaults:
    """How a model is loaded and used.

    Attributes:
        hub: its name on the Hugging Face Hub.
        pipeline: class that its ``model_index.json`` names.
        steps: denoising steps of one image or video.
        call: arguments of a pipeline call, as its authors give them.
        components: what is quantized.
        dtype: of the weights; by component where one needs another one, as ``from_pretrained`` takes it.
        load: further arguments of ``from_pretrained``, for the files on the hub only.
        batch_size: prompts a call.
        is_video: whether the pipeline makes videos, of which there are no pairs in the report.
    """

    hub: str
    pipeline: str
    steps: int
    call: Mapping[str, Any]
    components: tuple[str, ...] = ("transformer",)
    dtype: str | Mapping[str, str] = "bfloat16"
    load: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    is_video: bool = False

    def load_arguments(self, dtype: str | None = None) -> dict[str, Any]:
        """For ``SegQuantizer.from_pretrained``.

        Args:
            dtype: of all components, instead of the model's own.
        """
        own = dtype or self.dtype
        if isinstance(own, str):
            return {**self.load, "torch_dtype": getattr(torch, own)}
        return {**self.load, "torch_dtype": {name: getattr(torch, value) for name, value in own.items()}}


SIZE_1024 = {"height": 1024, "width": 1024}
# The VAE of Wan overflows in 16 bits.
WAN_DTYPE = {"default": "bfloat16", "vae": "float32"}

MODELS: Mapping[str, ModelDefaults] = {
    "sd35-medium": ModelDefaults(
        "stabilityai/stable-diffusion-3.5-medium", "StableDiffusion3Pipeline", 40, {"guidance_scale": 4.5, **SIZE_1024}
    ),
    "sd35-large": ModelDefaults(
        "stabilityai/stable-diffusion-3.5-large", "StableDiffusion3Pipeline", 28, {"guidance_scale": 3.5, **SIZE_1024}
    ),
    "flux-dev": ModelDefaults(
        "black-forest-labs/FLUX.1-dev",
        "FluxPipeline",
        50,
        {"guidance_scale": 3.5, "max_sequence_length": 512, **SIZE_1024},
    ),
    # Distilled to four steps; takes no guidance and at most 256 tokens.
    "flux-schnell": ModelDefaults(
        "black-forest-labs/FLUX.1-schnell",
        "FluxPipeline",
        4,
        {"guidance_scale": 0.0, "max_sequence_length": 256, **SIZE_1024},
    ),
    "sdxl": ModelDefaults(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "StableDiffusionXLPipeline",
        50,
        {"guidance_scale": 5.0, **SIZE_1024},
        components=("unet",),
        dtype="float16",
        load={"variant": "fp16"},
    ),
    # Two denoisers, each with a guidance of its own: one for the noisy steps, one for the others.
    "wan": ModelDefaults(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "WanPipeline",
        40,
        {"guidance_scale": 4.0, "guidance_scale_2": 3.0, "height": 720, "width": 1280, "num_frames": 81},
        components=("transformer", "transformer_2"),
        dtype=WAN_DTYPE,
        is_video=True,
    ),
    "wan21": ModelDefaults(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "WanPipeline",
        50,
        {"guidance_scale": 5.0, "height": 480, "width": 832, "num_frames": 81},
        dtype=WAN_DTYPE,
        is_video=True,
    ),
    # Guidance needs a negative prompt, if only a blank.
    "qwen-image": ModelDefaults(
        "Qwen/Qwen-Image",
        "QwenImagePipeline",
        50,
        {"true_cfg_scale": 4.0, "negative_prompt": " ", "height": 1328, "width": 1328},
    ),
}


def defaults_of(model: str, like: str | None) -> tuple[str, ModelDefaults]:
    """What to load, and how it is used.

    Args:
        model: name of a row, directory or hub name.
        like: name of the row to take for a directory or hub name.

    Raises:
        SystemExit: no row fits, or several do; it says what to write.
    """
    if model in MODELS:
        if like is not None:
            raise SystemExit(f"--like goes with a directory or hub name; {model} has a row of its own: leave it out")
        return MODELS[model].hub, MODELS[model]
    if like is None:
        like = row_of(model)
    return model, replace(MODELS[like], hub=model, load={})


def row_of(model: str) -> str:
    """Name of the only row with the pipeline class of a directory or hub name.

    Raises:
        SystemExit: there is none, or several.
    """
    try:
        pipeline = DiffusionPipeline.load_config(model)["_class_name"]
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{model} is none of {', '.join(MODELS)}, and no pipeline in a directory or on the hub that can be "
            "reached: check the name and the network"
        ) from error
    rows = [name for name, row in MODELS.items() if row.pipeline == pipeline]
    if len(rows) != 1:
        fit = f"fits the rows {' and '.join(rows)}" if rows else f"fits no row, they are {', '.join(MODELS)}"
        raise SystemExit(f"{model} is a {pipeline}, which {fit}: name the one it is used like with --like")
    return rows[0]


def key_values(texts: Sequence[str]) -> dict[str, Any]:
    """``["height=512", "negative_prompt=' '"]`` as a dictionary; values are read as YAML.

    Raises:
        SystemExit: a text without ``=``.
    """
    if wrong := [text for text in texts if "=" not in text]:
        raise SystemExit(f"{wrong[0]!r} is no argument: write NAME=VALUE")
    return {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in texts)}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, a directory or a hub name")
    parser.add_argument("--like", choices=MODELS, help="the row to use for a directory or hub name")
    parser.add_argument("--preset", default="SEGQUANT_CFG", help="name of a preset, or a YAML file")
    parser.add_argument("--export", default="segquant", choices=get_args(ExportFormat))
    parser.add_argument("--prompts", help="file or dataset with calibration prompts; by default the package's own")
    parser.add_argument("--num-prompts", type=int, default=32, help="how many of them")
    parser.add_argument("--held-out", type=int, default=4, help="unseen prompts to measure the SQNR on")
    parser.add_argument("--images", type=int, default=4, help="pairs of images in the report; 0 for none")
    parser.add_argument("--steps", type=int, help="denoising steps; by default the model's")
    parser.add_argument("--kept-steps", type=int, default=8, help="how many of them calibration sees")
    parser.add_argument("--call", nargs="+", default=[], metavar="NAME=VALUE", help="of the pipeline's call")
    parser.add_argument("--load", nargs="+", default=[], metavar="NAME=VALUE", help="of from_pretrained")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="by default the model's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--offload", action="store_true", help="only the model that is running is on the GPU")
    parser.add_argument("--cache-dir", type=Path, help="keeps sampled data and solved layers; a killed run goes on")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the directory and the page")
    options = parser.parse_args(arguments)
    if options.offload and not torch.cuda.is_available():
        parser.error("--offload needs a GPU: leave it out")
    return options


def load(source: str, defaults: ModelDefaults, options: argparse.Namespace) -> SegQuantizer:
    """The pipeline where it runs, with what is to be quantized chosen."""
    arguments = {**defaults.load_arguments(options.dtype), **key_values(options.load)}
    quantizer = SegQuantizer.from_pretrained(source, components=defaults.components, **arguments)
    if options.offload:
        quantizer.model.enable_model_cpu_offload()
    elif "device_map" not in arguments:
        quantizer.model.to(options.device)
    quantizer.model.set_progress_bar_config(disable=True)
    return quantizer


def main(arguments: Sequence[str] | None = None) -> Path:
    """Quantize, check, report; give the directory."""
    options = parse_arguments(arguments)
    # Whatever is wrong shows before gigabytes are loaded.
    config = resolve_config(options.preset)
    source, defaults = defaults_of(options.model, options.like)
    name = f"{Path(options.model).name}-{Path(config.name).stem}"
    directory = options.out / name
    check_replaceable(directory.resolve())
    call = {**defaults.call, **key_values(options.call)}
    steps = options.steps or defaults.steps
    settings = CalibrationSettings.read(
        options.prompts,
        limit=options.num_prompts,
        num_inference_steps=steps,
        steps=options.kept_steps,
        batch_size=defaults.batch_size,
        call_kwargs=call,
    )

    quantizer = load(source, defaults, options)
    samples = None
    if options.images and not defaults.is_video:
        samples = reference_images(quantizer.model, options.images, steps, call)
    result = quantizer.quantize(
        directory,
        config,
        calibration=settings,
        export=options.export,
        cache_dir=options.cache_dir,
        held_out=options.held_out or None,
    )
    if options.export == "native":
        describe_native(directory)  # other engines' files have no manifest of their own
    checked = verified_files(directory)
    evaluation = None if samples is None else compared(samples, result.pipeline)
    page = write_report(options.out / f"{name}.html", evaluation, quantization=result.report, title=name)
    print(result.report.summary())
    print(f"{directory}: {checked} files of models are as their checksums say. Report: {page}")
    return directory


def verified_files(directory: Path) -> int:
    """How many files were compared with the checksums of their manifests: one of each model, or one of an export.

    Raises:
        DamagedFilesError: a file is missing, truncated or altered.
    """
    return sum(len(verify_manifest(manifest.parent)) for manifest in directory.rglob(MANIFEST_NAME))


def reference_images(pipeline: Any, count: int, steps: int, call: Mapping[str, Any]) -> Samples:
    """Images and errors' reference in full precision, before the pipeline is quantized in place."""
    return sample_reference(
        pipeline,
        held_out_prompts(count),
        seeds=IMAGE_SEED,
        num_inference_steps=steps,
        batch_size=1,
        recorded_prompts=1,
        **call,
    )


def compared(samples: Samples, pipeline: Any) -> Evaluation:
    """The same images once more, from the quantized pipeline."""
    return evaluate_samples(samples, pipeline, metrics=("psnr", "ssim"))


if __name__ == "__main__":
    main()
