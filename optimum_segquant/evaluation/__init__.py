"""How close is a quantized diffusion pipeline to its full-precision original?

:func:`evaluate` measures everything in one call: images by PSNR, SSIM, LPIPS, FID and CLIP score, the denoiser's error
per timestep, the error that accumulates over the trajectory, and every layer's own. Its parts are usable on their own:

1. :func:`sample_trajectories` runs a full-precision pipeline and keeps what its denoiser read and returned.
   The result doubles as calibration data: :meth:`Trajectories.forward_loop` is the ``forward_loop`` of
   ``mtq.quantize``.
2. :func:`velocity_sqnr` replays the recorded inputs through a quantized denoiser and compares its outputs with the
   recorded ones. It isolates one denoiser call from the chaos of sampling: both models see the same inputs.
3. :func:`generate_images` and :func:`image_metrics` compare finished images of equal prompts and seeds (PSNR, SSIM).
4. :func:`perceptual_metrics` adds LPIPS, FID and CLIP score, with networks from a local directory or the hub.

:func:`compare` does the first three for one ModelOpt config on a copy of the denoiser; :func:`layer_costs` says which
layers hold the weights and do the multiply-adds.
"""

from .comparison import Comparison, compare, denoiser_replaced
from .cost import LayerCost, LayerShare, embedders, layer_costs, share
from .evaluator import Samples, evaluate, evaluate_samples, sample_reference
from .facts import PipelineFacts
from .images import generate_images
from .latents import LatentError, latent_errors
from .memory import PeakMemory
from .metrics import ImageMetrics, VelocitySQNR, image_metrics, sqnr_db, velocity_sqnr
from .perceptual import METRICS, MetricResult, perceptual_metrics
from .result import Evaluation
from .trajectories import DenoiserCall, RecordedCalls, Trajectories, denoiser_of, sample_trajectories

__all__ = [
    "METRICS",
    "Comparison",
    "DenoiserCall",
    "Evaluation",
    "ImageMetrics",
    "LatentError",
    "LayerCost",
    "LayerShare",
    "MetricResult",
    "PeakMemory",
    "PipelineFacts",
    "RecordedCalls",
    "Samples",
    "Trajectories",
    "VelocitySQNR",
    "compare",
    "denoiser_of",
    "denoiser_replaced",
    "embedders",
    "evaluate",
    "evaluate_samples",
    "generate_images",
    "image_metrics",
    "latent_errors",
    "layer_costs",
    "perceptual_metrics",
    "sample_reference",
    "sample_trajectories",
    "share",
    "sqnr_db",
    "velocity_sqnr",
]
