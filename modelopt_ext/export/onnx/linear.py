"""A PackedLinear in operators of the ONNX standard.

The equation is that of :mod:`modelopt_ext.nn.packed`; here is what becomes of its parts (M rows, K in, N out channels):

====================  ===============================================================================================
activation codes      QuantizeLinear, DequantizeLinear with one constant scale
scales per token      s = ReduceMax(abs(z)) / 127 in floats; z / s is rounded with the scale 1; the product times s
weight                constant codes, DequantizeLinear with a scale a row; transposed in the graph where not (K, N)
shift, smoothing      Sub, Mul of constants; W c is in the bias already
segments              Slice, and an Add of the products
output groups         Concat of the products
"dual"                max(z, 0) and min(z, 0), two products with one dequantized weight
"dual8", uint8        zero points 0 and 255: saturation at one end is the clamp at 0
"dual8", int8         z - 128 s and z + 127 s saturate at 0 likewise; 128 s or -127 s times the weight's sums is added
float8, ONNX Runtime  z / s with the scale 1, times s again: see OnnxActivation
int4 activations      clipped to the codes' range, then as int8
rotation              MatMul with the Hadamard matrix
low-rank branch       two MatMuls of the plain x
====================  ===============================================================================================

Modules are nested so that nodes get the names which NVIDIA's tools look for, ``.../to_q/input_quantizer/
DequantizeLinear``. The bias has the shape (1, 1, N), and products are of three dimensions or more: what ONNX Runtime
would fuse into a float Gemm (MatMul and Add of a vector) before it looks for codes is not there.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ...formats import SMALLEST_AMAX
from ...nn import input_block, weight_block
from ...nn.layout import SPLIT_BY_SIGN
from ...nn.packed import PackedLinear
from ...nn.packed_spec import FORMATS, PackedSpec
from ...nn.rotation import rotate
from .operators import dequantize_linear, quantize_linear
from .target import Target, stores_int4

Part = Literal["whole", "positive", "negative"]

INT4_SUFFIX = "codes_int4"
"""Initializers with this ending hold int4 codes in int8 until :mod:`.graph` packs them."""
CAST_INT4_SUFFIX = "codes_cast_int4"
"""As above, and a Cast to int8 is put behind them."""
BRANCH_NAME = "low_rank"
"""Of the submodule with the low-rank branch, whose initializers :mod:`.graph` stores in 16 bits."""

# Codes of the two halves of a split segment, when all 256 are on one side of zero but the type is int8.
_POSITIVE_OFFSET, _NEGATIVE_OFFSET = 128, -127


class OnnxActivation(nn.Module):
    """Round what one product reads: QuantizeLinear and DequantizeLinear.

    Args:
        spec: of the layer.
        part: of the segment: the whole of it, its positive or its negative half.
        unsigned: whether the codes use one sign only (``"dual8"``).
        scale: of static activations, float32 scalar; None finds one a row.
        target: for whom.
    """

    scale: Tensor
    zero_point: Tensor
    zero: Tensor
    static_scale: Tensor

    def __init__(self, spec: PackedSpec, part: Part, unsigned: bool, scale: Tensor | None, target: Target) -> None:
        super().__init__()
        assert spec.activations is not None
        fmt = FORMATS[spec.activations]
        fmt = fmt.as_unsigned() if unsigned else fmt
        self.part, self.unsigned = part, unsigned
        self.dynamic = scale is None
        self.max_code = fmt.max_code
        self.offset = 0
        self.bounds: tuple[float, float] | None = None
        eight_bit_sign = unsigned and spec.activations == "int8"
        kind, zero = _storage(spec, target)
        if eight_bit_sign and target.unsigned:
            zero = 0 if part == "positive" else 255
        elif eight_bit_sign:
            self.offset = _POSITIVE_OFFSET if part == "positive" else _NEGATIVE_OFFSET
        if spec.activations == "int4":
            low, high = fmt.min_code, fmt.max_code
            self.bounds = (-high, -low) if unsigned and part == "negative" else (low, high)
        # Signed halves need their clamp; with one-sided codes saturation is the clamp.
        self.clamps = part != "whole" and not eight_bit_sign
        one = torch.ones((), dtype=torch.float32)
        step = one if scale is None else scale.detach().float().reshape(())
        self.step = float(step)
        # ONNX Runtime moves float8 codes past Unsqueeze and into integer products, which do not take them: scaled in
        # floats, before and after, they stay where they are.
        self.scales_outside = kind == torch.float8_e4m3fn and target.runtime == "onnxruntime"
        if self.scales_outside:
            self.register_buffer("static_scale", step.clone())
        self.register_buffer("scale", one if self.scales_outside else step.clone())
        self.register_buffer("zero_point", torch.tensor(float(zero)).to(kind))
        if self.clamps:
            self.register_buffer("zero", torch.zeros(()))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Round (..., k): the rounded values (in units of the second result, if any), and one scale a row (..., 1)."""
        if self.clamps:
            # Not clamp: ONNX Runtime's fusion of Clip into QuantizeLinear stops at float8.
            z = torch.maximum(z, self.zero) if self.part == "positive" else torch.minimum(z, self.zero)
        row_scale = None
        if self.dynamic or self.scales_outside:
            row_scale = self._row_scale(z) if self.dynamic else self.static_scale
            z = z / row_scale
        elif self.bounds is not None:
            z = z.clamp(self.bounds[0] * self.step, self.bounds[1] * self.step)
        if self.offset:
            z = z - self.offset * self.step
        codes = quantize_linear(z, self.scale, self.zero_point)
        rounded = dequantize_linear(codes, self.scale, self.zero_point, 0, 0)
        return (rounded * row_scale, None) if self.scales_outside else (rounded, row_scale)

    def _row_scale(self, z: Tensor) -> Tensor:
        if self.part == "whole":
            largest = z.abs().amax(dim=-1, keepdim=True)
        elif self.part == "positive":
            largest = z.amax(dim=-1, keepdim=True)
        else:
            largest = -z.amin(dim=-1, keepdim=True)
        return largest.clamp(min=SMALLEST_AMAX) / self.max_code


