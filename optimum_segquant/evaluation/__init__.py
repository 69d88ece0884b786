"""How close is a quantized diffusion pipeline to its full-precision original?

Three steps, each usable on its own:

1. :func:`sample_trajectories` runs a full-precision pipeline and keeps what its denoiser read and returned.
   The result doubles as calibration data: :meth:`Trajectories.forward_loop` is the ``forward_loop`` of
   ``mtq.quantize``.
2. :func:`velocity_sqnr` replays the recorded inputs through a quantized denoiser and compares its outputs with the
   recorded ones. It isolates one denoiser call from the chaos of sampling: both models see the same inputs.
3. :func:`generate_images` and :func:`image_metrics` compare finished images of equal prompts and seeds (PSNR, SSIM).
"""

from .images import generate_images
from .metrics import ImageMetrics, VelocitySQNR, image_metrics, sqnr_db, velocity_sqnr
from .trajectories import DenoiserCall, Trajectories, denoiser_of, sample_trajectories

__all__ = [
    "DenoiserCall",
    "ImageMetrics",
    "Trajectories",
    "VelocitySQNR",
    "denoiser_of",
    "generate_images",
    "image_metrics",
    "sample_trajectories",
    "sqnr_db",
    "velocity_sqnr",
]
