"""Statistics of several processes, each of which ran a share of the calibration data, merged into those of all of it.

First the processes tell each other, in a few numbers a layer, what they saw: that settles which layers there are and
which process solves which. Then a layer's owner gets what it needs for that, rows last: of all samples together only
the rows with the smallest keys stay, so that only those are sent.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..distributed import Processes
from .statistics import LinearStatistics


@dataclass(frozen=True)
class Seen:
    """What all processes together saw a layer read, in numbers.

    Attributes:
        rows: how many.
        calls: in how many calls.
        low, high: the smallest and the largest value of any channel.
    """

    rows: int
    calls: int
    low: float
    high: float

    def __or__(self, other: Seen) -> Seen:
        """What both saw."""
        return Seen(
            self.rows + other.rows, self.calls + other.calls, min(self.low, other.low), max(self.high, other.high)
        )


def seen_by_all(statistics: Mapping[str, LinearStatistics], processes: Processes) -> dict[str, Seen]:
    """What was seen of each layer that any process called, in the order of first calls.

    Args:
        statistics: by layer, of this process, in the order of their first calls.
        processes: all of them.
    """
    own = {
        name: (
            (found.first_position, order),
            Seen(found.rows_seen, found.calls, float(found.range.low.min()), float(found.range.high.max())),
        )
        for order, (name, found) in enumerate(statistics.items())
    }
    first: dict[str, tuple[int, int]] = {}
    seen: dict[str, Seen] = {}
    for of_process in processes.gather(own):
        for name, (when, numbers) in of_process.items():
            first[name] = min(first.get(name, when), when)
            seen[name] = seen[name] | numbers if name in seen else numbers
    return {name: seen[name] for name in sorted(seen, key=first.__getitem__)}


def merged(
    statistics: MutableMapping[str, LinearStatistics], owners: Mapping[str, int], processes: Processes
) -> dict[str, LinearStatistics]:
    """The statistics of all processes, each layer's in the process that owns it.

    Args:
        statistics: by layer, of this process; those of ``owners`` are taken out, so that a layer's samples never lie
            there twice for long.
        owners: rank by layer, the same in all processes. Not every process need have called the layer, but one has.
        processes: all of them.
    """
    if processes.size == 1:
        return {name: statistics.pop(name) for name in owners}
    keys = processes.gather({name: statistics[name].keys for name in owners if name in statistics})
    found: dict[str, LinearStatistics] = {}
    for name, owner in owners.items():
        own = statistics.pop(name, None)
        if own is not None:
            own = own.with_keys_up_to(_largest_kept([of[name] for of in keys if name in of], own.samples))
        if processes.rank == owner:
            found[name] = _joined(own, [rank for rank, of in enumerate(keys) if name in of], processes)
        elif own is not None:
            processes.send(own, owner)
    return found


def _joined(own: LinearStatistics | None, callers: Iterable[int], processes: Processes) -> LinearStatistics:
    """This process's statistics of a layer and those that the others send, joined in the order of ranks."""
    parts: list[LinearStatistics] = []
    for rank in callers:
        parts.append(own if rank == processes.rank and own is not None else processes.receive(rank))
    return reduce(operator.or_, parts)


def _largest_kept(keys: Iterable[Tensor], samples: int) -> float:
    every = torch.cat(list(keys))
    return float(every.kthvalue(min(samples, len(every))).values)
