"""QuantizeLinear and DequantizeLinear as torch operators that the ONNX exporter writes one to one.

Eagerly they compute what the ONNX standard says (operators QuantizeLinear-21 and DequantizeLinear-21), so a model that
uses them runs in PyTorch with the numbers of the exported graph, shapes are traced from real values, and nothing in the
graph depends on what the exporter makes of a formula.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.onnx
from torch import Tensor
from torch.onnx import symbolic_helper

E4M3_MAX = 448.0
_FIRST_OPSET = 13  # of per-axis scales; newer ones take the same inputs


@torch.library.custom_op("segquant::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``saturate(round(x / scale) + zero_point)``, halves to even.

    Args:
        x: any shape, float32.
        scale: float32 scalar, what one code is worth.
        zero_point: scalar of the codes' dtype: int8, uint8 or float8_e4m3fn (then 0).

    Returns:
        Codes in ``x``'s shape and ``zero_point``'s dtype.
    """
    if zero_point.dtype == torch.float8_e4m3fn:
        return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    limits = torch.iinfo(zero_point.dtype)
    return ((x / scale).round() + zero_point.to(x.dtype)).clamp(limits.min, limits.max).to(zero_point.dtype)


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("segquant::dequantize_linear", mutates_args=())
def dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block_size: int) -> Tensor:
    """``(codes - zero_point) * scale``.

    Args:
        codes: any shape; int8, uint8 or float8_e4m3fn.
        scale: float32: a scalar, one a channel of ``axis``, or (``block_size`` > 0) of ``codes``'s rank with one scale
            for each run of ``block_size`` channels of ``axis``.
        zero_point: of ``scale``'s shape and ``codes``'s dtype, or None for 0.
        axis: which dimension the scales belong to; 0 for a scalar.
        block_size: channels that share a scale; 0 without blocks.

    Returns:
        float32, in ``codes``'s shape.
    """
    shape = [1] * codes.dim()
    if scale.dim() == 1:
        shape[axis] = -1

    def spread(values: Tensor) -> Tensor:
        if block_size:
            return values.repeat_interleave(block_size, dim=axis).narrow(axis, 0, codes.shape[axis])
        return values.reshape(shape)

    plain = codes.float()
    if zero_point is not None:
        plain = plain - spread(zero_point.float())
    return plain * spread(scale)


@dequantize_linear.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block_size: int) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


def _quantize_symbolic(g: Any, x: Any, scale: Any, zero_point: Any) -> Any:
    return g.op("QuantizeLinear", x, scale, zero_point)


@symbolic_helper.parse_args("v", "v", "v", "i", "i")
def _dequantize_symbolic(g: Any, codes: Any, scale: Any, zero_point: Any, axis: int, block_size: int) -> Any:
    attributes = {"axis_i": axis}
    if block_size:
        attributes["block_size_i"] = block_size
    inputs = [codes, scale] if symbolic_helper._is_none(zero_point) else [codes, scale, zero_point]
    return g.op("DequantizeLinear", *inputs, **attributes)


torch.onnx.register_custom_op_symbolic("segquant::quantize_linear", _quantize_symbolic, _FIRST_OPSET)
torch.onnx.register_custom_op_symbolic("segquant::dequantize_linear", _dequantize_symbolic, _FIRST_OPSET)
