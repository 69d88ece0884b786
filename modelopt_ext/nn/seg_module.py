"""What segmented Linears and convolutions share: one plain weight, two banks, and how the weight is folded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor

from .banks import QuantizerBank
from .layout import SegLayout


class SegModule(QuantModule):
    """Base of the classes that are mixed into a layer's quantized class; ModelOpt's quantizers have become banks."""

    input_quantizer: QuantizerBank
    weight_quantizer: QuantizerBank
    output_quantizer: TensorQuantizer

    def _setup(self) -> None:
        """Nothing to add: the quantizers are those of the class below, turned into banks on conversion."""

    @property
    def layout(self) -> SegLayout:
        """How the blocks are laid out, over input and output channels."""
        return self.input_quantizer.layout

    @property
    def plain_weight(self) -> Tensor:
        """The weight as stored, (N, K, ...), whatever mode ModelOpt's dynamic attributes are in."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def _is_transparent(self) -> bool:
        """True when nothing is rounded or collected: such a layer gives full-precision outputs to the bit."""
        banks = (self.input_quantizer, self.weight_quantizer)
        return not (
            any(bank.is_enabled and (bank._if_quant or bank._if_calib) for bank in banks)
            or getattr(self.weight_quantizer, "_folded", False)
        )

    def iter_weights_for_calibration(self) -> Iterator[tuple[Tensor, TensorQuantizer]]:
        """Yield (weight, bank): the bank hands each block its smoothed slice."""
        yield self.plain_weight, self.weight_quantizer

    def _before_folding(self) -> None:
        """Keep what can't be found from a folded weight any more."""

    @torch.no_grad()
    def fold_weight(self, keep_attrs: bool = False) -> None:
        """Bake smoothing and rounding into ``weight``, once; activations stay quantized.

        After this the stored weight lives in the smoothed domain and only this module can use it.
        """
        bank = self.weight_quantizer
        if getattr(bank, "_folded", False) or not bank.is_enabled:
            return
        self._before_folding()
        weight = self.plain_weight
        weight.copy_(bank(weight))
        bank._folded = True
        bank.disable()
        bank.set_buffer("_smoothing", None)
        if not keep_attrs:
            for name in bank.block_names():
                bank.block(name).reset_amax()
