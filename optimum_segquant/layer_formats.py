"""In which formats the quantized Linears of a model are, read off the model, simulated or packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import nn

from modelopt_ext import PackedLinear, SegLinear
from modelopt_ext.compress import packed_spec
from modelopt_ext.formats import QuantFormat
from modelopt_ext.nn.packed_spec import FORMATS, PackedSpec

__all__ = ["LayerFormats", "is_on", "layer_formats"]

_NAMES = {fmt.num_bits: name for name, fmt in FORMATS.items()}


@dataclasses.dataclass(frozen=True)
class LayerFormats:
    """Formats of one quantized Linear, in words.

    Attributes:
        weights: format of its codes, e.g. ``"int4 in groups of 32"``.
        activations: of its input, e.g. ``"int8 per token"``, ``"float"`` where it is not rounded.
        polarity: treatment of each input segment: none, shift, dual, dual8; a shift goes with any of the others and is
            named only where it is the only one.
        segmented: more than one input segment or output group.
        smoothed, rotated, low_rank: whether it has smoothing, a rotation, a low-rank branch.
    """

    weights: str
    activations: str
    polarity: tuple[str, ...]
    segmented: bool
    smoothed: bool
    rotated: bool
    low_rank: bool


def layer_formats(model: nn.Module) -> dict[str, LayerFormats]:
    """The formats of every Linear whose weight has codes, by module name."""
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name: layer for name, module in linears if (layer := _describe(name, module)) is not None}


def _describe(name: str, module: Any) -> LayerFormats | None:
    """The formats of a Linear, None if its weight is in full precision."""
    if isinstance(module, PackedLinear):
        return _of_spec(module.spec)
    if not isinstance(module, QuantModule) or not is_on(module.weight_quantizer):
        return None
    try:
        return _of_spec(packed_spec(module))
    except ValueError:  # no packed form, such as NVFP4 or a sequence of quantizers
        pass
    layout = module.layout if isinstance(module, SegLinear) else None
    bank = module.input_quantizer
    return LayerFormats(
        weights=_format_name(module.weight_quantizer, f"{name}.weight_quantizer"),
        activations=_format_name(bank, f"{name}.input_quantizer") if is_on(bank) else "float",
        polarity=_polarity(layout.polarity, bank.shift is not None) if layout is not None else ("none",),
        segmented=layout is not None and len(layout.in_segments) * len(layout.out_groups) > 1,
        smoothed=(bank.smoothing if layout is not None else bank.pre_quant_scale) is not None,
        rotated=layout is not None and any(run > 1 for run in layout.rotation),
        low_rank=layout is not None and module.weight_quantizer.up is not None,
    )


def _of_spec(spec: PackedSpec) -> LayerFormats:
    layout = spec.layout
    group = f" in groups of {spec.group}" if spec.group else ""
    return LayerFormats(
        weights=f"{spec.weights}{group}",
        activations=f"{spec.activations}{' per token' if spec.per_token else ''}" if spec.activations else "float",
        polarity=_polarity(layout.polarity, spec.shift),
        segmented=len(layout.in_segments) * len(layout.out_groups) > 1,
        smoothed=spec.smoothing,
        rotated=any(run > 1 for run in layout.rotation),
        low_rank=spec.rank > 0,
    )


def _polarity(tags: Iterable[str], shifted: bool) -> tuple[str, ...]:
    return tuple("shift" if tag == "none" and shifted else tag for tag in tags)


def is_on(quantizer: Any) -> bool:
    """Whether any quantizer of one side of a layer rounds."""
    parts = [part for part in quantizer.modules() if isinstance(part, TensorQuantizer)]
    return any(part.is_enabled for part in parts)


def _format_name(quantizer: Any, where: str) -> str:
    try:
        fmt = QuantFormat.of(quantizer, where)
    except ValueError:
        return "other"
    if fmt is None:
        return "float"
    if fmt.is_nvfp4:
        return "nvfp4"
    name = _NAMES.get(fmt.num_bits, f"{fmt.num_bits} bits")
    return f"{name}{f' in groups of {fmt.group}' if fmt.group else ''}{' per token' if fmt.dynamic else ''}"
