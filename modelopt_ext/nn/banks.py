"""Banks of quantizers: what a segmented Linear has in the place of its two stock quantizers.

A bank *is* a :class:`TensorQuantizer`, so that ModelOpt's patterns, summaries, save and restore find it under the
usual names ``input_quantizer`` and ``weight_quantizer``; it never rounds anything itself. Its attributes (bits, axis,
static or dynamic, enabled) are the template of its blocks, which are stock quantizers nested under it; a pattern that
reconfigures the bank reconfigures them. Buffers of a bank travel in ModelOpt's quantizer state like any ``_amax``.

    activations, output group o, input segment t:   z = ((x[t] - c[t]) / s[o, t]) H[t],      codes of z by block o_t
    weights, the same block:                         ((W[o, t] - L[o, t]) * s[o, t]) H[t],    codes by block w_t

``s`` is SmoothQuant's smoothing (arXiv 2211.10438, eq. 4), ``c`` the shift, which SegLinear gives back as a bias, ``H``
a Hadamard rotation, ``L`` the low-rank branch (SVDQuant, arXiv 2411.05007), which SegLinear evaluates in 16 bits.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor
from torch.nn.functional import linear

from .layout import SPLIT_BY_SIGN, SegLayout, input_block, weight_block
from .rotation import rotate


def _working_dtype(x: Tensor) -> torch.dtype:
    """At least float32: half-precision smoothing would cost more than INT8 rounding does."""
    return torch.promote_types(x.dtype, torch.float32)


class QuantizerBank(TensorQuantizer):
    """What the input and the weight bank share: a layout, blocks that follow the template, optional smoothing."""

    _skip_properties_for_save_restore = TensorQuantizer._skip_properties_for_save_restore | {"_layout"}
    _layout: SegLayout

    @classmethod
    def adopt(cls, quantizer: TensorQuantizer, layout: SegLayout) -> QuantizerBank:
        """Turn ``quantizer`` (or another bank) in place into a bank laid out as ``layout``, blocks not calibrated."""
        quantizer.__class__ = cls
        assert isinstance(quantizer, cls)
        for name in [name for name, child in quantizer.named_children() if isinstance(child, TensorQuantizer)]:
            delattr(quantizer, name)
        quantizer._del_pytorch_state()
        quantizer._layout = layout
        for name in quantizer.block_names():
            quantizer.add_module(name, TensorQuantizer())
        quantizer._configure_blocks()
        return quantizer

    @property
    def layout(self) -> SegLayout:
        """The layout of the Linear that this bank belongs to."""
        return self._layout

    def block_names(self) -> list[str]:
        """Names of the blocks, in order."""
        raise TypeError("a bank is an InputBank or a WeightBank")

    def block(self, name: str) -> TensorQuantizer:
        """The quantizer of one block."""
        return self.get_submodule(name)

    def set_buffer(self, name: str, value: Tensor | None) -> None:
        """Set, replace or (None) remove a buffer of the bank."""
        if hasattr(self, name):
            delattr(self, name)
        if value is not None:
            # A copy: two banks that shared memory could not be saved as safetensors.
            self.register_buffer(name, value.detach().clone())

    def set_from_attribute_config(self, attribute_cfg: Any) -> None:
        """Set the template's attributes, then those of every block."""
        super().set_from_attribute_config(attribute_cfg)
        if "_layout" in self.__dict__:
            self._configure_blocks()

    def _template(self) -> dict[str, Any]:
        known = TensorQuantizer().get_modelopt_state(properties_only=True)
        return {key: value for key, value in self.get_modelopt_state(properties_only=True).items() if key in known}

    def _configure_blocks(self) -> None:
        template = self._template()
        for name in self.block_names():
            self.block(name).set_from_modelopt_state(template, properties_only=True)
            # A rotation is the bank's business, see SegLayout.
            self.block(name).disable_rotate()

    def disable(self) -> None:
        """Disable the bank and its blocks."""
        super().disable()
        for name in self.block_names():
            self.block(name).disable()

    def enable(self) -> None:
        """Enable the bank and its blocks."""
        super().enable()
        for name in self.block_names():
            self.block(name).enable()

    @property
    def smoothing(self) -> Tensor | None:
        """SmoothQuant's s, (output groups, K) float32 > 0: activations are divided by it, weights multiplied."""
        return getattr(self, "_smoothing", None)

    def extra_repr(self) -> str:
        """The layout and the template in one line."""
        layout = self._layout
        parts = [
            "disabled" if self._disabled else f"{self._num_bits} bit",
            f"in={list(layout.in_segments)}",
            f"groups={list(layout.out_groups)}",
            f"polarity={list(layout.polarity)}",
        ]
        if self.smoothing is not None:
            parts.append(f"smoothing={self._short_tensor(self.smoothing)}")
        return " ".join(parts)


