"""Calibrating a whole model: one pass for the plan and the statistics, a local search per layer, then the change.

Nothing of the model changes before every layer has its solution; only sequential calibration changes it stage by stage,
and takes that back after an error. So an error on the way leaves the model as it was.

In several processes each does the pass on its share of the data; what they saw is merged, and each searches its share
of the layers. Everything else is decided in all of them alike, from the same numbers.
"""

from __future__ import annotations

import fnmatch
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from modelopt.torch.quantization.nn import SVDQuantLinear, TensorQuantizer
from modelopt.torch.quantization.utils import enable_weight_access_and_writeback, is_quantized_linear
from torch import nn

from ..config import SegQuantCalibConfig
from ..dataflow import RecordFirstForward
from ..distributed import Processes
from ..formats import QuantFormat
from ..nn import QuantizerBank, SegConv2d, SegLinear, to_seg_conv, to_seg_linear
from ..plan import LinearPlan, SegmentPlan, fold_names
from ..positions import CallPositions
from ..presets import PER_TOKEN
from .agreement import Agreement
from .checkpoint import fingerprint, parameters_fingerprint, weight_checksum
from .convolutions import segmentable_convolutions, solve_convolution
from .generated_inputs import generated_forward_loop
from .gptq import GPTQOptions
from .hessian import HessianMemory, SecondMoments
from .merging import Seen, seen_by_all
from .other_quantizers import (
    check_mergeable,
    disable_uncalibrated,
    max_calibration,
    merge_maxima,
    other_quantizers,
    uncalibrated,
)
from .polarity import affordable_second_products
from .recorded_calls import RecordedCalls
from .refine import LowRankOptions, RefineOptions
from .search import LinearSolution, SearchOptions, solve_linear
from .sequential import solve_stages
from .shared_inputs import cut_rows, siblings, stacked_plan
from .stages import Stage, stages_of
from .statistics import LinearStatistics, collect
from .weights import write_weight
from .windows import WINDOWS, WindowStatistics

logger = logging.getLogger(__name__)

ForwardLoop = Callable[[nn.Module], object]


@dataclass
class _Layer:
    """A Linear or convolution to calibrate and the formats that its quantizers ask for."""

    name: str
    module: Any  # a layer with ModelOpt's quantizers, which nn.Module's annotations can't express
    input_format: QuantFormat | None
    weight_format: QuantFormat | None

    def wants_rotation(self, config: SegQuantCalibConfig) -> bool | str:
        """The config's word, or ModelOpt's own attribute on either quantizer."""
        asked = any(q.rotate_is_enabled for q in (self.module.input_quantizer, self.module.weight_quantizer))
        return True if asked else config.rotate

    @property
    def is_quantized(self) -> bool:
        return (self.input_format, self.weight_format) != (None, None)

    @property
    def is_static(self) -> bool:
        return self.input_format is not None and not self.input_format.dynamic


@dataclass
class _Parts:
    """What of a model is to be calibrated.

    Attributes:
        linears, convolutions: by name.
        others: the quantizers of everything else, which are ModelOpt's business.
    """

    linears: dict[str, _Layer]
    convolutions: dict[str, _Layer]
    others: dict[str, TensorQuantizer]

    @property
    def layers(self) -> list[_Layer]:
        """Linears and convolutions."""
        return [*self.linears.values(), *self.convolutions.values()]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Those of :attr:`layers`, by name."""
        return {layer.name: layer.module for layer in self.layers}


@dataclass
class Calibration:
    """The outcome for a model: the plan that was used and every Linear's solution."""

    plan: SegmentPlan
    solutions: dict[str, LinearSolution]


def calibrate_model(
    model: nn.Module,
    config: SegQuantCalibConfig,
    forward_loop: ForwardLoop | None,
    previous_plan: SegmentPlan | None = None,
) -> Calibration:
    """Find plan, statistics and solutions, and apply them to the model in place.

    Args:
        model: converted by ModelOpt's quantize mode, quantizers configured.
        config: settings of the algorithm.
        forward_loop: runs the calibration data; None is enough for settings that need no statistics.
        previous_plan: the plan that the model is segmented with already.

    Raises:
        ValueError: nothing to calibrate, data that is missing, broken or not finite, or a plan that does not fit; the
            model is then unchanged, in all processes.
        RuntimeError: another process did not come, or died.
    """
    with Processes.meeting(config.distributed_sync) as processes, _speaking(processes.is_main):
        return _calibrate(model, config, forward_loop, previous_plan, processes)


