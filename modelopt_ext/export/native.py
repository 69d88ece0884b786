"""Which quantized Linears stock checkpoint keys can say exactly, and what the keys hold.

Inference engines know three layouts of a quantized Linear ``y = x W^T + b``, W (N, K):

==================  =====================================================  =========================================
``fp8``             ``weight`` float8_e4m3fn (N, K), ``weight_scale`` and  ModelOpt's ``FP8``: vLLM-Omni, SGLang,
                    ``input_scale`` float32 ()                             TensorRT-LLM VisualGen
``fp8_per_token``   ``weight`` float8_e4m3fn (N, K), ``weight_scale``      ModelOpt's ``FP8_PER_CHANNEL_PER_TOKEN``:
                    float32 (N,)                                           vLLM-Omni
``int8_per_token``  ``weight`` int8 (N, K), ``weight_scale`` float32       vLLM-Omni's ``int8``
                    (N, 1)
==================  =====================================================  =========================================

The engine computes ``round(x / input_scale)`` with a scale of its own per token in the last two, so nothing else can be
said: no segments, no shift, no smoothing that is left, no second product, no branch, no rotation. A model with a layer
that has more is refused, never approximated; :func:`native_config` calibrates one that fits.

Engines have their own copies of the models, in which only the Linears of attention and feed-forward can be quantized:
embedders, modulation (AdaLN) and the last projection are plain modules that take no scales. :func:`native_config`
leaves those in full precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, Literal, get_args

import modelopt
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import process_layer_quant_config
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn

from ..compress import pack
from ..config import SegQuantCalibConfig
from ..mode import plan_of
from ..nn.packed import PackedLinear
from ..presets import PER_TOKEN, linear_only

__all__ = [
    "NativeFormat",
    "NotRepresentableError",
    "format_of",
    "kept_by_engines",
    "native_config",
    "native_layers",
    "native_tensors",
    "problems_of",
    "quantization_config",
    "unrepresentable_settings",
]

NativeFormat = Literal["fp8", "fp8_per_token", "int8_per_token"]

_LISTED = 20
"""Layers that an error message spells out."""

_E4M3 = (4, 3)
_QUANTIZERS: Mapping[NativeFormat, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp8": ({"num_bits": _E4M3, "axis": None}, {"num_bits": _E4M3, "axis": None}),
    "fp8_per_token": ({"num_bits": _E4M3, "axis": 0}, {"num_bits": _E4M3, **PER_TOKEN}),
    "int8_per_token": ({"num_bits": 8, "axis": 0}, {"num_bits": 8, **PER_TOKEN}),
}
_PLAIN: Mapping[str, Any] = {
    "segments": False,
    "merge_heads": False,
    "polarity": "none",
    "alpha": None,
    "rotate": False,
    "low_rank": None,
}
"""Settings that stock keys need."""

# Layers that read one tensor, such as q, k and v, then share an input scale; engines that fuse them need that.
_DEFAULTS: Mapping[str, Any] = {"clip_grid": (1.0,)}

_MODULATION = ("*norm*", "*_mod.*", "*modulation*", "*time_emb_proj*")
"""Names of Linears inside blocks that engines keep in full precision."""

_MODELOPT_NAMES: Mapping[NativeFormat, str] = {"fp8": "fp8", "fp8_per_token": "fp8_pc_pt"}
"""What ModelOpt's exporter calls the layouts that it has."""


class NotRepresentableError(ValueError):
    """Layers of a model say more than stock checkpoint keys can.

    Attributes:
        problems: what stands in the way, by name of the layer.
        suggestion: the format whose :func:`native_config` gives a model that can be exported.
    """

    def __init__(self, problems: Mapping[str, str], layers: int, suggestion: NativeFormat) -> None:
        self.problems = dict(problems)
        self.suggestion = suggestion
        lines = [f"  {name or 'the model'}: {problem}" for name, problem in list(problems.items())[:_LISTED]]
        if len(problems) > _LISTED:
            lines.append(f"  and {len(problems) - _LISTED} more")
        super().__init__(
            f"{len(problems)} of {layers} quantized layers can't be written in stock checkpoint keys:\n"
            + "\n".join(lines)
            + "\nQuantize the original model with modelopt_ext.export.native.native_config"
            f"({suggestion!r}), or write a segquant checkpoint (save_pretrained of the compressed model) or ONNX, "
            "which can say everything."
        )


