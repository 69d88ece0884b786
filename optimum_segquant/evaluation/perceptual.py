"""LPIPS, FID and CLIP score of a set of images against the full-precision images of the same prompts and seeds.

torchmetrics does the arithmetic; :mod:`.networks` brings the pretrained networks, and one that can't be had makes a
:class:`MetricResult` that says why instead of a number.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .metrics import image_metrics
from .networks import NETWORK_METRICS, Network, Unavailable, Weights, find_weights, load_network

logger = logging.getLogger(__name__)

METRICS = ("psnr", "ssim", *NETWORK_METRICS)
"""Metrics of finished images, all against the full-precision ones but the CLIP score, which is against the prompt."""

HIGHER_IS_BETTER: Mapping[str, bool] = {"psnr": True, "ssim": True, "lpips": False, "fid": False, "clip_score": True}

_BATCH = 8  # images a network sees at once


@dataclasses.dataclass(frozen=True)
class MetricResult:
    """One metric over all images, or the reason why there is none.

    Attributes:
        value: mean over the images (PSNR in dB; FID: of the whole set); None where it was skipped.
        per_image: one value per image; empty for FID, which has none.
        reference: CLIP score of the full-precision images, None for the other metrics.
        reference_per_image: the same, image by image.
        network: which pretrained network it is of; empty for PSNR and SSIM.
        note: what a reader of the value should know; empty for nothing.
        skipped: why there is no value and what to do about it; empty where there is one.
    """

    value: float | None = None
    per_image: tuple[float, ...] = ()
    reference: float | None = None
    reference_per_image: tuple[float, ...] = ()
    network: str = ""
    note: str = ""
    skipped: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain types: ``{"skipped": "..."}``, or the values. A PSNR of bit-equal images is ``inf``."""
        if self.skipped:
            return {"skipped": self.skipped}
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found["per_image"], found["reference_per_image"] = list(self.per_image), list(self.reference_per_image)
        return {name: value for name, value in found.items() if name == "value" or value not in (None, "", [])}


def check_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    """Return the metrics, each once.

    Raises:
        ValueError: an unknown one, or a string where a list should be.
    """
    names = (metrics,) if isinstance(metrics, str) else tuple(dict.fromkeys(metrics))
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics: {name!r} is unknown; use some of {', '.join(METRICS)}")
    return names


def load_networks(
    metrics: Sequence[str], weights: Weights, device: torch.device | str = "cpu"
) -> dict[str, Network | MetricResult]:
    """Load what the metrics need, before anything expensive is done.

    Args:
        metrics: some of :data:`METRICS`.
        weights: see :mod:`.networks`.
        device: where networks compute.

    Returns:
        For each metric with a network that network, or the skipped result.

    Raises:
        FileNotFoundError, ValueError: a source that ``weights`` names is missing, damaged or of another kind.
    """
    sources = find_weights(weights)
    loaded: dict[str, Network | MetricResult] = {}
    for name in metrics:
        if name not in NETWORK_METRICS:
            continue
        try:
            loaded[name] = load_network(name, sources.get(name), device)
        except Unavailable as reason:
            logger.warning("%s is skipped: %s", name, reason)
            loaded[name] = MetricResult(skipped=str(reason))
    return loaded


def perceptual_metrics(
    images: Tensor,
    reference: Tensor,
    prompts: Sequence[str],
    *,
    metrics: Sequence[str] = METRICS,
    weights: Weights = None,
    networks: Mapping[str, Network | MetricResult] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, MetricResult]:
    """Compare images with the full-precision images of the same prompts and seeds, by every metric that can be had.

    Args:
        images: (P, 3, H, W) float in [0, 1].
        reference: the same shape and range.
        prompts: P prompts, for the CLIP score.
        metrics: some of :data:`METRICS`.
        weights: where pretrained networks are, see :mod:`.networks`.
        networks: from :func:`load_networks`, where they are loaded already.
        device: where networks compute.

    Returns:
        A result for each metric, in the order of ``metrics``.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_networks`; an unknown metric; tensors that are no such images.
    """
    metrics = check_metrics(metrics)
    if images.ndim != 4 or images.shape != reference.shape or images.shape[1] != 3 or len(images) != len(prompts):
        raise ValueError(
            f"expected two tensors ({len(prompts)}, 3, height, width), one image per prompt, "
            f"got {tuple(images.shape)} and {tuple(reference.shape)}"
        )
    if networks is None:
        networks = load_networks(metrics, weights, device)
    results: dict[str, MetricResult] = {}
    for name in metrics:
        if name in ("psnr", "ssim"):
            results[name] = _pixels(name, images, reference)
            continue
        network = networks[name]
        results[name] = (
            network
            if isinstance(network, MetricResult)
            else _with_network(name, network, images, reference, prompts, torch.device(device))
        )
    return results


