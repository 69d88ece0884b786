"""SegConv2d: a quantized 2-D convolution whose concatenated inputs have their own scales.

A UNet's up blocks convolve ``torch.cat([hidden, skip])``, two tensors of different range. With the input channels cut
where they were joined (Q-Diffusion's split of shortcuts, Li et al., arXiv 2302.04304, section 4.2), input segments t:

    y = sum_t  (Q((x[t] - c[t]) / s[t]) + c[t] / s[t]) * Q(W[:, t] * s[t])  +  b

where ``*`` is the convolution, and s, c and Q are those of :mod:`.seg_linear`. In integer arithmetic that is one
convolution a segment; here the rounded parts are put together again and convolved at once, which gives the same
numbers. Zero padding is zero in x, not in x - c, so where there is a shift the input is padded first.

What the shift takes out comes back as a bias, with the *rounded* weight: zero in x then gives zero, rounded weight or
not. With the weight in full precision its rounding error would be multiplied by x - c, and most of what SiLU leaves is
near zero, far from c, the middle of the range.

There is one output group: a convolution's output is read as a whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from modelopt.torch.opt.dynamic import _DMRegistryCls
from modelopt.torch.quantization.nn import QuantModule
from torch import Tensor, nn

from .banks import InputBank, QuantizerBank
from .layout import SegLayout, weight_block
from .seg_module import SegModule


def _channelwise(values: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1), which broadcasts over images (..., C, H, W) and kernels (N, C, kh, kw)."""
    return values.reshape(-1, 1, 1)


class ConvInputBank(InputBank):
    """Quantizers of a convolution's input, (B, C, H, W) or (C, H, W): one a segment, two where it is split by sign."""

    def forward(self, inputs: Tensor, group: int | None = 0) -> Tensor:
        """Round an image as the convolution reads it.

        Args:
            inputs: (..., C, H, W), already padded if there is a shift.
            group: 0, the one output group. None asks for what the shift takes out of the output instead; ``inputs`` is
                then the rounded weight, (N, C, kh, kw). (Here and not in a method of its own, because offloading hooks
                bring a module's buffers in for the time of its forward.)

        Returns:
            (..., C, H, W) in ``inputs``'s dtype. For ``group=None`` (N,), at least float32.
        """
        x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        if group is None:
            assert self.shift is not None
            # Loading may have cast both to half precision, in which their quotient would be another one.
            shift = self.shift.to(x.dtype)
            if self.smoothing is not None:
                shift = shift / self.smoothing[0]
            return (x * _channelwise(shift)).sum(dim=(1, 2, 3))
        if self.shift is not None:
            x = x - _channelwise(self.shift)
        if self.smoothing is not None:
            x = x / _channelwise(self.smoothing[0])
        parts = [self._round(x[..., part, :, :], 0, segment) for segment, part in enumerate(self.layout.in_slices)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-3)).to(inputs.dtype)


class ConvWeightBank(QuantizerBank):
    """Quantizers of a convolution's weight, one an input segment; per-channel scales have the shape (N, 1, 1, 1)."""

    def block_names(self) -> list[str]:
        """``block0_{input segment}``."""
        return [weight_block(0, segment) for segment in range(len(self.layout.in_segments))]

    def forward(self, inputs: Tensor) -> Tensor:
        """Smooth and round the plain weight (N, C, kh, kw); the same shape and dtype back."""
        weight = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        if self.smoothing is not None:
            weight = weight * _channelwise(self.smoothing[0])
        parts = [self.block(weight_block(0, t))(weight[:, part]) for t, part in enumerate(self.layout.in_slices)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(inputs.dtype)


class SegConv2d(SegModule):
    """Mixed into a Conv2d's quantized class: the result is still an ``nn.Conv2d`` with one ``weight`` and one ``bias``.

    Made by :func:`to_seg_conv`, never constructed. ``input_quantizer`` is a :class:`ConvInputBank`,
    ``weight_quantizer`` a :class:`ConvWeightBank`.
    """

    input_quantizer: ConvInputBank
    weight_quantizer: ConvWeightBank

    def forward(self, input: Tensor) -> Tensor:
        """Evaluate the equation above with fake quantization.

        Args:
            input: (B, C, H, W) or (C, H, W), any float dtype.

        Returns:
            What ``nn.Conv2d`` returns.
        """
        weight = self.plain_weight
        if self._is_transparent():
            return self.output_quantizer(self._conv_forward(input, weight, self.bias))
        rounded = self.weight_quantizer(weight)
        if self.input_quantizer.shift is None:
            return self.output_quantizer(self._conv_forward(self.input_quantizer(input), rounded, self.bias))
        codes = self.input_quantizer(pad_input(self, input))
        offset = self.input_quantizer(rounded, group=None)
        bias = (offset if self.bias is None else self.bias + offset).to(weight.dtype)
        return self.output_quantizer(F.conv2d(codes, rounded, bias, self.stride, 0, self.dilation, self.groups))


# Quantized Conv2d class -> its segmented class, filled as classes are met.
SegConvRegistry = _DMRegistryCls("Seg", QuantModule)


def pad_input(module: nn.Conv2d, x: Tensor) -> Tensor:
    """``x`` (..., C, H, W) with the padding that ``module`` would add itself."""
    padding = module._reversed_padding_repeated_twice
    if not any(padding):
        return x
    return F.pad(x, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def to_seg_conv(module: nn.Module, layout: SegLayout) -> SegConv2d:
    """Lay a quantized Conv2d out as ``layout``, in place; its quantizers become banks with blocks not calibrated.

    Args:
        module: a ModelOpt QuantConv2d without groups, or a SegConv2d whose layout changes.
        layout: over the convolution's input and output channels, with one output group and one weight segment.

    Raises:
        ValueError: the layout is for another size, has several output groups, or the convolution has groups.
    """
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        raise ValueError(f"only a Conv2d with groups=1 has input segments, not {module}")
    if (layout.in_features, layout.out_features) != (module.in_channels, module.out_channels):
        raise ValueError(
            f"the layout is for {layout.in_features} -> {layout.out_features} channels, "
            f"the convolution has {module.in_channels} -> {module.out_channels}"
        )
    if len(layout.out_groups) != 1 or len(layout.weight_segments) != 1:
        raise ValueError("a convolution's output has one group and one weight segment")
    if not isinstance(module, SegConv2d):
        if type(module) not in SegConvRegistry:
            SegConvRegistry.register({type(module): type(module).__name__})(SegConv2d)
        SegConvRegistry.convert(module)  # in place
    assert isinstance(module, SegConv2d)
    ConvInputBank.adopt(module.input_quantizer, layout)
    ConvWeightBank.adopt(module.weight_quantizer, layout)
    return module
