"""Recorded calls of a model: one call as a value, a sequence of them, and making them again."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_ext.positions import at

from .sampling import evaluation_mode


@dataclasses.dataclass(frozen=True)
class DenoiserCall:
    """One forward call of a denoiser, or of another component of a pipeline.

    Attributes:
        inputs: the call's arguments by parameter name; tensors on the CPU, in the dtype the pipeline passed.
        output: the first output, usually (B, C, H, W) or (B, tokens, C), on the CPU; B includes guidance's
            unconditional half. For flow-matching models this is the velocity; of a ControlNet the last residual.
        timestep: the largest entry of the timestep argument, in the denoiser's own units; NaN for components that get
            none (text encoders).
        step: index of the denoising step within the trajectory, from 0.
        batch: index of the pipeline call, from 0, over all processes: calls with the same one are of the same prompts.
    """

    inputs: dict[str, Any]
    output: Tensor
    timestep: float
    step: int
    batch: int = 0


class RecordedCalls(ABC):
    """Calls of a model in the order in which they happened, wherever they are kept."""

    @abstractmethod
    def __iter__(self) -> Iterator[DenoiserCall]: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def timesteps(self) -> tuple[float, ...]:
        """The distinct timesteps, from noise to image."""

    def replay(self, denoiser: nn.Module) -> Iterator[tuple[DenoiserCall, Tensor]]:
        """Call ``denoiser`` on every recorded input, in order, in eval mode and without gradients.

        Args:
            denoiser: a module with the recorded denoiser's parameters, quantized or not, on any device.

        Yields:
            The recorded call and the first output of ``denoiser``, in its own dtype and on its own device.
        """
        for call in self:
            # Calibration knows rows by the batch that they are of, whichever process has it.
            with at(call.batch):
                output = run_call(denoiser, call)
            yield call, output

    def forward_loop(self, denoiser: nn.Module) -> None:
        """Run the denoiser over all recorded inputs: the ``forward_loop`` argument of ``mtq.quantize``.

        Args:
            denoiser: the model that is being calibrated.
        """
        for _ in self.replay(denoiser):
            pass


@dataclasses.dataclass(frozen=True)
class Trajectories(RecordedCalls, Sequence[DenoiserCall]):
    """Recorded denoiser calls in the order in which they happened; an immutable sequence of :class:`DenoiserCall`."""

    calls: tuple[DenoiserCall, ...]

    def __post_init__(self) -> None:
        if not self.calls:
            raise ValueError("no denoiser calls: record at least one with sample_trajectories")

    def __iter__(self) -> Iterator[DenoiserCall]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: Any) -> Any:
        return self.calls[index]

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The distinct timesteps, from noise to image."""
        return distinct_timesteps(call.timestep for call in self.calls)


def distinct_timesteps(timesteps: Iterable[float]) -> tuple[float, ...]:
    """Each once, from noise to image, without the NaN of calls that have none."""
    return tuple(sorted({timestep for timestep in timesteps if not math.isnan(timestep)}, reverse=True))


def run_call(denoiser: nn.Module, call: DenoiserCall) -> Tensor:
    """Make one recorded call again, in eval mode and without gradients.

    Args:
        denoiser: with the recorded one's parameters, on any device.
        call: its inputs are copied: a model that writes to them does not change the recording.

    Returns:
        The output, as recorded, in the model's own dtype and on its own device.
    """
    device = execution_device(denoiser)
    inputs = map_tensors(call.inputs, lambda tensor: tensor.to(device, copy=True))
    with evaluation_mode(denoiser), torch.no_grad():
        return kept_tensor(denoiser(**inputs))


def execution_device(module: nn.Module) -> torch.device:
    """Return the device a module computes on; with accelerate's offloading the weights themselves may lie elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a denoiser's output: a tensor, a tuple, or one of diffusers' output classes.

    Raises:
        ValueError: the first entry is not a tensor.
    """
    first = output
    if not isinstance(first, Tensor):
        first = next(iter(output.values())) if isinstance(output, dict) else output[0]
    if not isinstance(first, Tensor):
        raise ValueError(f"the denoiser's first output is a {type(first).__name__}, not a tensor")
    return first


def kept_tensor(output: Any) -> Tensor:
    """Return the tensor of a model's output that a recording keeps: the first one, or of a list the last.

    A ControlNet returns a list of residuals, the last of which all its blocks had a part in; its first one comes before
    them. Outputs may nest; the output classes of diffusers and transformers are dicts.

    Raises:
        ValueError: there is something else in that place.
    """
    kept = output
    while isinstance(kept, (dict, list, tuple)) and kept:
        kept = next(iter(kept.values())) if isinstance(kept, dict) else kept[-1 if isinstance(kept, list) else 0]
    if not isinstance(kept, Tensor):
        raise ValueError(f"the model's output begins with a {type(kept).__name__}, not a tensor: it can't be recorded")
    return kept


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Rebuild nested dicts, lists and tuples with ``function`` applied to every tensor in them."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