def _calibrate(
    model: nn.Module,
    config: SegQuantCalibConfig,
    forward_loop: ForwardLoop | None,
    previous_plan: SegmentPlan | None,
    processes: Processes,
) -> Calibration:
    """See :func:`calibrate_model`."""
    positions = CallPositions(processes.rank, processes.size)
    with processes.together():
        parts = _parts_of(model, config)
        if config.is_sequential and forward_loop is None:
            raise ValueError("sequential calibration needs data: pass forward_loop, or leave sequential=False")
        agreement = None
        if processes.size > 1:
            check_mergeable(parts.others)
            agreement = Agreement.of(model, config, forward_loop is None, previous_plan)
    if agreement is not None:
        agreement.check(processes)
    calls = RecordedCalls(model, parts.modules, positions) if config.is_sequential else None
    observed = _observe(model, parts, config, forward_loop, previous_plan, calls, positions, processes)
    plan, seen = observed.plan, observed.seen
    called = list(seen)
    convolutions = parts.convolutions
    seen_linears = {name: numbers for name, numbers in seen.items() if name in parts.linears}
    reached = {name: convolutions[name] for name in seen if name in convolutions}
    layers = _with_outer_policies(model, parts.linears, config, list(seen_linears))
    layers = _without_uncalled(layers, seen_linears)

    affordable = affordable_second_products(
        {
            name: numbers.rows * layers[name].module.in_features * layers[name].module.out_features
            for name, numbers in seen_linears.items()
        },
        config.second_product_budget,
    )
    affordable |= affordable_second_products(
        {name: seen[name].rows * layer.module.weight.numel() for name, layer in reached.items()},
        config.second_product_budget,
    )
    solver = _Solver(model, layers, reached, plan, config, affordable, forward_loop is None)
    stages = _stages(model, solver.wanted, called, config)
    with torch.no_grad():
        solutions = solve_stages(solver, stages, observed.statistics, calls, seen, processes)
        _leave_unsolved(layers, convolutions, solutions)
        disable_uncalibrated(parts.others)
    left = [name for name, solution in solutions.items() if solution.too_few_rows]
    if left:
        logger.warning(
            "segquant: the weights of %s are not fitted to the calibration data (gptq, refits, corrections): it shows "
            "them too few different rows, one an item and timestep. More prompts and timesteps change that",
            fold_names(left),
        )
    if forward_loop is not None:
        _warn_of_rows_for_hessians(solutions, config)
    logger.info("segquant: %s", plan.summary())
    worst = sorted((solution.sqnr, name) for name, solution in solutions.items() if not math.isnan(solution.sqnr))[:5]
    logger.info("segquant: lowest output SQNR: %s", ", ".join(f"{name} {sqnr:.1f} dB" for sqnr, name in worst))
    return Calibration(plan, solutions)


@contextmanager
def _speaking(is_main: bool) -> Iterator[None]:
    """What all processes decide alike is told by the first one: warnings of others are not logged inside."""
    package = logging.getLogger(__name__.partition(".")[0])
    level = package.level
    if not is_main:
        package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def _parts_of(model: nn.Module, config: SegQuantCalibConfig) -> _Parts:
    """The Linears and the convolutions to calibrate, checked, and the quantizers of everything else."""
    layers = _quantized_linears(model)
    found = {
        name: _Layer(name, model.get_submodule(name), *formats)
        for name, formats in segmentable_convolutions(model).items()
    }
    if not layers and not found:
        raise ValueError(
            "segquant found no Linear with an enabled quantizer: call mtq.quantize(model, SEGQUANT_CFG, forward_loop) "
            "on a model with nn.Linear layers, and check the patterns in quant_cfg"
        )
    others = other_quantizers(model, [layer.module for layer in (*layers.values(), *found.values())])
    everything = _without_excluded({**layers, **found}, config)
    layers, convolutions = ({name: everything[name] for name in kind} for kind in (layers, found))
    for layer in layers.values():
        _check_layer(layer, config.for_layer(layer.name))
    for layer in convolutions.values():
        _check_polarity(layer, config.for_layer(layer.name))
    return _Parts(layers, convolutions, others)


def _stages(
    model: nn.Module, wanted: Collection[str], called: Sequence[str], config: SegQuantCalibConfig
) -> list[Stage]:
    """The stages to solve; a single one unless the config asks for more."""
    seen = [name for name in called if name in wanted]
    unseen = tuple(name for name in wanted if name not in called)
    if not config.by_blocks:
        return [Stage("model", (*seen, *unseen))]
    stages = stages_of(model, seen)
    return [*stages, Stage("not called", unseen)] if unseen else stages


