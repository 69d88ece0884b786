"""Activations to codes in one pass over them: shift, smoothing, scale (static or per token), both signs, rounding.

A program with static scales has a block of channels of several rows, so that what belongs to a channel is read once for
all of them. With scales per token it has whole rows, one after the other: a row stays in registers from the largest
magnitude to the codes (one that is too long for that is read again), and the next ones are copied to shared memory
meanwhile. Loads and stores are one-dimensional: those of two dimensions have layouts of their own in Triton, and what
goes from one to the other goes through shared memory, behind barriers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ..formats import E4M3_MAX, SMALLEST_AMAX, QuantFormat
from .cuda import on_device_of
from .rounding import Quantized, offset_of
from .scaled_mm import launches_directly
from .triton_gemm import processor_count, shared_memory

POLARITIES = ("none", "dual", "dual8")
# Rows, channels and warps of a program with static scales.
STATIC_BLOCK = (8, 1024, 2)
# Fewer channels are masked, or each small size would be compiled anew.
FEWEST_CHANNELS = 256
# With scales per token: channels that a program keeps, and channels a warp, at most.
MOST_KEPT, KEPT_BY_WARP = 16384, 2048
# Channels of all such programs on a multiprocessor.
KEPT_AT_ONCE = 12288
# Rows in registers and on their way, where shared memory has room for them.
MOST_STAGES = 4
# Codes that a warp stores at once. Smaller blocks have layouts of their own, too.
STORED_AT_ONCE = 512


@triton.jit
def _store(places, q, inside, OFFSET: tl.constexpr, FP8: tl.constexpr):
    """Codes of values in units of the scale: to the nearest, ties to even."""
    if not FP8:
        # Adding 1.5 * 2^23 leaves no bits for a fraction, and a bit pattern that counts in ones from 0x4B400000 on, of
        # which the last byte is kept.
        q = (q + (12582912.0 - OFFSET)).to(tl.int32, bitcast=True)
    tl.store(places, q.to(places.dtype.element_ty), mask=inside)


@triton.jit
def _store_both(
    codes_ptr,
    codes2_ptr,
    place,
    z,
    inverse,
    inverse2,
    inside,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    FP8: tl.constexpr,
    POLARITY: tl.constexpr,
    FOUND: tl.constexpr,
):
    """Codes of z, or those of its positive and negative values; scales that were FOUND in z leave none too large."""
    q = z * inverse
    if POLARITY == 0:
        if not FOUND:
            q = tl.minimum(tl.maximum(q, LOW), HIGH)
    else:
        # Scales are positive. A minimum or maximum takes as long as two multiplications.
        q2 = (-z if POLARITY == 2 else z) * inverse2
        q = tl.maximum(q, 0.0)
        q2 = tl.maximum(q2, 0.0) if POLARITY == 2 else tl.minimum(q2, 0.0)
        if not FOUND:
            q = tl.minimum(q, HIGH)
            q2 = tl.minimum(q2, HIGH) if POLARITY == 2 else tl.maximum(q2, LOW)
        _store(codes2_ptr + place, q2, inside, OFFSET, FP8)
    _store(codes_ptr + place, q, inside, OFFSET, FP8)


@triton.jit
def _of_channels(ptr, k, inside, EXISTS: tl.constexpr):
    return tl.load(ptr + k, mask=inside, other=0.0) if EXISTS else 0.0


@triton.jit
def _smoothed(x, shift, factor, HAS_SHIFT: tl.constexpr, HAS_SMOOTHING: tl.constexpr):
    """(x - shift) * inverse smoothing of a block of channels; 0 past the last."""
    z = x.to(tl.float32)
    if HAS_SHIFT:
        z = z - shift
    if HAS_SMOOTHING:
        z = z * factor
    return z


@triton.jit
def _higher_and_lower(high, low, high2, low2):
    return tl.maximum(high, high2), tl.minimum(low, low2)


@triton.jit
def _extremes(z, POLARITY: tl.constexpr):
    """What decides the scales of a block: its largest magnitude and 0, or its extreme values where signs are split."""
    if POLARITY == 0:
        return tl.max(tl.abs(z), axis=0), 0.0
    return tl.reduce((z, z), 0, _higher_and_lower)


@triton.jit
def _extremes_of_two(z, z2, BLOCK: tl.constexpr, BLOCK2: tl.constexpr, POLARITY: tl.constexpr):
    """The same of two blocks, by one reduction among threads, which has to wait for all of them."""
    parts = tl.reshape(z, (BLOCK // BLOCK2, BLOCK2))  # a thread's own
    if POLARITY == 0:
        return tl.max(tl.maximum(tl.max(tl.abs(parts), axis=0), tl.abs(z2)), axis=0), 0.0
    high, low = tl.maximum(tl.max(parts, axis=0), z2), tl.minimum(tl.min(parts, axis=0), z2)
    return tl.reduce((high, low), 0, _higher_and_lower)


@triton.jit
def _more(x_row, shift_ptr, inverse_ptr, channel, within, HAS_SHIFT: tl.constexpr, HAS_SMOOTHING: tl.constexpr):
    """A block of channels that is not kept."""
    x = tl.load(x_row + channel, mask=within, other=0.0)
    shift = _of_channels(shift_ptr, channel, within, HAS_SHIFT)
    factor = _of_channels(inverse_ptr, channel, within, HAS_SMOOTHING)
    return _smoothed(x, shift, factor, HAS_SHIFT, HAS_SMOOTHING)


@triton.jit(do_not_specialize=["M", "SEGMENT", "SEGMENTS"], do_not_specialize_on_alignment=["scale_ptr", "scale2_ptr"])
def _quantize_static(
    x_ptr,
    shift_ptr,
    inverse_ptr,
    scale_ptr,
    scale2_ptr,
    codes_ptr,
    codes2_ptr,
    M,
    K,
    stride_x,
    START,
    SIZE,
    SEGMENT,
    SEGMENTS,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    FP8: tl.constexpr,
    POLARITY: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes by scales (G, T) that are there; a program has some rows of a block of channels of a group."""
    group = tl.program_id(2)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < SIZE
    shift = _of_channels(shift_ptr + START, k, inside, HAS_SHIFT)
    factor = _of_channels(inverse_ptr + group * K + START, k, inside, HAS_SMOOTHING)
    inverse = 1.0 / tl.load(scale_ptr + group * SEGMENTS + SEGMENT)
    inverse2 = inverse
    if POLARITY != 0:
        inverse2 = 1.0 / tl.load(scale2_ptr + group * SEGMENTS + SEGMENT)
    first = tl.program_id(0) * ROWS
    for index in tl.range(0, tl.minimum(ROWS, M - first), loop_unroll_factor=4):
        row = first + index
        x = tl.load(x_ptr + row.to(tl.int64) * stride_x + START + k, mask=inside, other=0.0)
        z = _smoothed(x, shift, factor, HAS_SHIFT, HAS_SMOOTHING)
        place = (group * M + row).to(tl.int64) * K + START + k
        _store_both(codes_ptr, codes2_ptr, place, z, inverse, inverse2, inside, LOW, HIGH, OFFSET, FP8, POLARITY, False)


