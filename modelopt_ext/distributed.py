"""Calibrating one model by several processes, each with a copy of it and a share of the calibration data.

    # torchrun --nproc_per_node 4 quantize.py, or accelerate launch --num_processes 4 quantize.py
    torch.distributed.init_process_group()                   # accelerate.Accelerator() does it, too

    def forward_loop(model):
        for batch in share(batches):                         # this process's share; all of them in a single process
            model(**batch)

    mtq.quantize(model, modelopt_ext.SEGQUANT_CFG, forward_loop)         # in every process

``mtq.quantize`` then merges what the processes saw, deals the layers out to them, and makes the same changes in all.
What the processes tell each other goes over the CPU (gloo), whatever the backend of the default group is.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import modelopt.torch.utils.distributed as modelopt_distributed
import torch
import torch.distributed as dist
from torch import Tensor

from .positions import at

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
MEETING_TIMEOUT = timedelta(minutes=30)
"""How long the first process to arrive waits for the others: sampling and loading take each a different time."""
WORKING_TIMEOUT = timedelta(days=1)
"""How long one may wait while others work. One that failed says so, and one that died is noticed at once."""


def share(items: Iterable[Item]) -> Iterator[Item]:
    """This process's share of the calibration data: items r, r + W, r + 2W, ... in process r of W.

    Calls of the model between one item and the next are known by the item's number, so that calibration draws the same
    sample of rows as a single process that goes through all the items.

    Args:
        items: batches, prompts or the like, the same ones in the same order in every process.
    """
    rank, size = modelopt_distributed.rank(), modelopt_distributed.size()
    for number, item in enumerate(items):
        if number % size == rank:
            with at(number):
                yield item


@dataclass(frozen=True)
class Processes:
    """The processes that calibrate together; by default this one alone.

    All methods are collective: every process has to call the same ones in the same order.

    Attributes:
        rank: number of this process.
        size: how many there are.
        group: what they talk over; None for a single one.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    @contextmanager
    def meeting(cls, wanted: bool = True) -> Iterator[Processes]:
        """Inside, all processes of the default process group work together.

        Args:
            wanted: False leaves this process alone.

        Raises:
            RuntimeError: another process did not come.
        """
        size = modelopt_distributed.size() if wanted else 1
        if size == 1:
            yield cls()
            return
        logger.info("segquant: waiting for all %d processes to come here", size)
        try:
            # Made by all together or by none. It stays until the end: others may still be connecting.
            meeting = dist.new_group(timeout=MEETING_TIMEOUT, backend="gloo")
        except RuntimeError as error:
            raise RuntimeError(
                f"a process group of {size} is initialized, but not all of its processes came to calibrate within "
                f"{MEETING_TIMEOUT.total_seconds() / 60:g} minutes; call mtq.quantize in every process, or set "
                "distributed_sync=False in the algorithm's config to calibrate in this process alone"
            ) from error
        group = dist.new_group(timeout=WORKING_TIMEOUT, backend="gloo")
        try:
            yield cls(modelopt_distributed.rank(), size, group)
        finally:
            # After an error, too: whoever still waits for this process is then told that it left.
            dist.destroy_process_group(group)
            dist.destroy_process_group(meeting)

    @property
    def is_main(self) -> bool:
        """Whether this one speaks for all: it writes files and draws the progress bar."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, each process works on its own; after an error in any of them, all leave with an error.

        Nothing inside may be collective.

        Raises:
            ValueError: names the process that failed and repeats its message; an error that all have stays what it is.
        """
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            if self.size == 1:
                raise
            failure = error
        if self.size == 1:
            return
        messages = self.gather(None if failure is None else _message(failure))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failure is not None and (not isinstance(failure, Exception) or len(set(messages)) == 1):
            raise failure  # an interrupt or an exit stays one, and so does what all have met alike
        if failed:
            also = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
            raise ValueError(f"rank {failed[0]}{also} of {self.size} failed: {messages[failed[0]]}") from failure

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, by rank; plain types and small tensors, which are pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _contact():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def send(self, value: Any, receiver: int) -> None:
        """Send anything picklable to another process, which calls :meth:`receive` meanwhile; tensors go as bytes."""
        content, buffer = _packed(value)
        with _contact():
            dist.send_object_list([content], receiver, group=self.group)
            if len(buffer):
                dist.send(buffer, receiver, group=self.group)

    def receive(self, sender: int) -> Any:
        """What another process sends, its tensors on the CPU."""
        content: list[Any] = [None]
        with _contact():
            dist.recv_object_list(content, sender, group=self.group)
        buffer = content[0].empty_buffer()
        with _contact():
            if len(buffer):
                dist.recv(buffer, sender, group=self.group)
        return content[0].unpacked(buffer)

    def broadcast(self, value: Any, sender: int) -> Any:
        """What ``sender`` gives, in every process; what the others give is not looked at. Tensors come on the CPU."""
        if self.size == 1:
            return value
        content: list[Any] = [None]
        if self.rank == sender:
            content[0], buffer = _packed(value)
        with _contact():
            dist.broadcast_object_list(content, sender, group=self.group)
        if self.rank != sender:
            buffer = content[0].empty_buffer()
        with _contact():
            if len(buffer):
                dist.broadcast(buffer, sender, group=self.group)
        return content[0].unpacked(buffer)


@contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "lost contact with another process of this calibration; its own output says why it stopped"
        ) from error


def _message(error: BaseException) -> str:
    # Our own errors speak for themselves, others need their name.
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class _Content:
    """A value without its tensors, and what these are like.

    Attributes:
        pickled: the value with a number in the place of each tensor.
        tensors: dtype and shape of each.
    """

    pickled: bytes
    tensors: tuple[tuple[torch.dtype, torch.Size], ...]

    @property
    def _sizes(self) -> list[int]:
        return [dtype.itemsize * shape.numel() for dtype, shape in self.tensors]

    def empty_buffer(self) -> Tensor:
        """For the bytes of all tensors, (bytes,) uint8."""
        return torch.empty(sum(self._sizes), dtype=torch.uint8)

    def unpacked(self, buffer: Tensor) -> Any:
        """The value, with tensors from ``buffer``."""
        # Cloned: a view as another dtype has to begin at a multiple of that one's size.
        parts = [part.clone() for part in buffer.split(self._sizes)]
        unpickler = pickle.Unpickler(io.BytesIO(self.pickled))
        tensors = [part.view(dtype).reshape(shape) for part, (dtype, shape) in zip(parts, self.tensors, strict=True)]
        unpickler.persistent_load = tensors.__getitem__  # type: ignore[method-assign]
        return unpickler.load()


def _packed(value: Any) -> tuple[_Content, Tensor]:
    """A value as its content and the bytes of its tensors, one after the other: (bytes,) uint8."""
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: Any) -> int | None:
            if not isinstance(part, Tensor):
                return None
            tensors.append(part.detach().cpu().contiguous())
            return len(tensors) - 1

    file = io.BytesIO()
    Pickler(file).dump(value)
    content = _Content(file.getvalue(), tuple((tensor.dtype, tensor.shape) for tensor in tensors))
    parts = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    return content, torch.cat(parts) if parts else content.empty_buffer()
