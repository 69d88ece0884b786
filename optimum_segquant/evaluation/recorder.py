"""Hooks that keep what a component of a running pipeline reads and returns."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .calls import DenoiserCall, kept_tensor

TIMESTEP_NAMES = ("timestep", "timesteps", "timestep_ratio")
"""Arguments that hold the timestep, in the order in which they are looked up."""


class StepClock:
    """Counts the denoising steps of a trajectory: a step begins whenever the timestep changes.

    Guidance may need several calls a step. Denoisers that follow each other in one trajectory (``transformer`` and
    ``transformer_2`` of Wan) share a clock.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a new trajectory."""
        self.step = -1
        self.timestep = math.nan

    def see(self, timestep: float) -> int:
        """The index of the step that a call with this timestep belongs to."""
        if timestep != self.timestep:
            self.timestep = timestep
            self.step += 1
        return self.step


class CallRecorder:
    """Records the calls of one component, trajectory by trajectory.

    Args:
        module: the component.
        kept: indices of the steps to keep.
        clock: shared with other components of the same trajectory.
        needs_timestep: refuse calls without a timestep. Components that know none (text encoders) have all their calls
            kept.
        on_step: called with the step's index before each call.
        label: of the component, for messages.
    """

    def __init__(
        self,
        module: nn.Module,
        kept: Iterable[int],
        *,
        clock: StepClock | None = None,
        needs_timestep: bool = True,
        on_step: Callable[[int], object] | None = None,
        label: str = "denoiser",
    ) -> None:
        self.module = module
        self.kept = frozenset(kept)
        self.clock = clock or StepClock()
        self.calls: list[DenoiserCall] = []
        self.batch = -1
        self._signature = inspect.signature(module.forward)
        self._needs_timestep = needs_timestep
        self._on_step = on_step
        self._label = label
        self._stored: dict[str, Tensor] = {}
        self._pending: tuple[dict[str, Any], float, int] | None = None

    def start(self, batch: int | None = None) -> None:
        """Begin a new trajectory.

        Args:
            batch: its number; by default the next.
        """
        self.batch = self.batch + 1 if batch is None else batch
        self.clock.reset()
        self._stored = {}
        self._pending = None

    def attach(self) -> Callable[[], None]:
        """Begin to watch; gives what ends it."""
        handles = [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after),
        ]

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the inputs."""
        inputs = _by_name(self._signature, args, kwargs)
        timestep = _timestep(inputs)
        step = 0
        if timestep is not None:
            step = self.clock.see(timestep)
        elif self._needs_timestep:
            raise ValueError(
                f"the {self._label} has no argument {' or '.join(TIMESTEP_NAMES)}; it was given {sorted(inputs)}"
            )
        self._pending = None
        if self._on_step is not None:
            self._on_step(step)
        if timestep is None or step in self.kept:
            kept = {name: self._store(name, value) for name, value in inputs.items()}
            self._pending = kept, math.nan if timestep is None else timestep, step

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Store the output beside the inputs of the same call."""
        if self._pending is None:
            return
        inputs, timestep, step = self._pending
        result = kept_tensor(output).detach().to("cpu", copy=True)
        if not torch.isfinite(result).all():
            raise FloatingPointError(
                f"the full-precision {self._label} returned NaN or infinity at step {step} "
                f"(timestep {timestep:g}): nothing can be measured against it. Run the pipeline in a wider dtype."
            )
        self.calls.append(DenoiserCall(inputs, result, timestep, step, self.batch))
        self._pending = None

    def _store(self, path: str, value: Any) -> Any:
        """Copy to the CPU; text embeddings, the same in every step of a trajectory, are kept once."""
        if isinstance(value, Tensor):
            copy = value.detach().to("cpu", copy=True)
            before = self._stored.get(path)
            if before is not None and _identical(before, copy):
                return before
            self._stored[path] = copy
            return copy
        if isinstance(value, dict):
            return {key: self._store(f"{path}/{key}", item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self._store(f"{path}/{index}", item) for index, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by parameter name, so that a replay needs keywords only."""
    arguments = signature.bind(*args, **kwargs).arguments
    named: dict[str, Any] = {}
    for name, value in arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise ValueError(f"the denoiser takes {name!r} by position only: its calls cannot be replayed by keyword")
        else:
            named[name] = value
    return named


def _timestep(inputs: dict[str, Any]) -> float | None:
    value = next((inputs[name] for name in TIMESTEP_NAMES if inputs.get(name) is not None), None)
    if value is None:
        return None
    return float(value.max()) if isinstance(value, Tensor) else float(value)


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
