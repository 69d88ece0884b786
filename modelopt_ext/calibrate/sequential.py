"""Solving a model stage by stage: each stage reads what the stages before it give when they are quantized.

Rounding errors add up from block to block. A block that is solved on the inputs it is going to read, rather than on
those of the unquantized model, fits its ranges and weights to them; with ``correct_activations`` its weights also make
up for the part of the earlier blocks' errors that is linear in what it reads, by aiming at the unquantized output (as
GPTAQ does, arXiv 2504.02692).

The model runs once in full precision, as without stages, and the arguments of its calls are kept. Every stage but the
first then makes these calls again, each up to the stage's last layer, so that n stages cost about n / 2 passes more.
ModelOpt's own layerwise calibration would run fewer blocks, but puts placeholders in the place of the finished ones,
which only works for a single list of blocks with nothing between them, and knows no unquantized reference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn
from tqdm import tqdm

from ..config import SegQuantCalibConfig
from .checkpoint import StageCheckpoints
from .recorded_calls import RecordedCalls
from .search import LinearSolution
from .stages import Stage
from .statistics import LinearStatistics, collect
from .undo import Undo


class Solver(Protocol):
    """Solves the layers of a model one by one, and changes them."""

    model: nn.Module
    modules: dict[str, nn.Module]
    config: SegQuantCalibConfig

    @property
    def wanted(self) -> Sequence[str]:
        """Names of the layers to solve."""

    def new_statistics(self) -> Callable[[nn.Module, int, int], LinearStatistics]:
        """What makes the statistics of some layers, see :func:`collect`."""

    def accumulates(self, names: Collection[str]) -> bool:
        """Whether these layers need Hessians over all rows, which the first pass does not keep for all blocks."""

    def solve(
        self, name: str, statistics: LinearStatistics | None, reference: torch.Tensor | None = None
    ) -> LinearSolution:
        """Solve one layer from the statistics of its inputs."""

    def to_layers(self, solutions: Mapping[str, LinearSolution]) -> None:
        """Move solutions that were read from a file to their layers' devices."""

    def changes_weight(self, name: str, solution: LinearSolution) -> bool:
        """Whether :meth:`apply` changes the stored weight."""

    def apply(self, solutions: Mapping[str, LinearSolution]) -> None:
        """Change the layers."""

    def checksum(self, name: str) -> int:
        """Of a layer's weight."""

    def manifest(self, stages: Sequence[Stage], statistics: Mapping[str, LinearStatistics]) -> dict[str, Any]:
        """What a checkpoint has to be of."""


def solve_stages(
    solver: Solver,
    stages: Sequence[Stage],
    statistics: dict[str, LinearStatistics],
    calls: RecordedCalls | None,
) -> dict[str, LinearSolution]:
    """Solve stage after stage and change the model; after an error it is as it was.

    Args:
        solver: solves one layer.
        stages: in order.
        statistics: of the model in full precision; emptied on the way.
        calls: of the model, to be made again where stages are to read what the quantized stages before them give.
    """
    checkpoints = None
    if solver.config.layerwise.checkpoint_dir is not None:
        checkpoints = StageCheckpoints(solver.config.layerwise.checkpoint_dir, solver.manifest(stages, statistics))
    solutions: dict[str, LinearSolution] = {}
    undo = Undo(solver.model, solver.modules)
    bar = tqdm(total=len(solver.wanted), desc="SegQuant", unit="layer", disable=not solver.config.progress)
    with bar:
        try:
            for index, stage in enumerate(stages):
                checksums = {} if checkpoints is None else {name: solver.checksum(name) for name in stage.layers}
                found = None if checkpoints is None else checkpoints.load(index, checksums)
                if found is None:
                    seen = {name: statistics[name] for name in stage.layers if name in statistics}
                    references: dict[str, torch.Tensor] = {}
                    if calls is not None and seen and (solutions or solver.accumulates(seen)):
                        seen, references = _observe_again(solver, seen, solutions, calls)
                    found = {}
                    for name in stage.layers:
                        found[name] = solver.solve(name, seen.get(name), references.get(name))
                        bar.update()
                    if checkpoints is not None:
                        checkpoints.save(index, found, checksums)
                else:
                    solver.to_layers(found)
                    bar.update(len(found))
                for name in stage.layers:
                    statistics.pop(name, None)
                solutions |= found
                if calls is not None:
                    _apply(solver, found, undo)
            if calls is None:
                _apply(solver, solutions, undo)
        except BaseException:
            undo.undo()
            raise
    return solutions


def _apply(solver: Solver, solutions: Mapping[str, LinearSolution], undo: Undo) -> None:
    """Change layers one by one: applying frees a solution's weight, so that old and new never lie there twice."""
    for name, solution in solutions.items():
        undo.remember(solver.modules[name], solver.changes_weight(name, solution))
        solver.apply({name: solution})


def _observe_again(
    solver: Solver,
    first: Mapping[str, LinearStatistics],
    solutions: Mapping[str, LinearSolution],
    calls: RecordedCalls,
) -> tuple[dict[str, LinearStatistics], dict[str, torch.Tensor]]:
    """Statistics of some layers with the layers before them quantized, and the rows they read in full precision.

    Args:
        solver: knows the layers.
        first: their statistics in full precision.
        solutions: of the layers that are quantized already.
        calls: of the model.

    Raises:
        ValueError: an input is not finite, or other rows than in the first pass were read.
    """
    rounding = {id(part) for name in solutions for part in solver.modules[name].modules()}
    # `collect` silences the quantizers of what it gets: those of layers that are still to be solved, and others.
    silent = nn.ModuleList(
        module
        for module in solver.model.modules()
        if isinstance(module, TensorQuantizer) and id(module) not in rounding
    )
    again = collect(
        silent,
        {name: solver.modules[name] for name in first},
        partial(calls.replay, tuple(first)),
        samples=solver.config.rows_to_keep,
        seed=solver.config.seed,
        new=solver.new_statistics(),
    )
    for name, before in first.items():
        now = again.get(name)
        if now is None or (now.rows_seen, now.calls) != (before.rows_seen, before.calls):
            raise ValueError(
                f"{name} read {before.rows_seen} rows in full precision and {0 if now is None else now.rows_seen} when "
                "the calls of the model were made again. For sequential calibration forward_loop has to call the model "
                "itself, not its parts, and the model must always do the same; use sequential=False otherwise"
            )
        if not now.range.is_finite:
            raise ValueError(
                f"the inputs of {name} hold NaN or infinity once the layers before it are quantized; use more bits "
                "there, or bfloat16 instead of float16"
            )
    # Rows are drawn by number, not by value: those of both passes are the same tokens of the same calls.
    references = {
        name: seen.rows
        for name, seen in first.items()
        if seen.rows is not None and solver.config.for_layer(name).correct_activations
    }
    return again, references
