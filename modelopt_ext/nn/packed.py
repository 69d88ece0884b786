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

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .gradients import refuse_gradients
from .packed_product import PackedTensors, described, pack_int4
from .packed_spec import PackedSpec
from .rotation import rotate


@torch.compiler.assume_constant_result
def _has_autocast(kind: str) -> bool:
    """Whether devices of that type have autocast: asked outside of the compiler, that of torch 2.11 can not ask."""
    return torch.amp.is_autocast_available(kind)


class PackedLinear(nn.Linear):
    """A Linear that multiplies codes; see the module's docstring. Inference only.

    Args:
        spec: the formats.
        bias: whether there is one.
        dtype: of the bias, and of the low-rank branch if it has 16 bits (else the branch is float16).
        device: where tensors are made, uninitialized; "meta" makes none.
    """

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

    @property
    def spec(self) -> PackedSpec:
        """The formats."""
        return self._spec

    @spec.setter
    def spec(self, spec: PackedSpec) -> None:
        self._spec, self._described = spec, described(spec)

    def tensors(self) -> PackedTensors:
        """What it holds, with what computes from it."""
        return PackedTensors(
            self.spec,
            self.weight,
            self.bias,
            self.weight_scale,
            self.input_scale,
            self.input_scale_negative,
            self.inverse_smoothing,
            self.shift,
            self.weight_sum,
            self.low_rank_down,
            self.low_rank_up,
        )

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
        return self.tensors().codes()

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
        if torch.compiler.is_dynamo_compiling():
            output = torch.ops.segquant.packed_linear(x, *self.tensors()[1:], self._described, dtype)
        else:
            output = self.tensors().outputs(x, dtype)
        output = output.reshape(*input.shape[:-1], self.out_features)
        return refuse_gradients(output, input) if self.spec.activations else output

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain Linear with the quantized weights in the model's own domain; activations are not rounded any more.

        Args:
            dtype: of its weight and bias; the bias's, or else float32.
        """
        layout, tensors = self.spec.layout, self.tensors()
        weight = tensors.codes().float()
        for segment, columns in enumerate(layout.in_slices):
            scaled = weight[:, columns] * tensors.block_scale(segment)
            weight[:, columns] = rotate(scaled, layout.rotation[segment])
        if self.inverse_smoothing is not None:
            for group, rows in enumerate(layout.out_slices):
                weight[rows] *= self.inverse_smoothing[group]
        bias = None if self.bias is None else self.bias.float()
        if self.shift is not None:
            assert bias is not None
            bias = bias - (weight * self.shift).sum(dim=1)
        if self.low_rank_up is not None:
            weight += torch.cat([up.float() @ down.float() for down, up in tensors.factors()])
        dtype = dtype or (torch.float32 if self.bias is None else self.bias.dtype)
        plain = nn.Linear(1, 1, bias=bias is not None, device="meta", dtype=dtype)
        plain.in_features, plain.out_features = self.in_features, self.out_features
        plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        return plain
