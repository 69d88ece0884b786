"""Error measures: signal to quantization noise of the denoiser, PSNR and SSIM of images.

The velocity SQNR of a quantized denoiser v^ against full precision v, over recorded inputs, is

    SQNR = 10 log10( sum |v|^2 / sum |v - v^|^2 )   in dB,

with both sums over all recorded calls and elements. One more bit of precision is worth about 6 dB.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .calls import RecordedCalls


@dataclasses.dataclass(frozen=True)
class VelocitySQNR:
    """Signal to quantization noise ratio of a denoiser's output, in dB; higher is better, ``inf`` is bit-equal.

    Attributes:
        overall: over all recorded calls.
        per_timestep: over the calls of each timestep, from noise (largest timestep) to image.
    """

    overall: float
    per_timestep: Mapping[float, float]


@dataclasses.dataclass(frozen=True)
class ImageMetrics:
    """PSNR (dB) and SSIM of images against reference images; higher is better.

    Attributes:
        psnr: mean over the images of their PSNR; ``inf`` as soon as one image is bit-equal.
        ssim: mean over the images of their SSIM, 1 for equal images.
        psnr_per_image: one value per image.
        ssim_per_image: one value per image.
    """

    psnr: float
    ssim: float
    psnr_per_image: tuple[float, ...]
    ssim_per_image: tuple[float, ...]


def sqnr_db(signal: float, noise: float) -> float:
    """Return ``10 log10(signal / noise)`` of two energies (sums of squares), ``inf`` without noise.

    Raises:
        ValueError: no signal: the reference is zero everywhere, so that no ratio exists.
    """
    if not signal > 0:
        raise ValueError("the reference output is zero everywhere: there is no signal to compare noise with")
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def velocity_sqnr(denoiser: nn.Module, trajectories: RecordedCalls) -> VelocitySQNR:
    """Compare a quantized denoiser with the recorded full-precision outputs on the same inputs.

    Use trajectories of prompts and seeds that calibration has not seen.

    Args:
        denoiser: the quantized denoiser, on any device.
        trajectories: recorded with the full-precision denoiser.

    Returns:
        The ratio over all calls and per timestep. Energies are summed in float64.

    Raises:
        ValueError: the output's shape differs from the recorded one, or the recorded output is zero.
        FloatingPointError: the quantized denoiser returned NaN or infinity.
    """
    signal: dict[float, float] = {}
    noise: dict[float, float] = {}
    for call, output in trajectories.replay(denoiser):
        if output.shape != call.output.shape:
            raise ValueError(
                f"the denoiser returned {tuple(output.shape)} where {tuple(call.output.shape)} was recorded: "
                "the trajectories belong to another model"
            )
        reference = call.output.double()
        result = output.detach().cpu().double()
        if not torch.isfinite(result).all():
            raise FloatingPointError(f"the denoiser returned NaN or infinity at timestep {call.timestep:g}")
        # NaN, no timestep, is equal to nothing, itself included: one key for all such calls.
        key = math.nan if math.isnan(call.timestep) else call.timestep
        signal[key] = signal.get(key, 0.0) + float(reference.square().sum())
        noise[key] = noise.get(key, 0.0) + float((reference - result).square().sum())
    per_timestep = {t: sqnr_db(signal[t], noise[t]) for t in trajectories.timesteps}
    return VelocitySQNR(sqnr_db(sum(signal.values()), sum(noise.values())), per_timestep)


def image_metrics(images: Tensor, reference: Tensor) -> ImageMetrics:
    """Compare images with reference images of the same prompts and seeds.

    Args:
        images: (P, C, H, W), float in [0, 1], H and W at least 11 (the SSIM window).
        reference: the same shape and range.

    Returns:
        Means and one value per image, computed by torchmetrics with a data range of 1 and its default SSIM window
        (Gaussian, sigma 1.5, 11 pixels).

    Raises:
        ValueError: shapes that differ or are no images, or values outside [0, 1].
        ImportError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    except ImportError as error:
        raise ImportError("PSNR and SSIM need torchmetrics: pip install 'optimum-segquant[eval]'") from error
    if images.ndim != 4 or images.shape != reference.shape:
        raise ValueError(
            f"expected two tensors of one shape (images, channels, height, width), "
            f"got {tuple(images.shape)} and {tuple(reference.shape)}"
        )
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, got {tuple(images.shape[-2:])}")
    for name, tensor in (("images", images), ("reference", reference)):
        if not (tensor.min() >= 0 and tensor.max() <= 1):  # also catches NaN
            raise ValueError(f"{name} must lie in [0, 1]: scale pixels of 0 to 255 or -1 to 1 first")
    images, reference = images.float().cpu(), reference.float().cpu()
    psnr = peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")
    return ImageMetrics(
        psnr=float(psnr.mean()),
        ssim=float(ssim.mean()),
        psnr_per_image=tuple(psnr.tolist()),
        ssim_per_image=tuple(ssim.reshape(len(images)).tolist()),
    )
