"""What is sampled for calibration: prompts, seeds, how the pipeline is called, and which denoising steps are kept."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from .prompts import default_prompts, read_prompts

__all__ = ["CalibrationBatch", "CalibrationSettings", "NormalSteps", "StepChoice", "WeightedSteps"]

_GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, modulo 1, fill [0, 1) evenly however many there are."""

_LOWEST = {"num_inference_steps": 1, "batch_size": 1, "max_calls": 1, "seed": 0, "world_size": 1}


@dataclasses.dataclass(frozen=True)
class WeightedSteps:
    """Steps drawn at random without replacement, anew for every batch, by a weight for each.

    Attributes:
        count: steps a batch.
        weights: one for every denoising step from noise to image, not negative; their sum does not matter. At least
            ``count`` of them are above zero.

    Raises:
        ValueError: impossible values.
    """

    count: int
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        _check_count(self.count)
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights):
            raise ValueError(f"weights of steps must be finite and not negative, got {list(self.weights)}")
        positive = sum(weight > 0 for weight in self.weights)
        if positive < self.count:
            raise ValueError(
                f"{self.count} steps can't be drawn from {positive} with a weight above zero: lower count or give "
                "more weights"
            )

    def probabilities(self, total: int) -> np.ndarray:
        """(total,) float64 that add up to 1.

        Raises:
            ValueError: another number of weights.
        """
        if len(self.weights) != total:
            raise ValueError(f"{len(self.weights)} weights for {total} denoising steps: give one a step")
        return np.asarray(self.weights) / sum(self.weights)


@dataclasses.dataclass(frozen=True)
class NormalSteps:
    """Steps drawn from a normal distribution over the trajectory, anew for every batch (PTQ4DM, arXiv 2211.15736).

    The position of a step is 0 for pure noise and 1 for the last one before the image. PTQ4DM draws timesteps around a
    mean nearer to the image than the middle, with a standard deviation of half the trajectory.

    Attributes:
        count: steps a batch.
        mean: position of the mean.
        std: standard deviation, as a share of the trajectory.

    Raises:
        ValueError: impossible values.
    """

    count: int
    mean: float = 0.6
    std: float = 0.5

    def __post_init__(self) -> None:
        _check_count(self.count)
        if not 0 <= self.mean <= 1 or not self.std > 0:
            raise ValueError(f"mean must be in [0, 1] and std above 0, got {self.mean} and {self.std}")

    def probabilities(self, total: int) -> np.ndarray:
        """(total,) float64 that add up to 1."""
        positions = np.linspace(0, 1, total) if total > 1 else np.zeros(1)
        density = np.exp(-0.5 * ((positions - self.mean) / self.std) ** 2)
        return density / density.sum()


StepChoice = int | Sequence[int] | WeightedSteps | NormalSteps | None
"""At most so many steps spread evenly from the first to the last (Q-Diffusion, arXiv 2302.04304), the indices
themselves, a distribution, or None for all."""


