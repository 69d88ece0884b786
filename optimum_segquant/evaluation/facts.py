"""What a pipeline is: its classes, the form of its denoiser, how many bytes that takes and how long a step lasts."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any, Literal

import torch
from torch import nn

from ..quantization_report import model_bytes
from .trajectories import DENOISER_NAMES, execution_device

Form = Literal["full precision", "simulated", "packed", "ONNX Runtime"]
"""Simulated quantization rounds, but computes and stores in full precision: its bytes and seconds say nothing."""


_PROVIDERS = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "cuda",
}


@dataclasses.dataclass(frozen=True)
class PipelineFacts:
    """A pipeline as it was measured.

    Attributes:
        pipeline, denoiser: class names.
        form: what the denoiser holds.
        dtype: of the denoiser's first floating-point parameter, e.g. "bfloat16"; empty for ONNX Runtime.
        device: where it computes, ``"cuda"`` or ``"cpu"``, a comma, and the processor or ONNX Runtime's provider.
        bytes: of the denoiser's weights: in memory, or of the ONNX file; None where unknown.
        seconds_per_image: wall time of sampling over the number of images, text encoders and decoder included.
        seconds_per_step: median of a denoising step of a whole batch; None where it could not be timed.
        batch_size: prompts a step works on.
    """

    pipeline: str
    denoiser: str
    form: Form
    dtype: str
    device: str
    bytes: int | None
    seconds_per_image: float
    seconds_per_step: float | None
    batch_size: int

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return dataclasses.asdict(self)


def denoiser_component(pipeline: Any) -> Any:
    """The denoiser, whatever it is: a module, or an ONNX Runtime session of Optimum's.

    Raises:
        ValueError: the pipeline has none.
    """
    components = getattr(pipeline, "components", None)
    if isinstance(components, dict):
        for name in DENOISER_NAMES:
            if components.get(name) is not None:
                return components[name]
    raise ValueError(
        f"expected a diffusers pipeline with a {' or '.join(DENOISER_NAMES)}, got {type(pipeline).__name__}"
    )


def form_of(denoiser: Any) -> Form:
    """In which form a denoiser is."""
    if not isinstance(denoiser, nn.Module):
        return "ONNX Runtime"
    from modelopt_ext import PackedLinear
    from modelopt_ext.sensitivity import quantized_layers

    layers = quantized_layers(denoiser).values()
    if any(isinstance(layer, PackedLinear) for layer in layers):
        return "packed"
    return "simulated" if layers else "full precision"


def facts_of(pipeline: Any, seconds_per_image: float, seconds_per_step: float | None, batch_size: int) -> PipelineFacts:
    """Describe a pipeline that was just sampled from."""
    denoiser = denoiser_component(pipeline)
    return PipelineFacts(
        pipeline=type(pipeline).__name__,
        denoiser=type(denoiser).__name__,
        form=form_of(denoiser),
        dtype=_dtype(denoiser),
        device=_device(denoiser),
        bytes=_bytes(denoiser),
        seconds_per_image=seconds_per_image,
        seconds_per_step=seconds_per_step,
        batch_size=batch_size,
    )


def _dtype(denoiser: Any) -> str:
    if not isinstance(denoiser, nn.Module):
        return ""
    floating = (p.dtype for p in denoiser.parameters() if p.is_floating_point())
    return str(next(floating, "")).removeprefix("torch.")


def _device(denoiser: Any) -> str:
    if not isinstance(denoiser, nn.Module):
        session = getattr(denoiser, "session", None)
        providers = session.get_providers() if session is not None else []
        return f"{_PROVIDERS.get(providers[0], 'other')}, {providers[0]}" if providers else ""
    device = execution_device(denoiser)
    if device.type == "cuda":
        return f"{device.type}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device.type}, {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def _bytes(denoiser: Any) -> int | None:
    if isinstance(denoiser, nn.Module):
        return model_bytes(denoiser)
    path = getattr(denoiser, "path", None)
    if path is None:
        return None
    from modelopt_ext.export.onnx import file_bytes

    return file_bytes(path)
