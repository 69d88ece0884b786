"""Calibration data of several processes, started by ``torchrun`` or ``accelerate launch``.

Each process samples its share of the prompts and calibrates on what it has sampled; ``mtq.quantize`` merges what they
saw (:mod:`modelopt_ext.distributed`). In a single process all of this does nothing.

    join_processes()
    data = record_calibration(pipeline, own_share(CalibrationSettings.read("prompts.txt")))
    mtq.quantize(pipeline.transformer, modelopt_ext.SEGQUANT_CFG, data["transformer"].forward_loop)

Data that every process holds as a whole is dealt out by :func:`split`, any other by ``modelopt_ext.distributed.share``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import modelopt.torch.utils.distributed as modelopt_distributed
import torch

from ..evaluation import DenoiserCall, RecordedCalls
from ..evaluation.calls import distinct_timesteps
from .settings import CalibrationSettings

__all__ = ["join_processes", "own_share", "split"]

logger = logging.getLogger(__name__)


def join_processes() -> tuple[int, int]:
    """Join the other processes of a launch, if that is not done yet and if there are any.

    Returns:
        Rank of this process, and how many there are.

    Raises:
        ImportError: there are others and accelerate is not installed.
    """
    if not modelopt_distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ImportError("calibration in several processes needs accelerate: pip install accelerate") from error
        # It knows the variables of both launchers, the backend and the GPU of each process.
        PartialState(cpu=not torch.cuda.is_available())
    return modelopt_distributed.rank(), modelopt_distributed.size()


def own_share(settings: CalibrationSettings) -> CalibrationSettings:
    """The share of this process, or the settings themselves if there are no others or they are shared out already."""
    return settings if settings.world_size > 1 else settings.share(*join_processes())


def split(calls: RecordedCalls, rank: int | None = None, world_size: int | None = None) -> RecordedCalls:
    """The share of one process of calls that every process holds: each ``world_size``-th batch, from batch ``rank`` on.

    Args:
        calls: the same in every process, of several batches.
        rank: of the process; by default this one.
        world_size: number of processes; by default those that were launched.
    """
    if rank is None or world_size is None:
        rank, world_size = join_processes()
    share = _Share(calls, rank, world_size)
    logger.info("process %d of %d has %d of %d calls", rank, world_size, len(share), len(calls))
    return share


class _Share(RecordedCalls):
    """Every so manieth batch of recorded calls."""

    def __init__(self, calls: RecordedCalls, rank: int, world_size: int) -> None:
        self._calls = calls
        self._rank = rank
        self._world_size = world_size
        self._timesteps = [call.timestep for call in self]

    def __iter__(self) -> Iterator[DenoiserCall]:
        return (call for call in self._calls if call.batch % self._world_size == self._rank)

    def __len__(self) -> int:
        return len(self._timesteps)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The distinct timesteps, from noise to image."""
        return distinct_timesteps(self._timesteps)
