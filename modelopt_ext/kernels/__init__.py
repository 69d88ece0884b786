"""Matrix products of codes, as custom operators with a reference for every device."""

from . import cuda as cuda
from .scaled_mm import scaled_mm

__all__ = ["scaled_mm"]