def native_config(format: NativeFormat, *, every_linear: bool = False, **algorithm: Any) -> dict[str, Any]:
    """A ModelOpt config whose models stock checkpoints can hold.

        mtq.quantize(model, native_config("fp8_per_token", gptq=True), forward_loop)

    Args:
        format: ``"fp8"`` (one static scale per Linear), ``"fp8_per_token"`` or ``"int8_per_token"`` (scales found at
            run time; weights per output channel).
        every_linear: quantize embedders, modulation and the last projection, too. The keys can say it, and engines
            that take their layers from the file can load it; vLLM-Omni and SGLang can't.
        algorithm: further fields of :class:`modelopt_ext.SegQuantCalibConfig`, such as ``gptq``, ``exclude``,
            ``weight_clip_grid`` or ``samples``: what chooses codes and scales is free.

    Raises:
        ValueError: an unknown format, or a setting that stock keys can't hold.
    """
    if format not in get_args(NativeFormat):
        raise ValueError(f"format is one of {', '.join(get_args(NativeFormat))}, got {format!r}")
    outer = dict.fromkeys(("embedders", "last_layers"), "as_configured" if every_linear else "none")
    refused = {name: value for name, value in algorithm.items() if name in _PLAIN and value != _PLAIN[name]}
    refused |= {name: algorithm[name] for name in outer if algorithm.get(name, "none") not in ("none", outer[name])}
    if refused:
        raise ValueError(
            f"stock checkpoint keys can't hold {', '.join(f'{name}={value!r}' for name, value in refused.items())}; "
            "leave these out, or use one of this package's presets and a segquant checkpoint or ONNX"
        )
    for pattern, fields in algorithm.get("layers", {}).items():
        if names := sorted(set(fields) & set(_PLAIN)):
            raise ValueError(f"stock checkpoint keys can't hold layers[{pattern!r}] with {', '.join(names)}")
    weight, activation = _QUANTIZERS[format]
    config = linear_only(dict(weight), dict(activation), **{**_PLAIN, **_DEFAULTS, **outer, **algorithm})
    if not every_linear:
        config["quant_cfg"] += [{"quantizer_name": pattern, "enable": False} for pattern in _MODULATION]
    return config


def unrepresentable_settings(config: SegQuantCalibConfig) -> dict[str, Any]:
    """The settings of a config, by name, that stock keys can't hold; none if it is one of :func:`native_config`."""
    return {name: getattr(config, name) for name, value in _PLAIN.items() if getattr(config, name) != value}


