"""How a packed Linear reads its tensors: :class:`PackedSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ..formats import QuantFormat
from .layout import SPLIT_BY_SIGN, SegLayout

CodeType = Literal["int8", "int4", "float8_e4m3fn"]

FORMATS: Mapping[CodeType, QuantFormat] = {
    "int8": QuantFormat(8),
    "int4": QuantFormat(4),
    "float8_e4m3fn": QuantFormat((4, 3)),
}


@dataclass(frozen=True)
class PackedSpec:
    """How a PackedLinear reads its tensors: plain data.

    Attributes:
        layout: segments, groups, polarity and rotation; its ``weight_segments`` are the ``out_groups``.
        weights: what the weight's codes are.
        group: input channels that share a weight scale; None for those of an input segment.
        activations: what activations are rounded to; None for weight-only.
        per_token: whether activation scales are found at run time, one a row, segment and sign.
        smoothing, shift: whether there are such tensors.
        rank: of the low-rank branch, 0 for none.

    Raises:
        ValueError: values that contradict each other.
    """

    layout: SegLayout
    weights: CodeType = "int8"
    group: int | None = None
    activations: CodeType | None = "int8"
    per_token: bool = False
    smoothing: bool = False
    shift: bool = False
    rank: int = 0

    def __post_init__(self) -> None:
        for name, value in (("weights", self.weights), ("activations", self.activations)):
            if value not in (*get_args(CodeType), *((None,) if name == "activations" else ())):
                raise ValueError(f"{name} must be one of {get_args(CodeType)}, got {value!r}")
        if self.rank < 0:
            raise ValueError(f"rank must not be negative, got {self.rank}")
        if self.group is not None and (self.group < 1 or any(size % self.group for size in self.layout.in_segments)):
            raise ValueError(f"groups of {self.group} channels do not divide the segments {self.layout.in_segments}")
        if self.activations is None and (self.per_token or self.splits_by_sign):
            raise ValueError("without activation codes there are neither scales per token nor polarity")
        if self.activations == "float8_e4m3fn" and "dual8" in self.layout.polarity:
            raise ValueError("dual8 needs integer activations")

    @property
    def splits_by_sign(self) -> bool:
        """Whether any segment has a second product."""
        return any(polarity in SPLIT_BY_SIGN for polarity in self.layout.polarity)

    @property
    def multiplies_codes(self) -> bool:
        """Whether a product of two matrices of codes gives the output, integers by integers or E4M3 by E4M3."""
        if self.group is not None or self.activations is None:
            return False
        return (self.activations == "float8_e4m3fn") == (self.weights == "float8_e4m3fn")

    @property
    def has_zero_point(self) -> bool:
        """Whether int8 holds unsigned activation codes, less 128, in a product of codes."""
        return self.multiplies_codes and self.activations == "int8" and "dual8" in self.layout.polarity

    @property
    def weight_scales(self) -> int:
        """S, how many scales a row of the weight has."""
        return len(self.layout.in_segments) if self.group is None else self.layout.in_features // self.group

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for checkpoints."""
        layout = self.layout.to_dict()
        del layout["weight_segments"]
        return {**asdict(self), "layout": layout}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PackedSpec:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: missing or unknown keys, or values that do not fit.
        """
        expected = {field.name for field in fields(cls)}
        if set(data) != expected or not isinstance(data["layout"], Mapping):
            raise ValueError(f"the description of a packed Linear has the keys {sorted(expected)}, got {sorted(data)}")
        layout = dict(data["layout"])
        layout["weight_segments"] = layout.get("out_groups", ())
        return cls(**{**data, "layout": SegLayout.from_dict(layout)})
