"""Which part of the calibration data a call belongs to, numbered over all processes that run a share of it.

Calibration keeps a sample of rows and tries its choices on other calls than it fits scales to. Both go by the position
of a call in the whole data, so that they come out the same however the data is dealt to processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

# Positions that each marked item takes: its calls of the model follow each other, the next item's come after all of
# them, and nobody needs to know how many calls the items in other processes make.
ITEM = 1024

_marked: ContextVar[int | None] = ContextVar("marked", default=None)


@contextmanager
def at(item: int) -> Iterator[None]:
    """Inside, all calls belong to item number ``item`` of the whole calibration data, counted from 0.

    An item is a batch, a prompt, or whatever is dealt to processes as a whole. Marks of one item that follow each other
    are one mark.
    """
    before = _marked.get()
    _marked.set(item)
    try:
        yield
    finally:
        _marked.set(before)  # not reset(token): a generator may be closed in another context than it was started in


class CallPositions:
    """Tells the position of the call that is running.

    Inside :func:`at` it is :data:`ITEM` times the item and the number of the item's call of the model. Where nothing is
    marked, call n of the model in process r of W has the position n W + r, that of data dealt as ``batches[r::W]``.

    Args:
        rank: r.
        size: W.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self._rank = rank
        self._size = size
        self._calls = 0
        self._item: int | None = None
        self._calls_of_item = 0
        self._inside = False
        self._pinned: int | None = None

    @contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Inside, calls of ``model`` are counted."""

        def start(module: nn.Module, args: tuple[Any, ...]) -> None:
            item = _marked.get()
            self._calls_of_item = self._calls_of_item + 1 if item == self._item else 1
            self._item = item
            self._calls += 1
            self._inside = True

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._inside = False

        handles = (
            model.register_forward_pre_hook(start, prepend=True),
            model.register_forward_hook(end, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def pinned(self, position: int) -> Iterator[None]:
        """Inside, all calls have this position: that of a call that is made again."""
        self._pinned = position
        try:
            yield
        finally:
            self._pinned = None

    def __call__(self, calls: int) -> int:
        """The position of what is running.

        Args:
            calls: how often the asking layer was called before: its own count numbers unmarked calls of parts of the
                model.
        """
        if self._pinned is not None:
            return self._pinned
        item = _marked.get()
        if item is not None:
            within = self._calls_of_item - 1 if self._inside else 0
            return item * ITEM + min(within, ITEM - 1)
        return (self._calls - 1 if self._inside else calls) * self._size + self._rank
