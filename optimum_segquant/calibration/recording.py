"""Running a pipeline on prompts and keeping what its models read, batch by batch on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from tqdm import tqdm

from ..components import choose_components, denoisers_of, family_of
from ..evaluation import DenoiserCall
from ..evaluation.recorder import TIMESTEP_NAMES, CallRecorder, StepClock
from ..evaluation.sampling import check_call_arguments, run_pipeline, takes_prompts
from .cache import CachedCalls, CalibrationCache
from .identity import identity
from .settings import CalibrationBatch, CalibrationSettings

__all__ = ["CalibrationData", "open_cache", "record_calibration"]

logger = logging.getLogger(__name__)


class _Enough(Exception):  # noqa: N818  nothing went wrong
    """Ends a trajectory whose remaining steps nobody asked for."""


@dataclasses.dataclass(frozen=True)
class CalibrationData(Mapping[str, CachedCalls]):
    """Recorded calls by component.

    Attributes:
        settings: what they were sampled with, ``num_inference_steps`` filled in.
        calls: by component.
        sampled, reused: batches that this run sampled and that were there already.
    """

    settings: CalibrationSettings
    calls: Mapping[str, CachedCalls]
    sampled: int
    reused: int

    def __getitem__(self, component: str) -> CachedCalls:
        return self.calls[component]

    def __iter__(self) -> Iterator[str]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)


def record_calibration(
    pipeline: Any,
    settings: CalibrationSettings | None = None,
    *,
    components: str | Sequence[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> CalibrationData:
    """Run a pipeline on the prompts and record what its models read.

    Every batch is written when it is done. A run that was killed goes on with the batch it was at, and what it then
    gives is bit for bit what it would have given: a batch depends on nothing but its number. A trajectory ends after
    the last step that is kept; images are not decoded.

    Args:
        pipeline: a diffusers pipeline. One that takes no prompts gets what it takes instead from ``per_prompt_kwargs``
            of the settings, such as ``class_labels``.
        settings: what to sample; by default the package's prompts, 8 steps of each trajectory.
        components: models to record, see :func:`optimum_segquant.components.choose_components`; several are recorded in
            one run.
        cache_dir: where to keep the data; what is there and fits is used. By default a temporary directory, which goes
            with the result.
        overwrite: sample again if ``cache_dir`` holds data of something else, instead of refusing it.
        progress: show a bar of denoising steps, and one in every ``forward_loop`` of the result.

    Returns:
        For every component its calls, read from disk one at a time. With :meth:`CalibrationSettings.share` those of the
        batches of this process.

    Raises:
        ValueError: no such component, steps that do not fit, a component that is never called, or an argument that
            can't be written.
        CalibrationMismatchError: ``cache_dir`` holds data of something else; the difference is named.
        DamagedFilesError: a file of ``cache_dir`` is damaged.
        FloatingPointError: a model returned NaN or infinity.
        OSError: the disk is full; finished batches are kept.
    """
    settings = _resolved(settings or CalibrationSettings(), pipeline)
    chosen = choose_components(pipeline, components)
    temporary = None
    if cache_dir is None:
        temporary = tempfile.TemporaryDirectory(prefix="segquant-calibration-")
        cache_dir = temporary.name
    cache = open_cache(pipeline, settings, cache_dir, overwrite=overwrite)
    cache.is_temporary = temporary is not None
    wanted = [batch for batch in settings.batches if settings.quota(batch.number) != 0]
    if not wanted:
        raise ValueError(
            f"max_calls={settings.max_calls} leaves none for process {settings.rank} of {settings.world_size}: raise it"
        )
    missing = [batch for batch in wanted if not cache.is_complete(batch.number, chosen)]
    for name in chosen:
        for shard in cache.shards(name, [batch.number for batch in wanted if batch not in missing]):
            shard.check(content=False)
    logger.info("calibration data: %d of %d batches are to be sampled", len(missing), len(wanted))
    sampler = _Sampler(pipeline, settings, chosen)
    steps = settings.num_inference_steps or 1
    with tqdm(
        total=len(wanted) * steps,
        initial=(len(wanted) - len(missing)) * steps,
        desc="Sampling",
        unit="step",
        disable=not progress,
    ) as bar:
        for batch in missing:
            target = bar.n + steps
            for name, sampled in sampler.sample(batch, bar).items():
                cache.write(name, batch.number, sampled)
            bar.update(target - bar.n)
    numbers = [batch.number for batch in wanted]
    calls = {name: CachedCalls(name, cache.shards(name, numbers), progress=progress, keep=temporary) for name in chosen}
    for name, found in calls.items():
        if not len(found):
            raise _never_called(pipeline, name, settings)
    return CalibrationData(settings, calls, len(missing), len(wanted) - len(missing))


def open_cache(
    pipeline: Any, settings: CalibrationSettings, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> CalibrationCache:
    """The folder for data of a pipeline and settings, made or checked; of several processes one has to do it first.

    Raises:
        CalibrationMismatchError, FileExistsError, DamagedFilesError, OSError: see :class:`CalibrationCache`.
    """
    return CalibrationCache(folder, identity(pipeline, _resolved(settings, pipeline)), overwrite=overwrite)


def _resolved(settings: CalibrationSettings, pipeline: Any) -> CalibrationSettings:
    """The settings with the pipeline's own number of steps where they have none, checked against it.

    Raises:
        ValueError: neither has a number, the steps to keep do not fit, or the pipeline takes no prompts or not an
            argument of the settings.
    """
    total, known = settings.num_inference_steps, inspect.signature(pipeline.__call__).parameters
    check_call_arguments(pipeline, (*settings.call_kwargs, *settings.per_prompt_kwargs))
    if total is None:
        parameter = known.get("num_inference_steps")
        total = None if parameter is None else parameter.default
        if not isinstance(total, int):
            raise ValueError(
                f"{type(pipeline).__name__} has no default for num_inference_steps: set it in the calibration settings"
            )
    if not takes_prompts(pipeline) and not settings.per_prompt_kwargs:
        raise ValueError(
            f"{type(pipeline).__name__} takes no prompt: give what it takes instead, one value a prompt, in "
            "per_prompt_kwargs"
        )
    settings.kept_steps(0, total)
    if settings.world_size > settings.num_batches:
        raise ValueError(
            f"{settings.world_size} processes can't share {settings.num_batches} batches of prompts: give more "
            "prompts, a smaller batch_size, or start fewer processes"
        )
    return dataclasses.replace(settings, num_inference_steps=total)


def _never_called(pipeline: Any, name: str, settings: CalibrationSettings) -> ValueError:
    return ValueError(
        f"{type(pipeline).__name__} never called its {name} in the steps that are kept ({settings.steps} of "
        f"{settings.num_inference_steps}): leave it out of the components, or change steps or num_inference_steps"
    )


class _Sampler:
    """Samples single batches.

    Args:
        pipeline: the pipeline.
        settings: with a number of steps.
        chosen: models to record, by component.
    """

    def __init__(self, pipeline: Any, settings: CalibrationSettings, chosen: Mapping[str, nn.Module]) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._chosen = chosen
        self._denoisers = denoisers_of(pipeline)

    def sample(self, batch: CalibrationBatch, bar: Any) -> dict[str, list[DenoiserCall]]:
        """Sample one batch.

        Args:
            batch: its prompts.
            bar: of denoising steps; is moved on by as many as are done.

        Returns:
            What each component was called with, in order, thinned to the batch's share of ``max_calls``.

        Raises:
            ValueError: the first batch and a component is never called, although it would be in all batches or none.
        """
        settings = self._settings
        assert settings.num_inference_steps is not None
        kept = settings.kept_steps(batch.number, settings.num_inference_steps)
        start, last = bar.n, max(kept)

        def on_step(step: int) -> None:
            # Text encoders have run when the first denoiser is called; what knows steps has to be past the last one.
            if all(clocks[name].step > last for name in self._chosen if name in clocks):
                raise _Enough
            bar.update(max(0, start + min(step, settings.num_inference_steps or 0) - bar.n))

        clocks, recorders = self._recorders(kept, on_step)
        with contextlib.ExitStack() as hooks:
            for recorder in recorders.values():
                hooks.callback(recorder.attach())
                recorder.start(batch.number)
            try:
                run_pipeline(
                    self._pipeline,
                    batch.prompts,
                    seeds=batch.seeds,
                    batch_size=len(batch.prompts),
                    by_prompt=takes_prompts(self._pipeline),
                    num_inference_steps=settings.num_inference_steps,
                    output_type="latent",
                    **batch.call_kwargs,
                )
            except _Enough:
                # What the pipeline does at its end: accelerate's CPU offload moves the last model away.
                free = getattr(self._pipeline, "maybe_free_model_hooks", None)
                if free is not None:
                    free()
        result = {}
        for name in self._chosen:
            calls = recorders[name].calls
            if not calls and (isinstance(settings.steps, (int, tuple)) or settings.steps is None):
                raise _never_called(self._pipeline, name, settings)
            result[name] = [calls[i] for i in settings.thinned(batch.number, len(calls))]
        return result

    def _recorders(
        self, kept: frozenset[int], on_step: Callable[[int], object]
    ) -> tuple[dict[str, StepClock], dict[str, CallRecorder]]:
        """A recorder for each chosen component and, to count steps, each denoiser; before them the clocks of both."""
        watched = {**self._denoisers, **self._chosen}
        families = {family_of(name): StepClock() for name in self._denoisers}
        clocks = {name: families[family_of(name)] for name in self._denoisers}
        clocks |= {name: StepClock() for name in watched if name not in clocks and _takes_timesteps(watched[name])}
        recorders = {
            name: CallRecorder(
                part,
                kept if name in self._chosen else (),
                clock=clocks.get(name),
                needs_timestep=name in self._denoisers,
                on_step=on_step if name in self._denoisers else None,
                label=name,
            )
            for name, part in watched.items()
        }
        return clocks, recorders


def _takes_timesteps(module: nn.Module) -> bool:
    return not set(TIMESTEP_NAMES).isdisjoint(inspect.signature(module.forward).parameters)
