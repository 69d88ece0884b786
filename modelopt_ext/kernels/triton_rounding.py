"""Activations to codes in one pass over them: shift, smoothing, scale (static or per token), both signs, rounding.

A program has one row of one segment for one output group. With static scales it takes a block of the row's channels;
with scales per token it goes over the row twice, for the largest magnitude and for the codes, and the second time the
row comes from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ..formats import E4M3_MAX, SMALLEST_AMAX, QuantFormat
from .cuda import launches_directly
from .rounding import Quantized, offset_of

POLARITIES = ("none", "dual", "dual8")
LARGEST_BLOCK = 4096  # channels that a program holds at a time


@triton.jit
def _codes(z, scale, LOW: tl.constexpr, HIGH: tl.constexpr, OFFSET: tl.constexpr, FP8: tl.constexpr):
    """Codes of z: to the nearest, ties to even."""
    q = tl.minimum(tl.maximum(tl.math.div_rn(z, scale), LOW), HIGH)
    if not FP8:
        # Adding 1.5 * 2^23 leaves no bits for a fraction.
        q = (q + 12582912.0) - 12582912.0 - OFFSET
    return q


@triton.jit
def _quantize(
    x_ptr,
    shift_ptr,
    smoothing_ptr,
    scale_ptr,
    scale2_ptr,
    codes_ptr,
    codes2_ptr,
    scales_ptr,
    scales2_ptr,
    M,
    K,
    stride_x,
    START,
    SIZE,
    SEGMENT,
    SEGMENTS,
    SMALLEST: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    FP8: tl.constexpr,
    POLARITY: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row, group = tl.program_id(0), tl.program_id(2)
    out_row = (group * M + row).to(tl.int64)
    x_row = x_ptr + row.to(tl.int64) * stride_x + START
    first = tl.program_id(1) * BLOCK
    scale = 1.0
    scale2 = 1.0
    if PER_TOKEN:
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        largest2 = tl.zeros((BLOCK,), dtype=tl.float32)
        for block in range(BLOCKS):
            k = block * BLOCK + tl.arange(0, BLOCK)
            inside = k < SIZE
            z = tl.load(x_row + k, mask=inside, other=0.0).to(tl.float32)
            if HAS_SHIFT:
                z = z - tl.load(shift_ptr + START + k, mask=inside, other=0.0)
            if HAS_SMOOTHING:
                z = tl.math.div_rn(z, tl.load(smoothing_ptr + group * K + START + k, mask=inside, other=1.0))
            if POLARITY == 0:
                largest = tl.maximum(largest, tl.abs(z))
            else:
                largest = tl.maximum(largest, z)
                largest2 = tl.maximum(largest2, -z)
        scale = tl.math.div_rn(tl.maximum(tl.max(largest, axis=0), SMALLEST), LARGEST_CODE)
        scale2 = tl.math.div_rn(tl.maximum(tl.max(largest2, axis=0), SMALLEST), LARGEST_CODE)
        rows = tl.num_programs(2) * M
        tl.store(scales_ptr + SEGMENT * rows + out_row, scale)
        if POLARITY != 0:
            tl.store(scales2_ptr + SEGMENT * rows + out_row, scale2)
    else:
        scale = tl.load(scale_ptr + group * SEGMENTS + SEGMENT)
        if POLARITY != 0:
            scale2 = tl.load(scale2_ptr + group * SEGMENTS + SEGMENT)
    for block in range(BLOCKS):
        k = first + block * BLOCK + tl.arange(0, BLOCK)
        inside = k < SIZE
        z = tl.load(x_row + k, mask=inside, other=0.0).to(tl.float32)
        if HAS_SHIFT:
            z = z - tl.load(shift_ptr + START + k, mask=inside, other=0.0)
        if HAS_SMOOTHING:
            z = tl.math.div_rn(z, tl.load(smoothing_ptr + group * K + START + k, mask=inside, other=1.0))
        places = out_row * K + START + k
        if POLARITY == 0:
            q = _codes(z, scale, LOW, HIGH, OFFSET, FP8)
        else:
            q = _codes(tl.maximum(z, 0.0), scale, LOW, HIGH, OFFSET, FP8)
            below = tl.minimum(z, 0.0)
            if POLARITY == 2:
                below = -below
            q2 = _codes(below, scale2, LOW, HIGH, OFFSET, FP8)
            tl.store(codes2_ptr + places, q2.to(codes2_ptr.dtype.element_ty), mask=inside)
        tl.store(codes_ptr + places, q.to(codes_ptr.dtype.element_ty), mask=inside)


@torch.library.triton_op("segquant::quantize", mutates_args={})
def quantize_rows(
    x: Tensor,
    shift: Tensor | None,
    smoothing: Tensor | None,
    scale: Tensor | None,
    scale_negative: Tensor | None,
    segments: list[int],
    polarity: list[int],
    largest_code: float,
    low: float,
    high: float,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`modelopt_ext.kernels.rounding.quantize`; E4M3 where ``high`` is its largest number.

    Returns:
        codes (G M, K); scales found, (T, G M) or (0,); the same of the values below 0.
    """
    return launch(
        wrap_triton(_quantize),
        x,
        shift,
        smoothing,
        scale,
        scale_negative,
        segments,
        polarity,
        largest_code,
        low,
        high,
        offset,
    )


