"""How the blocks of a segmented Linear are laid out: sizes and names only, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

from ..plan import slices

SPLIT_BY_SIGN = ("dual", "dual8")
POLARITIES = ("none", *SPLIT_BY_SIGN)


@dataclass(frozen=True)
class SegLayout:
    """The blocks of one Linear ``y = x W^T + b``, W (N, K).

    Attributes:
        in_segments: sizes along K; each input segment has its own activation scales.
        out_groups: sizes along N; rows of one group read the same activation codes. Rows of different groups have
            their own smoothing, hence their own codes.
        weight_segments: sizes along N, a refinement of ``out_groups``; each weight segment has its own weight scales.
        polarity: per input segment ``"none"`` (one scale), ``"dual"`` (signed codes for each sign, the paper's
            DualScale) or ``"dual8"`` (all codes on one side for each sign).
        rotation: per input segment the channels that a Hadamard matrix mixes before rounding; 1 for none.

    Raises:
        ValueError: sizes that are not positive or do not nest, or an unknown polarity.
    """

    in_segments: tuple[int, ...]
    out_groups: tuple[int, ...]
    weight_segments: tuple[int, ...]
    polarity: tuple[str, ...]
    rotation: tuple[int, ...] = ()
    _in_slices: ClassVar[tuple[slice, ...]]
    _out_slices: ClassVar[tuple[slice, ...]]

    def __post_init__(self) -> None:
        if not self.rotation:
            object.__setattr__(self, "rotation", (1,) * len(self.in_segments))
        for name in ("in_segments", "out_groups", "weight_segments"):
            sizes = getattr(self, name)
            if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
                raise ValueError(f"{name} must be positive integers, got {sizes}")
        if not set(accumulate(self.out_groups)) <= set(accumulate(self.weight_segments)):
            raise ValueError(f"weight_segments {self.weight_segments} do not refine out_groups {self.out_groups}")
        if sum(self.weight_segments) != sum(self.out_groups):
            raise ValueError("weight_segments and out_groups must add up to the same number of rows")
        if len(self.polarity) != len(self.in_segments) or any(p not in POLARITIES for p in self.polarity):
            raise ValueError(f"polarity must be one of {POLARITIES} per input segment, got {self.polarity}")
        fits = len(self.rotation) == len(self.in_segments)
        if not fits or any(
            block < 1 or block & (block - 1) or size % block
            for size, block in zip(self.in_segments, self.rotation, strict=True)
        ):
            raise ValueError(f"rotation needs a power of two that divides each input segment, got {self.rotation}")
        # Every forward reads these.
        object.__setattr__(self, "_in_slices", slices(self.in_segments))
        object.__setattr__(self, "_out_slices", slices(self.out_groups))

    @property
    def in_features(self) -> int:
        """K."""
        return sum(self.in_segments)

    @property
    def out_features(self) -> int:
        """N."""
        return sum(self.out_groups)

    @property
    def in_slices(self) -> tuple[slice, ...]:
        """The channels of each input segment."""
        return self._in_slices

    @property
    def out_slices(self) -> tuple[slice, ...]:
        """The rows of each output group."""
        return self._out_slices

    @property
    def weight_slices(self) -> tuple[slice, ...]:
        """The rows of each weight segment."""
        return slices(self.weight_segments)

    def group_of(self, weight_segment: int) -> int:
        """The output group that holds a weight segment."""
        start = self.weight_slices[weight_segment].start
        return next(index for index, rows in enumerate(self.out_slices) if rows.start <= start < rows.stop)

    @property
    def is_single(self) -> bool:
        """True when one scale for the input and one row of weight scales says it all."""
        uncut = len(self.in_segments) == len(self.weight_segments) == 1
        return uncut and self.polarity == ("none",) and self.rotation == (1,)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for checkpoints."""
        return {
            "in_segments": list(self.in_segments),
            "out_groups": list(self.out_groups),
            "weight_segments": list(self.weight_segments),
            "polarity": list(self.polarity),
            "rotation": list(self.rotation),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SegLayout:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: missing or unknown keys, or sizes that do not fit.
        """
        expected = {"in_segments", "out_groups", "weight_segments", "polarity", "rotation"}
        if set(data) != expected:
            raise ValueError(f"a segment layout has the keys {sorted(expected)}, got {sorted(data)}")
        return cls(**{key: tuple(data[key]) for key in expected})


def input_block(group: int, segment: int, negative: bool = False) -> str:
    """Name of the quantizer of input segment ``segment`` as output group ``group`` reads it."""
    return f"block{group}_{segment}" + ("_negative" if negative else "")


def weight_block(weight_segment: int, segment: int) -> str:
    """Name of the quantizer of the weight block (rows ``weight_segment``, channels ``segment``)."""
    return f"block{weight_segment}_{segment}"
