"""Which treatments of the sign an input segment may get: DualScale and its relatives.

After SiLU, GELU and gated products the negatives are many and small, the positives few and large, and one symmetric
scale wastes half its codes. What can be done about it, for x of one segment:

``dual``   Q(x+; s+) + Q(x-; s-), signed codes each (SegQuant's DualScale, arXiv 2507.14811): a second GEMM.
``dual8``  the same with all codes on one side of zero: one bit more for each sign, the same cost.
``shift``  Q(x - c) with c in the middle of the range: one GEMM; W c goes into the bias, in full precision.

A second product costs as much as the first, so ``auto`` offers ``dual8`` (after a shift, too, and on any segment) only
where a budget of multiply-adds allows it, smallest Linears first: AdaLN with its few rows, embedders, the last
projection. Elsewhere it chooses between ``none`` and ``shift``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..formats import QuantFormat
from ..nn.layout import SPLIT_BY_SIGN
from ..nn.rotation import rotation_block
from ..plan import without_numbers


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


@dataclass(frozen=True)
class Treatment:
    """What is done to one input segment before rounding.

    Attributes:
        shift: whether the middle of the range is subtracted.
        polarity: a polarity of SegLayout.
        rotation: channels that a Hadamard matrix mixes; 1 for none.
    """

    shift: bool = False
    polarity: str = "none"
    rotation: int = 1


def candidates(
    policy: str,
    *,
    polar: bool,
    affordable: bool,
    fmt: QuantFormat | None,
    has_statistics: bool,
    rotate: bool | str = False,
    channels: int = 1,
) -> list[Treatment]:
    """The treatments to try on one input segment, cheapest first.

    Args:
        policy: ``none``, ``shift``, ``dual``, ``dual8`` or ``auto``.
        polar: whether the segment is lopsided.
        affordable: whether its Linear may do a second product under ``auto``.
        fmt: the activations' format, None in weight-only quantization.
        has_statistics: whether calibration data was seen; a shift needs it.
        rotate: True to rotate every segment, "search" to try it.
        channels: of the segment.
    """
    # Rotated channels have no sign to speak of, so a rotation replaces the split by sign.
    rotated = Treatment(rotation=rotation_block(channels)) if rotate else None
    shifts = (False, True) if has_statistics else (False,)
    if fmt is None or policy == "none":
        treatments = [Treatment()]
    elif policy in SPLIT_BY_SIGN:
        treatments = [Treatment(polarity=policy) if polar else Treatment()]
    else:
        polarities = ["none", "dual8"] if policy == "auto" and affordable and fmt.is_integer else ["none"]
        treatments = [Treatment(shift, polarity) for polarity in polarities for shift in shifts]
    if rotated is None or rotated.rotation == 1:
        return treatments
    may_shift = shifts if fmt is not None and policy in ("shift", "auto") else (False,)
    turned = [replace(rotated, shift=shift) for shift in may_shift]
    return treatments + turned if rotate == "search" else turned


def affordable_second_products(multiply_adds: Mapping[str, int], budget: float) -> set[str]:
    """The Linears that may do their product twice, smallest first, within a share of all multiply-adds.

    Those of one size at one place of repeated blocks go together: blocks that differ are compiled one by one.

    Args:
        multiply_adds: by name, over the calibration data.
        budget: extra multiply-adds allowed, as a share of their sum.
    """
    left = budget * sum(multiply_adds.values())
    places: dict[tuple[int, str], list[str]] = {}
    for name, cost in multiply_adds.items():
        places.setdefault((cost, without_numbers(name)), []).append(name)
    chosen: set[str] = set()
    for (cost, _), names in sorted(places.items()):
        left -= cost * len(names)
        if left < 0:
            break
        chosen.update(names)
    return chosen


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
