"""``segquant::scaled_mm``: the product of two matrices of 8-bit codes, scaled on the way out.

A ``torch.library`` operator: ``torch.compile``, ``torch.export`` and other back ends see one node with a schema. What
is registered here is the reference: it runs on every device and defines the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Sums of that many products of int8 codes stay below 2^24, where float32 counts in ones.
EXACT_CHANNELS = 1024


@torch.library.custom_op("segquant::scaled_mm", mutates_args=())
def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    zero: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``scale_a * ((a - zero) . b^T) * scale_b + bias``, summed in int32 (integers) or float32 (E4M3).

    Args:
        a: activations' codes, (M, K), int8 or float8_e4m3fn.
        b: weights' codes, (N, K), ``a``'s dtype.
        scale_a: float32, (1, 1), or (M, 1) for scales per token.
        scale_b: float32, (N,).
        bias: (N,), any float dtype, or None.
        zero: the code that means 0.0; -128 makes int8 hold the unsigned codes 0..255. Integers only.
        out_dtype: float32 by default.

    Returns:
        (M, N) in ``out_dtype``, rounded once.

    Raises:
        ValueError: dtypes that do not go together.
    """
    _check(a, b, zero)
    if a.dtype == torch.int8:
        product = _integer_product(a, b)
        if zero:
            product = product - zero * b.sum(dim=1, dtype=torch.int32)
        scaled = product.float()
    else:
        scaled = a.float() @ b.float().t()
    scaled = scaled * scale_a * scale_b
    if bias is not None:
        scaled = scaled + bias
    return scaled.to(out_dtype or torch.float32)


def _integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a . b^T of int8 matrices in int32, exact, by float32 products.

    Float products are what CPUs without 8-bit instructions are fast at: ``torch._int_mm`` is 30 times slower there,
    and on GPUs it takes no small matrices.
    """
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], EXACT_CHANNELS):
        chunk = slice(start, start + EXACT_CHANNELS)
        total += (a[:, chunk].float() @ b[:, chunk].float().t()).to(torch.int32)
    return total


@scaled_mm.register_fake
def _(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    zero: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check(a, b, zero)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype or torch.float32)


def _check(a: Tensor, b: Tensor, zero: int) -> None:
    if a.dtype != b.dtype or a.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"scaled_mm multiplies int8 by int8 or float8_e4m3fn by the same, got {a.dtype} by {b.dtype}")
    if zero and a.dtype != torch.int8:
        raise ValueError("scaled_mm: only integer codes have a zero point")
