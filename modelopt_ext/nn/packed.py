"""PackedLinear: a quantized Linear that holds codes, one byte or half a byte a weight, instead of rounded floats.

It computes what :class:`SegLinear` simulates, for output groups g (rows o) and input segments t:

    z[t] = ((x[t] - shift[t]) / smoothing[g, t]) H[t]          q[t] = clamp(round(z[t] / input_scale[g, t]))
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
``smoothing``                float32    (G, K)
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

from ..formats import SMALLEST_AMAX, QuantFormat, to_codes
from ..kernels import scaled_mm
from .layout import SPLIT_BY_SIGN, SegLayout
from .rotation import rotate

CodeType = Literal["int8", "int4", "float8_e4m3fn"]

FORMATS: Mapping[CodeType, QuantFormat] = {
    "int8": QuantFormat(8),
    "int4": QuantFormat(4),
    "float8_e4m3fn": QuantFormat((4, 3)),
}
# int8 holds the unsigned codes 0..255 minus this.
UNSIGNED_OFFSET = 128


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
    def has_zero_point(self) -> bool:
        """Whether int8 holds unsigned codes, less UNSIGNED_OFFSET, in a product of integers."""
        integers = self.weights != "float8_e4m3fn" and self.group is None
        return integers and self.activations == "int8" and "dual8" in self.layout.polarity

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
    smoothing: Tensor | None
    shift: Tensor | None
    weight_sum: Tensor | None
    low_rank_down: Tensor | None
    low_rank_up: Tensor | None

    # Scales lose too much in 16 bit; ``module.to(dtype)`` leaves these alone.
    FLOAT32 = ("weight_scale", "input_scale", "input_scale_negative", "smoothing", "shift")

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
            "smoothing": (groups, self.in_features) if spec.smoothing else None,
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
            return self.weight.detach().view(torch.float8_e4m3fn)
        if self.spec.weights == "int8":
            return self.weight.detach()
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
        """
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        x = input.reshape(-1, input.shape[-1])
        z = x.float() if self.shift is None else x.float() - self.shift
        codes = self.codes()
        # The last sum's rounding is the product's own, where nothing else is added.
        direct = dtype if self.low_rank_up is None else torch.float32
        groups = [self._group(z, codes, group, rows, direct) for group, rows in enumerate(self.spec.layout.out_slices)]
        output = groups[0] if len(groups) == 1 else torch.cat(groups, dim=-1)
        if self.low_rank_up is not None:
            output = output + self._branch(x)
        return output.to(dtype).reshape(*input.shape[:-1], self.out_features)

    def _group(self, z: Tensor, codes: Tensor, group: int, rows: slice, dtype: torch.dtype) -> Tensor:
        """What an output group gives without the branch, (M, rows) in ``dtype``."""
        layout = self.spec.layout
        if self.smoothing is not None:
            z = z / self.smoothing[group]
        bias = None if self.bias is None else self.bias[rows]
        last = len(layout.in_segments) - 1
        total = None
        for segment, columns in enumerate(layout.in_slices):
            part = rotate(z[:, columns], layout.rotation[segment])
            product = self._product(
                part,
                codes[rows, columns],
                group,
                rows,
                segment,
                bias if segment == last else None,
                dtype if last == 0 else None,
            )
            total = product if total is None else total + product
        assert total is not None
        return total.to(dtype)

    def _product(
        self,
        z: Tensor,
        weight: Tensor,
        group: int,
        rows: slice,
        segment: int,
        bias: Tensor | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """Round (M, k) activations and multiply them with a block (rows, k): (M, rows), float32 or ``dtype``."""
        spec = self.spec
        if spec.activations is None:
            return linear(z, weight.float() * self.block_scale(segment)[rows], None if bias is None else bias.float())
        (q, scale), *others = self._rounded(z, group, segment)
        sign = -1 if spec.layout.polarity[segment] == "dual8" else 1
        integers = spec.activations != "float8_e4m3fn"
        if spec.group is not None or integers != (spec.weights != "float8_e4m3fn"):
            # Mixed codes, or sums that end inside a segment: no product of two matrices of codes.
            wide = weight.float() * self.block_scale(segment)[rows]
            total = (q @ wide.t()) * scale
            for q2, scale2 in others:
                total = total + sign * (q2 @ wide.t()) * scale2
            return total if bias is None else total + bias
        offset = UNSIGNED_OFFSET if self.weight_sum is not None and sign < 0 else 0
        kind = torch.int8 if integers else torch.float8_e4m3fn
        second, second_scale = others[0] if others else (None, None)
        return scaled_mm(
            (q - offset).to(kind),
            weight,
            scale,
            self.weight_scale[rows, segment],
            bias,
            zero=-offset,
            sum_b=self.weight_sum[rows, segment] if offset and self.weight_sum is not None else None,
            a2=None if second is None else (second - offset).to(kind),
            scale_a2=second_scale,
            sign=sign,
            out_dtype=dtype,
        )

    def _rounded(self, z: Tensor, group: int, segment: int) -> list[tuple[Tensor, Tensor]]:
        """(codes as float32, scale (1, 1) or (M, 1)) of a segment; two where it is split by sign."""
        assert self.spec.activations is not None
        polarity = self.spec.layout.polarity[segment]
        fmt = FORMATS[self.spec.activations]
        if polarity == "dual8":
            fmt = fmt.as_unsigned()
        values = [z]
        if polarity in SPLIT_BY_SIGN:
            values = [z.clamp(min=0), z.clamp(max=0) if polarity == "dual" else (-z).clamp(min=0)]
        rounded = []
        for value, static in zip(values, (self.input_scale, self.input_scale_negative), strict=False):
            if static is None:
                scale = value.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST_AMAX) / fmt.max_code
            else:
                scale = static[group, segment].reshape(1, 1)
            rounded.append((to_codes(value, scale, fmt), scale))
        return rounded

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
        if self.smoothing is not None:
            for group, rows in enumerate(layout.out_slices):
                weight[rows] /= self.smoothing[group]
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
