"""What quantizing a pipeline did, as plain data: counts, sizes, seconds, errors, plans and versions."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from modelopt.torch.opt.dynamic import DynamicModule
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn

from modelopt_ext import PackedLinear, SegLinear
from modelopt_ext.compress import packed_spec
from modelopt_ext.nn.packed_spec import PackedSpec

from .layer_formats import is_on, layer_formats

__all__ = [
    "REPORT_NAME",
    "ComponentReport",
    "LayerCounts",
    "QuantizationReport",
    "model_bytes",
    "model_class",
    "packed_bytes",
]

REPORT_NAME = "segquant_report.json"
"""File of the report in an exported directory."""

_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class LayerCounts:
    """How many Linears of a model have which formats.

    Attributes:
        linears: all of them.
        quantized: those whose weight has codes.
        segmented: of these, those with more than one input segment or output group.
        weights: quantized Linears by the format of their weight, e.g. ``{"int8": 50, "int4 in groups of 32": 3}``.
        activations: the same by that of their input, e.g. ``{"int8": 47, "int8 per token": 3, "float": 2}``.
        polarity: input segments of quantized Linears by treatment: none, dual, dual8, or shift where a segment of a
            shifted Linear is not split by sign.
        smoothed, rotated, low_rank: quantized Linears with smoothing, a rotation, a low-rank branch.
        others: quantizers of other layers (convolutions, attention products) that are on.
    """

    linears: int
    quantized: int
    segmented: int
    weights: Mapping[str, int]
    activations: Mapping[str, int]
    polarity: Mapping[str, int]
    smoothed: int
    rotated: int
    low_rank: int
    others: int

    @classmethod
    def of(cls, model: nn.Module) -> LayerCounts:
        """Count the layers of a calibrated or packed model."""
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        layers = layer_formats(model)
        quantizers = [
            name for name, part in model.named_modules() if isinstance(part, TensorQuantizer) and part.is_enabled
        ]
        return cls(
            linears=len(linears),
            quantized=len(layers),
            segmented=sum(layer.segmented for layer in layers.values()),
            weights=_counted(layer.weights for layer in layers.values()),
            activations=_counted(layer.activations for layer in layers.values()),
            polarity=_counted(tag for layer in layers.values() for tag in layer.polarity),
            smoothed=sum(layer.smoothed for layer in layers.values()),
            rotated=sum(layer.rotated for layer in layers.values()),
            low_rank=sum(layer.low_rank for layer in layers.values()),
            others=sum(not any(name.startswith(f"{linear}.") for linear in linears) for name in quantizers),
        )


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def model_class(model: nn.Module) -> str:
    """Name of a model's own class; ModelOpt puts classes of its own in front of it."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, DynamicModule)).__name__


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, each once, wherever they are; ModelOpt's quantizers do not count."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(model, ()))


def packed_bytes(model: nn.Module) -> int | None:
    """About how many bytes the same model takes after ``modelopt_ext.compress``; None if it has no packed form.

    Nothing is packed. ``compress`` gives some layers a shift of zero, to have repeated blocks alike: a few bytes more.
    """
    specs: dict[str, tuple[Any, PackedSpec]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module, QuantModule) and is_on(module.weight_quantizer):
            try:
                specs[name] = module, packed_spec(module)
            except ValueError:
                return None
    packed = 0
    for module, spec in specs.values():
        weight = module._parameters["weight"]
        # What a shift takes out of the codes comes back in the bias, also where there was none.
        biased = module.bias is not None or (isinstance(module, SegLinear) and module.input_quantizer.has_bias)
        twin = PackedLinear(spec, biased, weight.dtype, "meta")
        packed += sum(tensor.numel() * tensor.element_size() for tensor in (*twin.parameters(), *twin.buffers()))
    rest = _tensors(model, [module for module, _ in specs.values()])
    return packed + sum(tensor.numel() * tensor.element_size() for tensor in rest)


