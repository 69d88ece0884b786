"""What a packed Linear computes, from its tensors alone: :class:`PackedTensors`.

In a model that is compiled, Dynamo sees one operator, ``segquant::packed_linear``, which later stages of the compiler
look into: to interpret what is in it would take 30 ms a Linear, and models have hundreds of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..formats import QuantFormat
from ..kernels import quantize, scaled_mm
from ..kernels.rounding import Quantized, offset_of, rounded, smoothed
from ..kernels.scaled_mm import few_rows
from .layout import SPLIT_BY_SIGN
from .packed_spec import FORMATS, PackedSpec
from .rotation import rotate_segments


class PackedTensors(NamedTuple):
    """The tensors of a :class:`PackedLinear`, which says what they are, and how to read them."""

    spec: PackedSpec
    weight: Tensor
    bias: Tensor | None
    weight_scale: Tensor
    input_scale: Tensor | None
    input_scale_negative: Tensor | None
    inverse_smoothing: Tensor | None
    shift: Tensor | None
    weight_sum: Tensor | None
    low_rank_down: Tensor | None
    low_rank_up: Tensor | None

    def codes(self) -> Tensor:
        """The weight's codes, (N, K): int8 (also for int4) or float8_e4m3fn. A view, but for int4."""
        if self.spec.weights == "float8_e4m3fn":
            return self.weight.view(torch.float8_e4m3fn)
        if self.spec.weights == "int8":
            return self.weight
        return unpack_int4(self.weight.detach(), self.spec.layout.in_features)

    def block_scale(self, segment: int) -> Tensor:
        """The scale of every weight of an input segment, (N, 1) or (N, channels) float32."""
        group, columns = self.spec.group, self.spec.layout.in_slices[segment]
        if group is None:
            return self.weight_scale[:, segment : segment + 1]
        return self.weight_scale[:, columns.start // group : columns.stop // group].repeat_interleave(group, dim=1)

    def factors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each output group's share of the low-rank branch, (r, K) and (rows, r)."""
        assert self.low_rank_down is not None
        assert self.low_rank_up is not None
        rank = self.spec.rank
        for group, rows in enumerate(self.spec.layout.out_slices):
            yield self.low_rank_down[group * rank : (group + 1) * rank], self.low_rank_up[rows]

    def outputs(self, x: Tensor, dtype: torch.dtype, compiled: bool = False) -> Tensor:
        """The Linear's outputs.

        Args:
            x: (M, K), any float dtype.
            dtype: of the outputs.
            compiled: whether a compiler sees this, which fuses the rounding of x into what x comes from.

        Returns:
            (M, N) in ``dtype``.
        """
        # The last sum's rounding is the product's own, where nothing else is added.
        direct = dtype if self.low_rank_up is None else _sum_dtype(x, dtype)
        product = self._codes_product if self.spec.multiplies_codes else self._float_product
        output = product(x, direct, compiled)
        if self.low_rank_up is not None:
            output = output + self._branch(x)
        return _as(output, dtype)

    def _codes_product(self, x: Tensor, dtype: torch.dtype, compiled: bool) -> Tensor:
        """Products of codes by codes, without the branch: (M, N) in ``dtype``."""
        layout = self.spec.layout
        groups, equal = len(layout.out_groups), len(set(layout.out_groups)) == 1
        kind = torch.float8_e4m3fn if self.spec.weights == "float8_e4m3fn" else torch.int8
        if groups == 1 or (equal and x.shape[0] <= few_rows(kind)):
            # Few rows: one launch for all groups, which is what their time is.
            return self._product(x, slice(0, groups), slice(0, layout.out_features), dtype, compiled)
        parts = [
            self._product(x, slice(group, group + 1), rows, dtype, compiled)
            for group, rows in enumerate(layout.out_slices)
        ]
        return torch.cat(parts, dim=-1)

    def _product(self, x: Tensor, groups: slice, rows: slice, dtype: torch.dtype, compiled: bool) -> Tensor:
        """What some output groups give, which are the outputs ``rows``: (M, rows) in ``dtype``."""
        layout, weight, scales, sums = self.spec.layout, self.codes(), self.weight_scale, self.weight_sum
        bias = self.bias
        some = rows.stop - rows.start < layout.out_features
        if some:
            weight, scales = weight[rows], scales[rows]
            bias, sums = None if bias is None else bias[rows], None if sums is None else sums[rows]
        activations = self._quantize(x, groups, compiled)
        codes = activations.codes
        if len(layout.in_segments) > 1 and codes.is_cuda and compiled:
            # Of a given layout: the compiler would compute codes anew for every product that asks for one.
            codes = codes.as_strided(codes.shape, codes.stride())
        last = len(layout.in_segments) - 1
        part_dtype = dtype if last == 0 else _sum_dtype(x, dtype)
        total = None
        for segment, columns in enumerate(layout.in_slices):
            split = layout.polarity[segment] in SPLIT_BY_SIGN
            unsigned = layout.polarity[segment] == "dual8"
            offset = offset_of(self._format) if unsigned else 0
            product = scaled_mm(
                codes,
                weight,
                activations.scales[segment],
                scales[:, segment],
                bias if segment == last else None,
                zero=-offset,
                sum_b=sums[:, segment] if offset and sums is not None else None,
                a2=activations.negative if split else None,
                scale_a2=activations.negative_scales[segment] if split and activations.negative_scales else None,
                sign=-1 if unsigned else 1,
                groups=groups.stop - groups.start,
                segment=columns if last or some else None,
                out_dtype=part_dtype,
            )
            total = product if total is None else total + product
        assert total is not None
        return _as(total, dtype)

    @property
    def _format(self) -> QuantFormat:
        """Of the activations."""
        assert self.spec.activations is not None
        return FORMATS[self.spec.activations]

    def _quantize(self, x: Tensor, groups: slice, compiled: bool) -> Quantized:
        """Codes of x (M, K) as some output groups read them."""
        layout = self.spec.layout
        shift, inverse = self.shift, _of_groups(self.inverse_smoothing, groups)
        # Static scales (G, T) of the values and of those below 0; None for scales per token.
        scales = _of_groups(self.input_scale, groups), _of_groups(self.input_scale_negative, groups)
        if any(block > 1 for block in layout.rotation):
            z = rotate_segments(smoothed(x, shift, inverse), layout.in_slices, layout.rotation)
            return rounded(z, self._format, layout.in_segments, layout.polarity, *scales)
        return quantize(x, self._format, layout.in_segments, layout.polarity, shift, inverse, *scales, compiled)

    def _float_product(self, x: Tensor, dtype: torch.dtype, compiled: bool) -> Tensor:
        """Products of rounded floats, for codes that no product of two matrices of codes serves: (M, N) in ``dtype``.

        Weight-only formats, integers by floats, and sums that end inside a segment (weight scales of groups).
        """
        # A GPU has fast products of 16-bit floats only, the simulation's own.
        wide = x.dtype if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) else torch.float32
        codes = self.codes()
        parts = []
        for group, rows in enumerate(self.spec.layout.out_slices):
            weight = torch.cat(
                [
                    codes[rows, columns].float() * self.block_scale(segment)[rows]
                    for segment, columns in enumerate(self.spec.layout.in_slices)
                ],
                dim=1,
            )
            bias = None if self.bias is None else self.bias[rows].to(wide)
            parts.append(linear(self._values(x, group, compiled).to(wide), weight.to(wide), bias))
        return torch.cat(parts, dim=-1).to(dtype)

    def _values(self, x: Tensor, group: int, compiled: bool) -> Tensor:
        """What x (M, K) is rounded to for an output group, float32."""
        layout, own = self.spec.layout, slice(group, group + 1)
        if self.spec.activations is None:
            z = smoothed(x, self.shift, None if self.inverse_smoothing is None else self.inverse_smoothing[own])
            return rotate_segments(z, layout.in_slices, layout.rotation)
        found = self._quantize(x, own, compiled)
        parts = []
        for segment, columns in enumerate(layout.in_slices):
            unsigned = layout.polarity[segment] == "dual8"
            offset = offset_of(self._format) if unsigned else 0
            value = (found.codes[:, columns].float() + offset) * found.scales[segment]
            if layout.polarity[segment] in SPLIT_BY_SIGN and found.negative is not None and found.negative_scales:
                below = (found.negative[:, columns].float() + offset) * found.negative_scales[segment]
                value = value - below if unsigned else value + below
            parts.append(value)
        return torch.cat(parts, dim=1)

    def _branch(self, x: Tensor) -> Tensor:
        """The low-rank branch's share of the output, (M, N)."""
        outputs = [linear(linear(x, down.to(x.dtype)), up.to(x.dtype)) for down, up in self.factors()]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