class _Solver:
    """Solves the layers of a model one by one, and changes them."""

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, _Layer],
        convolutions: Mapping[str, _Layer],
        plan: SegmentPlan,
        config: SegQuantCalibConfig,
        affordable: Collection[str],
        synthetic: bool,
    ) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.config = config
        self._linears = {name: layer for name, layer in linears.items() if layer.is_quantized}
        self._convolutions = {name: layer for name, layer in convolutions.items() if layer.is_quantized}
        self._plan = plan
        self._affordable = affordable
        self._synthetic = synthetic
        self._sharing = self._sharing_groups() if config.share_inputs else {}
        self._solved_together: dict[str, LinearSolution] = {}

    def _sharing_groups(self) -> dict[str, tuple[str, ...]]:
        """By name, the Linears that are solved together."""
        groups: dict[str, tuple[str, ...]] = {}
        for names in siblings(self._plan):
            layers = [self._linears[name] for name in names if name in self._linears]
            if len({(layer.input_format, layer.weight_format) for layer in layers}) > 1 or any(
                self.config.for_layer(layer.name) != self.config.for_layer(layers[0].name) for layer in layers
            ):
                raise ValueError(
                    f"share_inputs: {', '.join(layer.name for layer in layers)} read one tensor but have different "
                    "formats or settings; give them the same, or leave share_inputs=False"
                )
            if len(layers) > 1:
                groups |= dict.fromkeys((layer.name for layer in layers), tuple(layer.name for layer in layers))
        return groups

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the layers to solve."""
        return *self._linears, *self._convolutions

    def new_statistics(self) -> _NewStatistics:
        """What makes the statistics of some layers, Hessians included where they are asked for."""
        return _NewStatistics(self.config, _hessian_limits(self._linears.values(), self.config), HessianMemory())

    def accumulates(self, names: Collection[str]) -> bool:
        """Whether a Hessian over all rows is asked for, for any of these layers."""
        linears = [self._linears[name] for name in names if name in self._linears]
        return bool(_hessian_limits(linears, self.config))

    def solve(
        self, name: str, statistics: LinearStatistics | None, reference: torch.Tensor | None = None
    ) -> LinearSolution:
        """Solve one layer.

        Args:
            name: of a Linear or convolution.
            statistics: of its inputs; None if it was never called.
            reference: see :func:`solve_linear`.

        Returns:
            The solution, its weight on the CPU and everything else where the layer runs.
        """
        module = self.modules[name]
        if name in self._sharing:
            if name not in self._solved_together:
                self._solved_together |= self._solve_together(self._sharing[name], statistics, reference)
            solution = self._solved_together.pop(name)
            self.to_layers({name: solution})
            return solution
        with enable_weight_access_and_writeback(module, self.model, self.modules, writeback=False):
            if name in self._linears:
                solution = self._solve_linear(self._linears[name], statistics, reference)
            else:
                assert statistics is not None
                solution = self._solve_convolution(self._convolutions[name], statistics)
        self.to_layers({name: solution})
        return solution

    def _solve_together(
        self, names: Sequence[str], statistics: LinearStatistics | None, reference: torch.Tensor | None
    ) -> dict[str, LinearSolution]:
        """Solve Linears that read one tensor as one."""
        weights: dict[str, torch.Tensor] = {}
        for name in names:
            layer = self._linears[name]
            with enable_weight_access_and_writeback(layer.module, self.model, self.modules, writeback=False):
                weights[name] = _plain_weight(layer).to(self._working_device(layer), copy=True)
        plan = stacked_plan([self._plan.linears[name] for name in names])
        stacked = torch.cat(list(weights.values()))
        affordable = all(name in self._affordable for name in names)
        solution = self._solve_weight(self._linears[names[0]], stacked, plan, affordable, statistics, reference)
        return cut_rows(solution, {name: len(weight) for name, weight in weights.items()})

    def _solve_linear(
        self, layer: _Layer, statistics: LinearStatistics | None, reference: torch.Tensor | None
    ) -> LinearSolution:
        weight = _plain_weight(layer)
        plan = self._plan.linears.get(layer.name) or LinearPlan.trivial(weight.shape[1], weight.shape[0])
        return self._solve_weight(layer, weight, plan, layer.name in self._affordable, statistics, reference)

    def _solve_weight(
        self,
        layer: _Layer,
        weight: torch.Tensor,
        linear_plan: LinearPlan,
        affordable: bool,
        statistics: LinearStatistics | None,
        reference: torch.Tensor | None,
    ) -> LinearSolution:
        options = _search_options(layer, linear_plan, self.config, weight.dtype, affordable)
        try:
            solution = solve_linear(
                weight.to(self._working_device(layer)),
                linear_plan,
                statistics or _unseen(weight),
                layer.input_format,
                layer.weight_format,
                options,
                has_statistics=not self._synthetic and statistics is not None,
                reference=reference,
            )
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from error
        if solution.weight is not None:
            solution.weight = solution.weight.to("cpu", weight.dtype)
        return solution

    def _solve_convolution(self, layer: _Layer, statistics: LinearStatistics) -> LinearSolution:
        module, name = layer.module, layer.name
        weight = module._parameters["weight"].detach()
        _check_finite(name, weight)
        return solve_convolution(
            weight.to(self._working_device(layer)),
            self._plan.convs.get(name) or (module.in_channels,),
            statistics,
            layer.input_format,
            layer.weight_format,
            _convolution_options(self.config.for_layer(name), weight.dtype, name in self._affordable),
            has_statistics=not self._synthetic,
        )

    def _working_device(self, layer: _Layer) -> torch.device:
        return torch.device(self.config.device) if self.config.device else _home(layer.module)

    def to_layers(self, solutions: Mapping[str, LinearSolution]) -> None:
        """Move solutions to where their layers run, in place; new weights stay on the CPU."""
        for name, solution in solutions.items():
            _move(solution, _home(self.modules[name]))

    def changes_weight(self, name: str, solution: LinearSolution) -> bool:
        """Whether :meth:`apply` changes the stored weight."""
        return solution.weight is not None or (
            name in self._linears and _stock_smoothing(self.modules[name]) is not None
        )

    def apply(self, solutions: Mapping[str, LinearSolution]) -> None:
        """Change the layers that have a solution."""
        linears = {name: layer for name, layer in self._linears.items() if name in solutions}
        _apply(self.model, self.modules, linears, solutions)
        _apply_convolutions({n: layer for n, layer in self._convolutions.items() if n in solutions}, solutions)

    def units(self, names: Sequence[str], seen: Mapping[str, Seen]) -> Iterator[tuple[Sequence[str], float]]:
        """These layers, those that are solved together, and about how many multiply-adds that takes.

        Args:
            names: of layers.
            seen: what was seen of each that was called.
        """
        done: set[str] = set()
        for name in names:
            if name not in done:
                unit = self._sharing.get(name, (name,))
                done.update(unit)
                yield unit, sum(self._cost(part, seen.get(part)) for part in unit)

    def _cost(self, name: str, seen: Seen | None) -> float:
        shape = self.modules[name]._parameters["weight"].shape
        outputs, inputs = shape[0], shape[1:].numel()
        # Trying a setting multiplies the sampled rows by the weight; GPTQ goes through its columns.
        rows = min(self.config.rows_to_keep, 1 if seen is None else seen.rows)
        return float(outputs * inputs * (rows + inputs))

    def checksum(self, name: str) -> int:
        """Of a layer's weight."""
        module = self.modules[name]
        with enable_weight_access_and_writeback(module, self.model, self.modules, writeback=False):
            weight = module._parameters["weight"]
            assert weight is not None
            return weight_checksum(weight)

    def manifest(self, stages: Sequence[Stage], seen: Mapping[str, Seen]) -> dict[str, Any]:
        """What a checkpoint has to be of."""
        config = self.config.model_dump(exclude={"progress", "layerwise", "device", "distributed_sync"})
        formats = {
            layer.name: (str(layer.input_format), str(layer.weight_format))
            for layer in (*self._linears.values(), *self._convolutions.values())
        }
        return {
            "model": parameters_fingerprint(self.model),
            "config": fingerprint({**config, "sequential": self.config.is_sequential}),
            "formats": fingerprint(formats),
            "plan": fingerprint(self._plan.to_dict()),
            "seed": self.config.seed,
            "data": fingerprint({name: (numbers.calls, numbers.rows) for name, numbers in seen.items()}),
            "ranges": {name: [numbers.low, numbers.high] for name, numbers in seen.items()},
            "stages": [stage.name for stage in stages],
        }