@dataclasses.dataclass(frozen=True)
class CalibrationBatch:
    """The prompts of one pipeline call.

    Attributes:
        number: among all batches of all processes, from 0.
        prompts, seeds: one seed a prompt.
        call_kwargs: of the pipeline, those of single prompts cut to this batch.
    """

    number: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call_kwargs: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """What to sample.

    Attributes:
        prompts: one trajectory each.
        num_inference_steps: denoising steps of a trajectory; None takes the pipeline's own default.
        steps: which of them are kept, see :data:`StepChoice`.
        batch_size: prompts a pipeline call.
        seed: the first prompt's; the others have the following numbers. Draws of steps depend on it, too.
        max_calls: bound on the kept calls of each component, over all batches and processes. They are spread evenly
            over batches and steps. A pipeline that calls its denoiser twice a step, with and without the prompt, has
            two calls a step. None for no bound.
        call_kwargs: passed on to every pipeline call, as in use: ``guidance_scale``, ``height``, ...
        per_prompt_kwargs: the same with one value a prompt: ``{"image": [...]}`` of a ControlNet.
        rank, world_size: which share of the batches is sampled here, see :meth:`share`.

    Raises:
        ValueError: impossible values.
    """

    prompts: tuple[str, ...] = dataclasses.field(default_factory=default_prompts)
    num_inference_steps: int | None = None
    steps: StepChoice = 8
    batch_size: int = 4
    seed: int = 0
    max_calls: int | None = 1024
    call_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    per_prompt_kwargs: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise ValueError(f"prompts must be a list of strings: write [{self.prompts!r}], or read_prompts(file)")
        object.__setattr__(self, "prompts", read_prompts(tuple(self.prompts)))
        for name, values in self.per_prompt_kwargs.items():
            if isinstance(values, str):
                raise ValueError(f"{name} has one value a prompt: give a list, or put it into call_kwargs, for all")
        if isinstance(self.steps, str):
            raise ValueError(
                f"steps must be a number of steps, their indices, a distribution or None, got {self.steps!r}"
            )
        if not isinstance(self.steps, (int, WeightedSteps, NormalSteps, type(None))):
            object.__setattr__(self, "steps", tuple(int(step) for step in self.steps))
        object.__setattr__(self, "call_kwargs", dict(self.call_kwargs))
        object.__setattr__(self, "per_prompt_kwargs", {k: tuple(v) for k, v in self.per_prompt_kwargs.items()})
        for name, lowest in _LOWEST.items():
            value = getattr(self, name)
            if not isinstance(value, (Integral, type(None))):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if value is not None and value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        if isinstance(self.steps, int):
            _check_count(self.steps)
        elif self.steps == ():
            raise ValueError("steps is empty: give at least one index, a number of steps, or None for all")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to {self.world_size - 1}, got {self.rank}")
        for name, values in self.per_prompt_kwargs.items():
            if len(values) != len(self.prompts):
                raise ValueError(f"{name} has {len(values)} values for {len(self.prompts)} prompts: give one a prompt")
        self._check_reserved()

    def _check_reserved(self) -> None:
        reserved = {
            "prompt": "prompts",
            "generator": "seed",
            "num_inference_steps": "num_inference_steps of the settings",
            "output_type": None,
            "return_dict": None,
        }
        for name in (*self.call_kwargs, *self.per_prompt_kwargs):
            if name in reserved:
                instead = reserved[name]
                raise ValueError(f"{name!r} is set here: {f'give {instead} instead' if instead else 'leave it out'}")
        if both := sorted(self.call_kwargs.keys() & self.per_prompt_kwargs.keys()):
            raise ValueError(f"{', '.join(both)} is both in call_kwargs and in per_prompt_kwargs: keep one")

    @classmethod
    def read(
        cls,
        source: str | os.PathLike[str] | Iterable[Any] | None = None,
        *,
        column: str | None = None,
        split: str = "train",
        limit: int | None = None,
        **fields: Any,
    ) -> CalibrationSettings:
        """Settings with prompts from a file, list or dataset, see :func:`~.prompts.read_prompts`.

        Args:
            source, column, split, limit: of ``read_prompts``.
            fields: all other fields.
        """
        return cls(prompts=read_prompts(source, column=column, split=split, limit=limit), **fields)

    @property
    def seeds(self) -> tuple[int, ...]:
        """One for each of ``prompts``."""
        return tuple(range(self.seed, self.seed + len(self.prompts)))

    @property
    def num_batches(self) -> int:
        """Of all processes together."""
        return -(-len(self.prompts) // self.batch_size)

    @property
    def batches(self) -> tuple[CalibrationBatch, ...]:
        """The batches of this process, in order."""
        return tuple(self._batch(number) for number in range(self.rank, self.num_batches, self.world_size))

    def _batch(self, number: int) -> CalibrationBatch:
        own = slice(number * self.batch_size, (number + 1) * self.batch_size)
        per_prompt = {name: list(values[own]) for name, values in self.per_prompt_kwargs.items()}
        return CalibrationBatch(number, self.prompts[own], self.seeds[own], {**self.call_kwargs, **per_prompt})

    def share(self, rank: int, world_size: int) -> CalibrationSettings:
        """The settings of one of several processes: every ``world_size``-th batch, from batch ``rank`` on.

        Whole batches are dealt out, and a batch depends on nothing but its number, so that the batches of all processes
        are bit for bit those of one.

        Args:
            rank: of the process, from 0.
            world_size: number of processes.
        """
        return dataclasses.replace(self, rank=rank, world_size=world_size)

    def kept_steps(self, number: int, total: int) -> frozenset[int]:
        """Indices of the denoising steps to keep of a batch.

        Args:
            number: of the batch.
            total: denoising steps of a trajectory.

        Raises:
            ValueError: indices or weights that do not fit ``total``.
        """
        if self.steps is None:
            return frozenset(range(total))
        if isinstance(self.steps, int):
            return frozenset(np.linspace(0, total - 1, min(self.steps, total)).round().astype(int).tolist())
        if isinstance(self.steps, (WeightedSteps, NormalSteps)):
            if self.steps.count > total:
                raise ValueError(f"{self.steps.count} steps can't be drawn from {total}: lower count")
            generator = np.random.default_rng((self.seed, number))
            chances = self.steps.probabilities(total)
            return frozenset(generator.choice(total, self.steps.count, replace=False, p=chances).tolist())
        wrong = [step for step in self.steps if not 0 <= step < total]
        if wrong:
            raise ValueError(f"steps must be indices from 0 to {total - 1}, got {wrong}: there are {total} steps")
        return frozenset(self.steps)

    def quota(self, number: int) -> int | None:
        """How many calls of a component are kept of a batch at most; None for all."""
        if self.max_calls is None:
            return None
        return self.max_calls * (number + 1) // self.num_batches - self.max_calls * number // self.num_batches

    def thinned(self, number: int, calls: int) -> list[int]:
        """Which of a batch's ``calls`` calls are kept, as indices: evenly spread, other ones in every batch."""
        quota = self.quota(number)
        if quota is None or calls <= quota:
            return list(range(calls))
        offset = number * _GOLDEN % 1
        return [math.floor((i + offset) * calls / quota) for i in range(quota)]


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"at least one step must be kept, got {count}")
