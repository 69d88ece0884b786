"""Int8 products for ModelOpt's own ``mtq.compress``: registered with its ``gemm_registry``.

ModelOpt keeps the codes of INT8 weights after ``mtq.compress``, but multiplies only FP8 and NVFP4 codes. With this,
Linears of its stock INT8 configs do, too (one weight scale per output channel or for all, one static activation scale
or one per token)::

    mtq.quantize(model, mtq.INT8_SMOOTHQUANT_CFG, forward_loop)
    mtq.compress(model)
    enable_real_quant_gemm(model)  # of modelopt.torch.quantization.backends.gemm_registry

Segmented layers are not ModelOpt's to compress: :func:`modelopt_ext.compress` packs those.
"""

from __future__ import annotations

from typing import Any

import torch
from modelopt.torch.quantization.backends.gemm_registry import gemm_registry
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.qtensor import INT8QTensor, QTensorWrapper
from torch import Tensor, nn

from ..formats import QuantFormat, step_size
from .rounding import quantize
from .scaled_mm import scaled_mm

_INT8 = QuantFormat(8)


def register() -> None:
    """Add :func:`int8_linear` to ModelOpt's registry, once."""
    if int8_linear not in gemm_registry:
        gemm_registry.register(int8_linear, _fits)


def _fits(module: nn.Module, input: Tensor, args: Any, kwargs: Any) -> bool:
    """Whether a compressed Linear is a product of int8 codes."""
    from modelopt.torch.quantization.nn.modules.quant_linear import RealQuantLinear

    if not isinstance(module, RealQuantLinear) or not isinstance(module.weight, QTensorWrapper):
        return False
    if module.weight.metadata.get("qtensor_class") is not INT8QTensor:
        return False
    return _has_int8_weight(module.weight_quantizer) and _rounds_to_int8(module.input_quantizer)


def _has_int8_weight(quantizer: Any) -> bool:
    """Whether codes have one scale a row, or one for all."""
    if not isinstance(quantizer, TensorQuantizer) or quantizer.num_bits != 8 or quantizer.unsigned:
        return False
    return not quantizer.block_sizes and quantizer.axis in (None, 0, (0,))


def _rounds_to_int8(quantizer: Any) -> bool:
    """Whether activations get signed codes with one static scale, or one a token."""
    try:
        fmt = QuantFormat.of(quantizer, "input_quantizer")
    except ValueError:
        return False
    if fmt is None or fmt.num_bits != 8 or fmt.unsigned or fmt.narrow_range:
        return False
    return fmt.per_row if fmt.dynamic else not fmt.per_row


def int8_linear(module: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of a compressed Linear by int8 codes.

    Gradients of input and bias are those of the dequantized weight, straight through the rounding of activations, as
    ModelOpt's FP8 product has them: adapters can be trained around it. The weight has none.

    Args:
        module: a ``RealQuantLinear`` that :func:`register` found fitting.
        input: (..., K), any float dtype.
        weight: (N, K), int8 codes.
        bias: (N,) or None.

    Returns:
        (..., N) in ``input``'s dtype.
    """
    factor = module.input_quantizer.pre_quant_scale
    inverse = None if factor is None else factor.float().reshape(1, -1)
    dynamic = module.input_quantizer._dynamic
    static = None if dynamic else step_size(module.input_quantizer.amax, _INT8).reshape(1, 1)
    scale = module.weight_quantizer._scale.float().reshape(-1).expand(weight.shape[0])
    codes = weight.data.view(torch.int8).reshape(weight.shape[0], -1)
    x = input.reshape(-1, input.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        product = _WithGradient.apply(x, bias, codes, scale, inverse, static)
    else:
        product = _product(x, bias, codes, scale, inverse, static)
    return product.reshape(*input.shape[:-1], weight.shape[0])


def _product(
    x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, inverse: Tensor | None, static: Tensor | None
) -> Tensor:
    found = quantize(x, _INT8, (x.shape[1],), ("none",), None, inverse, static)
    return scaled_mm(found.codes, codes, found.scales[0], scale, bias, out_dtype=x.dtype)


class _WithGradient(torch.autograd.Function):
    """:func:`_product`, differentiable in x and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        inverse: Tensor | None,
        static: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(codes, scale, inverse)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _product(x, bias, codes, scale, inverse, static)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        codes, scale, inverse = ctx.saved_tensors
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            weight = codes.to(gradient.dtype) * scale[:, None].to(gradient.dtype)
            of_x = gradient @ weight
            if inverse is not None:
                of_x = (of_x * inverse).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.sum(dim=0).to(ctx.bias_dtype)
        return of_x, of_bias, None, None, None, None