def _quantized_linears(model: nn.Module) -> dict[str, _Layer]:
    layers = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not (isinstance(module, nn.Linear) and is_quantized_linear(module)):
            continue
        weight_format = QuantFormat.of(module.weight_quantizer, f"{name}.weight_quantizer")
        input_format = QuantFormat.of(module.input_quantizer, f"{name}.input_quantizer")
        if weight_format is None and input_format is None:
            continue
        if isinstance(module, SVDQuantLinear):
            raise ValueError(
                f"{name} carries ModelOpt's SVDQuant branch; segquant needs the original weights: run it on a freshly "
                "loaded model"
            )
        adapter = modules[name.rpartition(".")[0]]
        if name.endswith(".base_layer") and hasattr(adapter, "lora_A"):
            raise ValueError(
                f"{name} carries a LoRA adapter, whose layers ModelOpt replaces by merged ones; fuse it (fuse_lora, "
                "then unload_lora) or unload it before quantizing. Adapters can be loaded on top of the quantized model"
            )
        if getattr(module.weight_quantizer, "_folded", False):
            raise ValueError(f"{name}: its weight was folded; run segquant on a freshly loaded model")
        weight = module._parameters["weight"]
        assert weight is not None
        if not weight.is_meta:  # offloaded weights are looked at when they are fetched
            _check_finite(name, weight)
        layers[name] = _Layer(name, module, input_format, weight_format)
    return layers


def _without_excluded(layers: dict[str, _Layer], config: SegQuantCalibConfig) -> dict[str, _Layer]:
    """Leave layers in full precision that ``exclude`` names; check the patterns of ``layers`` on the way."""
    for field, patterns in (("exclude", config.exclude), ("layers", list(config.layers))):
        for pattern in patterns:
            if not fnmatch.filter(layers, pattern):
                raise ValueError(
                    f"{field}: {pattern!r} matches no quantized Linear; names look like {', '.join(list(layers)[:3])}"
                )
    excluded = {name for pattern in config.exclude for name in fnmatch.filter(layers, pattern)}
    return {
        name: _Layer(name, layer.module, None, None) if name in excluded else layer for name, layer in layers.items()
    }


def _check_polarity(layer: _Layer, config: SegQuantCalibConfig) -> None:
    if config.polarity == "dual8" and layer.input_format is not None and not layer.input_format.is_integer:
        raise ValueError(
            f"polarity='dual8' needs integer activations, {layer.name} has floating-point ones, whose sign bit "
            "can't be spared; use polarity='dual', 'shift' or 'auto'"
        )


