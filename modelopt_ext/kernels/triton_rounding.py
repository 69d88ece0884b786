"""Activations to codes in one pass over them: shift, smoothing, scale (static or per token), both signs, rounding.

A program has a few rows of one segment for one output group, so that what belongs to a channel is read
once for all of them. With static scales it takes a block of channels. With scales per token it takes all channels and
keeps them in registers from the largest magnitude to the codes; rows too long for that are read again from the cache.

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
from .cuda import launches_directly, on_device_of
from .rounding import Quantized, offset_of

POLARITIES = ("none", "dual", "dual8")
# (rows, most channels, warps) that a program holds at a time.
STATIC_BLOCK = (16, 512, 4)
PER_TOKEN_BLOCKS = ((4, 2048, 8), (2, 4096, 4))  # that hold a row; longer ones are read twice, in blocks of the first


@triton.jit
def _codes(z, inverse, LOW: tl.constexpr, HIGH: tl.constexpr, OFFSET: tl.constexpr, FP8: tl.constexpr):
    """Codes of z times the inverse of the scale: to the nearest, ties to even."""
    q = tl.minimum(tl.maximum(z * inverse, LOW), HIGH)
    if not FP8:
        # Adding 1.5 * 2^23 leaves no bits for a fraction.
        q = (q + 12582912.0) - 12582912.0 - OFFSET
    return q


@triton.jit
def _smoothed(
    x_rows,
    shift_ptr,
    inverse_row,
    is_row,
    first,
    START,
    SIZE,
    HAS_SHIFT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(x - shift) * inverse smoothing of a block of channels; 0 beyond the last."""
    k = first + tl.arange(0, BLOCK)
    inside = k < SIZE
    z = tl.load(x_rows + k[None, :], mask=is_row & inside[None, :], other=0.0).to(tl.float32)
    if HAS_SHIFT:
        z = z - tl.load(shift_ptr + START + k, mask=inside, other=0.0)[None, :]
    if HAS_SMOOTHING:
        z = z * tl.load(inverse_row + START + k, mask=inside, other=1.0)[None, :]
    return z