class OnnxWeight(nn.Module):
    """A block of the weight as constant codes, dequantized: (k, n).

    Args:
        packed: the layer.
        rows: of its weight.
        segment: the input segment.
        target: for whom.
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, packed: PackedLinear, rows: slice, segment: int, target: Target) -> None:
        super().__init__()
        spec = packed.spec
        columns = spec.layout.in_slices[segment]
        codes = packed.codes()[rows, columns]
        self.block_size = spec.group or 0
        self.rows_first = target.rows_first or not has_integer_kernel(spec)
        if spec.group is None:
            scale = packed.weight_scale[rows, segment]
        else:
            scale = packed.weight_scale[rows, columns.start // spec.group : columns.stop // spec.group]
        zero = None
        self.name = "codes"
        if stores_int4(spec, target):
            self.name = CAST_INT4_SUFFIX if target.int4_as_int8 and has_integer_kernel(spec) else INT4_SUFFIX
        elif target.unsigned_weights and has_integer_kernel(spec) and spec.weights == "int8":
            codes = (codes.to(torch.int16) + 128).to(torch.uint8)
            zero = torch.full(scale.shape, 128, dtype=torch.uint8, device=scale.device)
        self.register_buffer(self.name, (codes if self.rows_first else codes.t()).contiguous().clone())
        self.register_buffer("scale", scale.detach().float().contiguous().clone())
        self.register_buffer("zero_point", zero)

    def forward(self) -> Tensor:
        """The dequantized weight, (k, n) float32."""
        axis = int(bool(self.block_size)) if self.rows_first else 1
        weight = dequantize_linear(getattr(self, self.name), self.scale, self.zero_point, axis, self.block_size)
        return weight.t() if self.rows_first else weight

    def row_sums(self) -> Tensor:
        """The sums of the dequantized weight over its input channels, (n,) float32."""
        return self().double().sum(dim=0).float()


class OnnxBank(nn.ModuleDict):
    """The activations or weight blocks of a segmented layer; called, so that its name is in those of the nodes."""

    def forward(self, name: str, *inputs: Tensor) -> Any:
        """Call one of them."""
        return self[name](*inputs)


class OnnxBranch(nn.Module):
    """The low-rank branch of one output group: x (..., K) to (..., n)."""

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down.detach().float().t().contiguous().clone())
        self.register_buffer("up", up.detach().float().t().contiguous().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by down, (K, r), then by up, (r, n)."""
        return x @ self.down @ self.up


