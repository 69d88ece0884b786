"""Running a function in several processes at once, as torchrun would, for tests."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120  # seconds: far more than anything here takes, also on a busy machine


def in_processes(
    function: Callable[..., Any], *args: Any, size: int = 2, expected: Sequence[int] | None = None
) -> list[Any]:
    """What ``function(*args)`` gives in each of some processes with a process group (gloo), by rank.

    Processes are forked: importing everything anew would take longer than most tests.

    Args:
        function: what to run.
        args: its arguments.
        size: how many processes.
        expected: ranks whose value is returned; all by default.

    Returns:
        Values, or, where the function raised, a :class:`Failed`.

    Raises:
        AssertionError: a process hangs or was killed.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=_work, args=(rank, size, Path(folder), function, args), daemon=True)
            for rank in range(size)
        ]
        for worker in workers:
            worker.start()
        for rank, worker in enumerate(workers):
            worker.join(TIMEOUT)
            if worker.is_alive():
                for other in workers:
                    other.kill()
                raise AssertionError(f"process {rank} hangs")
        assert not any(worker.exitcode for worker in workers), [worker.exitcode for worker in workers]
        ranks = range(size) if expected is None else expected
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in ranks]


class Failed(str):
    """What a process raised, as "type: message"."""


def _work(rank: int, size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Distributed training is initialized")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    dist.barrier()  # whoever is done and leaves before another has connected makes that one fail
    try:
        result = function(*args)
    except Exception as error:
        traceback.print_exc()
        result = Failed(f"{type(error).__name__}: {error}")
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()
