"""Outputs of codes have no gradient: who asks for one gets an error, in a compiled model as well.

What would arrive otherwise is the gradient by low-rank branch and scales, or none: adapters in front of a packed Linear
would be trained by what goes around it. An operator raises, because compilers trace backward functions ahead of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def refuse_gradients(output: Tensor, input: Tensor) -> Tensor:
    """The output, copied, with a backward that raises; as it is where nothing can ask for a gradient.

    Args:
        output: any shape, float.
        input: what it was computed from.

    Raises:
        RuntimeError: in the backward, when the input's gradient is wanted.
    """
    if not (torch.is_grad_enabled() and input.requires_grad):
        return output
    if torch.jit.is_tracing() or (torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()):
        return output  # exporters, which know no such operator
    return torch.ops.segquant.without_gradient(output.detach(), input)


@torch.library.custom_op("segquant::without_gradient", mutates_args=())
def _without_gradient(output: Tensor, input: Tensor) -> Tensor:
    return output.clone()


@_without_gradient.register_fake
def _(output: Tensor, input: Tensor) -> Tensor:
    return torch.empty_like(output)


@torch.library.custom_op("segquant::refused_gradient", mutates_args=())
def _refused_gradient(gradient: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    raise RuntimeError(
        "packed Linears are for inference: rounding to codes has no gradient; train the model, or adapters on it, "
        "before compress, or run under torch.no_grad()"
    )


@_refused_gradient.register_fake
def _(gradient: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(size, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.size, ctx.dtype = inputs[1].shape, inputs[1].dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
    return None, torch.ops.segquant.refused_gradient(gradient, ctx.size, ctx.dtype)


_without_gradient.register_autograd(_backward, setup_context=_keep)
