"""Image pairs of an evaluation as a page shows them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..evaluation import Evaluation, MetricResult
from . import numbers
from .summary import METRIC_LABELS

_SMALL = 256  # pixels: smaller images are enlarged without smoothing


@dataclass(frozen=True)
class Pair:
    """A full-precision image and the quantized one of the same prompt and seed."""

    prompt: str
    numbers: str
    reference: str
    image: str
    width: int
    height: int
    enlarged: bool


def pairs_of(evaluation: Evaluation, limit: int, largest: int) -> tuple[list[Pair], str]:
    """Image pairs and what to say above them."""
    if evaluation.images.shape != evaluation.reference_images.shape:
        return [], "the pipelines give images of different sizes: pass height and width"
    if limit < 1:
        return [], "no images were asked for (max_images)"
    psnr = evaluation.metrics.get("psnr", MetricResult()).per_image
    count = len(evaluation.prompts)
    indices = shown_images(count, psnr, limit)
    height, width = evaluation.images.shape[-2:]
    note = f"{count} pairs" if len(indices) == count else f"{len(indices)} of {count} pairs"
    note += " of equal prompts and seeds"
    if len(indices) < count:
        note += ", the first ones and those with the lowest PSNR" if len(psnr) == count else ", the first ones"
    if max(height, width) > largest:
        note += f"; {width} x {height} pixels, scaled down here, differences too"
    return [_pair(evaluation, index, largest) for index in indices], note + "."


def _pair(evaluation: Evaluation, index: int, largest: int) -> Pair:
    height, width = evaluation.images.shape[-2:]
    parts = [f"seed {evaluation.seeds[index]}"]
    for name, result in evaluation.metrics.items():
        if len(result.per_image) > index:
            text = f"{METRIC_LABELS[name].partition(',')[0]} {numbers.metric(name, result.per_image[index])}"
            text += " dB" if name == "psnr" else ""
            if len(result.reference_per_image) > index:
                text += f" (full precision {numbers.metric(name, result.reference_per_image[index])})"
            parts.append(text)
    return Pair(
        prompt=evaluation.prompts[index],
        numbers=" · ".join(parts),
        reference=image_uri(evaluation.reference_images[index], largest),
        image=image_uri(evaluation.images[index], largest),
        width=width,
        height=height,
        enlarged=max(height, width) < _SMALL,
    )


def shown_images(count: int, psnr: Sequence[float], limit: int) -> list[int]:
    """Which of many pairs to show: the first half of the limit in the prompts' order, then those with the lowest PSNR.

    Args:
        count: pairs there are.
        psnr: of each pair, or empty where unknown.
        limit: pairs to show at most.

    Returns:
        Indices in increasing order.
    """
    if count <= limit:
        return list(range(count))
    if len(psnr) != count:
        return list(range(limit))
    first = list(range(limit // 2))
    rest = sorted(range(limit // 2, count), key=lambda index: (psnr[index], index))
    return sorted(first + rest[: limit - len(first)])


def image_uri(image: Tensor, largest: int) -> str:
    """A ``data:`` address of an image, PNG, so that differences are the pipeline's and not the file format's.

    Args:
        image: (3, H, W) float in [0, 1].
        largest: pixels of the longer side; larger images are scaled down.
    """
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
