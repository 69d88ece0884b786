"""Does a correction bring finished images closer to full precision? Compares final latents, prompt by prompt.

A correction that lowers the error of single steps may still make images worse: what it takes from one step may be what
the following steps would have averaged out. So ask the sampler.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluation.sampling import run_pipeline
from .affine import AffineCorrection
from .apply import correct_pipeline


@dataclasses.dataclass(frozen=True)
class SamplingGain:
    """Error of final latents with a correction against without, on the same prompts and seeds.

    Attributes:
        per_prompt_db: what each prompt gained: 10 log10 of its squared error without over that with, dB.
        gain_db: their mean.
        se_db: its standard error.
    """

    per_prompt_db: tuple[float, ...]

    @property
    def gain_db(self) -> float:
        """Mean gain, dB; positive is better than without."""
        return sum(self.per_prompt_db) / len(self.per_prompt_db)

    @property
    def se_db(self) -> float:
        """Standard error of the mean gain, dB."""
        return float(torch.tensor(self.per_prompt_db).double().std()) / math.sqrt(len(self.per_prompt_db))

    @property
    def helps(self) -> bool:
        """Whether the gain is above twice its standard error."""
        return self.gain_db > 2 * self.se_db

    @property
    def harms(self) -> bool:
        """Whether the loss is above twice its standard error: do not use the correction."""
        return self.gain_db < -2 * self.se_db


def final_latents(
    pipeline: Any, prompts: Sequence[str], *, seeds: int | Sequence[int] = 0, batch_size: int = 4, **call_kwargs: Any
) -> Tensor:
    """Sample a pipeline and return its latents, (P, ...), before they are decoded; the pipeline is left undisturbed.

    Args:
        pipeline: a diffusers pipeline.
        prompts: P prompts.
        seeds: one seed per prompt, or one integer ``s`` for ``s, s + 1, ...``.
        batch_size: prompts per pipeline call.
        call_kwargs: passed on, for example ``num_inference_steps`` or ``guidance_scale``.
    """
    batches = run_pipeline(pipeline, prompts, seeds=seeds, batch_size=batch_size, output_type="latent", **call_kwargs)
    return torch.cat([batch.detach().cpu() for batch in batches])


def confirm(
    pipeline: Any,
    correction: AffineCorrection,
    reference: Tensor,
    prompts: Sequence[str],
    *,
    seeds: int | Sequence[int] = 0,
    batch_size: int = 4,
    **call_kwargs: Any,
) -> SamplingGain:
    """Sample a quantized pipeline with and without a correction and compare both with full precision.

    Args:
        pipeline: the pipeline with the quantized denoiser, not corrected.
        correction: what is asked about.
        reference: (P, ...): :func:`final_latents` of the full-precision pipeline with the same arguments.
        prompts: P prompts, at least four, that the fit has not seen.
        seeds: as for the reference.
        batch_size: prompts per pipeline call.
        call_kwargs: as for the reference.

    Raises:
        ValueError: fewer than four prompts, or a reference of another shape.
        FloatingPointError: latents with NaN or infinity, or equal to the reference, so that no ratio exists.
    """
    if len(prompts) < 4:
        raise ValueError(f"{len(prompts)} prompts are too few to tell a gain from chance: give at least 4")
    if correction.is_identity:
        return SamplingGain((0.0,) * len(prompts))
    arguments = {"seeds": seeds, "batch_size": batch_size, **call_kwargs}
    without = final_latents(pipeline, prompts, **arguments)
    with correct_pipeline(pipeline, correction):
        corrected = final_latents(pipeline, prompts, **arguments)
    if without.shape != reference.shape:
        raise ValueError(
            f"the reference is {tuple(reference.shape)}, the pipeline gives {tuple(without.shape)}: sample it with the "
            "same prompts and arguments"
        )
    before, after = ((z.double() - reference.double()).flatten(1).square().sum(1) for z in (without, corrected))
    ratios = 10 * torch.log10(before / after)
    if not torch.isfinite(ratios).all():
        raise FloatingPointError(
            "latents with NaN or infinity, or equal to full precision: there is nothing to compare"
        )
    return SamplingGain(tuple(ratios.tolist()))
