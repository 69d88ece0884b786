"""What callers give as calibration data, and what it means: settings to sample with, or something to run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..evaluation import RecordedCalls
from .prompts import held_out_prompts, read_prompts
from .settings import CalibrationSettings

__all__ = ["ForwardLoop", "Runnable", "calibration_source", "forward_loop_of", "held_out_settings"]

logger = logging.getLogger(__name__)

ForwardLoop = Callable[[nn.Module], object]
"""Runs a model on calibration data, as ModelOpt takes it."""

Runnable = RecordedCalls | ForwardLoop
"""What one model can be calibrated on."""


def calibration_source(
    source: Any, components: Sequence[str], *, has_pipeline: bool
) -> CalibrationSettings | Mapping[str, Runnable] | None:
    """Settings to sample with, or what to run for each component.

    Args:
        source: :class:`CalibrationSettings`; prompts in any form that :func:`read_prompts` takes; recorded calls or a
            forward loop for a single component, or one for each by name; None for the package's prompts.
        components: names of what is to be calibrated.
        has_pipeline: whether there is a pipeline to run prompts with.

    Returns:
        None for a model without a pipeline and without data.

    Raises:
        ValueError: data that does not go with the components, or wrong prompts.
        FileNotFoundError: no such prompts file.
    """
    if _is_runnable(source):
        if len(components) > 1:
            raise ValueError(f"give calls or loops for each of {', '.join(components)} by name, or prompts for all")
        return {components[0]: source}
    if isinstance(source, Mapping) and source and all(map(_is_runnable, source.values())):
        if missing := [name for name in components if name not in source]:
            raise ValueError(f"there is no calibration data for {', '.join(missing)}: record it, or give prompts")
        return source
    if has_pipeline:
        return source if isinstance(source, CalibrationSettings) else CalibrationSettings(prompts=read_prompts(source))
    if source is None:
        return None
    raise ValueError(
        "prompts need a pipeline to run, this is a single model: give the pipeline that it is of, or recorded calls or "
        "a forward_loop"
    )


def held_out_settings(
    source: Any, calibration: CalibrationSettings | None, *, has_pipeline: bool
) -> CalibrationSettings | None:
    """How to sample what a calibrated model is measured on.

    Args:
        source: settings; prompts in any form; a number of the package's own held-out prompts; None for nothing.
        calibration: the calibration's settings, None for calls or loops of the caller; the held-out data is sampled
            alike, with seeds that follow.
        has_pipeline: whether there is a pipeline to run prompts with.

    Raises:
        ValueError: no pipeline, wrong prompts, or arguments for single prompts that would be missing.
    """
    if source is None:
        return None
    if not has_pipeline:
        raise ValueError(
            "held_out prompts need a pipeline to run: give the pipeline, or use velocity_sqnr(model, calls)"
        )
    if isinstance(source, CalibrationSettings):
        return source
    prompts = held_out_prompts(source) if isinstance(source, int) else read_prompts(source)
    like = calibration or CalibrationSettings()
    if like.per_prompt_kwargs:
        raise ValueError(
            f"{', '.join(like.per_prompt_kwargs)} has one value a prompt: give held_out as CalibrationSettings, with "
            "values of its own"
        )
    if known := set(prompts) & set(like.prompts):
        logger.warning("%d held-out prompts are calibrated on, too: give others to see what unseen ones do", len(known))
    return dataclasses.replace(like, prompts=prompts, seed=like.seed + len(like.prompts))


def forward_loop_of(data: Runnable | None) -> ForwardLoop | None:
    """As ``mtq.quantize`` takes it."""
    return data.forward_loop if isinstance(data, RecordedCalls) else data


def _is_runnable(source: Any) -> bool:
    return isinstance(source, RecordedCalls) or (callable(source) and not isinstance(source, type))
