"""PackedLinear: a quantized Linear that holds codes, one byte or half a byte a weight, instead of rounded floats.

It computes what :class:`SegLinear` simulates, for output groups g (rows o) and input segments t:

    z[t] = ((x[t] - shift[t]) * inverse_smoothing[g, t]) H[t]  q[t] = clamp(round(z[t] / input_scale[g, t]))
    y[o] = sum_t  input_scale[g, t] * (q[t] . weight[o, t]^T) * weight_scale[o, t]  +  x down[g]^T up[o]^T  +  bias[o]

with H a Hadamard rotation. A segment split by sign (arXiv 2507.14811, DualScale) has two products with the same weight:
``"dual"`` gives min(z, 0) signed codes of a scale of its own, ``"dual8"`` gives max(z, 0) and max(-z, 0) unsigned codes
and subtracts the second. Sums run over integers in int32, so they are exact; the rest is float32.

Layout of what it holds, which is also the layout of a checkpoint (K in, N out, T segments, G groups, r rank):

===========================  =========  ==============================================================================
``weight``                   int8       (N, K): int8 codes, or E4M3 bit patterns; (N, ceil(K / 2)): two int4 codes a
                                        byte, two's complement, the even channel in the low half
``bias``                     float      (N,), with W c of the shift and the bias correction in it
``weight_scale``             float32    (N, T), or (N, K / group)
``input_scale``              float32    (G, T): static scales
``input_scale_negative``     float32    (G, T): those of min(z, 0), where any segment is split by sign
``inverse_smoothing``        float32    (G, K): one over the smoothing factors; a GPU multiplies faster than it divides
``shift``                    float32    (K,)
``weight_sum``               int32      (N, T): the sums of each segment's codes, where int8 codes are ``"dual8"``
``low_rank_down``            16 bit     (G r, K): group g has the rows [g r, (g + 1) r)
``low_rank_up``              16 bit     (N, r)
===========================  =========  ==============================================================================

The weight is int8 in all formats, bit patterns included: loaders, LoRA libraries and ``module.to(dtype)`` convert
floating-point tensors, float8 ones too, and leave integers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ..formats import QuantFormat
from ..kernels import quantize, scaled_mm
from ..kernels.rounding import Quantized, offset_of, rounded, smoothed
from ..kernels.scaled_mm import few_rows
from .gradients import refuse_gradients
from .layout import SPLIT_BY_SIGN, SegLayout
from .rotation import rotate, rotate_segments

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


@torch.compiler.assume_constant_result
def _has_autocast(kind: str) -> bool:
    """Whether devices of that type have autocast: asked outside of the compiler, that of torch 2.11 can not ask."""
    return torch.amp.is_autocast_available(kind)


# A compiler takes time for every operation that it sees, also for those that do nothing.
def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _of_groups(table: Tensor | None, groups: slice) -> Tensor | None:
    """Rows of a table with one for each output group."""
    return table if table is None or groups.stop - groups.start == len(table) else table[groups]


class PackedLinear(nn.Linear):
    """A Linear that multiplies codes; see the module's docstring. Inference only.

    Args:
        spec: the formats.
        bias: whether there is one.
        dtype: of the bias, and of the low-rank branch if it has 16 bits (else the branch is float16).
        device: where tensors are made, uninitialized; "meta" makes none.
    """

    spec: PackedSpec
    weight_scale: Tensor
    input_scale: Tensor | None
    input_scale_negative: Tensor | None
    inverse_smoothing: Tensor | None
    shift: Tensor | None
    weight_sum: Tensor | None
    low_rank_down: Tensor | None
    low_rank_up: Tensor | None

    # Scales lose too much in 16 bit; ``module.to(dtype)`` leaves these alone.
    FLOAT32 = ("weight_scale", "input_scale", "input_scale_negative", "inverse_smoothing", "shift")

    def __init__(
        self,
        spec: PackedSpec,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        # Not nn.Linear's own, which allocates a full-precision weight.
        nn.Module.__init__(self)
        layout = spec.layout
        dtype = dtype or torch.get_default_dtype()
        branch = dtype if dtype.itemsize == 2 else torch.float16
        self.spec = spec
        self.in_features, self.out_features = layout.in_features, layout.out_features
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device), requires_grad=False)
            if bias
            else None,
        )
        # After the bias: models cast tensors to the dtype of a module's first parameter.
        shape = (self.out_features, -(-self.in_features // 2) if spec.weights == "int4" else self.in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8, device=device), requires_grad=False)
        groups, segments = len(layout.out_groups), len(layout.in_segments)
        static = spec.activations is not None and not spec.per_token
        shapes: dict[str, tuple[int, ...] | None] = {
            "weight_scale": (self.out_features, spec.weight_scales),
            "input_scale": (groups, segments) if static else None,
            "input_scale_negative": (groups, segments) if static and spec.splits_by_sign else None,
            "inverse_smoothing": (groups, self.in_features) if spec.smoothing else None,
            "shift": (self.in_features,) if spec.shift else None,
            "weight_sum": (self.out_features, segments) if spec.has_zero_point else None,
            "low_rank_down": (groups * spec.rank, self.in_features) if spec.rank else None,
            "low_rank_up": (self.out_features, spec.rank) if spec.rank else None,
        }
        for name, size in shapes.items():
            kind = torch.float32 if name in self.FLOAT32 else torch.int32 if name == "weight_sum" else branch
            self.register_buffer(name, None if size is None else torch.empty(size, dtype=kind, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        kept = {name: getattr(self, name) for name in self.FLOAT32 if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        """Sizes and formats in one line."""
        spec, layout = self.spec, self.spec.layout
        activations = f"{spec.activations}{' per token' if spec.per_token else ''}" if spec.activations else "16 bit"
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}",
            f"weights={spec.weights}{f' in groups of {spec.group}' if spec.group else ''}, activations={activations}",
        ]
        if not layout.is_single:
            parts.append(f"segments={list(layout.in_segments)}, groups={list(layout.out_groups)}")
            parts.append(f"polarity={list(layout.polarity)}")
        if spec.rank:
            parts.append(f"rank={spec.rank}")
        return ", ".join(parts)

    def codes(self) -> Tensor:
        """The weight's codes, (N, K): int8 (also for int4) or float8_e4m3fn. A view, but for int4."""
        if self.spec.weights == "float8_e4m3fn":
            return self.weight.view(torch.float8_e4m3fn)
        if self.spec.weights == "int8":
            return self.weight
        return unpack_int4(self.weight.detach(), self.in_features)

    def set_codes(self, codes: Tensor) -> None:
        """Store codes (N, K), of any dtype that holds them exactly."""
        if self.spec.weights == "float8_e4m3fn":
            stored = codes.to(torch.float8_e4m3fn).view(torch.int8)
        else:
            stored = codes.to(torch.int8)
            if self.spec.weights == "int4":
                stored = pack_int4(stored)
        self.weight.data.copy_(stored)
        if self.weight_sum is not None:
            sums = [codes[:, columns].sum(dim=1) for columns in self.spec.layout.in_slices]
            self.weight_sum.copy_(torch.stack(sums, dim=1))

    def block_scale(self, segment: int) -> Tensor:
        """The scale of every weight of an input segment, (N, 1) or (N, channels) float32."""
        group, columns = self.spec.group, self.spec.layout.in_slices[segment]
        if group is None:
            return self.weight_scale[:, segment : segment + 1]
        return self.weight_scale[:, columns.start // group : columns.stop // group].repeat_interleave(group, dim=1)

    def forward(self, input: Tensor) -> Tensor:
        """Evaluate the equations of the module's docstring.

        Args:
            input: (..., K), any float dtype.

        Returns:
            (..., N), in the dtype that ``F.linear`` gives (the autocast dtype under autocast).

        Raises:
            ValueError: the input has other than K channels. Kernels would read and write past its end.
        """
        if input.shape[-1] != self.in_features:
            raise ValueError(f"an input of {input.shape[-1]} channels does not fit a Linear of {self.in_features}")
        kind = input.device.type
        autocast = _has_autocast(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else input.dtype
        x = input.reshape(-1, input.shape[-1])
        # The last sum's rounding is the product's own, where nothing else is added.
        direct = dtype if self.low_rank_up is None else self._sum_dtype(x, dtype)
        output = self._codes_product(x, direct) if self.spec.multiplies_codes else self._float_product(x, direct)
        if self.low_rank_up is not None:
            output = output + self._branch(x)
        output = _as(output, dtype).reshape(*input.shape[:-1], self.out_features)
        return refuse_gradients(output, input) if self.spec.activations else output

    @staticmethod
    def _sum_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
        """What parts of an output are held in until they are added.

        On a GPU each part is written and read again, and bfloat16, which overflows no earlier than float32, halves that
        for an error far below the codes'.
        """
        return dtype if x.is_cuda and dtype == torch.bfloat16 else torch.float32

    def _codes_product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Products of codes by codes, without the branch: (M, N) in ``dtype``."""
        groups = len(self.spec.layout.out_groups)
        equal = len(set(self.spec.layout.out_groups)) == 1
        kind = torch.float8_e4m3fn if self.spec.weights == "float8_e4m3fn" else torch.int8
        if groups == 1 or (equal and x.shape[0] <= few_rows(kind)):
            # Few rows: one launch for all groups, which is what their time is.
            return self._product(x, slice(0, groups), slice(0, self.out_features), dtype)
        parts = [
            self._product(x, slice(group, group + 1), rows, dtype)
            for group, rows in enumerate(self.spec.layout.out_slices)
        ]
        return torch.cat(parts, dim=-1)

    def _product(self, x: Tensor, groups: slice, rows: slice, dtype: torch.dtype) -> Tensor:
        """What some output groups give, which are the outputs ``rows``: (M, rows) in ``dtype``."""
        layout, weight, scales, sums = self.spec.layout, self.codes(), self.weight_scale, self.weight_sum
        bias: Tensor | None = self.bias
        some = rows.stop - rows.start < self.out_features
        if some:
            weight, scales = weight[rows], scales[rows]
            bias, sums = None if bias is None else bias[rows], None if sums is None else sums[rows]
        activations = self._quantize(x, groups)
        codes = activations.codes
        if len(layout.in_segments) > 1 and codes.is_cuda and torch.compiler.is_dynamo_compiling():
            # Of a given layout: the compiler would compute codes anew for every product that asks for one.
            codes = codes.as_strided(codes.shape, codes.stride())
        last = len(layout.in_segments) - 1
        part_dtype = dtype if last == 0 else self._sum_dtype(x, dtype)
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

    def _quantize(self, x: Tensor, groups: slice) -> Quantized:
        """Codes of x (M, K) as some output groups read them."""
        layout = self.spec.layout
        shift, inverse = self.shift, _of_groups(self.inverse_smoothing, groups)
        # Static scales (G, T) of the values and of those below 0; None for scales per token.
        scales = _of_groups(self.input_scale, groups), _of_groups(self.input_scale_negative, groups)
        if any(block > 1 for block in layout.rotation):
            z = rotate_segments(smoothed(x, shift, inverse), layout.in_slices, layout.rotation)
            return rounded(z, self._format, layout.in_segments, layout.polarity, *scales)
        return quantize(x, self._format, layout.in_segments, layout.polarity, shift, inverse, *scales)

    def _float_product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
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
            parts.append(linear(self._values(x, group).to(wide), weight.to(wide), bias))
        return torch.cat(parts, dim=-1).to(dtype)

    def _values(self, x: Tensor, group: int) -> Tensor:
        """What x (M, K) is rounded to for an output group, float32."""
        layout, own = self.spec.layout, slice(group, group + 1)
        if self.spec.activations is None:
            z = smoothed(x, self.shift, None if self.inverse_smoothing is None else self.inverse_smoothing[own])
            return rotate_segments(z, layout.in_slices, layout.rotation)
        found = self._quantize(x, own)
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
        outputs = [linear(linear(x, down.to(x.dtype)), up.to(x.dtype)) for down, up in self._factors()]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _factors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each group's (r, K) and (rows, r)."""
        assert self.low_rank_down is not None
        assert self.low_rank_up is not None
        rank = self.spec.rank
        for group, rows in enumerate(self.spec.layout.out_slices):
            yield self.low_rank_down[group * rank : (group + 1) * rank], self.low_rank_up[rows]

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain Linear with the quantized weights in the model's own domain; activations are not rounded any more.

        Args:
            dtype: of its weight and bias; the bias's, or else float32.
        """
        layout = self.spec.layout
        weight = self.codes().float()
        for segment, columns in enumerate(layout.in_slices):
            scaled = weight[:, columns] * self.block_scale(segment)
            weight[:, columns] = rotate(scaled, layout.rotation[segment])
        if self.inverse_smoothing is not None:
            for group, rows in enumerate(layout.out_slices):
                weight[rows] *= self.inverse_smoothing[group]
        bias = None if self.bias is None else self.bias.float()
        if self.shift is not None:
            assert bias is not None
            bias = bias - (weight * self.shift).sum(dim=1)
        if self.low_rank_up is not None:
            weight += torch.cat([up.float() @ down.float() for down, up in self._factors()])
        dtype = dtype or (torch.float32 if self.bias is None else self.bias.dtype)
        plain = nn.Linear(1, 1, bias=bias is not None, device="meta", dtype=dtype)
        plain.in_features, plain.out_features = self.in_features, self.out_features
        plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        return plain


def pack_int4(codes: Tensor) -> Tensor:
    """Two codes a byte: (N, K) int8 in [-8, 7] to (N, ceil(K / 2)) int8, the even channel in the low half."""
    even, odd = pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2)).unbind(dim=-1)
    return (even & 0x0F) | (odd << 4)


def unpack_int4(packed: Tensor, channels: int) -> Tensor:
    """The inverse of :func:`pack_int4`: (N, channels) int8."""
    # An arithmetic shift right keeps the sign of the high half; shifting the low half up first gives it one.
    return torch.stack([(packed << 4) >> 4, packed >> 4], dim=-1).flatten(1)[:, :channels]