def _check_layer(layer: _Layer, config: SegQuantCalibConfig) -> None:
    """Refuse settings that the layer's formats can't carry out, by name."""
    activation, weight = layer.input_format, layer.weight_format
    _check_polarity(layer, config)
    if layer.wants_rotation(config) and activation is not None and not activation.dynamic:
        raise ValueError(
            f"rotate needs dynamic activation scales, {layer.name} has static ones, which are calibrated channel by "
            "channel; use block_sizes={-1: None, 'type': 'dynamic'} for its input_quantizer, or rotate=False"
        )
    for fmt, what in ((weight, "weights"), (activation, "activations")):
        if fmt is not None and fmt.is_nvfp4 and layer.module.weight.device.type == "cpu":
            raise ValueError(
                f"{layer.name} has NVFP4 {what}, which ModelOpt rounds on a GPU only: move the model there before "
                "mtq.quantize, or use a 4-bit integer preset such as SEGQUANT_W4A4_CFG"
            )
    if activation is not None and activation.group is not None and not activation.is_nvfp4:
        raise ValueError(
            f"{layer.name}.input_quantizer: groups of channels are for weights; give activations one scale a token, "
            "block_sizes={-1: None, 'type': 'dynamic'}"
        )
    fits = config.gptq or config.correct_activations
    if weight is not None and fits and (weight.is_nvfp4 or weight.dynamic):
        raise ValueError(
            f"gptq and correct_activations need weight scales that stay as they are, {layer.name} has "
            f"{'NVFP4' if weight.is_nvfp4 else 'dynamic'} ones; leave them out (low_rank works), or use integer weights"
        )


def _check_groups(name: str, plan: LinearPlan, *formats: QuantFormat | None) -> None:
    for fmt in formats:
        if fmt is None or fmt.group is None:
            continue
        wrong = [size for size in plan.in_segments if size % fmt.group]
        if wrong:
            raise ValueError(
                f"{name} has an input segment of {wrong[0]} channels, which groups of {fmt.group} do not divide; use a "
                f"group size that does (a divisor of {math.gcd(*plan.in_segments)}), per-channel weights for this "
                f"layer, or overrides={{{name!r}: None}} to leave it uncut"
            )


def _search_options(
    layer: _Layer, plan: LinearPlan, config: SegQuantCalibConfig, storage: torch.dtype, affordable: bool
) -> SearchOptions:
    _check_groups(layer.name, plan, layer.input_format, layer.weight_format)
    config = config.for_layer(layer.name)
    branch = None
    if config.low_rank is not None:
        branch = LowRankOptions(
            config.low_rank.rank, config.low_rank.max_rank, config.low_rank.max_share, config.low_rank.over
        )
        for size in plan.in_segments:
            branch.check((min(plan.out_segments), size), layer.name)
    gptq = config.gptq_config
    return replace(
        _convolution_options(config, storage, affordable),
        ranges=config.activation_ranges,
        rotate=layer.wants_rotation(config),
        refine=RefineOptions(
            low_rank=branch,
            gptq=None if gptq is None else GPTQOptions(gptq.damping, gptq.block_size, gptq.activation_order),
            correct_activations=config.correct_activations,
            weight_clips=config.weight_clip_grid,
            bias_correction=config.bias_correction,
            rounds=0 if config.low_rank is None else config.low_rank.refits,
        ),
    )


def _convolution_options(config: SegQuantCalibConfig, storage: torch.dtype, affordable: bool) -> SearchOptions:
    """The part of the settings that convolutions know as well: no rotation, low-rank branch or GPTQ."""
    return SearchOptions(
        polarity=config.polarity,
        shift_per_channel=config.shift_granularity == "channel",
        alphas=_alphas(config),
        clips=config.clip_grid,
        second_product=affordable if config.second_product in (None, "polar") else bool(config.second_product),
        second_product_if_polar=config.second_product == "polar",
        storage=storage,
    )


def _alphas(config: SegQuantCalibConfig) -> tuple[float | None, ...]:
    if config.alpha == "search":
        return (None, *config.alpha_grid)
    assert not isinstance(config.alpha, str)
    return (config.alpha,)


@dataclass
class _Observed:
    """What the calibration data shows.

    Attributes:
        plan: the segments.
        statistics: of this process's share, by layer.
        seen: of the whole, in numbers, in the order of first calls.
    """

    plan: SegmentPlan
    statistics: dict[str, LinearStatistics]
    seen: dict[str, Seen]


