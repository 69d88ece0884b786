"""What several commands do with a model: options to load it, to call it, to prompt it."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .options import Option

__all__ = ["CALL", "DTYPES", "LOADING", "PROMPTS", "call_of", "finite", "load", "load_any", "preset"]

DTYPES = ("float32", "bfloat16", "float16")

LOADING = (
    Option("dtype", "type of the weights of the loaded pipeline; by default as saved", choices=DTYPES),
    Option("device", "where it runs, e.g. cuda or cpu; by default cuda where there is one", metavar="DEVICE"),
    Option("load", "further arguments for from_pretrained, e.g. revision=main", kind="mapping"),
)
CALL = (
    Option("steps", "denoising steps of a trajectory; by default the pipeline's own", kind="integer"),
    Option("batch_size", "prompts in one call of the pipeline", kind="integer", default=4),
    Option("seed", "of the first prompt, the others have the following ones", kind="integer", default=0),
    Option("call", "arguments of the pipeline as in use, e.g. guidance_scale=4.5 height=1024", kind="mapping"),
)
PROMPTS = (
    Option("prompts", "file with prompts (.txt, .json, .jsonl, .csv) or a dataset; by default the package's own"),
    Option("num_prompts", "how many of them", kind="integer"),
    Option("column", "of the prompts file or dataset that holds them"),
)


_OWN = {
    "num_inference_steps": ("steps",),
    "prompt": ("prompts", "prompt"),
    "generator": ("seed",),
    "output_type": (),
    "return_dict": (),
    "callback_on_step_end": (),
}
"""Arguments of a pipeline that commands give themselves, and the options that say what."""


def call_of(values: Namespace, pipeline: Any = None) -> dict[str, Any]:
    """The arguments of ``--call``.

    Args:
        values: of all options.
        pipeline: that is called with them, to refuse what it does not take; None if it is not loaded yet.

    Raises:
        ValueError: one that the command gives itself, or that the pipeline does not take.
    """
    call = dict(values.call or {})
    for name, options in _OWN.items():
        option = next((option for option in options if hasattr(values, option)), None)
        free = name == "num_inference_steps" and option is None  # a command that has no use for trajectories
        if name in call and not free:
            raise ValueError(f"--call {name}: {'leave it out' if option is None else f'write --{option} instead'}")
    if pipeline is not None:
        from optimum_segquant.evaluation.sampling import check_call_arguments

        check_call_arguments(pipeline, call)
    return call


def preset(value: Any) -> Any:
    """A preset's name, a YAML file, or one of either for each component."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(item, str):
                raise ValueError(f"{name} needs the name of a preset or a YAML file, got {item!r}")
        return {str(name): item for name, item in value.items()}
    if "=" not in value or Path(value).expanduser().is_file():
        return value
    found: dict[str, str] = {}
    for part in value.split(","):
        name, equals, item = part.strip().partition("=")
        if not (name and equals and item):
            raise ValueError(f"write NAME=PRESET for every component, as in a=SEGQUANT_CFG,b=my.yaml; got {part!r}")
        if name in found:
            raise ValueError(f"{name} has two presets, {found[name]} and {item}: keep one")
        found[name] = item
    return found


def load(source: str, values: Namespace) -> Any:
    """Load a diffusers pipeline or model, quantized or not, and put it where it runs."""
    import torch

    import optimum_segquant  # noqa: F401  teaches diffusers to load packed checkpoints
    from optimum_segquant.pretrained import load_pretrained

    device = device_of(values)
    arguments = dict(values.load or {})
    for name in {"torch_dtype", "dtype"} & set(arguments):
        # A text is no dtype for diffusers, which would load float32.
        raise ValueError(f"--load {name}: write --dtype {arguments[name]} instead")
    if values.dtype is not None:
        arguments["torch_dtype"] = getattr(torch, values.dtype)
    with _hosts_quiet(values):
        model = load_pretrained(source, **arguments)
    if "device_map" not in arguments:
        model.to(device)
    if hasattr(model, "set_progress_bar_config"):
        model.set_progress_bar_config(disable=True)
    return model


@contextmanager
def _hosts_quiet(values: Namespace) -> Iterator[None]:
    """The hosts' logs and bars while they load, where nobody asked for them."""
    import diffusers
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logs = [diffusers.utils.logging, transformers.utils.logging]
    levels = [log.get_verbosity() for log in logs]
    hub = are_progress_bars_disabled()
    try:
        for log in logs:
            if not values.debug:
                log.set_verbosity_error()
            if not values.progress:
                log.disable_progress_bar()
        if not values.progress:
            disable_progress_bars()
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()
        if not hub:
            enable_progress_bars()


def load_any(source: str, values: Namespace) -> Any:
    """A pipeline in any form: of diffusers, exported to ONNX, or in a model repository."""
    path = Path(source).expanduser()
    if (path / "deployment.json").is_file():
        from optimum_segquant.serving import served_pipeline

        return served_pipeline(path)
    if any(path.glob("*/model.onnx")):
        return _load_onnx(path)
    return load(source, values)


def _load_onnx(path: Path) -> Any:
    from optimum_segquant.exporters.onnx import supported_pipelines
    from optimum_segquant.files import verify_manifest

    supported_pipelines()  # raises if optimum-onnx or onnxruntime is missing
    verify_manifest(path, required=False)
    from optimum.onnxruntime import ORTDiffusionPipeline

    return ORTDiffusionPipeline.from_pretrained(path, export=False)


def device_of(values: Namespace) -> str:
    """The device that was asked for.

    Raises:
        ValueError: this machine has none such.
    """
    import torch

    name = values.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"there is no device {name} here ({str(error).splitlines()[0]}): write --device cpu"
        ) from error
    return str(name)


def finite(value: Any) -> Any:
    """Plain data with infinities and NaN as texts, which JSON has not."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