class OnnxLinear(nn.Module):
    """Takes the place of a PackedLinear while its model is exported; computes the same.

    Args:
        packed: the layer.
        target: for whom.

    Raises:
        ValueError: the layer has no form that the target takes; says which preset has one.
    """

    bias: Tensor | None
    shift: Tensor | None
    inverse_smoothing: Tensor | None

    def __init__(self, packed: PackedLinear, target: Target) -> None:
        super().__init__()
        problem = why_not(packed.spec, target)
        if problem:
            raise ValueError(problem)
        spec = packed.spec
        self.spec, self.layout = spec, spec.layout
        self.in_features, self.out_features = packed.in_features, packed.out_features
        # Some models look at the dtype of a weight, or of a module's first parameter, before they call its Linear; as
        # for other int8 Linears, they then leave the input alone.
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.int8), requires_grad=False)
        self.register_buffer("bias", None if packed.bias is None else packed.bias.detach().float().reshape(1, 1, -1))
        for name in ("shift", "inverse_smoothing"):
            value = getattr(packed, name)
            self.register_buffer(name, None if value is None else value.detach().clone())
        self.input_quantizer: nn.Module | None = None
        if spec.activations is not None:
            self.input_quantizer = self._make_activations(packed, target)
        self.weight_quantizer: nn.Module = self._make_weights(packed, target)
        self.low_rank = (
            nn.ModuleList(OnnxBranch(down, up) for down, up in packed.tensors().factors()) if spec.rank else None
        )
        for block in {block for block in self.layout.rotation if block > 1}:
            self.register_buffer(f"hadamard{block}", rotate(torch.eye(block), block))
        self.to(packed.weight.device)
        self._register_offsets()

    def _make_activations(self, packed: PackedLinear, target: Target) -> nn.Module:
        spec, blocks = packed.spec, OnnxBank()
        for group in range(len(self.layout.out_groups)):
            for segment, polarity in enumerate(self.layout.polarity):
                for part in _parts(polarity):
                    scales = packed.input_scale_negative if part == "negative" else packed.input_scale
                    scale = None if scales is None else scales[group, segment]
                    name = input_block(group, segment, part == "negative")
                    blocks[name] = OnnxActivation(spec, part, polarity == "dual8", scale, target)
        return next(iter(blocks.values())) if len(blocks) == 1 else blocks

    def _make_weights(self, packed: PackedLinear, target: Target) -> nn.Module:
        blocks = OnnxBank(
            {
                weight_block(group, segment): OnnxWeight(packed, rows, segment, target)
                for group, rows in enumerate(self.layout.out_slices)
                for segment in range(len(self.layout.in_segments))
            }
        )
        return next(iter(blocks.values())) if len(blocks) == 1 else blocks

    def _register_offsets(self) -> None:
        """What comes back for codes that were moved by an offset: offset * scale * row sums, (1, 1, n)."""
        for name, activation in self.activations().items():
            if not activation.offset:
                continue
            group, segment = (int(number) for number in name.removeprefix("block").split("_")[:2])
            constant = activation.offset * activation.scale * self._weight(group, segment).row_sums()
            self.register_buffer(f"offset_{name}", constant.reshape(1, 1, -1))

    def activations(self) -> dict[str, OnnxActivation]:
        """What rounds the input, by block name."""
        if isinstance(self.input_quantizer, OnnxBank):
            return cast("dict[str, OnnxActivation]", dict(self.input_quantizer.items()))
        return {} if self.input_quantizer is None else {input_block(0, 0): cast(OnnxActivation, self.input_quantizer)}

    def _rounded(self, name: str, values: Tensor) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.input_quantizer, OnnxBank):
            return self.input_quantizer(name, values)
        assert self.input_quantizer is not None
        return self.input_quantizer(values)

    def _dequantized(self, group: int, segment: int) -> Tensor:
        if isinstance(self.weight_quantizer, OnnxBank):
            return self.weight_quantizer(weight_block(group, segment))
        return self.weight_quantizer()

    def _weight(self, group: int, segment: int) -> OnnxWeight:
        if isinstance(self.weight_quantizer, OnnxBank):
            return cast(OnnxWeight, self.weight_quantizer[weight_block(group, segment)])
        return cast(OnnxWeight, self.weight_quantizer)

    def forward(self, input: Tensor) -> Tensor:
        """Evaluate the layer.

        Args:
            input: (..., K), any float dtype; computed in float32.

        Returns:
            (..., N), in ``input``'s dtype.
        """
        # Not .float(), which the exporter writes as a Cast even where nothing changes.
        x = input if input.dtype == torch.float32 else input.to(torch.float32)
        missing = max(0, 3 - input.dim())
        for _ in range(missing):
            x = x.unsqueeze(0)
        z = x if self.shift is None else x - self.shift
        groups = [self._group(z, group) for group in range(len(self.layout.out_groups))]
        output = groups[0] if len(groups) == 1 else torch.cat(groups, dim=-1)
        if self.low_rank is not None:
            branches = [branch(x) for branch in self.low_rank]
            output = output + (branches[0] if len(branches) == 1 else torch.cat(branches, dim=-1))
        if self.bias is not None:
            output = output + self.bias
        for _ in range(missing):
            output = output.squeeze(0)
        return output if output.dtype == input.dtype else output.to(input.dtype)

    def _rotated(self, z: Tensor, block: int) -> Tensor:
        """As :func:`rotate`, with the matrix as a buffer: the file holds each size once."""
        if block == 1:
            return z
        return (z.unflatten(-1, (-1, block)) @ getattr(self, f"hadamard{block}")).flatten(-2)

    def _group(self, z: Tensor, group: int) -> Tensor:
        if self.inverse_smoothing is not None:
            z = z * self.inverse_smoothing[group]
        products = []
        for segment, columns in enumerate(self.layout.in_slices):
            whole = len(self.layout.in_segments) == 1
            values = self._rotated(z if whole else z[..., columns], self.layout.rotation[segment])
            weight = self._dequantized(group, segment)
            if self.spec.activations is None:
                products.append(values @ weight)
                continue
            for part in _parts(self.layout.polarity[segment]):
                name = input_block(group, segment, part == "negative")
                rounded, row_scale = self._rounded(name, values)
                # Not torch.matmul: in attention layers of transformers ModelOpt replaces it by a quantized one.
                product = rounded @ weight
                offset = getattr(self, f"offset_{name}", None)
                if offset is not None:
                    product = product + offset
                products.append(product if row_scale is None else product * row_scale)
        total = products[0]
        for product in products[1:]:
            total = total + product
        return total


