"""``optimum-cli segquant serve``."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from .base import Result, SegQuantSubcommand
from .models import CALL, call_of, finite
from .options import Option

__all__ = ["ServeCommand"]

_SIZE = re.compile(r"(\d+)x(\d+)")


def image_sizes(values: list[Any]) -> list[tuple[int, int]]:
    """``["1024x1024"]`` as pixels, height and width."""
    found = []
    for value in values:
        match = _SIZE.fullmatch(str(value))
        if match is None or not int(match[1]) * int(match[2]):
            raise ValueError(f"{value!r} is no image size: write HEIGHTxWIDTH, such as 1024x1024")
        found.append((int(match[1]), int(match[2])))
    return found


class ServeCommand(SegQuantSubcommand):
    """From an exported directory to a served model."""

    DESCRIPTION = (
        "Make a deployment of an exported pipeline: a model repository for NVIDIA Triton Inference Server (ONNX "
        "Runtime or TensorRT), or a checkpoint for vLLM-Omni, with checksums, record and commands. Or verify one, run "
        "it once, generate an image with it, here or on a server."
    )
    OPTIONS = (
        Option("source", "what `export` wrote, or a deployment", positional=True, required=True),
        Option("output", "the model repository to write", metavar="DIR"),
        Option("backend", "what runs the models", choices=("onnxruntime", "tensorrt"), default="onnxruntime"),
        Option("components", "models to serve; by default text encoders, denoiser and VAE decoder", kind="list"),
        Option("device", "where the server runs them", choices=("gpu", "cpu"), default="gpu"),
        Option("instances", "of each model, on each GPU or on the CPU", kind="integer", default=1),
        Option(
            "image_sizes", "HEIGHTxWIDTH that will be asked for, the usual one first", kind="list", check=image_sizes
        ),
        Option("max_images", "images in one call of the pipeline", kind="integer", default=1),
        Option("queue_delay", "microseconds that a request may wait to share a batch", kind="integer", default=0),
        *(option for option in CALL if option.name in ("call", "seed", "steps")),
        Option("check", "verify checksums and configurations, and run every model once", kind="flag"),
        Option("seal", "take engines that trtexec has built into the manifest", kind="flag"),
        Option("prompt", "generate an image with the deployment"),
        Option("image", "where to write it", metavar="FILE", default="image.png"),
        Option("url", "of a running server, e.g. http://localhost:8000; by default it runs here in ONNX Runtime"),
    )
    EXAMPLES = (
        "serve onnx --output repository --image-sizes 1024x1024 --max-images 4",
        "serve tensorrt --backend tensorrt --output repository --call guidance_scale=4.5",
        "serve repository --check",
        "serve repository --seal",
        'serve repository --prompt "a red circle" --url http://localhost:8000 --image circle.png',
        "serve checkpoint                     # what `export --to native` wrote, for vLLM-Omni",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options."""
        ServeCommand.add_to(parser)

    @staticmethod
    def work(values: Namespace) -> Result:
        """Make, verify or run."""
        source = Path(values.source).expanduser()
        if not source.is_dir():
            raise FileNotFoundError(f"there is no directory {source} (relative to {Path.cwd()})")
        asked = [name for name in ("output", "check", "seal", "prompt") if getattr(values, name)]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(f'--{name}' for name in asked)}: one at a time")
        if values.output is not None:
            return _write(source, values)
        if values.check:
            return _check(source)
        if values.seal:
            return _seal(source)
        if values.prompt is not None:
            return _generate(source, values)
        return _describe(source)


def _write(source: Path, values: Namespace) -> Result:
    from optimum_segquant.serving import ServingOptions, write_model_repository

    options = ServingOptions(device=values.device, instances=values.instances, max_queue_delay_us=values.queue_delay)
    deployment = write_model_repository(
        source,
        values.output,
        backend=values.backend,
        components=values.components,
        options=options,
        image_sizes=values.image_sizes or (),
        max_images=values.max_images,
        call_arguments=values.call or {},
    )
    return _result(deployment, f"{values.output} is ready; its README.md has these commands:")


def _describe(source: Path) -> Result:
    from optimum_segquant.serving import describe_native, load_deployment
    from optimum_segquant.serving.deployment import DEPLOYMENT_FILE, readme_name

    if (source / DEPLOYMENT_FILE).is_file():
        return _result(load_deployment(source), f"{source} is intact:")
    if any(source.glob("*/model.onnx")):
        raise ValueError(f"{source} holds ONNX files: give --output, the model repository to write")
    deployment = describe_native(source)
    return _result(deployment, f"{source} is ready; its {readme_name(source)} has these commands:")


def _result(deployment: Any, head: str) -> Result:
    lines = [head]
    for command in deployment.commands:
        lines += [f"\n# {command.name}: {command.purpose}", command.text]
    return Result(finite(deployment.to_dict()), "\n".join(lines))


def _check(source: Path) -> Result:
    from optimum_segquant.serving import serve_check

    checks = serve_check(source)
    rows = [f"{'model':<18}{'seconds':>10}{'rows, dB':>10}"]
    for check in checks:
        agreement = "-" if check.rows is None else f"{check.rows:.1f}"
        rows.append(f"{check.model:<18}{check.seconds:>10.3f}{agreement:>10}")
    data = [
        {"model": c.model, "seconds": c.seconds, "inputs": c.inputs, "outputs": c.outputs, "rows": c.rows}
        for c in checks
    ]
    return Result(finite({"models": data}), "\n".join([*rows, f"{source} is intact, and every model runs"]))


def _seal(source: Path) -> Result:
    from optimum_segquant.serving import seal_engines

    deployment = seal_engines(source)
    return Result({"models": list(deployment.backends)}, f"{source} is sealed, engines included")


def _generate(source: Path, values: Namespace) -> Result:
    import torch
    from PIL import Image

    from optimum_segquant.files import check_writable
    from optimum_segquant.serving import served_pipeline

    endings = [ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE]
    path = check_writable(values.image, example="image.png", endings=endings)
    pipeline = served_pipeline(source, values.url)
    pipeline.set_progress_bar_config(disable=True)
    if values.steps is not None and values.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {values.steps}")
    steps = {} if values.steps is None else {"num_inference_steps": values.steps}
    generator = torch.Generator().manual_seed(values.seed)
    image = pipeline(values.prompt, generator=generator, **steps, **call_of(values, pipeline)).images[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return Result({"image": str(path), "size": list(image.size)}, f"{path} is written")
