"""Rows of images with captions, as one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, LABEL, HEADER = 4, 180, 84  # pixels; the header has room for five lines


def difference(images: Tensor, reference: Tensor, gain: float = 4.0) -> tuple[str, Tensor]:
    """A strip of absolute differences, multiplied so that they can be seen.

    Args:
        images, reference: (P, 3, H, W) float in [0, 1].
        gain: the factor.
    """
    return f"difference x {gain:g}", ((images - reference).abs() * gain).clamp(0, 1)


def draw_strips(strips: Sequence[tuple[str, Tensor]], prompts: Sequence[str], zoom: int = 2) -> Image.Image:
    """Draw rows of images below each other.

    Args:
        strips: label, lines of which are wrapped, and (P or more, 3, H, W) float in [0, 1]; all of one size.
        prompts: P captions.
        zoom: pixels of the picture per pixel of an image.
    """
    height, width = (size * zoom for size in strips[0][1].shape[2:])
    font = ImageFont.load_default(size=12)
    sheet = Image.new("RGB", (LABEL + len(prompts) * (width + GAP), HEADER + len(strips) * (height + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        text = "\n".join(textwrap.wrap(prompt, width=20)[:5])
        pen.multiline_text((LABEL + column * (width + GAP), 4), text, fill="black", font=font)
    for line, (name, images) in enumerate(strips):
        top = HEADER + line * (height + GAP)
        pen.multiline_text((4, top + 4), "\n".join(textwrap.fill(part, 25) for part in name.split("\n")), "black", font)
        for column, image in enumerate(images[: len(prompts)]):
            pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL + column * (width + GAP), top))
    return sheet