@triton.jit(do_not_specialize=["M", "SEGMENT", "PROGRAMS"])
def _quantize_per_token(
    x_ptr,
    shift_ptr,
    inverse_ptr,
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
    PROGRAMS,
    SMALLEST: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    FP8: tl.constexpr,
    POLARITY: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK2: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scales (T, G M) and codes by them; a program has every PROGRAMS-th row of a group, in two blocks of channels."""
    group = tl.program_id(2)
    x_ptr += START
    shift_ptr += START
    inverse_ptr += group * K + START
    k = tl.arange(0, BLOCK)
    k2 = BLOCK + tl.arange(0, BLOCK2)
    inside = k < SIZE
    inside2 = k2 < SIZE
    shift = _of_channels(shift_ptr, k, inside, HAS_SHIFT)
    shift2 = _of_channels(shift_ptr, k2, inside2, HAS_SHIFT)
    factor = _of_channels(inverse_ptr, k, inside, HAS_SMOOTHING)
    factor2 = _of_channels(inverse_ptr, k2, inside2, HAS_SMOOTHING)
    for row in tl.range(tl.program_id(0).to(tl.int64), M, PROGRAMS, num_stages=STAGES):
        x = tl.load(x_ptr + row * stride_x + k, mask=inside, other=0.0)
        x2 = tl.load(x_ptr + row * stride_x + k2, mask=inside2, other=0.0)
        z = _smoothed(x, shift, factor, HAS_SHIFT, HAS_SMOOTHING)
        z2 = _smoothed(x2, shift2, factor2, HAS_SHIFT, HAS_SMOOTHING)
        highest, lowest = _extremes_of_two(z, z2, BLOCK, BLOCK2, POLARITY)
        for block in range(BLOCKS):
            channel = BLOCK + BLOCK2 + block * BLOCK + k
            within = channel < SIZE
            more = _more(x_ptr + row * stride_x, shift_ptr, inverse_ptr, channel, within, HAS_SHIFT, HAS_SMOOTHING)
            high, low = _extremes(more, POLARITY)
            highest, lowest = _higher_and_lower(highest, lowest, high, low)
        scale = tl.math.div_rn(tl.maximum(highest, SMALLEST), LARGEST_CODE)
        scale2 = scale
        out_row = group * M + row
        found = SEGMENT * tl.num_programs(2) * M + out_row
        tl.store(scales_ptr + found, scale)
        if POLARITY != 0:
            scale2 = tl.math.div_rn(tl.maximum(-lowest, SMALLEST), LARGEST_CODE)
            tl.store(scales2_ptr + found, scale2)
        inverse = 1.0 / scale
        inverse2 = 1.0 / scale2
        place = out_row * K + START
        _store_both(
            codes_ptr, codes2_ptr, place + k, z, inverse, inverse2, inside, LOW, HIGH, OFFSET, FP8, POLARITY, True
        )
        _store_both(
            codes_ptr, codes2_ptr, place + k2, z2, inverse, inverse2, inside2, LOW, HIGH, OFFSET, FP8, POLARITY, True
        )
        for block in range(BLOCKS):
            channel = BLOCK + BLOCK2 + block * BLOCK + k
            within = channel < SIZE
            more = _more(x_ptr + row * stride_x, shift_ptr, inverse_ptr, channel, within, HAS_SHIFT, HAS_SMOOTHING)
            _store_both(
                codes_ptr,
                codes2_ptr,
                place + channel,
                more,
                inverse,
                inverse2,
                within,
                LOW,
                HIGH,
                OFFSET,
                FP8,
                POLARITY,
                True,
            )


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
        wrap_triton,
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
    wrap: Callable[[Any], Any],
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
    """Run a kernel on every segment; see :func:`quantize_rows`.

    Args:
        wrap: what the kernel is given to before it is launched.
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
        block: with static scales, rows, most channels and warps of a program; with scales per token, channels of a
            row's first and second block and warps. By default what is fast.
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
            unsigned = POLARITIES[sign] == "dual8"
            top = 2.0 * high + 1 if unsigned else high
            shared = {
                "LOW": 0.0 if unsigned else low,
                "HIGH": top,
                "OFFSET": offset if unsigned else 0,
                "FP8": fp8,
                "POLARITY": sign,
                "HAS_SHIFT": shift is not None,
                "HAS_SMOOTHING": inverse_smoothing is not None,
            }
            # Absent tensors are replaced by others, which are not read.
            of_channels = x if shift is None else shift, x if inverse_smoothing is None else inverse_smoothing
            sizes = rows, channels, x.stride(0), ends[segment] - size, size, segment
            if scale is None:
                width, width2, warps = block or _per_token_blocks(size)
                kept = width + width2
                programs = min(rows, processor_count(x.device) * max(1, KEPT_AT_ONCE // kept))
                wrap(_quantize_per_token)[(programs, 1, groups)](
                    x,
                    *of_channels,
                    codes,
                    codes2,
                    scales,
                    scales2,
                    *sizes,
                    programs,
                    SMALLEST=SMALLEST_AMAX,
                    LARGEST_CODE=top if unsigned else largest_code,
                    BLOCK=width,
                    BLOCK2=width2,
                    BLOCKS=triton.cdiv(max(size - kept, 0), width),
                    STAGES=_stages(kept * x.element_size(), x.device) if size <= kept else 1,
                    num_warps=warps,
                    **shared,
                )
            else:
                together, most_channels, warps = block or STATIC_BLOCK
                width = min(max(triton.next_power_of_2(size), FEWEST_CHANNELS), most_channels)
                wrap(_quantize_static)[(triton.cdiv(rows, together), triton.cdiv(size, width), groups)](
                    x,
                    *of_channels,
                    scale.contiguous(),
                    x if scale_negative is None else scale_negative.contiguous(),
                    codes,
                    codes2,
                    *sizes,
                    len(segments),
                    ROWS=together,
                    BLOCK=width,
                    num_warps=warps,
                    **shared,
                )
    return codes, scales, codes2, scales2


def _unwrapped(kernel: Any) -> Any:
    return kernel


def _per_token_blocks(size: int) -> tuple[int, int, int]:
    """Sizes of a row's two blocks and warps of a program: powers of two that leave less of a row's end unused."""
    both = min(max(triton.next_power_of_2(size), 4), MOST_KEPT)
    warps = max(1, both // KEPT_BY_WARP)
    unequal = size <= both * 3 // 4 and both // 4 >= warps * STORED_AT_ONCE
    return both // 2, both // 4 if unequal else both // 2, warps


def _stages(size: int, device: torch.device) -> int:
    """Rows of ``size`` bytes that a program has at a time, the one in registers included."""
    return min(MOST_STAGES, 1 + shared_memory(device) // size)


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
    run = partial(launch, _unwrapped) if launches_directly() else torch.ops.segquant.quantize
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
