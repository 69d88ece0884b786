"""Denoising trajectories: what a pipeline's denoiser reads and returns while it generates images.

Diffusion activations depend strongly on the timestep and on guidance, so calibration and error measurement must see
the inputs of real sampling, not random tensors. :func:`sample_trajectories` hooks the denoiser, runs the pipeline as it
is used (guidance on, real prompts), and stores each call as keyword arguments plus the full-precision output.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .calls import DenoiserCall, RecordedCalls, Trajectories, execution_device, first_tensor
from .recorder import TIMESTEP_NAMES, CallRecorder
from .sampling import resolve_seeds, run_pipeline

__all__ = [
    "DENOISER_NAMES",
    "TIMESTEP_NAMES",
    "DenoiserCall",
    "RecordedCalls",
    "Trajectories",
    "denoiser_of",
    "execution_device",
    "first_tensor",
    "sample_trajectories",
]

logger = logging.getLogger(__name__)

DENOISER_NAMES = ("transformer", "unet")
"""Component names under which diffusers pipelines keep their denoiser."""


def denoiser_of(pipeline: Any, name: str | None = None) -> nn.Module:
    """Return the denoiser of a diffusers pipeline.

    Args:
        pipeline: a diffusers pipeline.
        name: the component to take; by default ``transformer`` or ``unet``, whichever the pipeline has.

    Raises:
        ValueError: the pipeline has no such component, or it is not a ``torch.nn.Module``.
    """
    kind = type(pipeline).__name__
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        raise ValueError(f"expected a diffusers pipeline, got {kind}")
    names = DENOISER_NAMES if name is None else (name,)
    found = next((components[n] for n in names if components.get(n) is not None), None)
    if found is None:
        present = ", ".join(sorted(n for n, c in components.items() if isinstance(c, nn.Module))) or "none"
        raise ValueError(f"{kind} has no {' or '.join(names)}; its modules are: {present}. Name one with denoiser=...")
    if not isinstance(found, nn.Module):
        raise ValueError(f"the denoiser of {kind} is a {type(found).__name__}, not a torch.nn.Module")
    return found


def sample_trajectories(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seeds: int | Sequence[int] = 0,
    num_inference_steps: int = 20,
    steps: int | Sequence[int] | None = None,
    batch_size: int = 4,
    denoiser: str | None = None,
    **call_kwargs: Any,
) -> Trajectories:
    """Run the pipeline on the prompts and record its denoiser's calls.

    The images are not decoded. The pipeline, its scheduler and torch's global generators are afterwards as before, also
    when the pipeline raises.

    Args:
        pipeline: a diffusers pipeline with a ``transformer`` or ``unet``.
        prompts: the prompts; one trajectory each.
        seeds: one seed per prompt, or one integer ``s`` for ``s, s + 1, ...``.
        num_inference_steps: denoising steps of each trajectory.
        steps: which denoising steps to keep: ``None`` for all, a number for as many spread evenly from the first to the
            last, or the step indices themselves.
        batch_size: prompts per pipeline call.
        denoiser: the pipeline component to record; by default ``transformer`` or ``unet``.
        call_kwargs: passed on to the pipeline, for example ``guidance_scale`` or ``height``.

    Returns:
        The calls in order: batch after batch, within a batch step after step.

    Raises:
        ValueError: no denoiser, no prompts, impossible steps, or a denoiser that was never called.
        FloatingPointError: the full-precision denoiser returned NaN or infinity (the step is named).
    """
    module = denoiser_of(pipeline, denoiser)
    resolve_seeds(prompts, seeds)
    kept = _kept_steps(steps, num_inference_steps)
    if "output_type" in call_kwargs:
        raise ValueError("output_type is set here: trajectories end in latent space")
    recorder = CallRecorder(module, kept)
    detach = recorder.attach()
    try:
        run_pipeline(
            pipeline,
            prompts,
            seeds=seeds,
            batch_size=batch_size,
            before_batch=recorder.start,
            num_inference_steps=num_inference_steps,
            output_type="latent",
            **call_kwargs,
        )
    finally:
        detach()
    if not recorder.calls:
        raise ValueError(
            f"{type(pipeline).__name__} never called its denoiser in steps {sorted(kept)}: it made "
            f"{recorder.clock.step + 1} steps. Check steps, num_inference_steps and (image to image) strength."
        )
    logger.info("recorded %d denoiser calls of %d trajectories", len(recorder.calls), len(prompts))
    return Trajectories(tuple(recorder.calls))


def _kept_steps(steps: int | Sequence[int] | None, num_inference_steps: int) -> frozenset[int]:
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    if steps is None:
        return frozenset(range(num_inference_steps))
    if isinstance(steps, int):
        if not 1 <= steps <= num_inference_steps:
            raise ValueError(f"steps must be from 1 to num_inference_steps={num_inference_steps}, got {steps}")
        return frozenset(torch.linspace(0, num_inference_steps - 1, steps).round().int().tolist())
    wrong = [step for step in steps if not 0 <= step < num_inference_steps]
    if wrong or len(steps) == 0:
        raise ValueError(f"steps must be indices from 0 to {num_inference_steps - 1}, at least one; got {list(steps)}")
    return frozenset(steps)