class InputBank(QuantizerBank):
    """Quantizers of the activations: one a block, two where the block is split by sign."""

    def block_names(self) -> list[str]:
        """``block{group}_{segment}``, and ``..._negative`` for the second of a pair."""
        layout = self._layout
        return [
            input_block(group, segment, negative)
            for group in range(len(layout.out_groups))
            for segment, polarity in enumerate(layout.polarity)
            for negative in ((False, True) if polarity in SPLIT_BY_SIGN else (False,))
        ]

    def _configure_blocks(self) -> None:
        super()._configure_blocks()
        for segment, polarity in enumerate(self._layout.polarity):
            if polarity == "dual8":
                for group in range(len(self._layout.out_groups)):
                    for negative in (False, True):
                        self.block(input_block(group, segment, negative)).unsigned = True

    @property
    def shift(self) -> Tensor | None:
        """c, (K,) float32, exact in bfloat16: subtracted from x before smoothing; None without a shift."""
        return getattr(self, "_shift", None)

    @property
    def offset(self) -> Tensor | None:
        """W c, (N,) float32, kept only once the weight is folded (see :meth:`SegLinear.fold_weight`)."""
        return getattr(self, "_offset", None)

    @property
    def correction(self) -> Tensor | None:
        """(N,) float32, added to the output: minus the mean error on calibration data; None without."""
        return getattr(self, "_correction", None)

    @property
    def has_bias(self) -> bool:
        """Whether anything of this bank belongs into the Linear's bias."""
        return self.shift is not None or self.correction is not None

    def forward(self, inputs: Tensor, group: int | None = 0) -> Tensor:
        """Round the activations as one output group reads them.

        Args:
            inputs: (..., K).
            group: index of the output group. None asks for what belongs into the bias instead: W c, which the shift
                takes out of the output, and the correction; ``inputs`` is then the weight W without its low-rank
                branch, (N, K). (Here and not in a method of its own, because offloading hooks bring a module's buffers
                in for the time of its forward.)

        Returns:
            (..., K) in ``inputs``'s dtype: ``s * z`` is not undone, z is what the group's smoothed weights expect. For
            ``group=None`` (N,) float32.
        """
        if group is None:
            return self._bias_of(inputs)
        x = inputs.reshape(-1, inputs.shape[-1]).to(_working_dtype(inputs))
        if self.shift is not None:
            x = x - self.shift
        if self.smoothing is not None:
            x = x / self.smoothing[group]
        parts = [self._round(x[:, channels], group, segment) for segment, channels in enumerate(self._layout.in_slices)]
        rounded = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return rounded.to(inputs.dtype).reshape(inputs.shape)

    def _bias_of(self, weight: Tensor) -> Tensor:
        if self.offset is not None:
            return self.offset
        bias = weight.new_zeros(weight.shape[0], dtype=_working_dtype(weight))
        if self.shift is not None:
            # Not a matrix-vector product: BLAS sums those in an order that depends on where the weight lies in memory,
            # and a restored model would differ from the saved one in the last bit.
            bias = (weight.to(bias.dtype) * self.shift).sum(dim=1)
        return bias if self.correction is None else bias + self.correction

    def _round(self, z: Tensor, group: int, segment: int) -> Tensor:
        polarity = self._layout.polarity[segment]
        z = rotate(z, self._layout.rotation[segment])
        block = self.block(input_block(group, segment))
        if polarity == "none":
            return block(z)
        negative = self.block(input_block(group, segment, negative=True))
        if polarity == "dual":
            return block(z.clamp(min=0)) + negative(z.clamp(max=0))
        return block(z.clamp(min=0)) - negative((-z).clamp(min=0))


class WeightBank(QuantizerBank):
    """Quantizers of the weight, one a block."""

    def block_names(self) -> list[str]:
        """``block{weight segment}_{input segment}``."""
        layout = self._layout
        return [
            weight_block(row, segment)
            for row in range(len(layout.weight_segments))
            for segment in range(len(layout.in_segments))
        ]

    @property
    def down(self) -> Tensor | None:
        """The low-rank branch's first factor, (groups * rank, K): group g has rows [g * rank, (g + 1) * rank)."""
        return getattr(self, "_down", None)

    @property
    def up(self) -> Tensor | None:
        """The low-rank branch's second factor, (N, rank): L[o] = up[o] down[o]."""
        return getattr(self, "_up", None)

    def forward(self, inputs: Tensor, use: Literal["round", "residual", "branch"] = "round", group: int = 0) -> Tensor:
        """Smooth and round a weight. (One method for three uses, because offloading hooks bring buffers in for it.)

        Args:
            inputs: the plain weight, (N, K); for ``"branch"`` activations, (..., K).
            use: ``"round"``; ``"residual"``, the weight without the low-rank branch; or ``"branch"``, the product of
                activations with the branch of one output group.
            group: index of the output group, for ``"branch"``.

        Returns:
            (N, K) in the weight's dtype (for ``"residual"`` at least float32); rounded, in the domain that
            :meth:`InputBank.forward` produces. For ``"branch"`` (..., rows of the group) in the activations' dtype.
        """
        if use == "branch":
            return self._branch(inputs, group)
        if getattr(self, "_folded", False):
            return inputs
        weight = self._residual(inputs)
        if use == "residual":
            return weight
        layout = self._layout
        rows = []
        for index, out in enumerate(layout.weight_slices):
            part = weight[out]
            if self.smoothing is not None:
                part = part * self.smoothing[layout.group_of(index)]
            blocks = [
                self.block(weight_block(index, segment))(rotate(part[:, channels], layout.rotation[segment]))
                for segment, channels in enumerate(layout.in_slices)
            ]
            rows.append(blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1))
        rounded = rows[0] if len(rows) == 1 else torch.cat(rows, dim=0)
        return rounded.to(inputs.dtype)

    def _factors(self, group: int) -> tuple[Tensor, Tensor]:
        assert self.down is not None
        assert self.up is not None
        rank = self.up.shape[1]
        return self.down[group * rank : (group + 1) * rank], self.up[self._layout.out_slices[group]]

    def _residual(self, weight: Tensor) -> Tensor:
        weight = weight.to(_working_dtype(weight))
        if self.down is None:
            return weight
        branch = []
        for group in range(len(self._layout.out_groups)):
            down, up = self._factors(group)
            branch.append(up.to(weight.dtype) @ down.to(weight.dtype))
        return weight - torch.cat(branch)

    def _branch(self, inputs: Tensor, group: int) -> Tensor:
        down, up = (factor.to(inputs.dtype) for factor in self._factors(group))
        return linear(linear(inputs, down), up)
