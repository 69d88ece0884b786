"""How long a denoising step takes and what it needs: in full precision, simulated and packed, on the present device.

One call of the denoiser is recorded from the pipeline in use, then repeated in every form. The forms follow each other
in one process on one model: full precision, then ``mtq.quantize`` on that call, then ``modelopt_ext.compress``.
"""

from __future__ import annotations

import dataclasses
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import nn

import modelopt_ext
from modelopt_ext.sensitivity import quantized_layers

from .calibration import default_prompts
from .evaluation import PeakMemory, Trajectories, denoiser_of, sample_trajectories
from .evaluation.calls import execution_device, run_call
from .quantization_report import model_bytes, model_class
from .versions import versions

__all__ = ["FORMS", "Benchmark", "FormCost", "benchmark_forms"]

FORMS = ("full", "simulated", "packed")
WARM_UP = 3  # untimed calls: allocations, kernels that are compiled at first use


@dataclasses.dataclass(frozen=True)
class FormCost:
    """One form of the denoiser.

    Attributes:
        form: ``"full"``, ``"simulated"`` or ``"packed"``.
        seconds: median of a step of the whole batch.
        fastest: of the timed steps, seconds.
        bytes: of parameters and buffers, quantizers left out.
        peak: bytes that a step takes at most beside what was there: activations and workspaces.
    """

    form: str
    seconds: float
    fastest: float
    bytes: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """All forms on one device.

    Attributes:
        denoiser: class.
        device: name of the processor.
        dtype: of the denoiser in full precision.
        shape: of its first input.
        repeats: timed steps.
        forms: in the order measured.
        versions: of the packages.
    """

    denoiser: str
    device: str
    dtype: str
    shape: tuple[int, ...]
    repeats: int
    forms: tuple[FormCost, ...]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """A few lines for people."""
        head = f"{self.denoiser}, {'x'.join(map(str, self.shape))}, {self.dtype}, {self.device}"
        lines = [head, f"{'form':<12}{'step, ms':>12}{'fastest, ms':>13}{'weights, MiB':>14}{'peak, MiB':>12}"]
        for form in self.forms:
            mebibytes = (f"{size / 2**20:.1f}" for size in (form.bytes, form.peak))
            weights, peak = mebibytes
            lines.append(
                f"{form.form:<12}{form.seconds * 1e3:>12.2f}{form.fastest * 1e3:>13.2f}{weights:>14}{peak:>12}"
            )
        return "\n".join(lines)


def benchmark_forms(
    pipeline: Any,
    config: Mapping[str, Any],
    *,
    forms: Sequence[str] = FORMS,
    repeats: int = 10,
    batch_size: int = 1,
    seed: int = 0,
    compiled: bool = False,
    **call_kwargs: Any,
) -> Benchmark:
    """Measure a pipeline's denoiser; it is quantized in place.

    Args:
        pipeline: in full precision.
        config: a ModelOpt config.
        forms: which of :data:`FORMS` to measure.
        repeats: timed steps of each form.
        batch_size: prompts in the recorded call.
        seed: of its first prompt.
        compiled: compile the packed denoiser before it is timed.
        call_kwargs: of the pipeline as in use: sizes, guidance.

    Raises:
        ValueError: unknown forms, a wrong count, or a model that is quantized already or has no packed form.
    """
    if unknown := sorted(set(forms) - set(FORMS)):
        raise ValueError(f"there are no forms {', '.join(unknown)}: write some of {', '.join(FORMS)}")
    if repeats < 1 or batch_size < 1:
        raise ValueError("repeats and batch_size must be at least 1")
    denoiser = denoiser_of(pipeline)
    if quantized_layers(denoiser):
        raise ValueError(f"the {type(denoiser).__name__} is quantized already: give the original, which has all forms")
    calls = sample_trajectories(
        pipeline,
        default_prompts(batch_size),
        seeds=seed,
        batch_size=batch_size,
        steps=[0],
        **{"num_inference_steps": 2, **call_kwargs},
    )
    device = execution_device(denoiser)
    dtype = next(parameter.dtype for parameter in denoiser.parameters())
    found = []
    for form in FORMS:
        if form == "simulated" and {"simulated", "packed"} & set(forms):
            mtq.quantize(denoiser, dict(config), calls.forward_loop)
        if form == "packed" and "packed" in forms:
            modelopt_ext.compress(denoiser)
            gc.collect()
        if form in forms:
            step = _step(denoiser, calls, compiled and form == "packed")
            found.append(_measure(form, denoiser, step, device, repeats))
    return Benchmark(
        denoiser=model_class(denoiser),
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        shape=_shape(calls),
        repeats=repeats,
        forms=tuple(found),
        versions=versions(),
    )


def _step(denoiser: nn.Module, calls: Trajectories, compiled: bool) -> Callable[[], object]:
    model = torch.compile(denoiser) if compiled else denoiser
    call = calls[0]
    return lambda: run_call(model, call)  # type: ignore[arg-type]


@torch.no_grad()
def _measure(
    form: str, denoiser: nn.Module, step: Callable[[], object], device: torch.device, repeats: int
) -> FormCost:
    for _ in range(WARM_UP):
        step()
    seconds = [_timed(step, device) for _ in range(repeats)]
    with PeakMemory(device) as memory:
        step()
    return FormCost(form, statistics.median(seconds), min(seconds), model_bytes(denoiser), memory.peak - memory.before)


def _timed(step: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _shape(calls: Trajectories) -> tuple[int, ...]:
    tensor = next(value for value in calls[0].inputs.values() if isinstance(value, torch.Tensor))
    return tuple(tensor.shape)