def launch(
    kernel: Any,
    x: Tensor,
    shift: Tensor | None,
    smoothing: Tensor | None,
    scale: Tensor | None,
    scale_negative: Tensor | None,
    segments: Sequence[int],
    polarity: Sequence[int],
    largest_code: float,
    low: float,
    high: float,
    offset: int,
    block: int = LARGEST_BLOCK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ``kernel`` on every segment; see :func:`quantize_rows`.

    Args:
        kernel: ``_quantize``, wrapped or not.
        x: (M, K), rows contiguous.
        shift: (K,) or None.
        smoothing: (G, K) or None.
        scale: (G, T) or None.
        scale_negative: (G, T) or None.
        segments: sizes.
        polarity: places in :data:`POLARITIES`.
        largest_code: of signed codes.
        low: the smallest signed code.
        high: the largest.
        offset: what unsigned codes are held less of.
        block: most channels at a time.
    """
    (rows, channels), groups = x.shape, 1 if smoothing is None else smoothing.shape[0]
    fp8, split, per_token = high == E4M3_MAX, any(polarity), scale is None
    kind = torch.float8_e4m3fn if fp8 else torch.int8
    codes = torch.empty(groups * rows, channels, dtype=kind, device=x.device)
    codes2 = torch.empty_like(codes) if split else codes.new_empty(0)
    found = (len(segments), groups * rows) if per_token else (0,)
    scales = torch.empty(found, dtype=torch.float32, device=x.device)
    scales2 = torch.empty(found if split else (0,), dtype=torch.float32, device=x.device)
    ends = list(accumulate(segments))
    for segment, (size, sign) in enumerate(zip(segments, polarity, strict=True)):
        width = min(triton.next_power_of_2(size), block)
        blocks = triton.cdiv(size, width)
        unsigned = POLARITIES[sign] == "dual8"
        top = 2.0 * high + 1 if unsigned else high
        kernel[(rows, 1 if per_token else blocks, groups)](
            x,
            x if shift is None else shift,
            x if smoothing is None else smoothing,
            x if scale is None else scale.contiguous(),
            x if scale_negative is None else scale_negative.contiguous(),
            codes,
            codes2,
            scales,
            scales2,
            rows,
            channels,
            x.stride(0),
            ends[segment] - size,
            size,
            segment,
            len(segments),
            SMALLEST=SMALLEST_AMAX,
            LARGEST_CODE=top if unsigned else largest_code,
            LOW=0.0 if unsigned else low,
            HIGH=top,
            OFFSET=float(offset) if unsigned else 0.0,
            FP8=fp8,
            POLARITY=sign,
            HAS_SHIFT=shift is not None,
            HAS_SMOOTHING=smoothing is not None,
            PER_TOKEN=per_token,
            BLOCK=width,
            BLOCKS=blocks if per_token else 1,
            num_warps=8 if width >= 2048 else 4,
        )
    return codes, scales, codes2, scales2


def fused(
    x: Tensor,
    fmt: QuantFormat,
    segments: Sequence[int],
    polarity: Sequence[str],
    shift: Tensor | None = None,
    smoothing: Tensor | None = None,
    scale: Tensor | None = None,
    scale_negative: Tensor | None = None,
) -> Quantized:
    """:func:`modelopt_ext.kernels.rounding.quantize` by the kernel."""
    x = x if x.stride(1) == 1 else x.contiguous()
    signs = [POLARITIES.index(sign) for sign in polarity]
    run = partial(launch, _quantize) if launches_directly() else torch.ops.segquant.quantize
    codes, scales, codes2, scales2 = run(
        x,
        shift,
        smoothing,
        scale,
        scale_negative,
        list(segments),
        signs,
        float(fmt.max_code),
        float(fmt.min_code) if fmt.is_integer else -E4M3_MAX,
        float(fmt.max_code) if fmt.is_integer else E4M3_MAX,
        offset_of(fmt),
    )
    split = any(signs)

    def by_segment(found: Tensor, static: Tensor | None) -> list[Tensor]:
        source = found.unsqueeze(-1) if static is None else static.t().unsqueeze(-1)
        return list(source)

    return Quantized(
        codes,
        by_segment(scales, scale),
        codes2 if split else None,
        by_segment(scales2, scale_negative) if split else None,
    )
