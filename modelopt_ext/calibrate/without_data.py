"""Quantizing Linears one by one as their weights come, for settings that need no calibration data.

A loader that reads a model's weights from a file can quantize each as it comes, and never holds the model in full
precision. What is decided for the model as a whole (segments, which layers are outermost, where a second product is
cheap) comes from a forward of a skeleton on the meta device; the rest is the driver's own way of solving a layer, so
the result is that of ``mtq.quantize(model, config)`` without data, and ``compress``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn

from ..compress import pack
from ..config import SegQuantCalibConfig
from ..dataflow import RecordFirstForward
from ..nn import PackedLinear
from ..plan import SegmentPlan
from .convolutions import segmentable_convolutions
from .driver import (
    ForwardLoop,
    _check_layer,
    _Layer,
    _quantized_linears,
    _Solver,
    _uncut,
    _with_outer_policies,
    _without_excluded,
)
from .other_quantizers import other_quantizers
from .polarity import affordable_second_products

logger = logging.getLogger(__name__)

FITTED_TO_DATA: Mapping[str, Any] = {
    "alpha": None,
    "gptq": None,
    "low_rank": None,
    "weight_clip_grid": (1.0,),
    "correct_activations": False,
    "bias_correction": False,
    "sequential": False,
}
"""Settings that are fitted to a layer's inputs, with their values for doing without."""


