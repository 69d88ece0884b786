"""Images from equal prompts and seeds, as one tensor that the metrics read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .sampling import run_pipeline


def generate_images(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seeds: int | Sequence[int] = 0,
    batch_size: int = 8,
    **call_kwargs: Any,
) -> Tensor:
    """Generate one image per prompt; equal arguments give equal starting noise, whatever the model's precision.

    Args:
        pipeline: a text-to-image pipeline, full precision or quantized.
        prompts: P prompts.
        seeds: one seed per prompt, or one integer ``s`` for ``s, s + 1, ...``.
        batch_size: prompts per pipeline call.
        call_kwargs: passed on to the pipeline, for example ``num_inference_steps`` or ``guidance_scale``.

    Returns:
        Images of shape (P, 3, H, W), float32 in [0, 1], on the CPU.

    Raises:
        ValueError: malformed prompts or seeds, or a pipeline whose result is not one image per prompt (video).
        FloatingPointError: an image with NaN or infinite pixels.
    """
    if "output_type" in call_kwargs:
        raise ValueError("output_type is set here: images come back as a tensor in [0, 1]")
    batches = run_pipeline(pipeline, prompts, seeds=seeds, batch_size=batch_size, output_type="pt", **call_kwargs)
    images = torch.cat([torch.as_tensor(batch).detach().float().cpu() for batch in batches])
    if images.ndim != 4 or images.shape[0] != len(prompts):
        raise ValueError(
            f"expected one image per prompt, a tensor ({len(prompts)}, channels, height, width), "
            f"but {type(pipeline).__name__} returned {tuple(images.shape)}: only image pipelines are supported"
        )
    if not torch.isfinite(images).all():
        bad = [i for i, image in enumerate(images) if not torch.isfinite(image).all()]
        raise FloatingPointError(f"NaN or infinite pixels in the images of prompts {bad}: the pipeline overflowed")
    return images
