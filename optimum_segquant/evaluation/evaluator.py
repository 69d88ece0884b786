"""One call that measures everything: images, trajectories and layers of a quantized pipeline against full precision.

    evaluation = evaluate(pipe, quantized_pipe, prompts, seeds=0, num_inference_steps=28, guidance_scale=4.5)
    print(evaluation.summary())

Where memory holds one pipeline only, sample full precision first and quantize in place:

    samples = sample_reference(pipe, prompts, seeds=0, num_inference_steps=28)
    mtq.quantize(pipe.transformer, config, loop)
    evaluation = evaluate_samples(samples, pipe)
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from tqdm import tqdm

from modelopt_ext import plan_of
from modelopt_ext.sensitivity import SensitivityTable, measure, quantized_layers

from ..layer_formats import layer_formats
from ..versions import versions
from .facts import PipelineFacts, denoiser_component, facts_of
from .images import generate_images
from .latents import LatentStep, StepRecorder, latent_errors
from .metrics import velocity_sqnr
from .networks import Network, Weights
from .perceptual import METRICS, MetricResult, check_metrics, load_networks, perceptual_metrics
from .result import Evaluation
from .sampling import resolve_seeds
from .trajectories import Trajectories, execution_device, sample_trajectories

logger = logging.getLogger(__name__)

RECORDED_PROMPTS = 8
RECORDED_STEPS = 8
LAYER_CALLS = 8

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SamplingTask:
    """What both pipelines have to do.

    Attributes:
        prompts, seeds: one image each.
        batch_size: prompts per pipeline call.
        call: the other arguments of the pipeline calls.
        recorded: of how many of the first prompts latents are kept.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    batch_size: int
    call: Mapping[str, Any]
    recorded: int


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a pipeline made of a task.

    Attributes:
        task: prompts, seeds and arguments.
        images: (P, 3, H, W) float32 in [0, 1], on the CPU.
        latents: of the first prompts after every step; empty: see ``missing``.
        trajectories: recorded calls of the denoiser; None: not recorded, or see ``missing``.
        facts: about the pipeline.
        missing: reasons, by ``"latents"`` and ``"trajectories"``.
    """

    task: SamplingTask
    images: Tensor = dataclasses.field(repr=False)
    latents: tuple[LatentStep, ...] = dataclasses.field(repr=False)
    trajectories: Trajectories | None = dataclasses.field(repr=False)
    facts: PipelineFacts
    missing: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Measurement:
    """How samples are compared; see :func:`evaluate` for its fields."""

    metrics: Sequence[str]
    networks: Mapping[str, Network | MetricResult]
    device: str
    layer_calls: int
    progress: bool

    @classmethod
    def prepared(
        cls, metrics: Sequence[str], weights: Weights, device: str, layer_calls: int, progress: bool
    ) -> _Measurement:
        """Check the arguments and load the networks."""
        names = check_metrics(metrics)
        _check_counts(layer_calls=layer_calls)
        return cls(names, load_networks(names, weights, device), device, layer_calls, progress)


def evaluate(
    reference: Any,
    quantized: Any,
    prompts: Sequence[str],
    *,
    seeds: int | Sequence[int] = 0,
    num_inference_steps: int = 20,
    batch_size: int = 4,
    metrics: Sequence[str] = METRICS,
    weights: Weights = None,
    device: str = "cpu",
    recorded_prompts: int = RECORDED_PROMPTS,
    recorded_steps: int = RECORDED_STEPS,
    layer_calls: int = LAYER_CALLS,
    progress: bool = True,
    **call_kwargs: Any,
) -> Evaluation:
    """Measure a quantized pipeline against its full-precision original, on prompts that calibration has not seen.

    Works for denoisers with simulated quantization, packed ones, and Optimum's ONNX Runtime pipelines, of which only
    images and latents can be compared. A part that can't be measured is left out with its reason; nothing that was
    measured is lost for it.

    Args:
        reference: the full-precision pipeline.
        quantized: the quantized one; it must not share its denoiser with ``reference``.
        prompts: P prompts.
        seeds: one seed per prompt, or one integer ``s`` for ``s, s + 1, ...``.
        num_inference_steps: denoising steps of every image.
        batch_size: prompts per pipeline call.
        metrics: which metrics of images to compute.
        weights: a directory with pretrained networks for LPIPS, FID and CLIP score, or a mapping from the metric's name
            to a path or a module; see :mod:`.networks`. By default torch's and Hugging Face's caches, then the network.
        device: where those networks compute, e.g. ``"cuda"``.
        recorded_prompts: how many prompts' denoiser calls and latents are recorded, rounded up to whole batches.
        recorded_steps: how many denoising steps, spread evenly, have their calls recorded.
        layer_calls: on how many of the recorded calls layers are compared one by one.
        progress: show bars that count denoising steps.
        call_kwargs: passed on to both pipelines, for example ``guidance_scale`` or ``height``.

    Raises:
        ValueError: malformed arguments, pipelines that share a denoiser, or a damaged file among ``weights``.
        FileNotFoundError: ``weights`` names something that is not there.
        FloatingPointError: an image with NaN or infinite pixels.
    """
    denoiser = denoiser_component(reference)
    if denoiser is denoiser_component(quantized):
        raise ValueError(
            "both pipelines have the same denoiser: give the full-precision pipeline a copy of its own, or call "
            "sample_reference before quantizing in place and evaluate_samples after it"
        )
    _check_counts(
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        recorded_prompts=recorded_prompts,
        recorded_steps=recorded_steps,
    )
    resolve_seeds(prompts, seeds)  # before the networks are loaded
    measurement = _Measurement.prepared(metrics, weights, device, layer_calls, progress)
    samples = sample_reference(
        reference,
        prompts,
        seeds=seeds,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        recorded_prompts=recorded_prompts,
        recorded_steps=recorded_steps,
        progress=progress,
        **call_kwargs,
    )
    return _evaluate(samples, quantized, denoiser, measurement)


def sample_reference(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seeds: int | Sequence[int] = 0,
    num_inference_steps: int = 20,
    batch_size: int = 4,
    recorded_prompts: int = RECORDED_PROMPTS,
    recorded_steps: int = RECORDED_STEPS,
    progress: bool = True,
    **call_kwargs: Any,
) -> Samples:
    """Sample images from the full-precision pipeline and record latents and denoiser calls of the first prompts.

    Args:
        pipeline: the full-precision pipeline.
        prompts, seeds, num_inference_steps, batch_size: see :func:`evaluate`.
        recorded_prompts, recorded_steps, progress, call_kwargs: likewise.

    Raises:
        ValueError, FloatingPointError: see :func:`evaluate`.
    """
    _check_counts(batch_size=batch_size, recorded_prompts=recorded_prompts, recorded_steps=recorded_steps)
    seed_list = tuple(resolve_seeds(prompts, seeds))
    call = {"num_inference_steps": num_inference_steps, **call_kwargs}
    # Whole batches: arguments such as negative_prompt may be lists of that length.
    recorded = min(len(prompts), -(-recorded_prompts // batch_size) * batch_size)
    samples = _sample(pipeline, SamplingTask(tuple(prompts), seed_list, batch_size, call, recorded), progress)
    trajectories, missing = None, dict(samples.missing)
    if samples.facts.form == "ONNX Runtime":
        missing["trajectories"] = "the calls of a denoiser in ONNX Runtime can't be recorded"
    else:
        trajectories = sample_trajectories(
            pipeline,
            prompts[:recorded],
            seeds=seed_list[:recorded],
            steps=min(recorded_steps, num_inference_steps),
            batch_size=batch_size,
            **call,
        )
    return dataclasses.replace(samples, trajectories=trajectories, missing=missing)


def evaluate_samples(
    reference: Samples,
    quantized: Any,
    *,
    full_precision: nn.Module | None = None,
    metrics: Sequence[str] = METRICS,
    weights: Weights = None,
    device: str = "cpu",
    layer_calls: int = LAYER_CALLS,
    progress: bool = True,
) -> Evaluation:
    """Measure a quantized pipeline against samples of its original: same prompts, seeds and arguments.

    Args:
        reference: from :func:`sample_reference`.
        quantized: the quantized pipeline; it may be the one that was sampled, quantized in place.
        full_precision: a full-precision denoiser on the same device, for the errors of single layers; without it they
            are missing.
        metrics, weights, device, layer_calls, progress: see :func:`evaluate`.

    Raises:
        ValueError, FileNotFoundError, FloatingPointError: see :func:`evaluate`.
    """
    measurement = _Measurement.prepared(metrics, weights, device, layer_calls, progress)
    return _evaluate(reference, quantized, full_precision, measurement)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _sample(pipeline: Any, task: SamplingTask, progress: bool) -> Samples:
    if "callback_on_step_end" in task.call:
        raise ValueError("callback_on_step_end is set here: it records the latents")
    reason = StepRecorder.why_not(pipeline)
    count, name = len(task.prompts), type(pipeline).__name__
    steps = task.call["num_inference_steps"] * -(-count // task.batch_size)
    with tqdm(total=steps, desc=f"Sampling {name}", unit="step", disable=not progress or bool(reason)) as bar:
        recorder = StepRecorder(task.recorded, bar)
        callback = {} if reason else {"callback_on_step_end": recorder}
        start = time.perf_counter()
        images = generate_images(
            pipeline, task.prompts, seeds=task.seeds, batch_size=task.batch_size, **task.call, **callback
        )
        seconds = (time.perf_counter() - start) / count
    facts = facts_of(pipeline, seconds, recorder.seconds_per_step, min(task.batch_size, count))
    logger.info("sampled %d images with %s (%s): %.2f s each", count, name, facts.form, seconds)
    return Samples(task, images, recorder.steps(), None, facts, {"latents": reason} if reason else {})


def _evaluate(reference: Samples, quantized: Any, full_precision: Any, measurement: _Measurement) -> Evaluation:
    denoiser = denoiser_component(quantized)
    task, calls = reference.task, reference.trajectories
    samples = _sample(quantized, task, measurement.progress)
    parts = _Parts({**samples.missing, **reference.missing}, samples.facts)
    latents = parts.measured("latents", lambda: latent_errors(reference.latents, samples.latents))
    velocity = parts.measured("velocity", lambda: velocity_sqnr(denoiser, _present(calls)))
    layers = parts.measured(
        "layers", lambda: _layer_errors(full_precision, denoiser, _present(calls), measurement.layer_calls)
    )
    return Evaluation(
        prompts=task.prompts,
        seeds=task.seeds,
        call=_plain({"batch_size": task.batch_size, **task.call}),
        reference=reference.facts,
        quantized=samples.facts,
        metrics=_metrics(samples.images, reference.images, task.prompts, measurement),
        velocity=velocity,
        layers=layers,
        latents=latents,
        formats=layer_formats(denoiser) if isinstance(denoiser, nn.Module) else {},
        plan=plan_of(denoiser) if isinstance(denoiser, nn.Module) else None,
        missing=parts.missing,
        versions=versions(),
        reference_images=reference.images,
        images=samples.images,
    )


class _Parts:
    """Measures part by part and keeps the reason for each that can't be measured."""

    def __init__(self, missing: Mapping[str, str], facts: PipelineFacts) -> None:
        self.missing = {name: missing[name] for name in ("latents",) if name in missing}
        reason = missing.get("trajectories", "")
        if facts.form == "ONNX Runtime":
            reason = "the denoiser runs in ONNX Runtime: evaluate the quantized PyTorch pipeline before its export"
        if reason:
            self.missing |= {"velocity": reason, "layers": reason}

    def measured(self, name: str, measure_part: Callable[[], T]) -> T | None:
        if name in self.missing:
            return None
        try:
            return measure_part()
        except Exception as error:  # images were sampled for minutes or hours: they are not lost for this
            expected = isinstance(error, ValueError)
            logger.warning("%s could not be measured: %s", name, error, exc_info=not expected)
            text = " ".join(str(error).split())
            self.missing[name] = text if expected else f"{type(error).__name__}: {text}"
            return None


