"""Codes of activations and matrix products of codes, with a reference for every device and fast kernels for GPUs."""

from .rounding import quantize
from .scaled_mm import scaled_mm

__all__ = ["quantize", "scaled_mm"]
