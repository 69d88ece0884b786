"""Affine correction of a quantized denoiser's output, timestep by timestep. Optional, and off unless it helps.

Quantization moves a denoiser's output in a way that depends on the timestep. The part of the error that is an affine
function of the output itself can be taken back for nothing: ``v ~ a_t * v_q + b_t`` per latent channel.

1. :func:`fit_affine_correction` fits ``a_t`` and ``b_t`` on recorded trajectories and keeps them only if they lower the
   error on prompts and timesteps left out of the fit; otherwise the result is the identity.
2. :func:`confirm` asks the question that counts: do finished latents come closer to full precision? A lower error of
   single steps does not answer it, because a shrunk output adds up over the steps.
3. :func:`correct_pipeline` applies it, in the denoiser (a forward hook) or in the scheduler (a subclass made on the
   fly, for denoisers that are no PyTorch modules); its handle takes it back.

Expect little. On the trained ``shapes-sd3`` pipeline (``examples/affine_correction.py``) a guided fit gains nothing at
W8A8 (the identity is chosen); at W4A8, rounded to nearest, the guided output gains 0.1 dB and the finished latents 0.24
+- 0.05 dB. Fits that do not know the guidance gain 0.03 to 0.16 dB in single steps, and in finished latents between
+0.07 and -0.16 dB: nearly all of the error is no affine function of the output. An untrained model with coarse 4-bit
weights gained more than one.

The correction is one readable file, ``affine_correction.json``, beside a saved pipeline.

Background: SegQuant's optional affiner (arXiv 2507.14811), TAC-Diffusion (arXiv 2407.03917), PTQD (arXiv 2305.10657).
"""

from .affine import FILE_NAME, AffineCorrection, Clock
from .apply import Handle, correct_denoiser, correct_pipeline, correct_scheduler
from .confirm import SamplingGain, confirm, final_latents
from .fit import Estimator, fit_affine_correction

__all__ = [
    "FILE_NAME",
    "AffineCorrection",
    "Clock",
    "Estimator",
    "Handle",
    "SamplingGain",
    "confirm",
    "correct_denoiser",
    "correct_pipeline",
    "correct_scheduler",
    "final_latents",
    "fit_affine_correction",
]
