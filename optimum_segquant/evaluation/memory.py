"""Peak memory of a block of code: what calibration needs on top of the model."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil
import torch

SAMPLING_INTERVAL = 0.005  # seconds between two looks at the process's memory


class PeakMemory:
    """Context manager that measures the largest amount of memory in use inside its block.

    On a CUDA device that is PyTorch's allocator on that device, exactly. On a CPU it is the resident set of the
    process, looked at every few milliseconds: a shorter peak may be missed, and memory that the C library keeps after
    it was freed counts.

    Attributes:
        before: bytes in use when the block was entered.
        peak: bytes, the largest amount in use up to now, or up to the end of the block.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._stop = threading.Event()
        self._process = psutil.Process()
        self._thread: threading.Thread | None = None
        self.before = self.peak = 0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self.before = self.peak = torch.cuda.memory_allocated(self._device)
        else:
            self.before = self.peak = self._process.memory_info().rss
            self._stop.clear()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is None:
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stop.set()
            self._thread.join()
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLING_INTERVAL):
            self._look()
