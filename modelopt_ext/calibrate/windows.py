"""What a convolution reads, as rows: statistics of its input channels and a sample of its windows (im2col).

A convolution is a Linear on windows: for output position p the row x[p] holds C * kh * kw values, channel by channel,
and y[p] = x[p] W^T with W (N, C * kh * kw). So the error of a rounding can be measured on sampled rows as for a Linear.
All windows of an image are kh * kw times its size; only the sampled ones are ever cut out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.seg_conv import pad_input
from .statistics import LinearStatistics

# Kept of a convolution unless the config says otherwise: each is as large as kernel-size rows of a Linear.
WINDOWS = 512


@dataclass
class Windows:
    """The windows of padded images (B, C, H, W) that a convolution reads, cut out on demand.

    It stands in for the tensor (rows, C * kh * kw) of all of them, rows ordered by image, then by output position.
    """

    images: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def positions(self) -> tuple[int, int]:
        """Output height and width."""
        size = zip(self.images.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        height, width = ((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in size)
        return height, width

    @property
    def dtype(self) -> torch.dtype:
        """That of the images."""
        return self.images.dtype

    @property
    def device(self) -> torch.device:
        """That of the images."""
        return self.images.device

    @property
    def shape(self) -> tuple[int, int]:
        """Number of windows over all images, and values in each."""
        height, width = self.positions
        return self.images.shape[0] * height * width, self.images.shape[1] * self.kernel[0] * self.kernel[1]

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Cut the windows ``index`` (R,) out: (R, C * kh * kw); ``dim`` is 0."""
        height, width = self.positions
        item, place = index // (height * width), index % (height * width)

        def taps(start: Tensor, axis: int) -> Tensor:
            offsets = torch.arange(self.kernel[axis], device=index.device) * self.dilation[axis]
            return start[:, None] * self.stride[axis] + offsets

        rows = taps(place // width, 0)[:, :, None]
        columns = taps(place % width, 1)[:, None, :]
        cut = self.images[item[:, None, None], :, rows, columns]  # (R, kh, kw, C)
        return cut.permute(0, 3, 1, 2).flatten(1)


class WindowStatistics(LinearStatistics):
    """Statistics of a convolution: ranges over its C input channels, rows of C * kh * kw values."""

    def __init__(self, module: nn.Conv2d, samples: int, seed: int) -> None:
        super().__init__(samples, seed)
        self._module = module

    def update(self, x: Tensor, position: int | None = None) -> None:
        """Take in the input of one call, (B, C, H, W) or (C, H, W).

        Padding counts as input: it is what the windows hold, and a shift moves it like any other zero.
        """
        module = self._module
        with torch.no_grad():
            images = pad_input(module, x.detach() if x.dim() == 4 else x.detach()[None])
            if images.numel() == 0:
                return
            windows = Windows(images, module.kernel_size, module.stride, module.dilation)
            self._take(images.flatten(2).transpose(1, 2), windows, position)