def _pixels(name: str, images: Tensor, reference: Tensor) -> MetricResult:
    try:
        found = image_metrics(images, reference)
    except ValueError as error:  # images too small for SSIM's window
        return MetricResult(skipped=str(error))
    return MetricResult(getattr(found, name), getattr(found, f"{name}_per_image"))


@torch.no_grad()
def _with_network(
    name: str, network: Network, images: Tensor, reference: Tensor, prompts: Sequence[str], device: torch.device
) -> MetricResult:
    compute = {"lpips": _lpips, "fid": _fid, "clip_score": _clip_score}[name]
    try:
        result = compute(network, images, reference, prompts, device)
    except Exception as error:  # the images took far longer than this metric is worth
        logger.warning("%s failed", name, exc_info=True)
        text = (str(error).strip().splitlines() or [""])[0]
        return MetricResult(skipped=f"{network.source} failed on these images: {type(error).__name__}: {text}")
    if result.value is not None and not math.isfinite(result.value):
        return MetricResult(skipped=f"{network.source} gave {result.value} for these images: check its weights")
    return result


def _lpips(
    network: Network, images: Tensor, reference: Tensor, prompts: Sequence[str], device: torch.device
) -> MetricResult:
    """Zhang et al. 2018, arXiv 1801.03924: 0 for equal images."""
    pairs = zip(images.split(_BATCH), reference.split(_BATCH), strict=True)
    values = torch.cat([network.module(a.float().to(device), b.float().to(device)).cpu() for a, b in pairs])
    if values.shape != (len(images),):
        raise ValueError(f"expected one distance per image ({len(images)}), got {tuple(values.shape)}")
    return MetricResult(float(values.mean()), tuple(values.tolist()), network=network.source)


def _fid(
    network: Network, images: Tensor, reference: Tensor, prompts: Sequence[str], device: torch.device
) -> MetricResult:
    """Heusel et al. 2017, arXiv 1706.08500, between the two sets of images."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    if len(images) < 2:
        return MetricResult(skipped="FID compares distributions: give at least two prompts, better hundreds")
    metric = FrechetInceptionDistance(feature=network.module, input_img_size=tuple(images.shape[1:])).to(device)
    for real, part in ((True, reference), (False, images)):
        for batch in part.split(_BATCH):
            metric.update(_bytes(batch).to(device), real=real)
    features = len(metric.real_features_sum)
    note = f"between {len(images)} images of each pipeline; comparable at this number only"
    if len(images) <= features:
        note += f", which is too small for {features} features"
    # Rounding can push the distance of equal sets a little below zero.
    return MetricResult(max(float(metric.compute()), 0.0), network=network.source, note=note)


def _clip_score(
    network: Network, images: Tensor, reference: Tensor, prompts: Sequence[str], device: torch.device
) -> MetricResult:
    """Hessel et al. 2021, arXiv 2104.08718: 100 cos(image, prompt), not below 0."""
    from torchmetrics.functional.multimodal import clip_score

    def scores(part: Tensor) -> tuple[float, ...]:
        # One by one: torchmetrics gives means.
        pairs = zip(_bytes(part), prompts, strict=True)
        return tuple(float(clip_score(image.to(device), prompt, lambda: network.module)) for image, prompt in pairs)

    own, full = scores(images), scores(reference)
    return MetricResult(sum(own) / len(own), own, sum(full) / len(full), full, network=network.source)


def _bytes(images: Tensor) -> Tensor:
    """[0, 1] to uint8."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