def _observe(
    model: nn.Module,
    parts: _Parts,
    config: SegQuantCalibConfig,
    forward_loop: ForwardLoop | None,
    previous_plan: SegmentPlan | None,
    calls: RecordedCalls | None,
    positions: CallPositions,
    processes: Processes,
) -> _Observed:
    """One pass: the plan from its first forward unless one is given, the statistics from all of it."""
    given = None if config.plan is None else SegmentPlan.from_dict(config.plan)
    known = given or previous_plan
    recorder = RecordFirstForward(model, merge_heads=config.merge_heads)
    with processes.together():
        if forward_loop is None:
            _check_needs_no_data(parts, config)
        if known is not None:
            known.check(model)
        recording = recorder if known is None else nullcontext()
        statistics = _run(model, parts, config, forward_loop, calls, positions, recording)
    # Generated inputs are not dealt out: every process had its own, and nothing but their number is looked at.
    sharing = Processes() if forward_loop is None else processes
    seen = seen_by_all(statistics, sharing)
    if not seen:
        raise ValueError(
            "forward_loop never ran a quantized Linear of the model: it gets the model as its argument and has to call "
            "that one, e.g. `for batch in data: model(**batch)`"
        )
    merge_maxima(parts.others, model, sharing)
    _warn_of_unshared_data(statistics, sharing)
    plan = known if known is not None else _first_plan(recorder.plan, statistics, sharing)
    if plan is None:
        raise ValueError("forward_loop never called the model itself, only parts of it; call model(...)")
    if config.overrides:
        plan = plan.with_overrides(config.overrides)
    if not config.segments:
        plan = _uncut(plan)
    if previous_plan is not None and (plan.linears, plan.convs) != (previous_plan.linears, previous_plan.convs):
        raise ValueError(
            "the model is segmented already, with another plan than this config asks for; load the original model "
            "again, or leave plan, overrides and segments as they were to calibrate it anew"
        )
    return _Observed(plan, statistics, seen)


def _check_needs_no_data(parts: _Parts, config: SegQuantCalibConfig) -> None:
    static = [layer.name for layer in parts.layers if layer.is_static]
    static += [name for name in uncalibrated(parts.others) if not name.endswith("weight_quantizer")]
    if static or config.needs_statistics:
        reason = f"static activation scales ({static[0]}, ...)" if static else f"alpha={config.alpha!r}"
        if not static and config.alpha is None:
            reason = f"polarity={config.polarity!r}"
        raise ValueError(
            f"{reason} need calibration data: pass forward_loop, a function that runs the model on it, or use "
            "SEGQUANT_INT8_DYNAMIC_CFG, which does without"
        )


def _run(
    model: nn.Module,
    parts: _Parts,
    config: SegQuantCalibConfig,
    forward_loop: ForwardLoop | None,
    calls: RecordedCalls | None,
    positions: CallPositions,
    recording: AbstractContextManager[object],
) -> dict[str, LinearStatistics]:
    """Run the loop once and watch the layers; calls are recorded in ``calls``, and in whatever ``recording`` does."""
    synthetic = forward_loop is None
    loop = generated_forward_loop(model) if forward_loop is None else forward_loop

    def run() -> None:
        try:
            with (
                recording,
                max_calibration(model, parts.others),
                nullcontext() if calls is None else calls.recording(),
            ):
                loop(model)
        except Exception as error:
            source = "the forward on generated inputs" if synthetic else "forward_loop"
            raise ValueError(
                f"{source} raised {type(error).__name__}: {error}; the model is unchanged, mend it and call again"
            ) from error

    samples = 1 if synthetic else config.rows_to_keep
    # Generated rows say nothing, and sequential calibration looks at every block once more before it is solved.
    once = not synthetic and calls is None
    new = _NewStatistics(config, _hessian_limits(parts.linears.values(), config) if once else {}, HessianMemory())
    statistics = collect(model, parts.modules, run, samples=samples, seed=config.seed, new=new, positions=positions)
    for name, seen in statistics.items():
        if not seen.range.is_finite:
            raise ValueError(
                f"the inputs of {name} hold NaN or infinity during calibration (the first layer in execution order "
                "where they do); check the calibration data and the model's dtype, float16 may overflow"
            )
    return statistics


def _first_plan(
    recorded: SegmentPlan | None, statistics: Mapping[str, LinearStatistics], processes: Processes
) -> SegmentPlan | None:
    """The plan that one process would have recorded, of the first call of all; warns if other calls gave others."""
    first = min((found.first_position for found in statistics.values()), default=-1)
    plans = [(position, plan) for position, plan in processes.gather((first, recorded)) if plan is not None]
    if not plans:
        return None
    chosen: SegmentPlan = min(plans, key=lambda found: found[0])[1]
    if any(plan != chosen for _, plan in plans):
        logger.warning(
            "segquant: the processes' first calls of the model show different segments; those of the very first call "
            "are taken, as in a single process. Pass a plan in the algorithm's config to decide"
        )
    return chosen


def _warn_of_unshared_data(statistics: Mapping[str, LinearStatistics], processes: Processes) -> None:
    if processes.size == 1:
        return
    numbers = {
        name: (seen.rows_seen, seen.range.high.double().sum().item(), seen.range.low.double().sum().item())
        for name, seen in statistics.items()
    }
    found = processes.gather(numbers)
    if all(other == found[0] for other in found):
        logger.warning(
            "segquant: all %d processes read the same calibration data. Give each its share: for batch in "
            "modelopt_ext.distributed.share(batches)",
            len(found),
        )


def _hessian_limits(layers: Iterable[_Layer], config: SegQuantCalibConfig) -> dict[nn.Module, float]:
    """The Linears whose Hessian is asked for over all rows, each with the GiB that all such Hessians may take."""
    asked = {
        layer.module: config.for_layer(layer.name).accumulated_memory
        for layer in layers
        if layer.weight_format is not None
    }
    return {module: limit for module, limit in asked.items() if limit is not None}


