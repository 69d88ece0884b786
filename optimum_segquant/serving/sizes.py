"""Which sizes do a pipeline's models really see? The pipeline itself says: it is run on models that compute nothing.

An engine is built for ranges of sizes, and a batch for a number of rows. Both follow from how a pipeline is used: image
sizes, images per call, guidance (two rows an image), tokens of each text encoder, padding. Instead of deriving them for
every architecture, Optimum's pipeline is run for two steps with :class:`ServedSession` objects that only look at the
shapes of what they get and answer with zeros. That takes a moment, for a model of any size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .pipeline import ServedSession
from .served import NUMPY_TYPES
from .signature import ModelSignature, TensorSignature

__all__ = ["AxisRange", "record_sizes", "served_ranges"]

_EXPRESSION = re.compile(r"(?P<axis>\w+) (?P<operator>[*/+-]) (?P<number>\d+)")
"""A size that Optimum computes from another one, e.g. ``latent_height * 8``."""


@dataclass(frozen=True)
class AxisRange:
    """The sizes of one axis: smallest, usual and largest."""

    smallest: int
    usual: int
    largest: int

    def __iter__(self) -> Any:
        return iter((self.smallest, self.usual, self.largest))


def record_sizes(
    folder: Path,
    signatures: Mapping[str, ModelSignature],
    image_sizes: Sequence[tuple[int, int]],
    max_images: int,
    arguments: Mapping[str, Any],
) -> dict[str, dict[str, AxisRange]]:
    """Run a pipeline without its models, and see which sizes each of them gets.

    Args:
        folder: of the pipeline, with the models' configs.
        signatures: of the exported models, by component.
        image_sizes: (height, width) in pixels, the usual one first; empty for the pipeline's own size.
        max_images: of one call.
        arguments: further ones of the call, e.g. ``{"guidance_scale": 4.0, "max_sequence_length": 256}``.

    Returns:
        By component: the range of each dynamic axis.

    Raises:
        ValueError: the pipeline refuses a size or an argument, or calls none of its models.
    """
    shapes: dict[str, list[dict[str, tuple[int, ...]]]] = {component: [] for component in signatures}
    pipeline = _load(folder, signatures, shapes)
    for images in dict.fromkeys((1, max_images)):
        chosen: list[dict[str, Any]] = [{"height": height, "width": width} for height, width in image_sizes] or [{}]
        for size in chosen:
            _call(pipeline, images, {**size, **arguments})
    return {component: _ranges(component, signature, shapes[component]) for component, signature in signatures.items()}


def _load(folder: Path, signatures: Mapping[str, ModelSignature], shapes: Mapping[str, list[Any]]) -> Any:
    from optimum.onnxruntime import ORTDiffusionPipeline

    sessions = {
        f"{component}_session": ServedSession(
            signature, folder / component, _Recorder(signature, folder / component, shapes[component])
        )
        for component, signature in signatures.items()
    }
    pipeline = ORTDiffusionPipeline.from_pretrained(folder, export=False, **sessions)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _call(pipeline: Any, images: int, arguments: Mapping[str, Any]) -> None:
    try:
        pipeline(["a"] * images, num_inference_steps=2, output_type="np", **arguments)
    except Exception as error:
        told = ", ".join(f"{name}={value}" for name, value in arguments.items()) or "its own sizes"
        raise ValueError(
            f"{type(pipeline).__name__} does not run with {told}: {str(error).splitlines()[0]}; give image_sizes and "
            "call_arguments that it takes"
        ) from error


class _Recorder:
    """Keeps the shapes of a model's inputs and gives zeros of the shapes of its outputs."""

    def __init__(self, signature: ModelSignature, folder: Path, shapes: list[dict[str, tuple[int, ...]]]) -> None:
        self.signature = signature
        self.folder = folder
        self.shapes = shapes

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.shapes.append({name: array.shape for name, array in inputs.items()})
        axes = _axes(self.signature.inputs, self.shapes[-1])
        return {
            tensor.name: np.zeros(self._shape(tensor, axes), NUMPY_TYPES[tensor.data_type])
            for tensor in self.signature.outputs
        }

    def _shape(self, tensor: TensorSignature, axes: Mapping[str, int]) -> list[int]:
        sizes = [size if isinstance(size, int) else _size(size, axes) for size in tensor.shape]
        if tensor.name == "text_embeds":
            # (B, projection), which Optimum calls (B, sequence_length).
            sizes[-1] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["projection_dim"]
        return sizes


def _axes(tensors: Iterable[TensorSignature], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {
        axis: size
        for tensor in tensors
        for axis, size in zip(tensor.shape, shapes[tensor.name], strict=True)
        if isinstance(axis, str)
    }


def _size(axis: str, axes: Mapping[str, int]) -> int:
    if axis in axes:
        return axes[axis]
    if (match := _EXPRESSION.fullmatch(axis)) and match["axis"] in axes:
        value, number = axes[match["axis"]], int(match["number"])
        return {"*": value * number, "/": value // number, "+": value + number, "-": value - number}[match["operator"]]
    raise ValueError(f"nothing says how large the axis {axis} of an output is")


def _ranges(
    component: str, signature: ModelSignature, calls: Sequence[Mapping[str, tuple[int, ...]]]
) -> dict[str, AxisRange]:
    if not calls:
        raise ValueError(f"the pipeline never calls its {component}: leave it out of components")
    sizes: dict[str, list[int]] = {}
    for call in calls:
        for axis, size in _axes(signature.inputs, call).items():
            sizes.setdefault(axis, []).append(size)
    return {axis: AxisRange(min(found), found[0], max(found)) for axis, found in sizes.items()}


def served_ranges(ranges: Mapping[str, AxisRange], signature: ModelSignature) -> dict[str, AxisRange]:
    """The ranges for a model as it is served: batches start at one row, since requests may be cut and joined.

    Args:
        ranges: of the model as it was exported.
        signature: of the served file, which may have one timestep for each row where the exported one had one for all.
    """
    batch = [ranges[axis] for axis in signature.batch_axes if axis in ranges]
    found = {axis: ranges[axis] for axis in signature.axes if axis in ranges}
    for axis in signature.batch_axes:
        found[axis] = AxisRange(1, max(size.usual for size in batch), max(size.largest for size in batch))
    return found
