"""Which treatments of the sign an input segment may get: DualScale and its relatives.

After SiLU, GELU and gated products the negatives are many and small, the positives few and large, and one symmetric
scale wastes half its codes. What can be done about it, for x of one segment:

``dual``   Q(x+; s+) + Q(x-; s-), signed codes each (SegQuant's DualScale, arXiv 2507.14811): a second GEMM.
``dual8``  the same with all codes on one side of zero: one bit more for each sign, the same cost.
``shift``  Q(x - c) with c in the middle of the range: one GEMM; W c goes into the bias, in full precision.

A second GEMM is free where the GEMM is bound by reading the weight (few rows: AdaLN) and as dear as the first where it
is bound by arithmetic, so ``auto`` offers it in the first case only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import QuantFormat

POLARITY_POLICIES = ("none", "shift", "dual", "dual8", "auto")


def is_polar(tag: str, low: float, high: float) -> bool:
    """Whether a segment's values are lopsided as its producer suggests.

    Args:
        tag: what dataflow found to have produced the segment; "" for anything else.
        low, high: smallest and largest value of the segment in calibration.

    Returns:
        True if the segment is tagged, both signs occur, and one reaches at least twice as far as the other: below
        that DualScale can't win a bit on either side.
    """
    if not tag or low >= 0 or high <= 0:
        return False
    return max(high, -low) >= 2 * min(high, -low)


def candidates(
    policy: str, *, polar: bool, weight_bound: bool, fmt: QuantFormat | None, has_statistics: bool
) -> list[str]:
    """The treatments to try on one input segment, cheapest first.

    Args:
        policy: one of :data:`POLARITY_POLICIES`.
        polar: whether the segment is lopsided.
        weight_bound: whether its GEMM is bound by reading the weight.
        fmt: the activations' format, None in weight-only quantization.
        has_statistics: whether calibration data was seen; a shift needs it.
    """
    if fmt is None:
        return ["none"]
    if policy in ("dual", "dual8"):
        return [policy] if polar else ["none"]
    if policy == "none":
        return ["none"]
    offered = ["none"]
    if has_statistics:
        offered.append("shift")
    if policy == "auto" and polar and weight_bound and fmt.is_integer:
        offered.append("dual8")
    return offered


def shift_of(channel_max: Tensor, channel_min: Tensor, per_channel: bool) -> Tensor:
    """c = (max + min) / 2 of one segment, rounded to bfloat16 so that it is exact in every dtype.

    Args:
        channel_max, channel_min: (K,) float32.
        per_channel: each channel has its own c (as in Outlier Suppression+, arXiv 2304.09145, eq. 3), or all share one.

    Returns:
        (K,) float32.
    """
    if per_channel:
        centre = (channel_max + channel_min) / 2
    else:
        centre = ((channel_max.max() + channel_min.min()) / 2).expand_as(channel_max)
    return centre.to(torch.bfloat16).float()
