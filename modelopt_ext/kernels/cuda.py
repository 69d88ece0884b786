"""Fast products of codes on CUDA devices, in the place of the reference.

Int8 codes go to a Triton kernel, E4M3 codes to ``torch._scaled_mm``. What a device or a size lacks is found out by
trying or by the operands, never by the GPU's name, and falls back to the reference, which a log line says once.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from .scaled_mm import check, reference, scaled_mm

logger = logging.getLogger(__name__)

# cuBLAS takes E4M3 matrices with sizes that are multiples of this.
FP8_MULTIPLE = 16


@cache
def _warn(problem: str) -> None:
    logger.warning("segquant: %s; using the slow reference product", problem)


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@scaled_mm.register_kernel("cuda")
def _(
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
    check(a, b, zero, sum_b, a2, scale_a2)
    out_dtype = out_dtype or torch.float32
    if a.dtype == torch.int8:
        if _has_triton():
            from .triton_gemm import int8_gemm  # Triton is optional

            second = None if a2 is None or scale_a2 is None else (a2, scale_a2, sign)
            return int8_gemm(a, b, scale_a, scale_b, bias, zero, sum_b, second, out_dtype)
        _warn("Triton is not installed (pip install triton)")
    elif _fp8_fits(a, b):
        if a2 is None or scale_a2 is None:
            return _fp8_gemm(a, b, scale_a, scale_b, bias, out_dtype)
        # No kernel shares the weight between two E4M3 products: two of them.
        first = _fp8_gemm(a, b, scale_a, scale_b, bias, torch.float32)
        return (first + sign * _fp8_gemm(a2, b, scale_a2, scale_b, None, torch.float32)).to(out_dtype)
    return reference(a, b, scale_a, scale_b, bias, zero, sum_b, a2, scale_a2, sign, out_dtype)


def _fp8_fits(a: Tensor, b: Tensor) -> bool:
    if not _has_fp8(a.device):
        _warn(f"{torch.cuda.get_device_name(a.device)} multiplies no E4M3 matrices")
        return False
    if b.shape[0] % FP8_MULTIPLE or b.shape[1] % FP8_MULTIPLE:
        _warn(f"a {b.shape[0]} x {b.shape[1]} E4M3 weight is not a multiple of {FP8_MULTIPLE}")
        return False
    return True


@cache
def _has_fp8(device: torch.device) -> bool:
    """Whether ``torch._scaled_mm`` works there."""
    one = torch.ones((), device=device)
    codes = torch.zeros(FP8_MULTIPLE, FP8_MULTIPLE, device=device).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(codes, codes.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError):
        return False
    return True


def _fp8_gemm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """One product; the sum is rounded to bfloat16 before scales, which have a row or column each, are applied."""
    one = torch.ones((), device=a.device)
    wide = out_dtype == torch.float32
    product = torch._scaled_mm(
        a.contiguous(), b.contiguous().t(), scale_a=one, scale_b=one, out_dtype=torch.float32 if wide else out_dtype
    )
    scaled = product.float() * (scale_a * scale_b)
    return (scaled if bias is None else scaled + bias).to(out_dtype)
