"""Numbers as a page shows them; what is missing is a dash, never an empty cell."""

from __future__ import annotations

import math

MISSING = "—"


def decibels(value: float | None, digits: int = 1) -> str:
    """``33.6``; ``∞`` for bit-equal outputs."""
    if value is None or math.isnan(value):
        return MISSING
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def size(count: float | None) -> str:
    """Bytes in a unit that leaves one to three digits before the point."""
    if count is None:
        return MISSING
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def seconds(value: float | None) -> str:
    """Seconds, or milliseconds below one."""
    if value is None:
        return MISSING
    if value < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def ratio(new: float | None, old: float | None) -> str:
    """``0.31 ×`` of the old value."""
    return MISSING if not new or not old else f"{new / old:.2f} ×"


_DIGITS = {"psnr": 1, "ssim": 4, "lpips": 4, "fid": 2, "clip_score": 2}


def metric(name: str, value: float | None) -> str:
    """A metric of images, to the digits that mean something; more of them before a difference is rounded away.

    >>> metric("ssim", 0.99314), metric("ssim", 0.9999912), metric("fid", 3.2e-7)
    ('0.9931', '0.99999', '3.2e-07')
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞"
    digits = _DIGITS.get(name, 3)
    text = f"{value:.{digits}f}"
    if value and not float(text):
        return f"{value:.2g}"
    while name == "ssim" and value != 1 and float(text) == 1:
        digits += 1
        text = f"{value:.{digits}f}"
    return text
