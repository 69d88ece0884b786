"""Quantizers that segquant leaves to ModelOpt: attention products (BMM), norms, grouped, 1-D and 3-D convolutions.

A config may enable them beside the Linears'. They get what ModelOpt's ``max`` algorithm gives, the largest magnitude
seen, by ModelOpt's own calibrators, during the pass that collects statistics for the Linears.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import torch
from modelopt.torch.quantization.calib import MaxCalibrator
from modelopt.torch.quantization.model_calib import enable_stats_collection, finish_stats_collection
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from modelopt.torch.quantization.utils import enable_weight_access_and_writeback
from torch import Tensor, nn

from ..distributed import Processes
from ..plan import fold_names

logger = logging.getLogger(__name__)


def other_quantizers(model: nn.Module, solved: Collection[nn.Module]) -> dict[str, TensorQuantizer]:
    """The enabled quantizers by name, without those of the inputs and weights of ``solved``."""
    ours = {
        id(quantizer)
        for module in solved
        for bank in (module.input_quantizer, module.weight_quantizer)
        for quantizer in bank.modules()  # type: ignore[union-attr]
    }
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled and id(module) not in ours
    }


@contextmanager
def max_calibration(model: nn.Module, quantizers: Mapping[str, TensorQuantizer]) -> Iterator[None]:
    """Inside, ``quantizers`` collect and round nothing; afterwards they hold the largest magnitudes that they saw.

    Raises:
        ValueError: what a quantizer reads holds NaN or infinity (raised by the forward inside).
    """
    if not quantizers:
        yield
        return
    group = nn.ModuleList(quantizers.values())
    handles = [
        quantizer.register_forward_pre_hook(partial(_check_finite, name)) for name, quantizer in quantizers.items()
    ]
    enable_stats_collection(group)
    try:
        _collect_weights(model, {id(quantizer) for quantizer in quantizers.values()})
        yield
    finally:
        for handle in handles:
            handle.remove()
        finish_stats_collection(group)


def _check_finite(name: str, quantizer: nn.Module, args: tuple[Any, ...]) -> None:
    if args and isinstance(args[0], Tensor) and not torch.isfinite(args[0]).all():
        raise ValueError(
            f"what {name} reads holds NaN or infinity; check the calibration data and the model's dtype, float16 may "
            "overflow"
        )


def _collect_weights(model: nn.Module, wanted: Collection[int]) -> None:
    modules = dict(model.named_modules())
    for module in modules.values():
        bank = getattr(module, "weight_quantizer", None)
        if not isinstance(module, QuantModule) or bank is None or not any(id(q) in wanted for q in bank.modules()):
            continue
        with torch.no_grad(), enable_weight_access_and_writeback(module, model, modules, writeback=False):
            for weight, quantizer in module.iter_weights_for_calibration():
                quantizer(weight)


def check_mergeable(quantizers: Mapping[str, TensorQuantizer]) -> None:
    """Refuse quantizers whose statistics of several processes can't be put together afterwards.

    Raises:
        ValueError: names one and what to do.
    """
    for name, quantizer in quantizers.items():
        if not _has_static_scale(quantizer):
            continue
        kind = type(quantizer._calibrator).__name__
        if quantizer.bias_calibrator is not None and quantizer.bias_type == "static":
            kind = "static bias"
        elif kind == MaxCalibrator.__name__:
            continue
        raise ValueError(
            f"{name} has a {kind}, which can't be merged over processes, only maxima can: use calibrator='max' and no "
            "static bias for it, or calibrate in a single process (distributed_sync=False in the algorithm's config)"
        )


def merge_maxima(quantizers: Mapping[str, TensorQuantizer], model: nn.Module, processes: Processes) -> None:
    """Give every quantizer the largest magnitudes that any process saw.

    Args:
        quantizers: by name, after :func:`max_calibration`.
        model: holds them.
        processes: all of them.
    """
    own = {
        name: quantizer._amax.cpu()
        for name, quantizer in quantizers.items()
        if _has_static_scale(quantizer) and hasattr(quantizer, "_amax")
    }
    every = processes.gather(own)
    if len(every) == 1:
        return
    for name, quantizer in quantizers.items():
        found = [amax[name] for amax in every if name in amax]
        if found:
            quantizer.amax = reduce(torch.maximum, found).to(_device_beside(model, name))


def _has_static_scale(quantizer: TensorQuantizer) -> bool:
    return not (quantizer._use_constant_amax or quantizer._constant_amax is not None or quantizer._dynamic)


def _device_beside(model: nn.Module, name: str) -> torch.device:
    """Where the nearest weight to a module lies; the CPU if all of them are offloaded."""
    while name:
        name = name.rpartition(".")[0]
        weights = (weight.device for weight in model.get_submodule(name).parameters() if not weight.is_meta)
        device = next(weights, None)
        if device is not None:
            return device
    return torch.device("cpu")


def uncalibrated(quantizers: Mapping[str, TensorQuantizer]) -> list[str]:
    """The quantizers that need a static scale and have none."""
    return [name for name, quantizer in quantizers.items() if _has_static_scale(quantizer) and quantizer.amax is None]


def disable_uncalibrated(quantizers: Mapping[str, TensorQuantizer]) -> None:
    """Disable quantizers whose inputs were never seen, and those of the weights beside them, with a warning.

    Without a scale they would find one at run time, in every call anew, which no deployment does.
    """
    unseen = uncalibrated(quantizers)
    if not unseen:
        return
    for name in unseen:
        quantizers[name].disable()
        layer, is_input, _ = name.rpartition("input_quantizer")
        if not is_input:
            continue
        for other, quantizer in quantizers.items():  # the weight may have several, one after the other
            if f"{other}.".startswith(f"{layer}weight_quantizer."):
                quantizer.disable()
    logger.warning(
        "segquant: the calibration data never reached %s; left in full precision. Calibrate with inputs that use them",
        fold_names(unseen),
    )