@dataclass
class _NewStatistics:
    """Makes the empty statistics of a layer at its first call.

    Attributes:
        config: settings of the algorithm.
        limits: see :func:`_hessian_limits`.
        memory: what the Hessians take so far.
    """

    config: SegQuantCalibConfig
    limits: Mapping[nn.Module, float]
    memory: HessianMemory

    def __call__(self, layer: nn.Module, samples: int, seed: int) -> LinearStatistics:
        if isinstance(layer, nn.Conv2d):  # its rows are kernel-size times wider, and only the search reads them
            return WindowStatistics(layer, min(samples, self.config.samples or WINDOWS), seed)
        statistics = LinearStatistics(samples, seed)
        limit = self.limits.get(layer)
        if isinstance(layer, nn.Linear) and limit is not None and self.memory.admit(layer.in_features, limit):
            statistics.moments = SecondMoments()
        return statistics


def _warn_of_rows_for_hessians(solutions: Mapping[str, LinearSolution], config: SegQuantCalibConfig) -> None:
    from_rows = [
        name
        for name, solution in solutions.items()
        if solution.hessian == "rows" and config.for_layer(name).accumulated_memory is not None
    ]
    if from_rows:
        logger.warning(
            "segquant: gptq's hessian_memory is too little to accumulate the Hessians of all layers: those of %s come "
            "from the sampled rows. Raise it, or use sequential=True, where it is the bound for one block at a time",
            fold_names(from_rows),
        )


def _uncut(plan: SegmentPlan) -> SegmentPlan:
    """One segment on either side of every Linear; a tag stays where the whole input has it."""
    whole = {
        name: LinearPlan(
            (linear.in_features,), (linear.out_features,), linear.activations if len(linear.in_segments) == 1 else ("",)
        )
        for name, linear in plan.linears.items()
    }
    return SegmentPlan(whole, plan.shared_inputs, plan.uncalled, plan.notes)


def outer_linears(model: nn.Module, called: list[str]) -> tuple[list[str], list[str]]:
    """The Linears outside the model's repeated blocks that run before the first and after the last block.

    Args:
        model: the denoiser; its repeated blocks are what its ``nn.ModuleList`` s hold.
        called: names of Linears in the order of their first call.
    """
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    inside = [index for index, name in enumerate(called) if name.startswith(blocks)] if blocks else []
    return (called[: inside[0]], called[inside[-1] + 1 :]) if inside else ([], [])


def embedders(model: nn.Module, called: list[str]) -> list[str]:
    """The first part of :func:`outer_linears`: time, text, patch and guidance embedders."""
    return outer_linears(model, called)[0]


def _with_outer_policies(
    model: nn.Module, layers: dict[str, _Layer], config: SegQuantCalibConfig, called: list[str]
) -> dict[str, _Layer]:
    changed = dict(layers)
    for policy, names in zip((config.embedders, config.last_layers), outer_linears(model, called), strict=True):
        for name in names:
            changed[name] = _under_policy(layers[name], policy)
    return changed


def _under_policy(layer: _Layer, policy: str) -> _Layer:
    weight, activation = layer.weight_format, layer.input_format
    if policy == "none":
        return _Layer(layer.name, layer.module, None, None)
    if policy == "eight_bit":
        floating = any(fmt is not None and not fmt.is_integer for fmt in (weight, activation))
        bits: int | tuple[int, int] = (4, 3) if floating else 8
        weight = None if weight is None else QuantFormat(bits, per_row=True)
        activation = None if activation is None else QuantFormat(bits, per_row=True, dynamic=True)
    elif policy == "per_token" and activation is not None:
        activation = QuantFormat(activation.num_bits, per_row=True, dynamic=True)
    return _Layer(layer.name, layer.module, activation, weight)


def _without_uncalled(layers: dict[str, _Layer], called: Collection[str]) -> dict[str, _Layer]:
    """Leave Linears in full precision that need static scales and were never called."""
    uncalled = [layer.name for layer in layers.values() if layer.name not in called and layer.is_static]
    if uncalled:
        logger.warning(
            "segquant: the calibration data never reached %s; left in full precision. Calibrate with inputs that use "
            "them, or give them dynamic activations",
            fold_names(uncalled),
        )
    return {
        name: _Layer(name, layer.module, None, None) if name in uncalled else layer for name, layer in layers.items()
    }


def _plain_weight(layer: _Layer) -> torch.Tensor:
    """The weight without an earlier algorithm's smoothing, (N, K)."""
    weight = layer.module._parameters["weight"]
    assert weight is not None
    _check_finite(layer.name, weight)
    scale = _stock_smoothing(layer.module)
    return weight.detach() if scale is None else weight.detach() * scale.to(weight.device)


def _check_finite(name: str, weight: torch.Tensor) -> None:
    if not torch.isfinite(weight).all():
        raise ValueError(f"the weight of {name} holds NaN or infinity; check the checkpoint it was loaded from")


