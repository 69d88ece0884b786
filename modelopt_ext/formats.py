"""Number formats: what a ModelOpt quantizer rounds to, as a value, and the rounding itself as a pure function.

ModelOpt keeps a format spread over the attributes of a :class:`TensorQuantizer`. The search over smoothing and
polarity tries many scales on sampled rows and needs the same rounding without modules, statistics or compiled
extensions, on any device: :func:`quantize_dequantize` gives the numbers that the quantizer gives.

Integers of b bits are symmetric with the full two's-complement range: codes ``[-2**(b-1), 2**(b-1) - 1]``, scale
``amax / (2**(b-1) - 1)``; unsigned ones have codes ``[0, 2**b - 1]``. FP8 is E4M3 with scale ``amax / 448``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from torch import Tensor

E4M3_MAX = 448.0
# ModelOpt treats a smaller amax as "all zero"; the same bound keeps both roundings identical.
SMALLEST_AMAX = 2.0**-24


@dataclass(frozen=True)
class QuantFormat:
    """What one quantizer does to a 2-D tensor (rows, channels).

    ``QuantFormat(8)``: signed INT8 with one static scale. ``QuantFormat(8, dynamic=True, per_row=True)``: INT8 with a
    scale per token, found at run time. ``QuantFormat(8, per_row=True)``: per-output-channel INT8 weights.
    ``QuantFormat((4, 3))``: FP8 E4M3.
    """

    num_bits: int | tuple[int, int]
    per_row: bool = False
    dynamic: bool = False
    unsigned: bool = False
    narrow_range: bool = False

    @property
    def is_integer(self) -> bool:
        """True for integer codes, False for floating-point ones."""
        return isinstance(self.num_bits, int)

    @property
    def max_code(self) -> float:
        """The code (integers) or value (E4M3) that ``amax`` maps to."""
        if isinstance(self.num_bits, tuple):
            return E4M3_MAX
        return float(2 ** (self.num_bits - 1 + int(self.unsigned)) - 1)

    @property
    def min_code(self) -> float:
        """The smallest code; -128 for full-range INT8."""
        if isinstance(self.num_bits, tuple):
            return -E4M3_MAX
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
        if not (isinstance(bits, int) or tuple(bits) == (4, 3)):
            raise ValueError(f"{where}: segquant rounds to integers or FP8 E4M3 (num_bits=(4, 3)), not num_bits={bits}")
        dynamic = bool(quantizer._dynamic)
        axis = quantizer.axis
        if blocks is not None:
            if any(blocks.get(key) is not None for key in blocks if key != "type"):
                raise ValueError(
                    f"{where}: block_sizes={dict(blocks)} is not supported; use axis=0 for per-channel weights, or "
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
        )


def row_amax(x: Tensor, fmt: QuantFormat) -> Tensor:
    """Largest magnitude of ``x`` (rows, channels) that each scale covers: (rows, 1) if per row, else ()."""
    magnitude = x.abs()
    return magnitude.amax(dim=-1, keepdim=True) if fmt.per_row else magnitude.amax()


def quantize_dequantize(x: Tensor, amax: Tensor, fmt: QuantFormat) -> Tensor:
    """Round ``x`` to ``fmt`` and back.

    Args:
        x: (rows, channels), float32.
        amax: () or (rows, 1), float32, >= 0: the magnitude that the largest code stands for.
        fmt: the format.

    Returns:
        (rows, channels), float32. Where ``amax`` is (nearly) zero the result is zero.
    """
    zero = amax <= SMALLEST_AMAX
    scale = fmt.max_code / torch.where(zero, torch.ones_like(amax), amax)
    if fmt.is_integer:
        rounded = (x * scale).round_().clamp_(fmt.min_code, fmt.max_code)
    else:
        rounded = (x * scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)
    return torch.where(zero, torch.zeros_like(rounded), rounded / scale)
