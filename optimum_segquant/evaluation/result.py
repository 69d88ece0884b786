"""What an evaluation found: numbers as plain data, and the images they are of."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modelopt_ext import SegmentPlan
from modelopt_ext.sensitivity import LayerSensitivity, SensitivityTable

from ..layer_formats import LayerFormats
from .facts import PipelineFacts
from .latents import LatentError
from .metrics import VelocitySQNR
from .perceptual import MetricResult


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A quantized pipeline against its full-precision original, on the same prompts and seeds.

    Attributes:
        prompts, seeds: one image each.
        call: the other arguments of the pipeline calls, as plain data.
        reference, quantized: what the two pipelines are, how large and how quick.
        metrics: of the images, by name; skipped ones say why.
        velocity: of the denoiser's output on recorded inputs, per timestep; None: see ``missing``.
        layers: every quantized layer's own output on inputs that full precision feeds it; None: see ``missing``.
        latents: accumulated error after each step; None: see ``missing``.
        formats: of every quantized Linear, by module name; empty for ONNX Runtime.
        plan: the segments that the denoiser was quantized with, where it knows them.
        missing: the reason for each of ``velocity``, ``layers``, ``latents`` that is None.
        versions: of the packages.
        reference_images, images: (P, 3, H, W) float32 in [0, 1]; not part of :meth:`to_dict`.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    call: Mapping[str, Any]
    reference: PipelineFacts
    quantized: PipelineFacts
    metrics: Mapping[str, MetricResult]
    velocity: VelocitySQNR | None
    layers: SensitivityTable | None
    latents: tuple[LatentError, ...] | None
    formats: Mapping[str, LayerFormats]
    plan: SegmentPlan | None
    missing: Mapping[str, str]
    versions: Mapping[str, str]
    reference_images: Tensor = dataclasses.field(repr=False, compare=False)
    images: Tensor = dataclasses.field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON types. A dB value of ``None`` is infinite: no difference. Missing parts are ``{"missing": reason}``."""
        return _finite(
            {
                "prompts": list(self.prompts),
                "seeds": list(self.seeds),
                "call": dict(self.call),
                "reference": self.reference.to_dict(),
                "quantized": self.quantized.to_dict(),
                "metrics": {name: result.to_dict() for name, result in self.metrics.items()},
                "velocity": self._part(
                    "velocity",
                    self.velocity
                    and {
                        "sqnr_db": self.velocity.overall,
                        "per_timestep": [[t, value] for t, value in self.velocity.per_timestep.items()],
                    },
                ),
                "layers": self._part(
                    "layers",
                    self.layers and [_layer(row) for row in self.layers.layers],
                ),
                "latents": self._part(
                    "latents",
                    self.latents and [{**dataclasses.asdict(step), "sqnr_db": step.sqnr} for step in self.latents],
                ),
                "formats": {name: dataclasses.asdict(formats) for name, formats in self.formats.items()},
                "plan": self.plan and self.plan.to_dict(),
                "versions": dict(self.versions),
            }
        )

    def to_json(self) -> str:
        """JSON text of :meth:`to_dict`."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def _part(self, name: str, value: Any) -> Any:
        return {"missing": self.missing[name]} if name in self.missing else value

    def summary(self) -> str:
        """A few lines of text: every number there is, and the reason for every one there is not."""
        lines = [f"{self.quantized.denoiser}, {self.quantized.form}, {len(self.prompts)} images"]
        if self.velocity is not None:
            lines.append(f"velocity SQNR  {self.velocity.overall:.2f} dB")
        if self.latents:
            lines.append(f"final latents  {self.latents[-1].sqnr:.2f} dB")
        if self.layers is not None:
            worst = self.layers.ranking[0]
            lines.append(f"worst layer    {worst.local_sqnr:.2f} dB ({worst.name})")
        for name, result in self.metrics.items():
            if result.skipped:
                lines.append(f"{name:<14} skipped: {result.skipped}")
                continue
            against = "" if result.reference is None else f" (full precision {result.reference:.6g})"
            lines.append(f"{name:<14} {result.value:.6g}{against}")
        lines += [f"{name:<14} missing: {reason}" for name, reason in self.missing.items()]
        return "\n".join(lines)


def _layer(row: LayerSensitivity) -> dict[str, Any]:
    return {
        "name": row.name,
        "weights": row.weights,
        "multiply_adds": row.multiply_adds,
        "noise": row.local_noise,
        "sqnr_db": row.local_sqnr,
    }


def _finite(value: Any) -> Any:
    """Nested plain data with infinities as None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
