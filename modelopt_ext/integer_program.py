"""Picking one choice a group at the least total value under budgets: a multiple-choice knapsack.

    min  sum_g objective[g][c(g)]     subject to     sum_g used[b][g][c(g)] <= limits[b]     for each budget b

The exact solver is ModelOpt's, ``LPS`` on PuLP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from modelopt.torch.opt.searcher import LPS

# Relative rounding error of a sum of costs, and by how much the solver may take a budget for met that is not.
SLACK = 1e-9
SOLVER_TOLERANCE = 1e-6


def smallest(costs: Sequence[Sequence[float]]) -> float:
    """The least sum of costs that any choices have."""
    return math.fsum(min(row) for row in costs)


def solve(
    objective: Sequence[Sequence[float]], used: Mapping[str, Sequence[Sequence[float]]], limits: Mapping[str, float]
) -> list[int] | None:
    """The choice a group that minimizes the sum of ``objective`` within all ``limits``.

    Args:
        objective: for each group of layers, a non-negative value a choice.
        used: by budget, the costs in the same form, all above zero.
        limits: by budget, the largest sum of costs.

    Returns:
        The index of the choice for each group, or None if no choices meet the limits.

    The solver's tolerances are absolute, noises span many orders of magnitude: once a solution is known, choices that
    alone cost more than all of it are left out, and the rest is solved again in units of a thousandth of it.
    """
    if any(smallest(used[name]) > limit * (1 + SLACK) for name, limit in limits.items()):
        return None
    allowed = [list(range(len(row))) for row in objective]
    limits = dict(limits)
    unit = max((value for row in objective for value in row), default=0.0)
    best: list[int] | None = None
    least = math.inf
    while True:
        picks = _solve_scaled(objective, used, limits, allowed, unit)
        if picks is None:
            return best
        over = [
            name
            for name, limit in limits.items()
            if math.fsum(used[name][i][pick] for i, pick in enumerate(picks)) > limit * (1 + SLACK)
        ]
        if over:
            limits = {n: limit * (1 - SOLVER_TOLERANCE) if n in over else limit for n, limit in limits.items()}
            continue
        value = math.fsum(objective[i][pick] for i, pick in enumerate(picks))
        if not value < least * (1 - SLACK):
            return best
        best, least, unit = picks, value, value / 1000
        if value == 0:
            return best
        allowed = [
            [choice for choice in choices if objective[i][choice] <= value * (1 + SLACK)]
            for i, choices in enumerate(allowed)
        ]


def _solve_scaled(
    objective: Sequence[Sequence[float]],
    used: Mapping[str, Sequence[Sequence[float]]],
    limits: Mapping[str, float],
    allowed: Sequence[Sequence[int]],
    unit: float,
) -> list[int] | None:
    def pick(rows: Sequence[Sequence[float]], one: float) -> list[list[float]]:
        return [[row[choice] / (one or 1.0) for choice in choices] for row, choices in zip(rows, allowed, strict=True)]

    solver = LPS(
        "mixed_precision",
        constraints=dict.fromkeys(limits, (None, 1.0)),
        constraints_to_candidate_costs={name: pick(used[name], limit) for name, limit in limits.items()},
        candidate_scores=pick(objective, unit),
    )
    chosen, status = solver()
    if status != "Optimal":
        return None
    return [choices[int(index)] for choices, index in zip(allowed, chosen, strict=True)]
