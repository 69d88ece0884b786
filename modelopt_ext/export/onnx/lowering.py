"""Swap a model's quantized Linears for their ONNX form, for the time of an export."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import nn

from ...compress import pack, packed_spec
from ...nn.packed import PackedLinear
from ...nn.packed_spec import PackedSpec
from .linear import OnnxLinear, why_not
from .target import Target

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_LISTED = 8  # names in a message


def quantized_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The Linears that an export lowers, by name: packed ones, and calibrated ones with simulated quantization.

    Raises:
        ValueError: the model has quantizers that are not a Linear's.
    """
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
        or (isinstance(module, QuantModule) and isinstance(module, nn.Linear) and _rounds(module))
    }
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer)
        and module.is_enabled
        and not any(name.startswith(f"{linear}." if linear else "") for linear in found)
    ]
    if others:
        raise ValueError(
            f"only quantized Linears are exported to ONNX; {len(others)} other quantizers are enabled: "
            f"{_listed(others)}. Leave them out of the config, or mtq.disable_quantizer them"
        )
    return found


def _rounds(module: nn.Module) -> bool:
    quantizers = (getattr(module, name, None) for name in ("weight_quantizer", "input_quantizer"))
    return any(getattr(quantizer, "is_enabled", True) for quantizer in quantizers if quantizer is not None)


def specs_of(model: nn.Module) -> dict[str, PackedSpec]:
    """The formats of the Linears that an export lowers, by name.

    Raises:
        ValueError: as :func:`quantized_linears`, or a layer has no packed form.
    """
    return {name: _spec(name, module) for name, module in quantized_linears(model).items()}


def check_layers(specs: Mapping[str, PackedSpec], target: Target) -> None:
    """Refuse what a target does not take, all layers in one message.

    Raises:
        ValueError: lists the layers by reason, with what to do instead.
    """
    reasons: dict[str, list[str]] = {}
    for name, spec in specs.items():
        if problem := why_not(spec, target):
            reasons.setdefault(problem, []).append(name)
    if reasons:
        raise ValueError(
            f"{target.name} does not take this model:\n  "
            + "\n  ".join(f"{len(names)} layers ({_listed(names)}): {reason}" for reason, names in reasons.items())
        )


@contextmanager
def lowered(model: nn.Module, target: Target) -> Iterator[dict[str, OnnxLinear]]:
    """Replace the quantized Linears of ``model`` by :class:`OnnxLinear`; the block's end puts them back.

    Args:
        model: calibrated, compressed or loaded from a checkpoint. Its tensors are copied, never changed.
        target: for whom.

    Yields:
        The replacements by name.

    Raises:
        ValueError: a layer has no form that the target takes.
    """
    linears = quantized_linears(model)
    packed = {name: _packed(name, module) for name, module in linears.items()}
    check_layers({name: module.spec for name, module in packed.items()}, target)
    replacements = {name: OnnxLinear(module, target).eval() for name, module in packed.items()}
    del packed
    by_identity = {id(linears[name]): replacement for name, replacement in replacements.items()}
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if id(child) in by_identity:
                    setattr(parent, name, by_identity[id(child)])
                    swapped.append((parent, name, child))
        yield replacements
    finally:
        for parent, name, child in swapped:
            setattr(parent, name, child)


def _packed(name: str, module: nn.Module) -> PackedLinear:
    return module if isinstance(module, PackedLinear) else _named(name, module, pack)


def _spec(name: str, module: nn.Module) -> PackedSpec:
    return module.spec if isinstance(module, PackedLinear) else _named(name, module, packed_spec)


def _named(name: str, module: nn.Module, function: Callable[[nn.Module], _Result]) -> _Result:
    """Apply ``function``, whose errors get the layer's name."""
    try:
        return function(module)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