def _present(trajectories: Trajectories | None) -> Trajectories:
    if trajectories is None:
        raise ValueError("no calls of the full-precision denoiser were recorded")
    return trajectories


def _layer_errors(full_precision: Any, quantized: nn.Module, calls: Trajectories, count: int) -> SensitivityTable:
    """Every quantized layer against its original, on what the original reads in some of the recorded calls."""
    if full_precision is None:
        raise ValueError("no full-precision denoiser: use evaluate with both pipelines, or give full_precision")
    if not quantized_layers(quantized):
        raise ValueError("the denoiser holds no layer that ModelOpt or SegQuant quantized")
    devices = {execution_device(full_precision), execution_device(quantized)}
    stored = {p.device for module in (full_precision, quantized) for p in module.parameters()}
    if len(devices | stored) > 1:
        raise ValueError(
            "layers are compared one by one, which needs both denoisers on one device, not offloaded; they are on "
            + ", ".join(sorted(map(str, devices | stored)))
        )
    # The middles of equal spans, as everywhere: the first and last calls are the most peculiar ones.
    count = min(count, len(calls))
    chosen = Trajectories(tuple(calls[(2 * i + 1) * len(calls) // (2 * count)] for i in range(count)))
    return measure(full_precision, quantized, chosen.forward_loop, batches=count, local_only=True)


def _metrics(
    images: Tensor, reference: Tensor, prompts: Sequence[str], measurement: _Measurement
) -> dict[str, MetricResult]:
    if images.shape != reference.shape:
        sizes = " and ".join(f"{t.shape[-1]} x {t.shape[-2]}" for t in (reference, images))
        reason = f"the pipelines give images of {sizes} pixels: pass height and width"
        return {name: MetricResult(skipped=reason) for name in measurement.metrics}
    return perceptual_metrics(
        images,
        reference,
        prompts,
        metrics=measurement.metrics,
        networks=measurement.networks,
        device=measurement.device,
    )


def _plain(value: Any) -> Any:
    """Call arguments as JSON types; tensors and other objects by what they are."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"<{type(value).__name__}>"
