"""How often do the pictures of a pipeline follow their prompts? No learned judge: colours and outlines are measured.

``read`` finds the shapes in a picture without knowing its prompt: the background is the colour of the border, every
connected patch that differs from it is a thing, its colour is the nearest of the palette, its outline the best match
among all outlines of that area at that place. ``judge`` compares what was read with what the prompt claims, one
attribute after the other. Anything extra in the picture counts against it.

    python examples/score_shapes.py examples/pipelines/shapes-sd3 --prompts 128
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shapes
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from scipy import ndimage

FOREGROUND = 0.18  # RGB distance (of a unit cube) from the background at which a pixel belongs to a thing
SPECK = 10.0  # pixels: smaller patches are not things
PALETTE_REACH = 0.3  # RGB distance from every palette colour at which a colour has no name
OUTLINE_FIT = 0.6  # overlap (intersection over union) under which a patch is none of the shapes

ATTRIBUTES = ("count", "shape", "colour", "size", "place", "relation", "background")


@dataclass(frozen=True)
class Seen:
    """One thing as read from a picture; ``fit`` is the overlap with its outline, 0..1. "?" is a name for no name."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    fit: float


@dataclass(frozen=True)
class Reading:
    """All that was read from a picture."""

    background: str
    things: tuple[Seen, ...]


def _colour_name(rgb: torch.Tensor) -> str:
    names = list(shapes.PALETTE)
    distances = (torch.tensor([shapes.PALETTE[n] for n in names]) / 255 - rgb).norm(dim=-1)
    return names[int(distances.argmin())] if distances.min() < PALETTE_REACH else "?"


def _outlines(x: float, y: float, area: float) -> torch.Tensor:
    """Every shape of one area (pixels) around one centre: (shapes, CANVAS, CANVAS) coverage in 0..1."""
    grid = torch.arange(shapes.CANVAS) + 0.5
    radius = torch.tensor([math.sqrt(area / o.area) for o in shapes.SHAPES.values()])
    distances = shapes.signed_distances(grid[None, :, None] - x, grid[:, None, None] - y, radius)
    return (0.5 - distances.diagonal(dim1=-2, dim2=-1)).clamp(0, 1).permute(2, 0, 1)


def read(picture: torch.Tensor) -> Reading:
    """Read a picture.

    Args:
        picture: (3, CANVAS, CANVAS) float in 0..1.

    Raises:
        ValueError: if the picture has another size.
    """
    if picture.shape != (3, shapes.CANVAS, shapes.CANVAS):
        raise ValueError(
            f"a picture of shape {tuple(picture.shape)} can't be read: generate at {shapes.CANVAS} x {shapes.CANVAS} "
            "and pass (3, height, width) floats in 0..1, for example with output_type='pt'"
        )
    pixels = picture.float().cpu().permute(1, 2, 0)
    border = torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = border.median(dim=0).values
    away = (pixels - ground).norm(dim=-1)
    patches, count = ndimage.label((away > FOREGROUND).numpy(), structure=torch.ones(3, 3).numpy())
    things = []
    for i in range(1, count + 1):
        patch = patches == i
        if patch.sum() < SPECK:
            continue
        core = torch.from_numpy(ndimage.binary_erosion(patch) if ndimage.binary_erosion(patch).sum() >= 4 else patch)
        rgb = pixels[core].median(dim=0).values
        # Edge pixels are mixtures of thing and background: how far along the way each one is gives its coverage.
        way = rgb - ground
        cover = ((pixels - ground) @ way / way.square().sum()).clamp(0, 1)
        cover = cover * torch.from_numpy(ndimage.binary_dilation(patch))
        area = float(cover.sum())
        grid = torch.arange(shapes.CANVAS) + 0.5
        x, y = float((cover.sum(0) * grid).sum() / area), float((cover.sum(1) * grid).sum() / area)
        outlines = _outlines(x, y, area)
        overlap = torch.minimum(outlines, cover).sum((1, 2)) / torch.maximum(outlines, cover).sum((1, 2))
        best = int(overlap.argmax())
        name = list(shapes.SHAPES)[best] if overlap[best] >= OUTLINE_FIT else "?"
        radius = math.sqrt(area / list(shapes.SHAPES.values())[best].area)
        things.append(Seen(name, _colour_name(rgb), x, y, radius, float(overlap[best])))
    return Reading(_colour_name(ground), tuple(things))


def _thing_verdicts(claim: shapes.ThingClaim, seen: Seen | None) -> Iterator[tuple[str, bool]]:
    yield "shape", seen is not None and seen.shape == claim.shape
    yield "colour", seen is not None and seen.colour == claim.colour
    if claim.size:
        yield "size", seen is not None and shapes.size_of(seen.radius) == claim.size
    if claim.place:
        cells = shapes.PLACES[claim.place]
        at = seen is not None and all(
            cell is None or shapes.third(v) == cell for v, cell in zip((seen.x, seen.y), cells, strict=True)
        )
        yield "place", at


