"""Applying a correction to a pipeline, and taking it back.

At the *denoiser*: a forward hook, which reads the timestep from the call. Works under any pipeline and any scheduler,
exact under guidance of any kind, since it corrects before guidance mixes.

At the *scheduler*: ``step`` corrects the model output first. For denoisers that are no PyTorch modules (ONNX Runtime,
TensorRT). Exact for guidance of the form ``u + s (c - u)``; where a pipeline rescales the guided output afterwards
(``guidance_rescale``), the correction comes after that and is close, not equal. The scheduler's class is a subclass
made on the fly that bears its parent's name and module, so that diffusers saves, copies and checks it like the parent;
``save_pretrained`` writes the plain scheduler and the correction stays a file of its own.

There is no third way, folding a correction that is constant over the timesteps into the last Linear: where a constant
correction is the best one, it is worth hundredths of a decibel (``examples/affine_correction.py`` prints the choice).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..evaluation.trajectories import DENOISER_NAMES, TIMESTEP_NAMES, denoiser_of, first_tensor
from .affine import AffineCorrection
from .fit import type_name


class Handle:
    """An applied correction: ``remove()`` takes it back; as a context manager it does so at the end of the block."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Restore what was there before, bit for bit; a second call does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class AffineHook:
    """Forward hook (with keyword arguments) that corrects the first output of a denoiser."""

    def __init__(self, correction: AffineCorrection, signature: inspect.Signature) -> None:
        self.correction = correction
        self.signature = signature

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output with its first tensor corrected, in the container it came in."""
        corrected = self.correction.apply(first_tensor(output), self._timestep(args, kwargs))
        if isinstance(output, Tensor):
            return corrected
        if isinstance(output, dict):  # diffusers' output classes are dictionaries, too
            output[next(iter(output))] = corrected
            return output
        if hasattr(output, "_fields"):
            return type(output)(corrected, *output[1:])
        return type(output)([corrected, *output[1:]])

    def _timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = {**kwargs, **self.signature.bind_partial(*args).arguments} if args else kwargs
        value = next((arguments[name] for name in TIMESTEP_NAMES if arguments.get(name) is not None), None)
        if value is None:
            raise ValueError(
                f"the denoiser was called without {' or '.join(TIMESTEP_NAMES)}: the correction needs the timestep; "
                f"it was given {sorted(arguments)}"
            )
        return value


def correct_denoiser(denoiser: nn.Module, correction: AffineCorrection) -> Handle:
    """Correct the outputs of a denoiser from now on. Its weights and state dict stay as they are.

    Args:
        denoiser: the quantized denoiser that the correction was fitted to.
        correction: what :func:`fit_affine_correction` or :meth:`AffineCorrection.load` returned.

    Raises:
        ValueError: another class of denoiser, or one that is corrected already.
    """
    _check_denoiser(type_name(denoiser), correction)
    if any(isinstance(hook, AffineHook) for hook in denoiser._forward_hooks.values()):
        raise ValueError("the denoiser is corrected already: remove() that correction first")
    if correction.is_identity:
        return Handle(lambda: None)
    hook = AffineHook(correction, inspect.signature(denoiser.forward))
    return Handle(denoiser.register_forward_hook(hook, with_kwargs=True).remove)


def correct_scheduler(scheduler: Any, correction: AffineCorrection, *, any_scheduler: bool = False) -> Any:
    """Return a copy of a scheduler whose ``step`` corrects the model output first. The given one stays as it is.

    Args:
        scheduler: a diffusers scheduler.
        correction: fitted with ``scheduler=``.
        any_scheduler: also take a scheduler of another class than the correction was fitted with. It must count time
            and define the model output (velocity, noise, ...) like that one.

    Raises:
        ValueError: a scheduler that the correction cannot be used with; the message says why.
    """
    kind = type(scheduler).__name__
    if getattr(type(scheduler), "affine_correction", None) is not None:
        raise ValueError(f"this {kind} is corrected already: use the scheduler it was made from")
    parameters = list(inspect.signature(scheduler.step).parameters) if hasattr(scheduler, "step") else []
    if parameters[:2] != ["model_output", "timestep"]:
        raise ValueError(f"{kind} has no step(model_output, timestep, ...): correct the denoiser instead")
    if correction.clock is None:
        raise ValueError(
            f"the correction does not know how {kind} counts time: fit it with scheduler=pipeline.scheduler; if that "
            "was done, its timesteps are no linear time (log sigma): correct the denoiser instead"
        )
    if kind != correction.scheduler and not any_scheduler:
        raise ValueError(
            f"the correction was fitted with {correction.scheduler}, this is a {kind}: fit it again, correct the "
            "denoiser instead, or pass any_scheduler=True if both count time alike"
        )
    corrected = copy.deepcopy(scheduler)
    if not correction.is_identity:
        corrected.__class__ = _corrected_class(type(scheduler), correction)
    return corrected


def correct_pipeline(
    pipeline: Any, correction: AffineCorrection, *, at: Literal["denoiser", "scheduler"] = "denoiser"
) -> Handle:
    """Correct a diffusers pipeline from now on, or inside a ``with`` block.

    Args:
        pipeline: the pipeline with the quantized denoiser.
        correction: the correction.
        at: where: see the top of this file.

    Raises:
        ValueError: see :func:`correct_denoiser` and :func:`correct_scheduler`.
    """
    if at == "denoiser":
        return correct_denoiser(denoiser_of(pipeline), correction)
    if at != "scheduler":
        raise ValueError(f"at must be 'denoiser' or 'scheduler', got {at!r}")
    original = getattr(pipeline, "scheduler", None)
    if original is None:
        raise ValueError(f"{type(pipeline).__name__} has no scheduler: correct its denoiser")
    denoiser = next((c for c in (getattr(pipeline, n, None) for n in DENOISER_NAMES) if isinstance(c, nn.Module)), None)
    if denoiser is not None:
        _check_denoiser(type_name(denoiser), correction)
        if any(isinstance(hook, AffineHook) for hook in denoiser._forward_hooks.values()):
            raise ValueError("the denoiser is corrected already: remove() that correction first")
    pipeline.scheduler = correct_scheduler(original, correction)
    return Handle(lambda: setattr(pipeline, "scheduler", original))


def _check_denoiser(name: str, correction: AffineCorrection) -> None:
    if name != correction.denoiser:
        raise ValueError(
            f"the correction was fitted to a {correction.denoiser}, this denoiser is a {name}: "
            "fit_affine_correction on this one"
        )


def _corrected_class(parent: type, correction: AffineCorrection) -> type:
    """A subclass of a scheduler's class with its name and module, whose ``step`` corrects first."""
    original: Any = parent.step  # type: ignore[attr-defined]
    assert correction.clock is not None
    clock = correction.clock

    @functools.wraps(original)  # pipelines read step's signature to know which arguments it takes
    def step(self: Any, model_output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        time = torch.as_tensor(timestep, device=model_output.device, dtype=torch.float32)
        return original(self, correction.apply(model_output, clock.denoiser_time(time)), timestep, *args, **kwargs)

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        # By name, pickle would find the parent instead.
        return _rebuild, (parent, correction, dict(vars(self)))

    members = {
        "step": step,
        "__reduce_ex__": reduce,
        "affine_correction": correction,
        "__module__": parent.__module__,
        "__qualname__": parent.__qualname__,
        "__doc__": parent.__doc__,
    }
    return type(parent.__name__, (parent,), members)


def _rebuild(parent: type, correction: AffineCorrection, state: dict[str, Any]) -> Any:
    """Unpickle or copy a corrected scheduler."""
    scheduler: Any = object.__new__(parent)
    vars(scheduler).update(state)
    scheduler.__class__ = _corrected_class(parent, correction)
    return scheduler
