"""Linears that read one tensor, such as q, k and v of an attention, solved as the one Linear that engines fuse them to.

Stacked, their weights (N1 + N2 + ..., K) are those of a Linear with more outputs: solving that gives one smoothing, one
shift and one input scale for all of them, and cutting its rows apart afterwards changes no number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..plan import LinearPlan, SegmentPlan
from .search import LinearSolution


def siblings(plan: SegmentPlan) -> Iterator[tuple[str, ...]]:
    """Groups of two or more Linears of one module that read the very same tensor with the same cuts.

    The modulations of all blocks read one tensor, too, but nothing fuses those.
    """
    for group in plan.shared_inputs:
        by_module: dict[tuple[str, tuple[int, ...], tuple[str | None, ...]], list[str]] = defaultdict(list)
        for name in group:
            linear = plan.linears[name]
            by_module[name.rpartition(".")[0], linear.in_segments, linear.activations].append(name)
        yield from (tuple(names) for names in by_module.values() if len(names) > 1)


def stacked_plan(plans: Sequence[LinearPlan]) -> LinearPlan:
    """The plan of Linears stacked along their outputs: the inputs' cuts, one output segment.

    Args:
        plans: of Linears whose inputs have the same cuts.
    """
    return replace(plans[0], out_segments=(sum(sum(plan.out_segments) for plan in plans),))


def cut_rows(solution: LinearSolution, sizes: Mapping[str, int]) -> dict[str, LinearSolution]:
    """The solution of stacked Linears as solutions of each.

    Args:
        solution: with one output group, of N rows.
        sizes: rows of each Linear by name, in the order they were stacked; they add up to N.
    """
    total, start = sum(sizes.values()), 0
    solutions = {}
    for name, size in sizes.items():

        def rows(value: Tensor | None, start: int = start, size: int = size) -> Tensor | None:
            return None if value is None else value[start : start + size].clone()

        def scales(amax: Tensor, start: int = start, size: int = size) -> Tensor:
            if amax.numel() == 1:
                return amax.clone()
            each = len(amax) // total  # groups of channels in a row
            return amax[start * each : (start + size) * each].clone()

        solutions[name] = replace(
            solution,
            layout=replace(solution.layout, out_groups=(size,), weight_segments=(size,)),
            input_amax={block: amax.clone() for block, amax in solution.input_amax.items()},
            weight_amax={block: scales(amax) for block, amax in solution.weight_amax.items()},
            up=rows(solution.up),
            correction=rows(solution.correction),
            weight=rows(solution.weight),
        )
        start += size
    return solutions
