"""How the measurements call the shapes pipelines: guidance on, short text, the size that they were trained with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import shapes
from diffusers import DiffusionPipeline

PIPELINES = Path(__file__).parent / "pipelines"
PIPELINE = PIPELINES / "shapes-sd3"
GUIDANCE = 4.0
TEXT_TOKENS = 32  # what the pipelines' text encoders were trained with; longer padding only costs time


def check_pipeline(folder: Path) -> None:
    """Stop the script if there is no pipeline in a folder.

    Raises:
        SystemExit: there is none.
    """
    if not (folder / "model_index.json").is_file():
        raise SystemExit(f"{folder} holds no pipeline: train one with examples/train_shapes_pipeline.py")


def load_pipeline(folder: Path, device: str = "cpu") -> Any:
    """A full-precision pipeline of the class that its folder names, without progress bars.

    Raises:
        SystemExit: there is none.
    """
    check_pipeline(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampling(pipeline: Any, steps: int, batch_size: int = 16) -> dict[str, Any]:
    """Arguments for ``sample_trajectories`` and ``generate_images``.

    Args:
        pipeline: of any architecture.
        steps: denoising steps.
        batch_size: prompts a call; FLUX-style pipelines get as many negative prompts, so it must divide their number.
    """
    known = inspect.signature(pipeline.__call__).parameters
    arguments: dict[str, Any] = {"num_inference_steps": steps, "batch_size": batch_size}
    if "true_cfg_scale" in known:  # FLUX: guidance_scale is an embedding, which the shapes pipeline lacks
        arguments |= {"true_cfg_scale": GUIDANCE, "negative_prompt": [""] * batch_size}
        arguments |= {"height": shapes.CANVAS, "width": shapes.CANVAS}  # its default is 1024, whatever the model's
    else:
        arguments["guidance_scale"] = GUIDANCE
    if "max_sequence_length" in known:
        arguments["max_sequence_length"] = TEXT_TOKENS
    return arguments


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any of some patterns, as ``--rows`` takes them.

    Raises:
        SystemExit: none does.
    """
    names = list(names)
    found = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    if not found:
        raise SystemExit(f"--rows {' '.join(patterns)} matches none of: {', '.join(names)}")
    return found