def judge(claim: shapes.Claim, reading: Reading) -> list[tuple[str, bool]]:
    """Every attribute that the prompt claims, and whether the picture has it, in the most favourable assignment of the
    things read to the things claimed. The picture follows its prompt if all of them hold."""
    slots: list[Seen | None] = [*reading.things, *[None] * len(claim.things)]
    best: list[tuple[str, bool]] = []
    # A picture full of rubbish has many patches; more than six are not worth assigning.
    for chosen in itertools.permutations(slots[: 6 + len(claim.things)], len(claim.things)):
        verdicts = [v for c, s in zip(claim.things, chosen, strict=True) for v in _thing_verdicts(c, s)]
        if claim.relation:
            a, b = chosen
            holds = a is not None and b is not None and shapes.relation_of(a.x - b.x, a.y - b.y) == claim.relation
            verdicts.append(("relation", holds))
        if not best or sum(ok for _, ok in verdicts) > sum(ok for _, ok in best):
            best = verdicts
    best = [("count", len(reading.things) == len(claim.things)), *best]
    if claim.background:
        best.append(("background", reading.background == claim.background))
    return best


@dataclass
class Score:
    """How often prompts were followed: for whole prompts, and by attribute (right, claimed)."""

    followed: int = 0
    prompts: int = 0
    right: Counter[str] = field(default_factory=Counter)
    claimed: Counter[str] = field(default_factory=Counter)
    failures: list[int] = field(default_factory=list)  # which pictures did not follow their prompt

    @property
    def rate(self) -> float:
        """Share of pictures that follow their whole prompt, 0..1."""
        return self.followed / self.prompts if self.prompts else math.nan

    def rates(self) -> dict[str, float]:
        """Share of right claims by attribute, 0..1; attributes that no prompt claims are left out."""
        return {a: self.right[a] / self.claimed[a] for a in ATTRIBUTES if self.claimed[a]}

    def __str__(self) -> str:
        parts = ", ".join(f"{a} {100 * r:.1f} %" for a, r in self.rates().items())
        return f"whole prompt {100 * self.rate:.1f} % of {self.prompts} ({parts})"


def score(prompts: Sequence[str], pictures: torch.Tensor) -> Score:
    """Judge pictures against their prompts.

    Args:
        prompts: captions of the shapes world (``shapes.parse`` must understand them).
        pictures: (len(prompts), 3, CANVAS, CANVAS) float in 0..1.

    Raises:
        ValueError: if there are not as many pictures as prompts, or a prompt is not of this world.
    """
    if len(prompts) != len(pictures):
        raise ValueError(f"{len(prompts)} prompts but {len(pictures)} pictures: pass one picture for each prompt")
    result = Score()
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        verdicts = judge(shapes.parse(prompt), read(picture))
        result.right.update(a for a, ok in verdicts if ok)
        result.claimed.update(a for a, _ in verdicts)
        result.prompts += 1
        if all(ok for _, ok in verdicts):
            result.followed += 1
        else:
            result.failures.append(i)
    return result


def unseen_prompts(count: int, seed: int = 1_000_000_007) -> list[str]:
    """Captions of scenes that no training picture shows, fit to be judged: the background is always named."""
    rng = random.Random(seed)
    prompts: list[str] = []
    while len(prompts) < count:
        caption, claim = shapes.describe(shapes.sample_scene(rng), rng)
        if claim.background:
            prompts.append(caption)
    return prompts


@torch.inference_mode()
def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int = 24,
    guidance: float = 4.0,
    seed: int = 0,
    batch: int = 32,
) -> torch.Tensor:
    """Pictures of prompts, prompt i always from the noise of seed + i, whatever the batch size.

    Works for the SD3, FLUX and SDXL style pipelines of the shapes world. Texts are encoded at 32 tokens.

    Returns:
        (len(prompts), 3, CANVAS, CANVAS) float32 in 0..1, on the CPU.
    """
    name = type(pipe).__name__
    options: dict[str, Any] = {"guidance_scale": guidance}
    if name.startswith("StableDiffusion3"):
        options["max_sequence_length"] = 32
    elif name.startswith("Flux"):
        options = {"true_cfg_scale": guidance, "negative_prompt": "", "max_sequence_length": 32}
    pictures = []
    for start in range(0, len(prompts), batch):
        chunk = list(prompts[start : start + batch])
        if name.startswith("Flux"):
            options["negative_prompt"] = [""] * len(chunk)
        pictures.append(
            pipe(
                prompt=chunk,
                height=shapes.CANVAS,
                width=shapes.CANVAS,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))],
                output_type="pt",
                **options,
            )
            .images.float()
            .cpu()
        )
    return torch.cat(pictures)


def contact_sheet(pictures: torch.Tensor, columns: int = 8, zoom: int = 2) -> Image.Image:
    """Pictures (N, 3, H, W), float in 0..1, as one image, ``columns`` a row, with a white line between."""
    n, _, height, width = pictures.shape
    rows = math.ceil(n / columns)
    sheet = torch.ones(3, rows * (height + 2), columns * (width + 2))
    for i, picture in enumerate(pictures):
        y, x = i // columns * (height + 2), i % columns * (width + 2)
        sheet[:, y : y + height, x : x + width] = picture
    image = Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Print how often a pipeline's pictures follow their prompts.")
    parser.add_argument("pipeline", type=Path, help="folder of a pipeline of the shapes world")
    parser.add_argument("--prompts", type=int, default=128, help="how many unseen prompts")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sheet", type=Path, help="also write the first 64 pictures to this PNG")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    pipe = DiffusionPipeline.from_pretrained(args.pipeline).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    prompts = unseen_prompts(args.prompts)
    pictures = generate(pipe, prompts, steps=args.steps, guidance=args.guidance, seed=args.seed)
    result = score(prompts, pictures)
    print(result)
    for i in result.failures[:20]:
        print(f"  not followed: {prompts[i]!r}; read {read(pictures[i])}")
    if args.sheet:
        contact_sheet(pictures[:64]).save(args.sheet)


if __name__ == "__main__":
    main()
