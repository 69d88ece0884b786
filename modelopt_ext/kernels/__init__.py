"""Matrix products of codes, with a reference for every device and fast kernels for GPUs."""

from .scaled_mm import scaled_mm

__all__ = ["scaled_mm"]
