"""Segmented Linears and convolutions, and their banks of quantizers."""

from .banks import InputBank, QuantizerBank, WeightBank
from .layout import SegLayout, input_block, weight_block
from .packed import PackedLinear
from .packed_spec import PackedSpec
from .seg_conv import SegConv2d, to_seg_conv
from .seg_linear import SegLinear, to_seg_linear

__all__ = [
    "InputBank",
    "PackedLinear",
    "PackedSpec",
    "QuantizerBank",
    "SegConv2d",
    "SegLayout",
    "SegLinear",
    "WeightBank",
    "input_block",
    "to_seg_conv",
    "to_seg_linear",
    "weight_block",
]