@triton.jit
def _quantize(
    x_ptr,
    shift_ptr,
    inverse_ptr,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    group = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = (row < M)[:, None]
    out_row = (group * M + row).to(tl.int64)
    x_rows = x_ptr + row.to(tl.int64)[:, None] * stride_x + START
    out_rows = out_row[:, None] * K + START
    first = tl.program_id(1) * BLOCK
    inverse = 1.0
    inverse2 = 1.0
    inverse_row = inverse_ptr + group * K
    z = _smoothed(x_rows, shift_ptr, inverse_row, is_row, first, START, SIZE, HAS_SHIFT, HAS_SMOOTHING, BLOCK)
    if PER_TOKEN:
        largest = tl.abs(z) if POLARITY == 0 else z
        largest2 = -z
        for block in range(1, BLOCKS):
            z = _smoothed(
                x_rows, shift_ptr, inverse_row, is_row, block * BLOCK, START, SIZE, HAS_SHIFT, HAS_SMOOTHING, BLOCK
            )
            largest = tl.maximum(largest, tl.abs(z) if POLARITY == 0 else z)
            largest2 = tl.maximum(largest2, -z)
        scale = tl.math.div_rn(tl.maximum(tl.max(largest, axis=1), SMALLEST), LARGEST_CODE)
        scale2 = tl.math.div_rn(tl.maximum(tl.max(largest2, axis=1), SMALLEST), LARGEST_CODE)
        found = SEGMENT * tl.num_programs(2) * M + out_row
        tl.store(scales_ptr + found, scale, mask=row < M)
        if POLARITY != 0:
            tl.store(scales2_ptr + found, scale2, mask=row < M)
        inverse = (1.0 / scale)[:, None]
        inverse2 = (1.0 / scale2)[:, None]
    else:
        inverse = 1.0 / tl.load(scale_ptr + group * SEGMENTS + SEGMENT)
        if POLARITY != 0:
            inverse2 = 1.0 / tl.load(scale2_ptr + group * SEGMENTS + SEGMENT)
    for block in range(BLOCKS):
        start = first + block * BLOCK
        if BLOCKS > 1:
            z = _smoothed(x_rows, shift_ptr, inverse_row, is_row, start, START, SIZE, HAS_SHIFT, HAS_SMOOTHING, BLOCK)
        k = start + tl.arange(0, BLOCK)
        both = is_row & (k < SIZE)[None, :]
        places = out_rows + k[None, :]
        if POLARITY == 0:
            q = _codes(z, inverse, LOW, HIGH, OFFSET, FP8)
        else:
            q = _codes(tl.maximum(z, 0.0), inverse, LOW, HIGH, OFFSET, FP8)
            below = tl.minimum(z, 0.0)
            if POLARITY == 2:
                below = -below
            q2 = _codes(below, inverse2, LOW, HIGH, OFFSET, FP8)
            tl.store(codes2_ptr + places, q2.to(codes2_ptr.dtype.element_ty), mask=both)
        tl.store(codes_ptr + places, q.to(codes_ptr.dtype.element_ty), mask=both)


@torch.library.triton_op("segquant::quantize", mutates_args={})
def quantize_rows(
    x: Tensor,
    shift: Tensor | None,
    inverse_smoothing: Tensor | None,
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
        inverse_smoothing,
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
    inverse_smoothing: Tensor | None,
    scale: Tensor | None,
    scale_negative: Tensor | None,
    segments: Sequence[int],
    polarity: Sequence[int],
    largest_code: float,
    low: float,
    high: float,
    offset: int,
    block: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ``kernel`` on every segment; see :func:`quantize_rows`.

    Args:
        kernel: ``_quantize``, wrapped or not.
        x: (M, K), rows contiguous.
        shift: (K,) or None.
        inverse_smoothing: (G, K) or None.
        scale: (G, T) or None.
        scale_negative: (G, T) or None.
        segments: sizes.
        polarity: places in :data:`POLARITIES`.
        largest_code: of signed codes.
        low: the smallest signed code.
        high: the largest.
        offset: what unsigned codes are held less of.
        block: as :data:`STATIC_BLOCK`, which is the default, or those of :data:`PER_TOKEN_BLOCKS`.
    """
    (rows, channels), groups = x.shape, 1 if inverse_smoothing is None else inverse_smoothing.shape[0]
    fp8, split, per_token = high == E4M3_MAX, any(polarity), scale is None
    kind = torch.float8_e4m3fn if fp8 else torch.int8
    codes = torch.empty(groups * rows, channels, dtype=kind, device=x.device)
    codes2 = torch.empty_like(codes) if split else codes.new_empty(0)
    found = (len(segments), groups * rows) if per_token else (0,)
    scales = torch.empty(found, dtype=torch.float32, device=x.device)
    scales2 = torch.empty(found if split else (0,), dtype=torch.float32, device=x.device)
    if rows == 0:
        return codes, scales, codes2, scales2
    ends = list(accumulate(segments))
    with on_device_of(x):
        for segment, (size, sign) in enumerate(zip(segments, polarity, strict=True)):
            most_rows, most_channels, warps = block or (_per_token_block(size) if per_token else STATIC_BLOCK)
            together = min(most_rows, triton.next_power_of_2(rows))
            width = min(triton.next_power_of_2(size), most_channels)
            blocks = triton.cdiv(size, width)
            unsigned = POLARITIES[sign] == "dual8"
            top = 2.0 * high + 1 if unsigned else high
            kernel[(triton.cdiv(rows, together), 1 if per_token else blocks, groups)](
                x,
                x if shift is None else shift,
                x if inverse_smoothing is None else inverse_smoothing,
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
                HAS_SMOOTHING=inverse_smoothing is not None,
                PER_TOKEN=per_token,
                ROWS=together,
                BLOCK=width,
                BLOCKS=blocks if per_token else 1,
                num_warps=warps,
            )
    return codes, scales, codes2, scales2


def _per_token_block(size: int) -> tuple[int, int, int]:
    return next((block for block in PER_TOKEN_BLOCKS if size <= block[1]), PER_TOKEN_BLOCKS[0])


def fused(
    x: Tensor,
    fmt: QuantFormat,
    segments: Sequence[int],
    polarity: Sequence[str],
    shift: Tensor | None = None,
    inverse_smoothing: Tensor | None = None,
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
        inverse_smoothing,
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
        if static is None:
            return [found[segment].unsqueeze(-1) for segment in range(len(segments))]
        return [static] if len(segments) == 1 else [static[:, t : t + 1] for t in range(len(segments))]

    return Quantized(
        codes,
        by_segment(scales, scale),
        codes2 if split else None,
        by_segment(scales2, scale_negative) if split else None,
    )