def _stock_smoothing(module: Any) -> torch.Tensor | None:
    """ModelOpt's SmoothQuant leaves W / pre_quant_scale as the weight; None where it did not run."""
    quantizer = module.input_quantizer
    return None if isinstance(quantizer, QuantizerBank) else quantizer.pre_quant_scale


def _unseen(weight: torch.Tensor) -> LinearStatistics:
    """Statistics of a Linear that was never called."""
    statistics = LinearStatistics(samples=1, seed=0)
    statistics.update(torch.zeros(1, weight.shape[1], device=weight.device))
    return statistics


def _move(solution: LinearSolution, device: torch.device) -> None:
    """Move all but the weight."""
    for name in ("smoothing", "shift", "down", "up", "correction"):
        value = getattr(solution, name)
        if value is not None:
            setattr(solution, name, value.to(device))
    for scales in (solution.input_amax, solution.weight_amax):
        for block, amax in scales.items():
            scales[block] = amax.to(device)


def _home(module: Any) -> torch.device:
    """Where the layer runs: accelerate knows it of offloaded layers, otherwise the weight is there."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return module._parameters["weight"].device if device is None else torch.device(device)


def _apply(
    model: nn.Module,
    modules: dict[str, nn.Module],
    layers: Mapping[str, _Layer],
    solutions: Mapping[str, LinearSolution],
) -> None:
    for name, layer in layers.items():
        module = layer.module
        solution = solutions[name]
        weight = solution.weight
        if weight is None and _stock_smoothing(module) is not None:
            with enable_weight_access_and_writeback(module, model, modules, writeback=False):
                weight = _plain_weight(layer)
        if weight is not None:
            write_weight(module, weight, model, modules)
            solution.weight = None
        _configure(layer)
        for quantizer in (module.input_quantizer, module.weight_quantizer):
            quantizer._del_pytorch_state()
        if solution.is_stock and not isinstance(module, SegLinear):
            _fill_stock(module, solution)
            continue
        fill(to_seg_linear(module, solution.layout), solution)


def _leave_unsolved(
    layers: Mapping[str, _Layer], convolutions: Mapping[str, _Layer], solutions: Mapping[str, LinearSolution]
) -> None:
    """Disable the quantizers of layers without a solution: excluded ones, and convolutions never called."""
    uncalled = [name for name, layer in convolutions.items() if layer.is_quantized and name not in solutions]
    if uncalled:
        logger.warning(
            "segquant: the calibration data never reached the convolutions %s; left in full precision",
            fold_names(uncalled),
        )
    for name, layer in (*layers.items(), *convolutions.items()):
        if name not in solutions:
            layer.module.input_quantizer.disable()
            layer.module.weight_quantizer.disable()


def _apply_convolutions(convolutions: Mapping[str, _Layer], solutions: Mapping[str, LinearSolution]) -> None:
    for name, convolution in convolutions.items():
        module = convolution.module
        for quantizer in (module.input_quantizer, module.weight_quantizer):
            quantizer._del_pytorch_state()
        solution = solutions[name]
        if solution.is_stock and not isinstance(module, SegConv2d):
            _fill_stock(module, solution)
        else:
            fill_scales(to_seg_conv(module, solution.layout), solution)


def _configure(layer: _Layer) -> None:
    """Carry a policy's change of format over to the quantizers."""
    for quantizer, fmt in (
        (layer.module.input_quantizer, layer.input_format),
        (layer.module.weight_quantizer, layer.weight_format),
    ):
        # Dynamic ones are set anew in any case: their first call left them with the axes of that call's input.
        if fmt is None or (not fmt.dynamic and fmt == QuantFormat.of(quantizer, layer.name)):
            continue
        scales = {"axis": None, **PER_TOKEN} if fmt.dynamic else {"axis": 0, "block_sizes": None, "type": "static"}
        quantizer.set_from_attribute_config({"num_bits": fmt.num_bits, **scales})


def _fill_stock(module: Any, solution: LinearSolution) -> None:
    for quantizer, found in (
        (module.input_quantizer, solution.input_amax),
        (module.weight_quantizer, solution.weight_amax),
    ):
        for amax in found.values():
            quantizer.amax = amax
        quantizer.disable_rotate()  # asked for, but with an odd number of channels there is nothing to rotate


def fill_scales(module: SegLinear | SegConv2d, solution: LinearSolution) -> None:
    """Write scales, smoothing and shift into the banks of a segmented layer laid out for the solution."""
    for bank, found in (
        (module.input_quantizer, solution.input_amax),
        (module.weight_quantizer, solution.weight_amax),
    ):
        bank.set_buffer("_smoothing", solution.smoothing)
        for name, amax in found.items():
            bank.block(name).amax = amax
    module.input_quantizer.set_buffer("_shift", solution.shift)


def fill(module: SegLinear, solution: LinearSolution) -> None:
    """Write a solution into a SegLinear laid out for it."""
    fill_scales(module, solution)
    module.input_quantizer.set_buffer("_correction", solution.correction)
    module.weight_quantizer.set_buffer("_down", solution.down)
    module.weight_quantizer.set_buffer("_up", solution.up)
