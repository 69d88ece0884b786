"""Number formats: what a ModelOpt quantizer rounds to, as a value, and the rounding itself as a pure function.

ModelOpt keeps a format spread over the attributes of a :class:`TensorQuantizer`. The search over smoothing and
polarity tries many scales on sampled rows and needs the same rounding without modules, statistics or compiled
extensions, on any device: :func:`quantize_dequantize` gives the numbers that the quantizer gives.

Integers of b bits are symmetric with the full two's-complement range: codes ``[-2**(b-1), 2**(b-1) - 1]``, scale
``amax / (2**(b-1) - 1)``; unsigned ones have codes ``[0, 2**b - 1]``. FP8 is E4M3 with scale ``amax / 448``. NVFP4 is
E2M1 in groups of 16 channels, each with an E4M3 scale relative to one scale of the whole tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
NVFP4_GROUP = 16
# ModelOpt treats a smaller amax as "all zero"; the same bound keeps both roundings identical.
SMALLEST_AMAX = 2.0**-24


@dataclass(frozen=True)
class QuantFormat:
    """What one quantizer does to a 2-D tensor (rows, channels).

    ``QuantFormat(8)``: signed INT8 with one static scale. ``QuantFormat(8, dynamic=True, per_row=True)``: INT8 with a
    scale per token, found at run time. ``QuantFormat(8, per_row=True)``: per-output-channel INT8 weights.
    ``QuantFormat(4, group=64)``: INT4 weights, one scale for 64 channels of a row. ``QuantFormat((4, 3))``: FP8 E4M3.
    ``QuantFormat((2, 1), group=16)``: NVFP4; its group scales are always found at run time.
    """

    num_bits: int | tuple[int, int]
    per_row: bool = False
    dynamic: bool = False
    unsigned: bool = False
    narrow_range: bool = False
    group: int | None = None

    @property
    def is_integer(self) -> bool:
        """True for integer codes, False for floating-point ones."""
        return isinstance(self.num_bits, int)

    @property
    def is_nvfp4(self) -> bool:
        """True for E2M1 values with two levels of scales."""
        return self.num_bits == (2, 1)

    @property
    def has_row_scales(self) -> bool:
        """Whether every row has scales of its own, so that cutting rows apart changes no number."""
        return self.per_row or (self.group is not None and not self.is_nvfp4)

    @property
    def max_code(self) -> float:
        """The code (integers) or value (E4M3, NVFP4) that ``amax`` maps to."""
        if isinstance(self.num_bits, tuple):
            return E4M3_MAX * E2M1_MAX if self.is_nvfp4 else E4M3_MAX
        return float(2 ** (self.num_bits - 1 + int(self.unsigned)) - 1)

    @property
    def min_code(self) -> float:
        """The smallest code; -128 for full-range INT8."""
        if isinstance(self.num_bits, tuple):
            return -self.max_code
        if self.unsigned:
            return 0.0
        return -self.max_code - (0.0 if self.narrow_range else 1.0)

    def as_unsigned(self) -> QuantFormat:
        """The same width with all codes on one side of zero (integers only)."""
        return replace(self, unsigned=True)

    @classmethod
    def of(cls, quantizer: TensorQuantizer, where: str) -> QuantFormat | None:
        """Read the format of ``quantizer``; None when it is disabled.

        Args:
            quantizer: a stock quantizer of a Linear's input or weight, not calibrated yet.
            where: the quantizer's qualified name, for messages.

        Raises:
            ValueError: the quantizer has a format that segments can't carry; the message names what can.
        """
        if isinstance(quantizer, SequentialQuantizer):
            raise ValueError(
                f"{where} is a sequence of quantizers, which segquant can't cut into segments; give it one `cfg` dict "
                "instead of a list, or disable it and quantize that layer with another algorithm"
            )
        if not quantizer.is_enabled:
            return None
        if not quantizer.fake_quant:
            raise ValueError(
                f"{where} holds compressed weights; run segquant before mtq.compress, on the original model"
            )
        bits, blocks = quantizer.num_bits, quantizer.block_sizes
        if not isinstance(bits, int):
            if tuple(bits) == (2, 1):
                return cls._nvfp4(quantizer, where)
            if tuple(bits) != (4, 3):
                raise ValueError(
                    f"{where}: segquant rounds to integers, FP8 E4M3 (num_bits=(4, 3)) or NVFP4 (num_bits=(2, 1)), "
                    f"not num_bits={bits}"
                )
        dynamic = bool(quantizer._dynamic)
        axis = quantizer.axis
        group = None
        if blocks is not None and blocks.get(-1) is not None:
            group = blocks[-1]
            others = {key: value for key, value in blocks.items() if key not in (-1, "type") and value is not None}
            if others or blocks.get("type") == "dynamic" or dynamic or not isinstance(bits, int):
                raise ValueError(
                    f"{where}: block_sizes={dict(blocks)} with num_bits={bits} is not supported; groups are for static "
                    "integer weights: num_bits=4, block_sizes={-1: 64, 'type': 'static'}"
                )
            if quantizer.unsigned:
                raise ValueError(f"{where}: group scales with unsigned codes are not supported; leave unsigned=False")
            per_row = False
        elif blocks is not None:
            if any(blocks.get(key) is not None for key in blocks if key != "type"):
                raise ValueError(
                    f"{where}: block_sizes={dict(blocks)} is not supported; use axis=0 for per-channel weights, "
                    "block_sizes={-1: 64, 'type': 'static'} for groups of channels, or "
                    "block_sizes={-1: None, 'type': 'dynamic'} for per-token activations"
                )
            # {-1: None}: one scale for all of the last dim, so one per row.
            per_row, dynamic = set(blocks) - {"type"} == {-1}, dynamic or blocks.get("type") == "dynamic"
        else:
            # After its first call ModelOpt turns {-1: None} into a tuple of all leading dims.
            per_row = axis in (0, (0,)) or (dynamic and isinstance(axis, tuple) and axis == tuple(range(len(axis))))
            if axis is not None and not per_row:
                raise ValueError(f"{where}: axis={axis} is not supported; use axis=0 (weights) or axis=None")
        return cls(
            num_bits=bits if isinstance(bits, int) else (4, 3),
            per_row=per_row,
            dynamic=dynamic,
            unsigned=bool(quantizer.unsigned),
            narrow_range=bool(quantizer.narrow_range),
            group=group,
        )

    @classmethod
    def _nvfp4(cls, quantizer: TensorQuantizer, where: str) -> QuantFormat:
        blocks = dict(quantizer.block_sizes or {})
        if blocks != {-1: NVFP4_GROUP, "type": "dynamic", "scale_bits": (4, 3)}:
            raise ValueError(
                f"{where}: of the E2M1 formats segquant has NVFP4 only, block_sizes={{-1: {NVFP4_GROUP}, 'type': "
                f"'dynamic', 'scale_bits': (4, 3)}}, not {blocks}"
            )
        return cls((2, 1), group=NVFP4_GROUP)


def row_amax(x: Tensor, fmt: QuantFormat) -> Tensor:
    """Largest magnitude of ``x`` (rows, channels) that each scale covers.

    Returns:
        () float32 with one scale for all (NVFP4: the scale of the tensor), (rows, 1) per row, or, with groups,
        (rows, channels), equal inside a group.
    """
    if fmt.per_row:
        return _largest_magnitude(x, dim=-1, keepdim=True)
    if fmt.group is None or fmt.is_nvfp4:
        return _largest_magnitude(x)
    return _largest_magnitude(x.unflatten(-1, (-1, fmt.group)), dim=-1).repeat_interleave(fmt.group, dim=-1)


def _largest_magnitude(x: Tensor, **dims: Any) -> Tensor:
    """Looking for both ends takes less than a copy of all magnitudes does."""
    return torch.maximum(x.amax(**dims), -x.amin(**dims))


def stored_amax(amax: Tensor, fmt: QuantFormat) -> Tensor:
    """What a quantizer's ``amax`` holds: as :func:`row_amax`, but (rows * groups, 1) with groups, one for each."""
    return amax[:, :: fmt.group].reshape(-1, 1) if fmt.group is not None and not fmt.is_nvfp4 else amax