torch.library.define(
    "segquant::packed_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor weight_scale, Tensor? input_scale, Tensor? input_scale_negative, "
    "Tensor? inverse_smoothing, Tensor? shift, Tensor? weight_sum, Tensor? low_rank_down, Tensor? low_rank_up, "
    "str spec, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _packed_linear(x: Tensor, *rest: Any) -> Tensor:
    *tensors, spec, dtype = rest
    return PackedTensors(_read(spec), *tensors).outputs(x, dtype, compiled=True)


torch.library.impl("segquant::packed_linear", "CompositeImplicitAutograd", _packed_linear)


def described(spec: PackedSpec) -> str:
    """As the operator takes it."""
    return json.dumps(spec.to_dict())


@cache
def _read(spec: str) -> PackedSpec:
    return PackedSpec.from_dict(json.loads(spec))


# A compiler takes time for every operation that it sees, also for those that do nothing.
def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _of_groups(table: Tensor | None, groups: slice) -> Tensor | None:
    """Rows of a table with one for each output group."""
    return table if table is None or groups.stop - groups.start == len(table) else table[groups]


def _sum_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What parts of an output are held in until they are added.

    On a GPU each part is written and read again, and bfloat16, which overflows no earlier than float32, halves that for
    an error far below the codes'.
    """
    return dtype if x.is_cuda and dtype == torch.bfloat16 else torch.float32


def pack_int4(codes: Tensor) -> Tensor:
    """Two codes a byte: (N, K) int8 in [-8, 7] to (N, ceil(K / 2)) int8, the even channel in the low half."""
    even, odd = pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2)).unbind(dim=-1)
    return (even & 0x0F) | (odd << 4)


def unpack_int4(packed: Tensor, channels: int) -> Tensor:
    """The inverse of :func:`pack_int4`: (N, channels) int8."""
    # An arithmetic shift right keeps the sign of the high half; shifting the low half up first gives it one.
    return torch.stack([(packed << 4) >> 4, packed >> 4], dim=-1).flatten(1)[:, :channels]
