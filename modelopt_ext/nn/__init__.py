"""Segmented Linears and their banks of quantizers."""

from .banks import InputBank, QuantizerBank, WeightBank
from .layout import SegLayout, input_block, weight_block
from .seg_linear import SegLinear, to_seg_linear

__all__ = [
    "InputBank",
    "QuantizerBank",
    "SegLayout",
    "SegLinear",
    "WeightBank",
    "input_block",
    "to_seg_linear",
    "weight_block",
]
