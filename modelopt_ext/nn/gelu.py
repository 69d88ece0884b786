"""GELU in front of packed Linears, as compilers make fast code of it.

In a compiled model the rounding to codes is fused with the activation function before it, and that kernel would be
bound by the 25 instructions of a float32 tanh, not by memory. The tanh approximation of GELU (arXiv 1606.08415) is the
same function with a logistic one, which takes a third of them:

    0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)),    u = sqrt(2 / pi) (x + 0.044715 x^3)

The difference is float32's rounding. Without a compiler, on a CPU, and in an export that is not a strict one, nothing
changes.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

# Of -2 u / ln 2.
_LINEAR = -2 * math.sqrt(2 / math.pi) / math.log(2)
_CUBIC = _LINEAR * 0.044715


def gelu_tanh(x: Tensor) -> Tensor:
    """``gelu(x, approximate="tanh")``; x any float dtype, any shape."""
    # Not is_compiling(): torch.export and the ONNX exporter, which are to find a GELU, are that too.
    if x.is_cuda and torch.compiler.is_dynamo_compiling():
        return as_logistic(x)
    return gelu(x, approximate="tanh")


def as_logistic(x: Tensor) -> Tensor:
    """The same by the logistic function, computed in float32."""
    wide = x.float()
    # A power of 2 and an inverse root, which is what GPUs have: a division takes them more.
    root = torch.rsqrt(1 + torch.exp2(wide * (_LINEAR + _CUBIC * wide * wide)))
    return (wide * root * root).to(x.dtype)


class TanhGELU(nn.GELU):
    """``nn.GELU(approximate="tanh")`` by :func:`gelu_tanh`."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: Tensor) -> Tensor:
        """GELU of every value."""
        return gelu_tanh(input)


def lighten_gelu(model: nn.Module) -> None:
    """Make the activations with GELU's tanh approximation in a model use :func:`gelu_tanh`, in place.

    These are torch's ``nn.GELU``, and modules like diffusers' ``GELU``, which call a ``gelu`` method of their own.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.GELU and child.approximate == "tanh":
                setattr(module, name, TanhGELU().train(child.training))
        if getattr(module, "approximate", None) == "tanh" and callable(getattr(type(module), "gelu", None)):
            cast(Any, module).gelu = gelu_tanh  # found before the method of that name
