"""Where a denoiser's weights and multiply-adds are: what share of the work a quantization policy leaves out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from modelopt_ext import calibrate

from .trajectories import Trajectories, first_tensor


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Cost of one Linear or convolution.

    Attributes:
        weights: number of entries of the weight; the bias is not counted.
        multiply_adds: in one call of the denoiser, over the whole batch.
    """

    weights: int
    multiply_adds: int

    def __add__(self, other: LayerCost) -> LayerCost:
        return LayerCost(self.weights + other.weights, self.multiply_adds + other.multiply_adds)


@dataclasses.dataclass(frozen=True)
class LayerShare:
    """A part of a model's layers, as fractions of all its Linears and convolutions, from 0 to 1."""

    weights: float
    multiply_adds: float


def layer_costs(denoiser: nn.Module, trajectories: Trajectories) -> dict[str, LayerCost]:
    """Measure the cost of every Linear and convolution in the first recorded call.

    Args:
        denoiser: the model; quantized, packed, or neither.
        trajectories: only the first call is replayed.

    Returns:
        The cost by module name, in the order of the first calls. Products of two activations (attention) are no layers
        and are not counted.
    """
    costs: dict[str, LayerCost] = {}
    handles = []

    def count(name: str, module: nn.Linear | _ConvNd, args: tuple[Any, ...], output: Any) -> None:
        rows, columns = _weight_shape(module)
        # Each output element is a dot product with one row of the weight; a transposed convolution's weight has a row
        # for each input element instead.
        transposed = isinstance(module, _ConvNd) and module.transposed
        elements: Tensor = args[0] if transposed else first_tensor(output)
        earlier = costs[name].multiply_adds if name in costs else 0
        costs[name] = LayerCost(rows * columns, earlier + elements.numel() * columns)

    for name, module in denoiser.named_modules():
        if isinstance(module, (nn.Linear, _ConvNd)):
            handles.append(module.register_forward_hook(partial(count, name)))
    try:
        Trajectories(trajectories.calls[:1]).forward_loop(denoiser)
    finally:
        for handle in handles:
            handle.remove()
    return costs


def _weight_shape(module: nn.Linear | _ConvNd) -> tuple[int, int]:
    """Rows and columns of a weight; packed Linears hold two INT4 codes a byte, and their weight looks narrower."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.weight.shape[0], module.weight[0].numel()


def embedders(denoiser: nn.Module, costs: Mapping[str, LayerCost]) -> list[str]:
    """Return the names of the layers that run before the first of the repeated blocks.

    The same rule as that of the setting ``embedders`` of ``segquant``: repeated blocks are what the model keeps in a
    ``ModuleList``; before them come the time, text, patch and guidance embedders. Empty for a model without blocks.

    Args:
        denoiser: the model.
        costs: from :func:`layer_costs`, in call order.
    """
    return calibrate.embedders(denoiser, list(costs))


def share(costs: Mapping[str, LayerCost], names: Iterable[str]) -> LayerShare:
    """Return what part of all layers' weights and multiply-adds the named layers have.

    Args:
        costs: from :func:`layer_costs`.
        names: keys of ``costs``.
    """
    total = sum(costs.values(), LayerCost(0, 0))
    part = sum((costs[name] for name in set(names)), LayerCost(0, 0))
    return LayerShare(part.weights / total.weights, part.multiply_adds / total.multiply_adds)
