"""The product of two matrices of 8-bit codes, scaled on the way out: :func:`scaled_mm`.

The operator ``segquant::scaled_mm`` is its reference: it runs on every device and defines the numbers, and
``torch.compile`` and ``torch.export`` see one node with a schema. :mod:`.cuda` has fast products for GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda

# Sums of that many products of int8 codes stay below 2^24, where float32 counts in ones.
EXACT_CHANNELS = 1024


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    zero: int = 0,
    sum_b: Tensor | None = None,
    a2: Tensor | None = None,
    scale_a2: Tensor | None = None,
    sign: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``(scale_a * ((a - zero) . b^T) + sign * scale_a2 * ((a2 - zero) . b^T)) * scale_b + bias``.

    Products are summed in int32 (integers) or float32 (E4M3).

    Args:
        a: activations' codes, (M, K), int8 or float8_e4m3fn.
        b: weights' codes, (N, K), ``a``'s dtype.
        scale_a: float32, (1, 1), or (M, 1) for scales per token.
        scale_b: float32, (N,).
        bias: (N,), any float dtype, or None.
        zero: the code that means 0.0; -128 makes int8 hold the unsigned codes 0..255. Integers only.
        sum_b: int32 (N,), the sums of b's rows; needed with ``zero``.
        a2: a second matrix like ``a`` that is multiplied with the same ``b``, or None.
        scale_a2: its scale, of ``scale_a``'s shape.
        sign: 1 or -1, for its product.
        out_dtype: float32 by default.

    Returns:
        (M, N) in ``out_dtype``, rounded once; E4M3 products on a GPU are rounded to bfloat16 before that.

    Raises:
        ValueError: operands that do not go together.
    """
    check(a, b, zero, sum_b, a2, scale_a2)
    wanted = out_dtype or torch.float32
    if a.is_cuda:
        if a.dtype == torch.int8 and cuda.has_triton():
            return torch.ops.segquant.int8_gemm(a, b, scale_a, scale_b, bias, zero, sum_b, a2, scale_a2, sign, wanted)
        if a.dtype == torch.float8_e4m3fn and cuda.fp8_fits(a.device.index or 0, b.shape[0], b.shape[1]):
            second = None if a2 is None or scale_a2 is None else (a2, scale_a2, sign)
            return cuda.fp8_gemm(a, b, scale_a, scale_b, bias, second, wanted)
    return reference(a, b, scale_a, scale_b, bias, zero, sum_b, a2, scale_a2, sign).to(wanted)


@torch.library.custom_op("segquant::scaled_mm", mutates_args=())
def reference(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    zero: int = 0,
    sum_b: Tensor | None = None,
    a2: Tensor | None = None,
    scale_a2: Tensor | None = None,
    sign: int = 1,
) -> Tensor:
    """:func:`scaled_mm` in plain torch, float32."""
    total = _product(a, b, zero, sum_b) * scale_a
    if a2 is not None and scale_a2 is not None:
        total = total + sign * (_product(a2, b, zero, sum_b) * scale_a2)
    total = total * scale_b
    return total if bias is None else total + bias


def _product(a: Tensor, b: Tensor, zero: int, sum_b: Tensor | None) -> Tensor:
    """``(a - zero) . b^T``, float32."""
    if a.dtype != torch.int8:
        return a.float() @ b.float().t()
    product = _integer_product(a, b)
    return (product - zero * sum_b if zero and sum_b is not None else product).float()


def _integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a . b^T of int8 matrices in int32, exact, by float32 products.

    Float products are what CPUs without 8-bit instructions are fast at (``torch._int_mm`` is 30 times slower there),
    and GPUs have no int8 product for every size.
    """
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], EXACT_CHANNELS):
        chunk = slice(start, start + EXACT_CHANNELS)
        total += (a[:, chunk].float() @ b[:, chunk].float().t()).to(torch.int32)
    return total


@reference.register_fake
def _(a: Tensor, b: Tensor, *rest: object, **named: object) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.float32)


def check(a: Tensor, b: Tensor, zero: int, sum_b: Tensor | None, a2: Tensor | None, scale_a2: Tensor | None) -> None:
    """Raise ValueError for operands that do not go together."""
    if a.dtype != b.dtype or a.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"scaled_mm multiplies int8 by int8 or float8_e4m3fn by the same, got {a.dtype} by {b.dtype}")
    if zero and (a.dtype != torch.int8 or sum_b is None):
        raise ValueError("scaled_mm: only integer codes have a zero point, and it needs sum_b")
    if (a2 is None) != (scale_a2 is None) or (a2 is not None and (a2.dtype != a.dtype or a2.shape != a.shape)):
        raise ValueError("scaled_mm: a2 needs a's dtype and shape, and scale_a2")