def _tensors(model: nn.Module, without: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers of a model but for those of some modules and of quantizers."""
    left_out = {id(part) for module in without for part in module.modules()}
    left_out |= {id(inner) for part in model.modules() if isinstance(part, TensorQuantizer) for inner in part.modules()}
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if id(module) not in left_out:
            found |= {id(t): t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class ComponentReport:
    """What became of one model of a pipeline.

    Attributes:
        name, model: component and class.
        config_name: of the preset or file, ``custom`` for a dict.
        config: the ModelOpt config, plain types.
        parameters: of the original.
        bytes_before: of the original's parameters and buffers.
        bytes_after: the same packed: counted where it was packed, else about; None if it has no packed form.
        layers: counts by format.
        plan_summary: one line about the segments, None for another algorithm than SegQuant's.
        plan: ``SegmentPlan.to_dict()``, None likewise.
        calls: calibration calls, None if a loop of the caller's was used.
        timesteps: distinct timesteps among them.
        seconds: wall time of ``mtq.quantize``.
        sqnr: SQNR of the output on held-out calls, dB; None where it was not asked for. Infinite for bit-equal outputs.
        sqnr_by_timestep: the same for each timestep.
    """

    name: str
    model: str
    config_name: str
    config: Mapping[str, Any]
    parameters: int
    bytes_before: int
    bytes_after: int | None
    layers: LayerCounts
    plan_summary: str | None
    plan: Mapping[str, Any] | None
    calls: int | None
    timesteps: int | None
    seconds: float
    sqnr: float | None = None
    sqnr_by_timestep: Mapping[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """What ``SegQuantizer.quantize`` did.

    Attributes:
        pipeline: class, or that of the model if it was quantized by itself.
        components: one for each quantized model.
        calibration: settings of the calibration data, plain types, with a hash in the place of the prompts; None if the
            caller gave calls or a loop.
        held_out: the same of the held-out data.
        processes: how many calibrated together.
        seconds: wall time by stage: ``load``, ``sample``, ``sample held-out``, ``quantize``, ``evaluate``, ``export``.
        export: what was written: ``segquant``, ``native``, ``onnx``, ``onnx-vnni``, ``tensorrt``; None for nothing.
        exported_bytes: of the directory, None likewise.
        versions: of the packages.
    """

    pipeline: str
    components: tuple[ComponentReport, ...]
    calibration: Mapping[str, Any] | None
    held_out: Mapping[str, Any] | None
    processes: int
    seconds: Mapping[str, float]
    export: str | None
    exported_bytes: int | None
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON: tuples are lists, infinities and timesteps strings."""
        return {"format": "segquant-report", "version": _FORMAT_VERSION, **_plain(dataclasses.asdict(self))}

    def to_json(self) -> str:
        """JSON text of :meth:`to_dict`."""
        return json.dumps(self.to_dict(), indent=2)

    def summary(self) -> str:
        """A few lines for people."""
        lines = []
        for part in self.components:
            counts = part.layers
            sizes = f"{_mib(part.bytes_before)} -> {_mib(part.bytes_after)}" if part.bytes_after else "no packed form"
            lines.append(
                f"{part.name} ({part.model}), {part.config_name}: {counts.quantized} of {counts.linears} Linears "
                f"quantized, {sizes}, {part.seconds:.1f} s"
            )
            for title, table in (
                ("weights", counts.weights),
                ("activations", counts.activations),
                ("polarity of input segments", counts.polarity),
            ):
                if table:
                    lines.append(f"  {title}: {', '.join(f'{count} {kind}' for kind, count in table.items())}")
            if part.plan_summary:
                lines.append(f"  plan: {part.plan_summary}")
            if part.sqnr is not None:
                lines.append(f"  held-out SQNR: {part.sqnr:.1f} dB")
        if self.export is not None and self.exported_bytes is not None:
            lines.append(f"written as {self.export}: {_mib(self.exported_bytes)}")
        return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