def native_layers(model: nn.Module) -> tuple[NativeFormat, dict[str, PackedLinear]]:
    """The quantized Linears of a model in packed form, by name, if stock keys can say all of them.

    Args:
        model: calibrated by ``mtq.quantize``, or compressed, or loaded from a checkpoint; it stays as it is. The codes
            of a model that is not compressed are computed, one byte a weight, where the weights are.

    Returns:
        The format that all of them share, and the layers. Linears whose weight is read without calling them are not
        among them: their quantizers do nothing, they are written as plain ones.

    Raises:
        NotRepresentableError: names every layer that stock keys can't say.
        ValueError: the model has no quantized Linear.
    """
    layers: dict[str, PackedLinear] = {}
    problems: dict[str, str] = {}
    done: dict[nn.Module, PackedLinear] = {}
    plan = plan_of(model)
    outside = plan.read_outside if plan is not None else frozenset()
    for name, module in model.named_modules(remove_duplicate=False):
        if name in outside:
            continue
        if isinstance(module, PackedLinear):
            layers[name] = module
        elif isinstance(module, QuantModule) and isinstance(module, nn.Linear) and _is_quantized(module):
            try:
                layers[name] = done[module] = done[module] if module in done else pack(module)
            except ValueError as error:
                problems[name] = str(error)
    if not layers and not problems:
        raise ValueError("the model has no quantized Linear; call mtq.quantize with native_config(...) first")
    problems |= _other_quantizers(model)
    formats = {name: format_of(layer) for name, layer in layers.items()}
    main = _most_common(formats.values())
    for name, layer in layers.items():
        reasons = problems_of(layer)
        if not reasons and formats[name] != main:
            reasons = [f"it is {formats[name]}, most layers are {main}, and a stock checkpoint has one format"]
        if reasons:
            problems[name] = "; ".join(reasons)
    if problems:
        raise NotRepresentableError(problems, len(layers) + len(set(problems) - set(layers)), main)
    return main, layers


def format_of(layer: PackedLinear) -> NativeFormat:
    """The stock format that is nearest to a layer; :func:`problems_of` says whether it fits."""
    spec = layer.spec
    if spec.weights != "float8_e4m3fn":
        return "int8_per_token"
    return "fp8_per_token" if spec.per_token else "fp8"


def problems_of(layer: PackedLinear) -> list[str]:
    """What a layer has that stock keys can't say; empty if they say it exactly.

    Smoothing by ones, a shift of zeros, and output groups that differ in nothing count as absent.
    """
    spec, layout = layer.spec, layer.spec.layout
    problems = _code_problems(layer)
    if len(layout.in_segments) > 1:
        problems.append(f"it has {len(layout.in_segments)} input segments")
    if layer.input_scale is not None and not _is_uniform(layer.input_scale):
        problems.append(f"its {len(layout.out_groups)} output groups and {len(layout.in_segments)} segments differ")
    if spec.splits_by_sign:
        problems.append(f"its input is split by sign ({', '.join(sorted(set(layout.polarity) - {'none'}))})")
    if any(size != 1 for size in layout.rotation):
        problems.append("its input is rotated")
    if layer.inverse_smoothing is not None and not bool((layer.inverse_smoothing == 1).all()):
        problems.append("its input is smoothed")
    if layer.shift is not None and bool(layer.shift.any()):
        problems.append("its input is shifted")
    if spec.rank:
        problems.append(f"it has a low-rank branch of rank {spec.rank}")
    return problems


def _code_problems(layer: PackedLinear) -> list[str]:
    spec = layer.spec
    if spec.group is not None:
        return [f"its weight has scales for groups of {spec.group} channels"]
    if spec.weights == "int4" or spec.activations != spec.weights:
        return [f"{spec.weights} weights with {spec.activations or '16-bit'} activations have no stock layout"]
    if spec.weights == "int8" and not spec.per_token:
        return ["static INT8 activations: no engine loads them from a checkpoint, they deploy through ONNX"]
    if spec.weights == "float8_e4m3fn" and not spec.per_token and not _is_uniform(layer.weight_scale):
        return ["static FP8 needs one weight scale, this weight has one for each output channel (axis=0)"]
    return []


def native_tensors(layer: PackedLinear, format: NativeFormat) -> dict[str, Tensor]:
    """The stock keys of one layer, without its name.

    Args:
        layer: one without :func:`problems_of`.
        format: see the module's docstring for shapes and dtypes.

    Returns:
        ``weight``, ``weight_scale``, for ``"fp8"`` ``input_scale``, and ``bias`` if there is one; contiguous.
    """
    scale = layer.weight_scale.detach().float()
    tensors = {"weight": layer.codes().detach().contiguous()}
    if format == "fp8":
        assert layer.input_scale is not None
        tensors["weight_scale"] = scale[0, 0].clone()
        tensors["input_scale"] = layer.input_scale.detach().float()[0, 0].clone()
    elif format == "fp8_per_token":
        tensors["weight_scale"] = scale[:, 0].contiguous()
    else:
        tensors["weight_scale"] = scale[:, :1].contiguous()
    if layer.bias is not None:
        tensors["bias"] = layer.bias.detach().contiguous()
    return tensors


