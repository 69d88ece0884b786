"""Quantize a copy of a pipeline's denoiser and measure it: one row of a results table."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import modelopt.torch.quantization as mtq
from torch import Tensor, nn

from .images import generate_images
from .memory import PeakMemory
from .metrics import ImageMetrics, VelocitySQNR, image_metrics, velocity_sqnr
from .trajectories import DENOISER_NAMES, Trajectories, denoiser_of, execution_device

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A quantized denoiser measured against full precision.

    Attributes:
        sqnr: of the denoiser's output on recorded inputs.
        images: (P, 3, H, W) float32 in [0, 1]: one image per prompt, None when no prompts were given.
        metrics: of ``images`` against the reference images, None when no prompts were given.
        seconds: wall time of ``mtq.quantize``, calibration included.
        denoiser: the quantized denoiser.
        memory: bytes in use before ``mtq.quantize`` and at most during it, see :class:`PeakMemory`; the denoiser's
            full-precision original and copy are there already before.
    """

    sqnr: VelocitySQNR
    images: Tensor | None
    metrics: ImageMetrics | None
    seconds: float
    denoiser: nn.Module
    memory: PeakMemory


@contextlib.contextmanager
def denoiser_replaced(pipeline: Any, denoiser: nn.Module) -> Iterator[None]:
    """Let the pipeline use another denoiser inside the block."""
    original = denoiser_of(pipeline)
    name = next(name for name in DENOISER_NAMES if getattr(pipeline, name, None) is original)
    setattr(pipeline, name, denoiser)
    try:
        yield
    finally:
        setattr(pipeline, name, original)


def compare(
    pipeline: Any,
    config: Mapping[str, Any],
    *,
    calibration: Trajectories,
    unseen: Trajectories,
    prompts: Sequence[str] = (),
    reference: Tensor | None = None,
    seeds: int | Sequence[int] = 0,
    **call_kwargs: Any,
) -> Comparison:
    """Quantize a copy of the denoiser with ``config`` and measure what it lost. The pipeline itself stays as it is.

    Args:
        pipeline: the full-precision pipeline; memory for a second denoiser is needed.
        config: a ModelOpt quantization config such as ``mtq.INT8_DEFAULT_CFG``.
        calibration: what the denoiser is calibrated on.
        unseen: what the velocity SQNR is measured on.
        prompts: P prompts to generate images for; none by default.
        reference: (P, 3, H, W) in [0, 1]: full-precision images of the same prompts, seeds and ``call_kwargs``.
        seeds: see :func:`generate_images`.
        call_kwargs: passed on to :func:`generate_images`.

    Raises:
        ValueError: prompts without reference images or the other way round, or another number of them.
    """
    if (len(prompts) > 0) != (reference is not None):
        raise ValueError(
            "prompts and reference belong together: generate the reference with the same prompts and seeds"
        )
    if reference is not None and len(reference) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(reference)} reference images: generate one image a prompt")
    denoiser = copy.deepcopy(denoiser_of(pipeline))
    start = time.perf_counter()
    with PeakMemory(execution_device(denoiser)) as memory:
        denoiser = mtq.quantize(denoiser, copy.deepcopy(dict(config)), calibration.forward_loop)
    seconds = time.perf_counter() - start
    logger.info("quantized in %.1f s", seconds)
    sqnr = velocity_sqnr(denoiser, unseen)
    images = metrics = None
    if reference is not None:
        with denoiser_replaced(pipeline, denoiser):
            images = generate_images(pipeline, prompts, seeds=seeds, **call_kwargs)
        metrics = image_metrics(images, reference)
    return Comparison(sqnr, images, metrics, seconds, denoiser, memory)