def has_integer_kernel(spec: PackedSpec) -> bool:
    """Whether ONNX Runtime has a product of these codes: integers on both sides, one weight scale a row.

    Others are dequantized and multiplied as floats. Their weight is stored (N, K) for ONNX Runtime, too: it would fuse
    DequantizeLinear and MatMul of a (K, N) weight into MatMulNBits, which rounds activations to 8 bits on its own, and
    float8 codes into an integer product that it can't run.
    """
    integers = spec.weights != "float8_e4m3fn" and spec.activations in ("int8", "int4")
    return integers and spec.group is None


def why_not(spec: PackedSpec, target: Target) -> str | None:
    """Why a target does not take a layer, with what it takes instead; None if it does."""
    if target.runtime != "tensorrt":
        return None
    integers = {"int8": True, "int4": True, "float8_e4m3fn": False}
    if spec.activations is not None and integers[spec.weights] != integers[spec.activations]:
        return (
            f"TensorRT multiplies no {spec.weights} weights by {spec.activations} activations: use SEGQUANT_FP8_CFG or "
            "SEGQUANT_W4A8_CFG"
        )
    if spec.group is not None and not (spec.weights == "int4" and spec.activations is None):
        return (
            f"TensorRT has weight scales of groups for weight-only int4, not for {spec.weights} with "
            f"{spec.activations or 'unrounded'} activations: use scales per channel (SEGQUANT_W4A8_CFG, "
            "SEGQUANT_INT8_CFG)"
        )
    if spec.weights == "int4" and spec.activations is None and spec.group not in (64, 128):
        return (
            f"TensorRT has weight-only int4 in groups of 64 or 128 channels, not {spec.group or 'per channel'}: "
            'use SEGQUANT_W4A16_CFG with block_sizes {-1: 64, "type": "static"}, or SEGQUANT_W8A16_CFG'
        )
    return None


def _parts(polarity: str) -> tuple[Part, ...]:
    return ("positive", "negative") if polarity in SPLIT_BY_SIGN else ("whole",)


def _storage(spec: PackedSpec, target: Target) -> tuple[torch.dtype, int]:
    """The dtype and zero point of activation codes."""
    if spec.activations == "float8_e4m3fn":
        return torch.float8_e4m3fn, 0
    if target.unsigned and has_integer_kernel(spec):
        return torch.uint8, 128
    return (torch.uint8, 128) if target.unsigned and "dual8" in spec.layout.polarity else (torch.int8, 0)