def quantization_config(format: NativeFormat, quantized: Iterable[str], plain: Iterable[str]) -> dict[str, Any]:
    """What stands under ``quantization_config`` in ``config.json``.

    Args:
        format: of all quantized layers.
        quantized: names of the quantized Linears.
        plain: names of the Linears and convolutions in full precision, which the engine must leave alone.

    Returns:
        For FP8 what ModelOpt's exporter writes (``quant_method: "modelopt"`` and ``quant_algo``), for INT8 what
        vLLM-Omni reads (``quant_method: "int8"``).
    """
    plain, quantized = list(plain), list(quantized)
    if format == "int8_per_token":
        return {"quant_method": "int8", "activation_scheme": "dynamic", "ignored_layers": sorted(plain)}
    layers: dict[str, Any] = {f"{name}.quantization": None for name in plain}
    layers |= {f"{name}.quantization": _MODELOPT_NAMES[format] for name in quantized}
    details = {"quant_algo": None, "kv_cache_quant_algo": None, **process_layer_quant_config(layers)}
    details["exclude_modules"] = [_exactly(pattern, quantized) for pattern in details["exclude_modules"]]
    producer = {"name": "modelopt", "version": modelopt.__version__}
    return convert_hf_quant_config_format({"producer": producer, "quantization": details})


def _exactly(pattern: str, quantized: Sequence[str]) -> str:
    """A pattern of layers in full precision that catches no quantized one.

    They are globs, but vLLM also takes them for parts of names: FLUX's last ``proj_out`` would take the single blocks'
    along. ``proj_ou[t]`` matches as a glob and is part of no name.
    """
    stem, star = pattern.rstrip("*"), "*" if pattern.endswith("*") else ""
    if stem and any(stem in name for name in quantized):
        return f"{stem[:-1]}[{stem[-1]}]{star}"
    return pattern


def kept_by_engines(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that engines keep in full precision: outside the model's blocks, or modulation."""
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return [
        name
        for name in names
        if not name.startswith(blocks) or any(fnmatch(f"{name}.", pattern) for pattern in _MODULATION)
    ]


def _is_quantized(module: Any) -> bool:
    return any(
        child.is_enabled
        for quantizer in (module.input_quantizer, module.weight_quantizer)
        for child in quantizer.modules()
        if isinstance(child, TensorQuantizer)
    )


def _other_quantizers(model: nn.Module) -> dict[str, str]:
    """Enabled quantizers that belong to no Linear: their rounding would be lost."""
    problems = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantModule) or isinstance(module, nn.Linear):
            continue
        enabled = [part for part, child in module.named_modules() if isinstance(child, TensorQuantizer)]
        enabled = [part for part in enabled if module.get_submodule(part).is_enabled]
        own = [part for part in enabled if not _is_inside_another(module, part)]
        if own:
            problems[name] = f"it rounds outside of Linears ({', '.join(own[:3])}), which stock keys can't say"
    return problems


def _is_inside_another(module: nn.Module, part: str) -> bool:
    """Whether a submodule belongs to a quantized module further in."""
    names = part.split(".")
    parents = (module.get_submodule(".".join(names[:end])) for end in range(1, len(names)))
    return any(isinstance(parent, QuantModule) for parent in parents)


def _is_uniform(scale: Tensor) -> bool:
    return bool((scale == scale.flatten()[0]).all())


def _most_common(formats: Iterable[NativeFormat]) -> NativeFormat:
    counted: dict[NativeFormat, int] = {}
    for name in formats:
        counted[name] = counted.get(name, 0) + 1
    return max(counted, key=lambda name: counted[name], default="fp8")
