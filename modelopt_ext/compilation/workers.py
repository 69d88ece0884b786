"""Inductor's compile workers: :func:`start_workers`.

Inductor starts them after it has traced the first model, and compiles by itself until they have come up, which takes
some seconds: about as long as it takes to trace, and to run what is not compiled.
"""

from __future__ import annotations

import torch
from torch._inductor import async_compile


def start_workers() -> None:
    """Start them now, in the background, where there is a GPU to compile for. What turns them off is respected."""
    start = getattr(async_compile, "maybe_warm_pool", None)  # Inductor's own parts move; nothing depends on it
    if start is not None and torch.cuda.is_available():
        start()
