"""The ModelOpt mode ``segquant_calibrate``: what `"method": "segquant"` runs, and how a checkpoint is restored."""

from __future__ import annotations

from typing import Any

import torch
from modelopt.torch.opt.conversion import ApplyModeError, ModeloptStateManager
from modelopt.torch.opt.mode import ConvertEntrypoint, RestoreEntrypoint, UpdateEntrypoint
from modelopt.torch.quantization.conversion import restore_quantizer_state, update_quantize_metadata
from modelopt.torch.quantization.mode import BaseCalibrateModeDescriptor, CalibrateModeRegistry
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from .calibrate import calibrate_model
from .calibrate.driver import ForwardLoop
from .config import SegQuantCalibConfig
from .nn import SegConv2d, SegLayout, SegLinear, to_seg_conv, to_seg_linear
from .plan import SegmentPlan

MODE = "segquant_calibrate"
METADATA_KEY = "segquant"
METADATA_VERSION = 1

Metadata = dict[str, Any]


def convert(
    model: nn.Module, config: SegQuantCalibConfig, forward_loop: ForwardLoop | None = None
) -> tuple[nn.Module, Metadata]:
    """Calibrate ``model`` in place. After an error its weights are unchanged and nothing is quantized."""
    try:
        calibration = calibrate_model(model, config, forward_loop, plan_of(model))
    except BaseException:
        # ModelOpt converted the model before we ran; quantizers that stayed enabled would round with dynamic scales.
        for module in model.modules():
            if isinstance(module, TensorQuantizer):
                module.disable()
        raise
    metadata: Metadata = {METADATA_KEY: {"version": METADATA_VERSION, "plan": calibration.plan.to_dict()}}
    update(model, config, metadata)
    return model, metadata


def update(model: nn.Module, config: SegQuantCalibConfig, metadata: Metadata) -> None:
    """Bring the metadata up to the model's present state; plain types only, so that safe loading takes them."""
    update_quantize_metadata(model, config, metadata)
    metadata[METADATA_KEY]["layouts"] = {
        name: module.layout.to_dict()
        for name, module in model.named_modules()
        if isinstance(module, SegLinear | SegConv2d)
    }


def restore(model: nn.Module, config: SegQuantCalibConfig, metadata: Metadata) -> nn.Module:
    """Give a freshly converted model the segments and quantizers of a checkpoint; tensor values are loaded later.

    Raises:
        ApplyModeError: metadata that is incomplete, of another version, or of another model.
    """
    saved = metadata.get(METADATA_KEY)
    if not isinstance(saved, dict) or "layouts" not in saved:
        raise ApplyModeError(f"the checkpoint's {MODE} metadata is incomplete; save the model again with mto.save")
    if saved.get("version") != METADATA_VERSION:
        raise ApplyModeError(
            f"the checkpoint has {MODE} metadata of version {saved.get('version')!r}, this package reads version "
            f"{METADATA_VERSION}: use the optimum-segquant version that wrote it"
        )
    modules = dict(model.named_modules())
    problems = []
    for name, data in saved["layouts"].items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear | nn.Conv2d):
            problems.append(f"{name}: no such Linear or convolution")
            continue
        segment = to_seg_linear if isinstance(module, nn.Linear) else to_seg_conv
        try:
            segment(module, SegLayout.from_dict(data))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ApplyModeError(
            f"the checkpoint's segments do not fit this {type(model).__name__}; restore into the architecture that was "
            "quantized:\n  " + "\n  ".join(problems)
        )
    restored = restore_quantizer_state(model, config, metadata)
    _move_banks(restored)
    return restored


def _move_banks(model: nn.Module) -> None:
    """Put restored buffers beside their weights, also where the weight comes later (meta device, offloading)."""
    for module in model.modules():
        if isinstance(module, SegLinear | SegConv2d) and module.plain_weight.device != torch.device("meta"):
            module.input_quantizer.to(module.plain_weight.device)
            module.weight_quantizer.to(module.plain_weight.device)


def plan_of(model: nn.Module) -> SegmentPlan | None:
    """The segment plan that ``model`` was quantized with, None if segquant did not run on it.

    Args:
        model: a model, the root that ``mtq.quantize`` got.
    """
    if not ModeloptStateManager.is_converted(model):
        return None
    for mode, state in reversed(ModeloptStateManager(model).state_dict()):
        if mode == MODE:
            return SegmentPlan.from_dict(state["metadata"][METADATA_KEY]["plan"])
    return None


@CalibrateModeRegistry.register_mode
class SegQuantModeDescriptor(BaseCalibrateModeDescriptor):
    """Registers ``segquant`` among ModelOpt's calibration algorithms."""

    @property
    def config_class(self) -> type[SegQuantCalibConfig]:
        """The algorithm's settings."""
        return SegQuantCalibConfig

    @property
    def convert(self) -> ConvertEntrypoint:
        """Runs the calibration."""
        return convert

    @property
    def restore(self) -> RestoreEntrypoint:
        """Rebuilds segments from a checkpoint's metadata."""
        return restore

    @property
    def update_for_save(self) -> UpdateEntrypoint:
        """Refreshes the metadata before saving."""
        return update

    @property
    def update_for_new_mode(self) -> UpdateEntrypoint:
        """Refreshes the metadata before another mode runs."""
        return update
