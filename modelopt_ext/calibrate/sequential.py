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

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn
from tqdm import tqdm

from ..config import SegQuantCalibConfig
from ..distributed import Processes
from .checkpoint import StageCheckpoints
from .dealing import all_solutions, deal
from .merging import Seen, merged, seen_by_all
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

    def units(self, names: Sequence[str], seen: Mapping[str, Seen]) -> Iterable[tuple[Sequence[str], float]]:
        """These layers, those that have to be solved in one process together, and what that costs."""

    def checksum(self, name: str) -> int:
        """Of a layer's weight."""

    def manifest(self, stages: Sequence[Stage], seen: Mapping[str, Seen]) -> dict[str, Any]:
        """What a checkpoint has to be of."""


def solve_stages(
    solver: Solver,
    stages: Sequence[Stage],
    statistics: dict[str, LinearStatistics],
    calls: RecordedCalls | None,
    seen: Mapping[str, Seen],
    processes: Processes,
) -> dict[str, LinearSolution]:
    """Solve stage after stage and change the model; after an error it is as it was, in all processes.

    Args:
        solver: solves one layer.
        stages: in order.
        statistics: of the model in full precision, in this process; emptied on the way.
        calls: of the model, to be made again where stages are to read what the quantized stages before them give.
        seen: what all processes saw.
        processes: that solve the layers of each stage together.
    """
    checkpoints = None
    with processes.together():
        if solver.config.layerwise.checkpoint_dir is not None and processes.is_main:
            manifest = solver.manifest(stages, seen)
            checkpoints = StageCheckpoints(solver.config.layerwise.checkpoint_dir, manifest)
    solutions: dict[str, LinearSolution] = {}
    undo = Undo(solver.model, solver.modules)
    silent = not (solver.config.progress and processes.is_main)
    bar = tqdm(total=len(solver.wanted), desc="SegQuant", unit="layer", disable=silent)
    with bar:
        try:
            for index, stage in enumerate(stages):
                before = bar.n
                checksums, found = _from_checkpoint(solver, stage, index, checkpoints, processes)
                if not found:
                    found = _solve(solver, stage, statistics, solutions, calls, seen, processes, bar)
                    with processes.together():
                        if checkpoints is not None:
                            checkpoints.save(index, found, checksums)
                bar.update(len(found) - (bar.n - before))
                solver.to_layers(found)
                for name in stage.layers:
                    statistics.pop(name, None)
                solutions |= found
                if calls is not None:
                    with processes.together():
                        _apply(solver, found, undo)
            if calls is None:
                with processes.together():
                    _apply(solver, solutions, undo)
        except BaseException:
            undo.undo()
            raise
    return solutions


def _from_checkpoint(
    solver: Solver, stage: Stage, index: int, checkpoints: StageCheckpoints | None, processes: Processes
) -> tuple[dict[str, int], dict[str, LinearSolution]]:
    """Checksums of a stage's weights and its solutions, if there are any; only the main process has checkpoints."""
    checksums: dict[str, int] = {}
    loaded = None
    if solver.config.layerwise.checkpoint_dir is None:
        return checksums, {}
    with processes.together():
        if checkpoints is not None:
            checksums = {name: solver.checksum(name) for name in stage.layers}
            loaded = checkpoints.load(index, checksums)
    return checksums, all_solutions(loaded or {}, processes)


def _solve(
    solver: Solver,
    stage: Stage,
    statistics: MutableMapping[str, LinearStatistics],
    solutions: Mapping[str, LinearSolution],
    calls: RecordedCalls | None,
    seen: Mapping[str, Seen],
    processes: Processes,
    bar: tqdm[Any],
) -> dict[str, LinearSolution]:
    """The solutions of a stage, see :func:`solve_stages`; each process solves its share."""
    owners = deal(solver.units(stage.layers, seen), processes.size)
    reading = {name: owners[name] for name in stage.layers if name in seen}
    references: dict[str, torch.Tensor] = {}
    if calls is not None and reading and (solutions or solver.accumulates(reading)):
        again = _observe_again(solver, {name: seen[name] for name in reading}, solutions, calls, processes)
        # Rows are drawn by number, not by value: those of both passes are the same tokens of the same calls.
        correcting = {name: rank for name, rank in reading.items() if solver.config.for_layer(name).correct_activations}
        first = merged(statistics, correcting, processes)
        references = {name: found.rows for name, found in first.items() if found.rows is not None}
        found = merged(again, reading, processes)
    else:
        found = merged(statistics, reading, processes)
    own: dict[str, LinearSolution] = {}
    with processes.together():
        for name in stage.layers:
            if owners[name] == processes.rank:
                own[name] = solver.solve(name, found.get(name), references.get(name))
                bar.update()
    everything = all_solutions(own, processes)
    return {name: everything[name] for name in stage.layers}


def _apply(solver: Solver, solutions: Mapping[str, LinearSolution], undo: Undo) -> None:
    """Change layers one by one: applying frees a solution's weight, so that old and new never lie there twice."""
    for name, solution in solutions.items():
        undo.remember(solver.modules[name], solver.changes_weight(name, solution))
        solver.apply({name: solution})


def _observe_again(
    solver: Solver,
    first: Mapping[str, Seen],
    solutions: Mapping[str, LinearSolution],
    calls: RecordedCalls,
    processes: Processes,
) -> dict[str, LinearStatistics]:
    """Statistics of some layers, in this process, with the layers before them quantized.

    Args:
        solver: knows the layers.
        first: what all processes saw them read in full precision.
        solutions: of the layers that are quantized already.
        calls: of the model, in this process.
        processes: all of them.

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
    with processes.together():
        again = collect(
            silent,
            {name: solver.modules[name] for name in first},
            partial(calls.replay, tuple(first)),
            samples=solver.config.rows_to_keep,
            seed=solver.config.seed,
            new=solver.new_statistics(),
            positions=calls.positions,
        )
        for name, found in again.items():
            if not found.range.is_finite:
                raise ValueError(
                    f"the inputs of {name} hold NaN or infinity once the layers before it are quantized; use more bits "
                    "there, or bfloat16 instead of float16"
                )
    seen = seen_by_all(again, processes)
    for name, before in first.items():
        now = seen.get(name)
        if now is None or (now.rows, now.calls) != (before.rows, before.calls):
            raise ValueError(
                f"{name} read {before.rows} rows in full precision and {0 if now is None else now.rows} when "
                "the calls of the model were made again. For sequential calibration forward_loop has to call the model "
                "itself, not its parts, and the model must always do the same; use sequential=False otherwise"
            )
    return again
