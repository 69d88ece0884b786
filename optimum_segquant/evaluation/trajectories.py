"""Denoising trajectories: what a pipeline's denoiser reads and returns while it generates images.

Diffusion activations depend strongly on the timestep and on guidance, so calibration and error measurement must see
the inputs of real sampling, not random tensors. :func:`sample_trajectories` hooks the denoiser, runs the pipeline as it
is used (guidance on, real prompts), and stores each call as keyword arguments plus the full-precision output.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .sampling import evaluation_mode, resolve_seeds, run_pipeline

logger = logging.getLogger(__name__)

DENOISER_NAMES = ("transformer", "unet")
"""Component names under which diffusers pipelines keep their denoiser."""

TIMESTEP_NAMES = ("timestep", "timesteps", "timestep_ratio")
"""Denoiser arguments that hold the timestep, in the order in which they are looked up."""


@dataclasses.dataclass(frozen=True)
class DenoiserCall:
    """One forward call of a denoiser.

    Attributes:
        inputs: the call's arguments by parameter name; tensors on the CPU, in the dtype the pipeline passed.
        output: the first output, usually (B, C, H, W) or (B, tokens, C), on the CPU; B includes guidance's
            unconditional half. For flow-matching models this is the velocity.
        timestep: the largest entry of the timestep argument, in the denoiser's own units.
        step: index of the denoising step within the trajectory, from 0.
        batch: index of the pipeline call, from 0: calls with the same one are of the same prompts.
    """

    inputs: dict[str, Any]
    output: Tensor
    timestep: float
    step: int
    batch: int = 0


@dataclasses.dataclass(frozen=True)
class Trajectories(Sequence[DenoiserCall]):
    """Recorded denoiser calls in the order in which they happened; an immutable sequence of :class:`DenoiserCall`."""

    calls: tuple[DenoiserCall, ...]

    def __post_init__(self) -> None:
        if not self.calls:
            raise ValueError("no denoiser calls: record at least one with sample_trajectories")

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: Any) -> Any:
        return self.calls[index]

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The distinct timesteps, from noise to image."""
        return tuple(sorted({call.timestep for call in self.calls}, reverse=True))

    def replay(self, denoiser: nn.Module) -> Iterator[tuple[DenoiserCall, Tensor]]:
        """Call ``denoiser`` on every recorded input, in order, in eval mode and without gradients.

        Args:
            denoiser: a module with the recorded denoiser's parameters, quantized or not, on any device.

        Yields:
            The recorded call and the first output of ``denoiser``, in its own dtype and on its own device.
        """
        device = execution_device(denoiser)
        for call in self.calls:
            # A fresh copy each time: a model that writes to its inputs must not change the recording.
            inputs = _map_tensors(call.inputs, lambda t: t.to(device, copy=True))
            with evaluation_mode(denoiser), torch.no_grad():
                output = first_tensor(denoiser(**inputs))
            yield call, output

    def forward_loop(self, denoiser: nn.Module) -> None:
        """Run the denoiser over all recorded inputs: the ``forward_loop`` argument of ``mtq.quantize``.

        Args:
            denoiser: the model that is being calibrated.
        """
        for _ in self.replay(denoiser):
            pass


def denoiser_of(pipeline: Any, name: str | None = None) -> nn.Module:
    """Return the denoiser of a diffusers pipeline.

    Args:
        pipeline: a diffusers pipeline.
        name: the component to take; by default ``transformer`` or ``unet``, whichever the pipeline has.

    Raises:
        ValueError: the pipeline has no such component, or it is not a ``torch.nn.Module``.
    """
    kind = type(pipeline).__name__
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        raise ValueError(f"expected a diffusers pipeline, got {kind}")
    names = DENOISER_NAMES if name is None else (name,)
    found = next((components[n] for n in names if components.get(n) is not None), None)
    if found is None:
        present = ", ".join(sorted(n for n, c in components.items() if isinstance(c, nn.Module))) or "none"
        raise ValueError(f"{kind} has no {' or '.join(names)}; its modules are: {present}. Name one with denoiser=...")
    if not isinstance(found, nn.Module):
        raise ValueError(f"the denoiser of {kind} is a {type(found).__name__}, not a torch.nn.Module")
    return found


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


