"""How far the trajectory of a quantized pipeline has drifted from the full-precision one, step by step.

The velocity SQNR asks what one call of the denoiser loses on equal inputs. Here both pipelines sample on their own from
the same noise, so that the error of every step goes into the next. With x the full-precision latents after step i and
x^ the quantized ones,

    noise_i = sum |x_i - x^_i|^2 / sum |x_i|^2,        SQNR_i = -10 log10 noise_i  in dB.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

_WARM_UP = 1  # steps of every pipeline call that are not timed: the first one waits for the text encoders


@dataclasses.dataclass(frozen=True)
class LatentStep:
    """The latents after one denoising step.

    Attributes:
        step: from 0.
        timestep: in the scheduler's units.
        latents: one tensor per prompt, as the pipeline holds them, on the CPU.
    """

    step: int
    timestep: float
    latents: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class LatentError:
    """Accumulated error after one denoising step; energies relative to the signal's, without unit.

    Attributes:
        step: from 0.
        timestep: in the scheduler's units, from noise to image.
        noise: over all prompts.
        worst: of the prompt that drifted most.
    """

    step: int
    timestep: float
    noise: float
    worst: float

    @property
    def sqnr(self) -> float:
        """dB; ``inf`` for equal latents."""
        return math.inf if self.noise == 0 else -10 * math.log10(self.noise)


class StepRecorder:
    """A pipeline's ``callback_on_step_end``: keeps the latents of the first prompts and times every step.

    Args:
        prompts: how many prompts' latents are kept.
        bar: a progress bar that counts steps.

    Attributes:
        seconds: of each step but the first of every call, as the pipeline ran it (a whole batch of prompts).
    """

    def __init__(self, prompts: int, bar: tqdm[NoReturn] | None = None) -> None:
        self.seconds: list[float] = []
        self._bar = bar
        self._wanted = prompts
        self._kept = 0  # prompts whose trajectory is complete or under way
        self._room = 0  # of the current call
        self._steps: dict[int, tuple[float, list[Tensor]]] = {}
        self._before = 0.0

    @staticmethod
    def why_not(pipeline: Any) -> str:
        """Why a pipeline can't be recorded; empty if it can."""
        if "callback_on_step_end" not in inspect.signature(pipeline.__call__).parameters:
            return f"{type(pipeline).__name__} takes no callback_on_step_end, which would show its latents"
        if "latents" not in getattr(pipeline, "_callback_tensor_inputs", ("latents",)):
            return f"{type(pipeline).__name__} does not show its latents to callback_on_step_end"
        return ""

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Called by the pipeline after each step; changes nothing."""
        latents: Tensor = tensors["latents"]
        if latents.device.type == "cuda":
            torch.cuda.synchronize(latents.device)
        now = time.perf_counter()
        if step >= _WARM_UP:
            self.seconds.append(now - self._before)
        if step == 0:
            self._room = min(len(latents), self._wanted - self._kept)
            self._kept += self._room
        if self._room > 0:
            _, kept = self._steps.setdefault(step, (float(timestep), []))
            kept.extend(latents[: self._room].detach().to("cpu", copy=True).unbind())
        if self._bar is not None:
            self._bar.update()
        self._before = time.perf_counter()  # copying and drawing are not the pipeline's
        return tensors

    @property
    def seconds_per_step(self) -> float | None:
        """Median; None where every call had a single step."""
        return statistics.median(self.seconds) if self.seconds else None

    def steps(self) -> tuple[LatentStep, ...]:
        """What was kept, in order."""
        return tuple(LatentStep(step, timestep, tuple(kept)) for step, (timestep, kept) in sorted(self._steps.items()))


def latent_errors(reference: Sequence[LatentStep], quantized: Sequence[LatentStep]) -> tuple[LatentError, ...]:
    """Compare two recorded trajectories, step by step.

    Args:
        reference: of the full-precision pipeline.
        quantized: of the quantized one, same prompts, seeds and steps.

    Raises:
        ValueError: other steps, other shapes, or latents that are zero everywhere.
        FloatingPointError: the quantized latents hold NaN or infinity.
    """
    if [(s.step, len(s.latents)) for s in reference] != [(s.step, len(s.latents)) for s in quantized]:
        raise ValueError(
            f"the trajectories have {len(reference)} and {len(quantized)} steps, or other numbers of prompts: sample "
            "both with the same scheduler and arguments"
        )
    errors = []
    for ours, theirs in zip(quantized, reference, strict=True):
        noises, signals = [], []
        for a, b in zip(theirs.latents, ours.latents, strict=True):
            if a.shape != b.shape:
                raise ValueError(f"latents of shapes {tuple(a.shape)} and {tuple(b.shape)}: use one size for both")
            if not torch.isfinite(b).all():
                raise FloatingPointError(f"the quantized latents hold NaN or infinity after step {ours.step}")
            signals.append(float(a.double().square().sum()))
            noises.append(float((a.double() - b.double()).square().sum()))
        if not min(signals) > 0:
            raise ValueError(f"the full-precision latents of a prompt are zero after step {ours.step}")
        worst = max(noise / signal for noise, signal in zip(noises, signals, strict=True))
        errors.append(LatentError(theirs.step, theirs.timestep, sum(noises) / sum(signals), worst))
    return tuple(errors)
