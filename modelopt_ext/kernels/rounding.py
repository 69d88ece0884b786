"""From activations to codes: :func:`quantize`, the step in front of :func:`modelopt_ext.kernels.scaled_mm`.

Written in plain torch, which ``torch.compile`` fuses into whatever produces the activations, and that is the fast way.
Without it, a GPU reads the activations once in a Triton kernel of :mod:`.triton_rounding` instead of once an operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import E4M3_MAX, SMALLEST_AMAX, QuantFormat
from . import cuda

# int8 holds the unsigned codes 0..255 minus this.
UNSIGNED_OFFSET = 128
# A float32 of this size has no bits for a fraction: adding it rounds to the nearest integer, ties to even, and the bit
# pattern of the sum counts in ones.
_INTEGERS_ONLY = 1.5 * 2.0**23
_BITS_OF_ZERO = 0x4B400000
# Segments up to which the scale of a channel is chosen where it is used, by comparing the channel's number.
_CHOSEN_INLINE = 4


class Quantized(NamedTuple):
    """Codes of activations, group after group of G, M rows each; T segments.

    Attributes:
        codes: (G M, K), int8 or float8_e4m3fn. Of the values of at least 0, where a segment is split by sign.
        scales: T tensors, float32, (G, 1), or (G M, 1) for scales per token.
        negative: (G M, K), those of the values below 0; None where no segment is split. Anything in the others.
        negative_scales: like ``scales``, or None.
    """

    codes: Tensor
    scales: Sequence[Tensor]
    negative: Tensor | None = None
    negative_scales: Sequence[Tensor] | None = None


def quantize(
    x: Tensor,
    fmt: QuantFormat,
    segments: Sequence[int],
    polarity: Sequence[str],
    shift: Tensor | None = None,
    inverse_smoothing: Tensor | None = None,
    scale: Tensor | None = None,
    scale_negative: Tensor | None = None,
    compiled: bool = False,
) -> Quantized:
    """Round ``z = (x - shift) * inverse_smoothing`` of every group to codes ``z / scale``.

    Args:
        x: (M, K), any float dtype.
        fmt: of signed codes.
        segments: sizes along K.
        polarity: of each segment, ``"none"``, ``"dual"`` (arXiv 2507.14811: signed codes of max(z, 0) and min(z, 0)) or
            ``"dual8"`` (unsigned codes of max(z, 0) and max(-z, 0), held as int8 less :func:`offset_of`).
        shift: float32 (K,), or None.
        inverse_smoothing: float32 (G, K), or None for one group and ones.
        scale: float32 (G, T), static scales; None finds one for each row, group, segment and sign.
        scale_negative: float32 (G, T), those of the values below 0, where any segment is split.
        compiled: whether a compiler sees this that can't say so (``torch.compiler.is_compiling``).
    """
    if x.is_cuda and not (compiled or torch.compiler.is_compiling()) and _fits_kernel(x, fmt):
        from .triton_rounding import fused

        return fused(x, fmt, segments, polarity, shift, inverse_smoothing, scale, scale_negative)
    lowered = cuda.lowered(x) if compiled and x.is_cuda and scale is not None else ""
    if scale is not None and lowered and isinstance(x.shape[0], int):
        return _as_operator(x, fmt, segments, polarity, shift, inverse_smoothing, scale, scale_negative, lowered)
    return reference(x, fmt, segments, polarity, shift, inverse_smoothing, scale, scale_negative)


def _as_operator(
    x: Tensor,
    fmt: QuantFormat,
    segments: Sequence[int],
    polarity: Sequence[str],
    shift: Tensor | None,
    inverse_smoothing: Tensor | None,
    scale: Tensor,
    scale_negative: Tensor | None,
    lowered: str,
) -> Quantized:
    """:func:`reference` with static scales as one operator, which :mod:`.rounding_lowering` explains to Inductor."""
    bits = [fmt.num_bits] if isinstance(fmt.num_bits, int) else list(fmt.num_bits)
    scales = [_of_segment(scale, t) for t in range(len(segments))]
    if set(polarity) == {"none"}:
        codes = torch.ops.segquant.codes(x, shift, inverse_smoothing, scale, list(segments), bits, lowered)
        return Quantized(codes, scales)
    assert scale_negative is not None
    codes, negative = torch.ops.segquant.codes_of_signs(
        x, shift, inverse_smoothing, scale, scale_negative, list(segments), list(polarity), bits, lowered
    )
    return Quantized(codes, scales, negative, [_of_segment(scale_negative, t) for t in range(len(segments))])


# Arguments as in :func:`quantize`; ``bits`` as :class:`QuantFormat` has them, and the version of the lowering.
torch.library.define(
    "segquant::codes",
    "(Tensor x, Tensor? shift, Tensor? inverse_smoothing, Tensor scale, int[] segments, int[] bits, str lowered) "
    "-> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "segquant::codes_of_signs",
    "(Tensor x, Tensor? shift, Tensor? inverse_smoothing, Tensor scale, Tensor scale_negative, int[] segments, "
    "str[] polarity, int[] bits, str lowered) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def plain_codes(
    x: Tensor,
    shift: Tensor | None,
    inverse_smoothing: Tensor | None,
    scale: Tensor,
    segments: Sequence[int],
    bits: Sequence[int],
    lowered: str = "",
) -> Tensor:
    """The operator of that name: (G M, K)."""
    polarity = ["none"] * len(segments)
    return reference(x, _format_of(bits), segments, polarity, shift, inverse_smoothing, scale).codes


def plain_codes_of_signs(
    x: Tensor,
    shift: Tensor | None,
    inverse_smoothing: Tensor | None,
    scale: Tensor,
    scale_negative: Tensor,
    segments: Sequence[int],
    polarity: Sequence[str],
    bits: Sequence[int],
    lowered: str = "",
) -> tuple[Tensor, Tensor]:
    """The operator of that name: twice (G M, K)."""
    found = reference(x, _format_of(bits), segments, polarity, shift, inverse_smoothing, scale, scale_negative)
    assert found.negative is not None
    return found.codes, found.negative


torch.library.impl("segquant::codes", "CompositeExplicitAutograd", plain_codes)
torch.library.impl("segquant::codes_of_signs", "CompositeExplicitAutograd", plain_codes_of_signs)


@torch.library.register_fake("segquant::codes")
def _(x: Tensor, shift: Any, inverse_smoothing: Any, scale: Tensor, segments: Any, bits: Any, lowered: str) -> Tensor:
    return _codes_like(x, scale, bits)


@torch.library.register_fake("segquant::codes_of_signs")
def _(x: Tensor, shift: Any, inverse_smoothing: Any, scale: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _codes_like(x, scale, arguments[3]), _codes_like(x, scale, arguments[3])


def _codes_like(x: Tensor, scale: Tensor, bits: Sequence[int]) -> Tensor:
    kind = torch.int8 if len(bits) == 1 else torch.float8_e4m3fn
    return x.new_empty((len(scale) * x.shape[0], x.shape[1]), dtype=kind)


def _format_of(bits: Sequence[int]) -> QuantFormat:
    return QuantFormat(bits[0] if len(bits) == 1 else (bits[0], bits[1]))


def _fits_kernel(x: Tensor, fmt: QuantFormat) -> bool:
    return cuda.has_triton() and (fmt.is_integer or cuda.multiplies_fp8(x.device.index or 0))


def offset_of(fmt: QuantFormat) -> int:
    """What int8 holds unsigned codes less of: those of 8 bits do not fit otherwise."""
    return UNSIGNED_OFFSET if fmt.num_bits == 8 else 0


def reference(
    x: Tensor,
    fmt: QuantFormat,
    segments: Sequence[int],
    polarity: Sequence[str],
    shift: Tensor | None = None,
    inverse_smoothing: Tensor | None = None,
    scale: Tensor | None = None,
    scale_negative: Tensor | None = None,
) -> Quantized:
    """:func:`quantize` in plain torch."""
    return rounded(smoothed(x, shift, inverse_smoothing), fmt, segments, polarity, scale, scale_negative)


def smoothed(x: Tensor, shift: Tensor | None, inverse_smoothing: Tensor | None) -> Tensor:
    """``(x - shift) * inverse_smoothing`` of every group, (G M, K) float32; see :func:`quantize`."""
    z = x.float() if shift is None else x.float() - shift
    if inverse_smoothing is None:
        return z
    # A compiler takes time for every operation, also for those that do nothing.
    return z * inverse_smoothing if len(inverse_smoothing) == 1 else (z * inverse_smoothing[:, None]).flatten(0, 1)


def rounded(
    z: Tensor,
    fmt: QuantFormat,
    segments: Sequence[int],
    polarity: Sequence[str],
    scale: Tensor | None = None,
    scale_negative: Tensor | None = None,
) -> Quantized:
    """Codes of z (G M, K) float32; see :func:`quantize`."""
    rows = len(z) if scale is None else len(z) // len(scale)
    if scale is not None and set(polarity) == {"none"}:
        # All of a row at once: nothing between the producer of x and its codes has to be written to memory.
        whole = encoded(z, scale, partial(_by_channel, segments=segments, rows=rows), fmt)
        return Quantized(whole, [_of_segment(scale, t) for t in range(len(segments))])
    codes: list[Tensor] = []
    negative: list[Tensor] = []
    scales: list[Tensor] = []
    negative_scales: list[Tensor] = []
    for segment, (part, sign) in enumerate(zip(z.split(list(segments), dim=1), polarity, strict=True)):
        own, offset = (fmt.as_unsigned(), offset_of(fmt)) if sign == "dual8" else (fmt, 0)
        values = part if sign == "none" else part.clamp(min=0)
        step = _step(values, own, scale, segment)
        codes.append(encoded(values, step, partial(_by_row, rows=len(z)), own, offset))
        scales.append(step)
        if sign == "none":
            # Nothing reads these.
            negative.append(codes[-1])
            negative_scales.append(step)
            continue
        values = part.clamp(max=0) if sign == "dual" else (-part).clamp(min=0)
        step = _step(values, own, scale_negative, segment)
        negative.append(encoded(values, step, partial(_by_row, rows=len(z)), own, offset))
        negative_scales.append(step)
    if set(polarity) == {"none"}:
        return Quantized(_joined(codes), scales)
    return Quantized(_joined(codes), scales, _joined(negative), negative_scales)


def encoded(z: Tensor, scale: Tensor, spread: Callable[[Tensor], Tensor], fmt: QuantFormat, offset: int = 0) -> Tensor:
    """The nearest codes to z float32 divided by ``spread(scale)``: int8 less an ``offset``, or float8_e4m3fn.

    On a GPU in what it does at full speed: divisions and conversions between floats and integers run at a quarter of
    it, which would make a rounding that is fused with a GELU slower than its memory traffic. Inverse scales move a code
    only where it was a tie but for float32's last digit.
    """
    codes = z * spread(scale.reciprocal()) if z.is_cuda else z / spread(scale)
    if not fmt.is_integer:
        # One comparison less than with a bound on each side, and NaN stays NaN without another one.
        size = codes.abs()
        size = torch.where(size > E4M3_MAX, E4M3_MAX, size) if z.is_cuda else size.clamp(max=E4M3_MAX)
        return size.copysign(codes).to(torch.float8_e4m3fn)
    if not z.is_cuda:
        return (codes.clamp(fmt.min_code, fmt.max_code).round() - offset).to(torch.int8)
    return nearest(codes, int(fmt.min_code), int(fmt.max_code), offset)


def nearest(codes: Tensor, low: int, high: int, offset: int) -> Tensor:
    """The nearest integers to float32, ties to even, from ``low`` to ``high``, less ``offset``: int8.

    Bit patterns past the range of integers are on the right side of it, those of infinities, too: what bounds them are
    comparisons of integers, which have no NaN to look after.
    """
    bits = (codes + _INTEGERS_ONLY).view(torch.int32).clamp(_BITS_OF_ZERO + low, _BITS_OF_ZERO + high)
    return (bits - (_BITS_OF_ZERO + offset)).to(torch.int8)


def _step(values: Tensor, fmt: QuantFormat, static: Tensor | None, segment: int) -> Tensor:
    """The scale of a segment: (G, 1) of ``static`` (G, T), or one found for each row of ``values`` (G M, k)."""
    if static is not None:
        return _of_segment(static, segment)
    return values.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST_AMAX) / fmt.max_code


def _of_segment(scale: Tensor, segment: int) -> Tensor:
    """(G, 1) of (G, T)."""
    return scale if scale.shape[1] == 1 else scale[:, segment : segment + 1]


def _by_row(step: Tensor, rows: int) -> Tensor:
    """(G, 1) or (G M, 1) for (G M, k)."""
    return step if len(step) in (1, rows) else step.repeat_interleave(rows // len(step), dim=0)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    # E4M3 codes as bytes: not every device concatenates them.
    kind = parts[0].dtype
    return torch.cat([part.view(torch.int8) for part in parts], dim=1).view(kind)


def _by_channel(scale: Tensor, segments: Sequence[int], rows: int) -> Tensor:
    """Static (G, T) for (G M, K)."""
    if len(scale) > 1:
        scale = scale.repeat_interleave(rows, dim=0)
    if len(segments) == 1:
        return scale
    if len(segments) > _CHOSEN_INLINE:
        return torch.cat([scale[:, t : t + 1].expand(-1, size) for t, size in enumerate(segments)], dim=1)
    channel = torch.arange(sum(segments), device=scale.device)
    chosen, end = scale[:, -1:], sum(segments)
    for segment in range(len(segments) - 2, -1, -1):
        end -= segments[segment + 1]
        chosen = torch.where(channel < end, scale[:, segment : segment + 1], chosen)
    return chosen