def sample_trajectories(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seeds: int | Sequence[int] = 0,
    num_inference_steps: int = 20,
    steps: int | Sequence[int] | None = None,
    batch_size: int = 4,
    denoiser: str | None = None,
    **call_kwargs: Any,
) -> Trajectories:
    """Run the pipeline on the prompts and record its denoiser's calls.

    The images are not decoded. The pipeline, its scheduler and torch's global generators are afterwards as before, also
    when the pipeline raises.

    Args:
        pipeline: a diffusers pipeline with a ``transformer`` or ``unet``.
        prompts: the prompts; one trajectory each.
        seeds: one seed per prompt, or one integer ``s`` for ``s, s + 1, ...``.
        num_inference_steps: denoising steps of each trajectory.
        steps: which denoising steps to keep: ``None`` for all, a number for as many spread evenly from the first to the
            last, or the step indices themselves.
        batch_size: prompts per pipeline call.
        denoiser: the pipeline component to record; by default ``transformer`` or ``unet``.
        call_kwargs: passed on to the pipeline, for example ``guidance_scale`` or ``height``.

    Returns:
        The calls in order: batch after batch, within a batch step after step.

    Raises:
        ValueError: no denoiser, no prompts, impossible steps, or a denoiser that was never called.
        FloatingPointError: the full-precision denoiser returned NaN or infinity (the step is named).
    """
    module = denoiser_of(pipeline, denoiser)
    resolve_seeds(prompts, seeds)
    kept = _kept_steps(steps, num_inference_steps)
    if "output_type" in call_kwargs:
        raise ValueError("output_type is set here: trajectories end in latent space")
    recorder = _Recorder(module, kept)
    handles = [
        module.register_forward_pre_hook(recorder.before, with_kwargs=True),
        module.register_forward_hook(recorder.after),
    ]
    try:
        run_pipeline(
            pipeline,
            prompts,
            seeds=seeds,
            batch_size=batch_size,
            before_batch=recorder.start,
            num_inference_steps=num_inference_steps,
            output_type="latent",
            **call_kwargs,
        )
    finally:
        for handle in handles:
            handle.remove()
    if not recorder.calls:
        raise ValueError(
            f"{type(pipeline).__name__} never called its denoiser in steps {sorted(kept)}: it made "
            f"{recorder.step + 1} steps. Check steps, num_inference_steps and (image to image) strength."
        )
    logger.info("recorded %d denoiser calls of %d trajectories", len(recorder.calls), len(prompts))
    return Trajectories(tuple(recorder.calls))


class _Recorder:
    """The forward hooks of :func:`sample_trajectories` and the step counter between them."""

    def __init__(self, module: nn.Module, kept: frozenset[int]) -> None:
        self.signature = inspect.signature(module.forward)
        self.kept = kept
        self.calls: list[DenoiserCall] = []
        self.batch = -1

    def start(self) -> None:
        """Begin a new trajectory."""
        self.batch += 1
        self.step = -1
        self.timestep = math.nan
        self.stored: dict[str, Any] = {}
        self.pending: dict[str, Any] | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the inputs; a step begins whenever the timestep changes (guidance may need several calls a step)."""
        inputs = _by_name(self.signature, args, kwargs)
        timestep = _timestep(inputs)
        if timestep != self.timestep:
            self.timestep = timestep
            self.step += 1
        self.pending = None
        if self.step in self.kept:
            self.pending = {name: self._store(name, value) for name, value in inputs.items()}
            self.stored = self.pending

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Store the output beside the inputs of the same call."""
        if self.pending is None:
            return
        result = _to_cpu(first_tensor(output))
        if not torch.isfinite(result).all():
            raise FloatingPointError(
                f"the full-precision denoiser returned NaN or infinity at step {self.step} "
                f"(timestep {self.timestep:g}): nothing can be measured against it. Run the pipeline in a wider dtype."
            )
        self.calls.append(DenoiserCall(self.pending, result, self.timestep, self.step, self.batch))
        self.pending = None

    def _store(self, name: str, value: Any) -> Any:
        """Copy to the CPU; text embeddings, the same in every step of a trajectory, are kept once."""
        copy = _map_tensors(value, _to_cpu)
        before = self.stored.get(name)
        if isinstance(copy, Tensor) and isinstance(before, Tensor) and _identical(before, copy):
            return before
        return copy


def _kept_steps(steps: int | Sequence[int] | None, num_inference_steps: int) -> frozenset[int]:
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    if steps is None:
        return frozenset(range(num_inference_steps))
    if isinstance(steps, int):
        if not 1 <= steps <= num_inference_steps:
            raise ValueError(f"steps must be from 1 to num_inference_steps={num_inference_steps}, got {steps}")
        return frozenset(torch.linspace(0, num_inference_steps - 1, steps).round().int().tolist())
    wrong = [step for step in steps if not 0 <= step < num_inference_steps]
    if wrong or len(steps) == 0:
        raise ValueError(f"steps must be indices from 0 to {num_inference_steps - 1}, at least one; got {list(steps)}")
    return frozenset(steps)


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


def _timestep(inputs: dict[str, Any]) -> float:
    value = next((inputs[name] for name in TIMESTEP_NAMES if inputs.get(name) is not None), None)
    if value is None:
        raise ValueError(f"the denoiser has no argument {' or '.join(TIMESTEP_NAMES)}; it was given {sorted(inputs)}")
    return float(value.max()) if isinstance(value, Tensor) else float(value)


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Rebuild nested dicts, lists and tuples with ``function`` applied to every tensor in them."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
