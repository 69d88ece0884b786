"""Dealing the layers of a model out to processes, and telling all of them what each has found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..distributed import Processes
from .search import LinearSolution


def deal(units: Iterable[tuple[Sequence[str], float]], processes: int) -> dict[str, int]:
    """Say which process solves which layer: the dearest first, each to the process with the least to do so far.

    Args:
        units: names of layers that one process has to solve together, and what that costs, in any unit.
        processes: how many there are.

    Returns:
        Rank by layer, in the order of ``units``.
    """
    units = list(units)
    load = [0.0] * processes
    ranks: dict[int, int] = {}
    # Sorting is stable, and the first of several least loaded processes is taken: the same in every process.
    for index in sorted(range(len(units)), key=lambda index: -units[index][1]):
        ranks[index] = load.index(min(load))
        load[ranks[index]] += units[index][1]
    return {name: ranks[index] for index, (names, _) in enumerate(units) for name in names}


def all_solutions(own: Mapping[str, LinearSolution], processes: Processes) -> dict[str, LinearSolution]:
    """The solutions of all processes, those of others on the CPU.

    Args:
        own: what this process has found, by layer. No other has the same layers.
        processes: all of them.
    """
    solutions: dict[str, LinearSolution] = {}
    for rank, names in enumerate(processes.gather(list(own))):
        for name in names:
            found = processes.broadcast(own.get(name), rank)
            solutions[name] = own.get(name, found)
    return solutions
