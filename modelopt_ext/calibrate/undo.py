"""Taking back what calibration did to a model whose later blocks could not be solved."""

from __future__ import annotations

from typing import Any

import torch
from modelopt.torch.quantization.utils import enable_weight_access_and_writeback
from torch import nn

from .weights import write_weight


class Undo:
    """The state of some layers before they change: classes, attributes, quantizers, and weights, those on the CPU.

    Meant for layers with ModelOpt's quantizers, which turn into other classes in place and whose quantizers' buffers
    are replaced, never written to.
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        self._model = model
        self._modules = modules
        self._states: list[tuple[nn.Module, type, dict[str, Any]]] = []
        self._weights: list[tuple[nn.Module, torch.Tensor]] = []

    def remember(self, module: nn.Module, with_weight: bool) -> None:
        """Keep the state of a layer.

        Args:
            module: a Linear or convolution with quantizers.
            with_weight: whether its weight is going to change.
        """
        if with_weight:
            with enable_weight_access_and_writeback(module, self._model, self._modules, writeback=False):
                weight = module._parameters["weight"]
                assert weight is not None
                self._weights.append((module, weight.detach().to("cpu", copy=True)))
        for part in module.modules():
            # Containers are copied, what they hold is not: tensors and hooks stay the objects they are.
            attributes = {
                name: value.copy() if isinstance(value, dict | set | list) else value
                for name, value in part.__dict__.items()
            }
            self._states.append((part, type(part), attributes))

    def undo(self) -> None:
        """Put everything back, latest change first."""
        for module, weight in reversed(self._weights):
            write_weight(module, weight, self._model, self._modules)
        for part, kind, attributes in reversed(self._states):
            part.__class__ = kind
            part.__dict__.clear()
            part.__dict__.update(attributes)
        self._weights.clear()
        self._states.clear()
