"""SmoothQuant's smoothing of one block (Xiao et al., arXiv 2211.10438, eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

# Keeps s, and with it the smoothed tensors, inside float16's normal range.
LARGEST_SMOOTHING = 2.0**12


def smoothing_scale(activation_amax: Tensor, weight_amax: Tensor, alpha: float) -> Tensor:
    """s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), normalized to geometric mean 1.

    The quantizers' scales follow any common factor, so the normalization changes no code; it keeps the smoothed
    tensors in the range that they had, which half precision needs.

    Args:
        activation_amax: (K,) float32 >= 0, largest magnitude of each input channel.
        weight_amax: (K,) float32 >= 0, largest magnitude of each weight column of the block.
        alpha: 0 leaves the weights level, 1 the activations.

    Returns:
        (K,) float32 > 0. A channel that is dead on either side keeps s_j = 1.
    """
    alive = (activation_amax > 0) & (weight_amax > 0)
    ones = torch.ones_like(activation_amax)
    log_scale = alpha * torch.where(alive, activation_amax, ones).log()
    log_scale = log_scale - (1 - alpha) * torch.where(alive, weight_amax, ones).log()
    count = alive.sum().clamp(min=1)
    log_scale = log_scale - torch.where(alive, log_scale, torch.zeros_like(log_scale)).sum() / count
    return torch.where(alive, log_scale.exp().clamp(1 / LARGEST_SMOOTHING, LARGEST_SMOOTHING), ones)
