"""Rounding to codes as a GPU does it, on any device."""

from __future__ import annotations

import pytest
import torch

from modelopt_ext.kernels.rounding import nearest


@pytest.mark.parametrize(("lowest", "highest", "offset"), [(-128, 127, 0), (0, 255, 128), (-8, 7, 0)])
def test_integers_from_bit_patterns(lowest: int, highest: int, offset: int) -> None:
    halves = torch.arange(2 * lowest, 2 * highest + 1) / 2  # ties go to the even code
    beyond = torch.cat([2.0 ** torch.arange(0, 128, 0.5), torch.tensor([float("inf"), 0.0])])
    codes = torch.cat([halves, halves + 1e-4, halves - 1e-4, beyond, -beyond])
    found = nearest(codes, lowest, highest, offset)
    assert found.dtype == torch.int8
    assert torch.equal(found.float(), codes.clamp(lowest, highest).round() - offset)
