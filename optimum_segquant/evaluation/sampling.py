"""Running a diffusers pipeline repeatably and leaving it as it was.

A pipeline call has side effects: the scheduler keeps its timesteps and counters, a progress bar is drawn, and whatever
forgets to use the given generators draws from torch's global generators. :func:`run_pipeline` undoes the first two and
shields the third, so that a measurement can neither disturb the program around it nor be disturbed by it.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def resolve_seeds(prompts: Sequence[str], seeds: int | Sequence[int]) -> list[int]:
    """Return one seed per prompt.

    Args:
        prompts: the prompts, at least one.
        seeds: one seed per prompt, or one integer ``s``, which stands for ``s, s + 1, s + 2, ...``.

    Raises:
        ValueError: no prompts, a prompt that is no string, or as many seeds as do not fit.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of strings, got one string: write [{prompts!r}]")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: give at least one prompt")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"prompts must be strings, got {type(prompt).__name__}")
    if isinstance(seeds, int):
        return [seeds + i for i in range(len(prompts))]
    if len(seeds) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed per prompt, or a single integer"
        )
    return [int(seed) for seed in seeds]


@contextlib.contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block and put their states back after it."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode inside the block; afterwards each gets its own ``training`` flag back."""
    flags = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for submodule, training in flags:
            submodule.training = training


@contextlib.contextmanager
def undisturbed(pipeline: Any) -> Iterator[None]:
    """Run the pipeline inside the block on a copy of its scheduler, without progress bars and in eval mode."""
    scheduler = getattr(pipeline, "scheduler", None)
    had_config = "_progress_bar_config" in vars(pipeline)
    progress = vars(pipeline).get("_progress_bar_config")
    with contextlib.ExitStack() as stack:
        for component in getattr(pipeline, "components", {}).values():
            if isinstance(component, nn.Module):
                stack.enter_context(evaluation_mode(component))
        try:
            if scheduler is not None:
                pipeline.scheduler = copy.deepcopy(scheduler)
            if hasattr(pipeline, "set_progress_bar_config"):
                pipeline.set_progress_bar_config(disable=True)
            yield
        finally:
            if scheduler is not None:
                pipeline.scheduler = scheduler
            if had_config:
                pipeline._progress_bar_config = progress
            else:
                vars(pipeline).pop("_progress_bar_config", None)


def takes_prompts(pipeline: Any) -> bool:
    """Whether a pipeline is called with prompts."""
    parameters = inspect.signature(pipeline.__call__).parameters
    return "prompt" in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def check_call_arguments(pipeline: Any, names: Iterable[str]) -> None:
    """Refuse arguments that a pipeline does not take, before it computes anything.

    Raises:
        ValueError: names the first one, and what was probably meant.
    """
    known = inspect.signature(pipeline.__call__).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"{type(pipeline).__name__} takes no argument {name!r}"
                + (f", is {near[0]!r} meant?" if near else f": it takes {', '.join(known)}")
            )


def run_pipeline(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seeds: int | Sequence[int],
    batch_size: int,
    before_batch: Callable[[], None] | None = None,
    by_prompt: bool = True,
    **call_kwargs: Any,
) -> list[Any]:
    """Call ``pipeline`` on all prompts in batches and return the first output of each batch.

    Every prompt has its own generator, on the CPU, so the noise of a prompt does not depend on the batch it is in or on
    the device of the model.

    Args:
        pipeline: a diffusers pipeline, or an object that is called like one (Optimum's ONNX Runtime pipelines).
        prompts: the prompts.
        seeds: see :func:`resolve_seeds`.
        batch_size: prompts per pipeline call.
        before_batch: called just before each pipeline call.
        by_prompt: give the prompts to the pipeline; False for one that takes none, whose arguments say what each of the
            ``prompts``, then no more than labels, stands for.
        call_kwargs: passed on to the pipeline, for example ``guidance_scale`` or ``num_inference_steps``.

    Raises:
        ValueError: empty or malformed prompts or seeds, a batch size below one, or an argument that this function
            fills in itself or the pipeline does not take.
    """
    seed_list = resolve_seeds(prompts, seeds)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for reserved in ("prompt", "generator", "return_dict"):
        if reserved in call_kwargs:
            raise ValueError(
                f"{reserved!r} is set here: give prompts and seeds instead of pipeline argument {reserved!r}"
            )
    if by_prompt and not takes_prompts(pipeline):
        raise ValueError(f"{type(pipeline).__name__} takes no prompt: only text-conditioned pipelines can be evaluated")
    check_call_arguments(pipeline, call_kwargs)
    outputs = []
    with isolated_rng(seed_list[0]), undisturbed(pipeline), torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seed_list[start : start + batch_size]]
            if before_batch is not None:
                before_batch()
            logger.debug("pipeline call for prompts %d to %d of %d", start, start + len(batch) - 1, len(prompts))
            conditions = {"prompt": batch, **call_kwargs} if by_prompt else call_kwargs
            outputs.append(pipeline(generator=generators, return_dict=False, **conditions)[0])
    return outputs