def without_fitting(algorithm: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """An algorithm's settings with all that needs calibration data left out.

    Args:
        algorithm: fields of :class:`SegQuantCalibConfig`.

    Returns:
        The fields, and the names of those that were changed (by default ``alpha`` is, which asks for a search).
    """
    config = SegQuantCalibConfig.model_validate(dict(algorithm))
    changed = [name for name, plain in FITTED_TO_DATA.items() if getattr(config, name) not in (plain, False)]
    kept = {key: value for key, value in algorithm.items() if key not in FITTED_TO_DATA}
    if kept.pop("layerwise", None):
        changed.append("layerwise")
    if config.polarity == "shift":
        changed.append("polarity")
        kept["polarity"] = "none"
    layers = {}
    for pattern, fields in config.layers.items():
        layers[pattern] = {key: value for key, value in fields.items() if key not in FITTED_TO_DATA}
        if layers[pattern].get("polarity") == "shift":
            layers[pattern]["polarity"] = "none"
        changed += [name for name in fields if fields[name] != layers[pattern].get(name) and name not in changed]
    return {**kept, **FITTED_TO_DATA, "layers": layers}, changed


@dataclass(frozen=True)
class Observation:
    """What one forward of a skeleton shows.

    Attributes:
        plan: its segments; None if nothing ran.
        rows: input rows that each Linear saw, in the order of first calls.
    """

    plan: SegmentPlan | None = None
    rows: Mapping[str, int] = field(default_factory=dict)


def observe(skeleton: nn.Module, forward_loop: ForwardLoop, merge_heads: bool = False) -> Observation:
    """Run a skeleton once.

    Args:
        skeleton: the model, on any device; "meta" is enough.
        forward_loop: calls it.
        merge_heads: see :class:`modelopt_ext.dataflow.DataflowRecorder`.
    """
    rows: dict[str, int] = {}

    def count(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs["input"]
        rows[name] = rows.get(name, 0) + value.numel() // value.shape[-1]

    handles = [
        module.register_forward_pre_hook(partial(count, name), with_kwargs=True)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with RecordFirstForward(skeleton, merge_heads=merge_heads) as recording:
            forward_loop(skeleton)
    finally:
        for handle in handles:
            handle.remove()
    return Observation(recording.plan, rows)


class WithoutData:
    """Makes packed Linears from plain weights.

    Args:
        skeleton: the model on the meta device; it is converted and used up.
        config: a ModelOpt config with ``"method": "segquant"``, with nothing that needs data; a plan in its algorithm
            is used instead of the one observed.
        seen: what a forward of the skeleton showed. Without rows no activations are split by sign, and outermost
            layers are told by the order of the plan.

    Raises:
        ValueError: a setting needs calibration data, something other than Linears is to be quantized, or there is no
            plan.
    """

    def __init__(self, skeleton: nn.Module, config: Mapping[str, Any], seen: Observation) -> None:
        self._config = SegQuantCalibConfig.model_validate(dict(config["algorithm"]))
        if self._config.needs_statistics:
            raise ValueError("these settings are fitted to calibration data; see without_fitting")
        plan = seen.plan if self._config.plan is None else SegmentPlan.from_dict(self._config.plan)
        if plan is None:
            raise ValueError("the segments are found in a forward: observe one, or put a plan into the config")
        plan.check(skeleton)
        if self._config.overrides:
            plan = plan.with_overrides(self._config.overrides)
        self.plan = plan if self._config.segments else _uncut(plan)
        mtq.quantize(skeleton, {"quant_cfg": config["quant_cfg"], "algorithm": None})
        self._layers = self._layers_of(skeleton, list(seen.rows or plan.linears))
        costs = {
            name: count * layer.module.in_features * layer.module.out_features
            for name, count in seen.rows.items()
            if (layer := self._layers.get(name)) is not None
        }
        affordable = affordable_second_products(costs, self._config.second_product_budget)
        self._solver = _Solver(skeleton, self._layers, {}, self.plan, self._config, affordable, True)

    def _layers_of(self, skeleton: nn.Module, called: list[str]) -> dict[str, _Layer]:
        layers = _quantized_linears(skeleton)
        if not layers:
            raise ValueError("no Linear has an enabled quantizer: check the patterns in quant_cfg and exclude")
        others = [
            *segmentable_convolutions(skeleton),
            *other_quantizers(skeleton, [layer.module for layer in layers.values()]),
        ]
        if others:
            raise ValueError(
                f"only Linears can be quantized while they are loaded, not {others[0]}: leave it out of quant_cfg, or "
                "calibrate the loaded model with mtq.quantize"
            )
        layers = _without_excluded(layers, self._config)
        layers = _with_outer_policies(
            skeleton, layers, self._config, [name for name in called if name in layers and layers[name].is_quantized]
        )
        if any(layer.weight_format is not None and layer.weight_format.is_nvfp4 for layer in layers.values()):
            raise ValueError("NVFP4 has no packed form: use SEGQUANT_W4A16_CFG, or export with ModelOpt")
        static = [layer.name for layer in layers.values() if layer.is_static]
        if static:
            raise ValueError(
                f"static activation scales ({static[0]}, ...) need calibration data: use a preset with scales per "
                "token (SEGQUANT_INT8_DYNAMIC_CFG) or weight-only (SEGQUANT_W8A16_CFG), or calibrate, compress and save"
            )
        for layer in layers.values():
            _check_layer(layer, self._config.for_layer(layer.name))
        return {
            name: layer
            for name, layer in layers.items()
            if layer.weight_format is not None and name not in self.plan.read_outside
        }

    @property
    def names(self) -> frozenset[str]:
        """Names of the Linears that :meth:`pack` is for."""
        return frozenset(self._layers)

    @torch.no_grad()
    def pack(self, name: str, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Quantize one Linear.

        Args:
            name: of the Linear.
            weight: (N, K), any float dtype, on the device to work on and to leave the result on.
            bias: (N,) on any device, "meta" included; the result has this very tensor.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        module = self._layers[name].module
        module.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=False)
        self._solver.apply({name: self._solver.solve(name, None)})
        packed = pack(module)
        if bias is not None:
            packed.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
            packed.bias.requires_grad_(False)
        # The skeleton keeps no weights.
        for key in ("weight", "bias"):
            if module._parameters[key] is not None:
                setattr(module, key, nn.Parameter(module._parameters[key].to("meta"), requires_grad=False))
        return packed
