"""Hadamard rotation of channels: spreads outliers over neighbours before rounding, undone by rotating the weight too.

With H orthogonal, (z H)(W H)^T = z W^T. ModelOpt's quantizers have a ``rotate`` attribute for the same thing, which
needs a CUDA-only package; this is plain torch, for any device and for block sizes that are no power of two times one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.scaled_mm import launches_directly

# A larger block spreads outliers further but costs more: (block) multiply-adds a channel as a matrix product.
LARGEST_BLOCK = 256


def rotation_block(channels: int) -> int:
    """Channels that are rotated together: the largest power of two that divides ``channels``, at most 256.

    Returns:
        1 where ``channels`` is odd: nothing to rotate.
    """
    return min(channels & -channels, LARGEST_BLOCK)


@lru_cache(maxsize=32)
def _hadamard(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    matrix = torch.ones(1, 1, dtype=dtype)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return (matrix / block**0.5).to(device)


def rotate(x: Tensor, block: int) -> Tensor:
    """Rotate each run of ``block`` channels by the normalized (Sylvester) Hadamard matrix; its own inverse.

    Args:
        x: (..., K) floating point, K a multiple of ``block``.
        block: a power of two; 1 returns ``x``.

    Returns:
        (..., K) in ``x``'s dtype.
    """
    if block == 1:
        return x
    # What is kept has to be real.
    hadamard = _hadamard if launches_directly() else _hadamard.__wrapped__
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    # Scales are found in float32 afterwards.
    with torch.autocast(kind, enabled=False) if autocast else nullcontext():
        return (x.unflatten(-1, (-1, block)) @ hadamard(block, x.device, x.dtype)).flatten(-2)


def rotate_segments(x: Tensor, columns: Sequence[slice], blocks: Sequence[int]) -> Tensor:
    """:func:`rotate` each run of columns of x (rows, K) by its own block size; its own inverse."""
    if all(block == 1 for block in blocks):
        return x
    return torch.cat([rotate(x[:, c], block) for c, block in zip(columns, blocks, strict=True)], dim=1)