def step_size(amax: Tensor, fmt: QuantFormat) -> Tensor:
    """The scale: what one code is worth, float32 > 0, in ``amax``'s shape. Not for NVFP4, which has two levels."""
    return amax.float().clamp(min=SMALLEST_AMAX) / fmt.max_code


def to_codes(x: Tensor, scale: Tensor, fmt: QuantFormat) -> Tensor:
    """The codes of ``x``, as float32: integers, or E4M3 values. ``scale`` expands to x's shape. Not for NVFP4."""
    codes = x.float() / scale
    if fmt.is_integer:
        return codes.round().clamp(fmt.min_code, fmt.max_code)
    return codes.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def quantize_dequantize(x: Tensor, amax: Tensor, fmt: QuantFormat) -> Tensor:
    """Round ``x`` to ``fmt`` and back.

    Args:
        x: (rows, channels), float32.
        amax: float32, >= 0, any shape that expands to x's: the magnitude that the largest code stands for.
        fmt: the format.

    Returns:
        (rows, channels), float32. Where ``amax`` is (nearly) zero the result of finite values is zero.
    """
    if fmt.is_nvfp4:
        return _round_nvfp4(x, amax)
    zero = amax <= SMALLEST_AMAX
    scale = fmt.max_code / torch.where(zero, torch.ones_like(amax), amax)
    scaled = x * torch.where(zero, torch.zeros_like(scale), scale)
    if fmt.is_integer:
        rounded = scaled.round_().clamp_(fmt.min_code, fmt.max_code)
    else:
        rounded = scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)
    return rounded.div_(scale)


def _round_nvfp4(x: Tensor, amax: Tensor) -> Tensor:
    """Round to E2M1 times an E4M3 scale per group times amax / (448 * 6); channels are a multiple of the group."""
    unit = amax.clamp(min=SMALLEST_AMAX) / (E4M3_MAX * E2M1_MAX)
    groups = x.unflatten(-1, (-1, NVFP4_GROUP))
    scale = (groups.abs().amax(dim=-1, keepdim=True) / (E2M1_MAX * unit)).clamp(max=E4M3_MAX)
    scale = scale.to(torch.float8_e4m3fn).to(x.dtype) * unit
    magnitude = (groups.abs() / torch.where(scale > 0, scale, torch.ones_like(scale))).clamp(max=E2M1_MAX)
    # E2M1 is 0, .5, 1, 1.5, 2, 3, 4, 6: steps of .5 below 2, of 1 below 4, of 2 above; ties go to even codes.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = (magnitude / step).round() * step * scale
    return torch.where(scale > 0, rounded * groups.sign(), torch.zeros_like(groups)).flatten(-2)
