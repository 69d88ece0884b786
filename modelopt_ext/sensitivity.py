"""How much each quantized layer alone costs the model's output.

    table = layer_sensitivity(model, modelopt_ext.SEGQUANT_CFG, forward_loop)
    print(table)                     # worst layer first

For a layer l, with v the model's output in full precision and v_l the output with l quantized and every other layer in
full precision, over the same recorded inputs,

    noise_l = sum |v - v_l|^2 / sum |v|^2,        SQNR_l = -10 log10 noise_l  in dB.

The cheap relative looks at the layer's own output y_l instead, on the inputs that full precision feeds it:
``local_noise`` = sum |y_l - Q(y_l)|^2 / sum |y_l|^2. All layers share one pass, but how far a layer's error travels to
the model's output stays unknown.

Layers are exchanged for their quantized twins in a copy of the model, one at a time, while the model itself replays the
call: it does not matter how a twin rounds (stock quantizers, segments, GPTQ, low rank), and the loop always goes on
from the full-precision output, so that a whole sampling loop may serve as ``forward_loop``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.opt.conversion import ModeloptStateManager
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils._pytree import tree_map_only

from .nn.packed import PackedLinear

logger = logging.getLogger(__name__)

__all__ = ["LayerSensitivity", "SensitivityTable", "layer_sensitivity", "measure", "quantized_copy", "quantized_layers"]

ForwardLoop = Callable[[nn.Module], object]

_FORMAT = "segquant-sensitivity"


def decibels(noise: float) -> float:
    """-10 log10 of a noise-to-signal ratio; ``inf`` without noise."""
    return math.inf if noise == 0 else -10 * math.log10(noise)


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer, quantized alone. Noises are energies relative to the signal's, without unit.

    Attributes:
        name: qualified module name.
        weights: number of weight elements.
        rows: input rows per call of the layer (of a convolution, windows; of a transposed one, places), averaged over
            the measured calls; 0 for a layer that was never called.
        calls: calls of the layer per call of the model.
        local_noise: of the layer's own output.
        noise: of the model's output; None where only the local one was asked for.
        activation_noise, weight_noise: the same with only the inputs or only the weights rounded; None unless asked
            for. What calibration wrote into the weights or the bias (GPTQ, corrections) is there in both.
    """

    name: str
    weights: int
    rows: float
    calls: float
    local_noise: float
    noise: float | None = None
    activation_noise: float | None = None
    weight_noise: float | None = None

    @property
    def multiply_adds(self) -> float:
        """Per call of the model."""
        return self.rows * self.calls * self.weights

    @property
    def sqnr(self) -> float:
        """SQNR of the model's output with this layer alone quantized, dB; NaN where it was not measured."""
        return math.nan if self.noise is None else decibels(self.noise)

    @property
    def local_sqnr(self) -> float:
        """SQNR of the layer's own output, dB."""
        return decibels(self.local_noise)


@dataclass(frozen=True)
class SensitivityTable:
    """The sensitivity of every quantized layer.

    Attributes:
        layers: in the order of the model's modules.
        calls: measured calls of the model.
        floor: noise between two full-precision runs on equal inputs; above zero the model (or its device) is not
            deterministic, and noises near the floor mean nothing.
    """

    layers: tuple[LayerSensitivity, ...]
    calls: int
    floor: float = 0.0

    def __getitem__(self, name: str) -> LayerSensitivity:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(
            f"{name!r} is not in the table; it has {', '.join(layer.name for layer in self.layers[:3])}, ..."
        )

    @property
    def ranking(self) -> list[LayerSensitivity]:
        """Worst layer first: by the noise of the model's output, or by the local one where that is all there is."""
        return sorted(self.layers, key=lambda row: (-(row.local_noise if row.noise is None else row.noise), row.name))

    @property
    def predicted_sqnr(self) -> float:
        """SQNR of the model's output with all layers quantized, dB, if their errors were independent; NaN if local."""
        noises = [layer.noise for layer in self.layers]
        return math.nan if None in noises else decibels(sum(noise for noise in noises if noise is not None))

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation of local and true noise over the layers that have both above zero; NaN below three."""
        pairs = [(row.local_noise, row.noise) for row in self.layers if row.noise and row.local_noise]
        if len(pairs) < 3:
            return math.nan
        ranks = torch.tensor(pairs, dtype=torch.float64).argsort(dim=0).argsort(dim=0).double()
        return float(torch.corrcoef(ranks.T)[0, 1])

    def table(self, limit: int | None = None) -> str:
        """Aligned text, worst layer first.

        Args:
            limit: rows to show; all by default.
        """
        weights = sum(layer.weights for layer in self.layers)
        work = sum(layer.multiply_adds for layer in self.layers)
        split = any(layer.weight_noise is not None for layer in self.layers)
        head = ["layer", "alone, dB", *(["activations", "weights"] if split else []), "local, dB", "weights, %"]
        lines = [[*head, "multiply-adds, %"]]
        shown = self.ranking[:limit]
        for row in shown:
            cells = [row.noise, *((row.activation_noise, row.weight_noise) if split else ()), row.local_noise]
            lines.append(
                [
                    row.name,
                    *("" if noise is None else f"{decibels(noise):.1f}" for noise in cells),
                    f"{100 * row.weights / weights:.2f}",
                    f"{100 * row.multiply_adds / work:.2f}" if row.rows else "never called",
                ]
            )
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        text = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        text.insert(1, "  ".join("-" * width for width in widths))
        if len(shown) < len(self.layers):
            text.append(f"... and {len(self.layers) - len(shown)} more")
        summary = f"{len(self.layers)} layers, {self.calls} calls"
        if not math.isnan(self.predicted_sqnr):
            summary += f"; all together, if errors add: {self.predicted_sqnr:.1f} dB"
        if not math.isnan(self.rank_correlation):
            summary += f"; rank correlation of local and alone: {self.rank_correlation:.2f}"
        if self.floor:
            summary += f"; full precision repeats itself to {decibels(self.floor):.1f} dB only"
        return "\n".join([*text, summary])

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Plain types; noises as ratios, so that a layer without noise needs no infinity."""
        return {
            "format": _FORMAT,
            "calls": self.calls,
            "floor": self.floor,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SensitivityTable:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: not a sensitivity table.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise ValueError(f'not a sensitivity table: expected a mapping with "format": "{_FORMAT}"')
        return cls(tuple(LayerSensitivity(**layer) for layer in data["layers"]), data["calls"], data["floor"])

    def save(self, path: str | PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def layer_sensitivity(
    model: nn.Module,
    config: Mapping[str, Any],
    forward_loop: ForwardLoop,
    *,
    score_loop: ForwardLoop | None = None,
    batches: int = 4,
    parts: bool = False,
    local_only: bool = False,
    select: Callable[[Any], Any] | None = None,
) -> SensitivityTable:
    """Measure every layer that ``config`` quantizes, alone. The model itself stays as it is; a copy is quantized.

    Costs, besides the calibration: memory for the copy, two runs of the loop (the first one counts its calls), and per
    measured call one forward more, and one for each layer (three with ``parts``) unless ``local_only``. Nothing is kept
    between calls.

    Args:
        model: the full-precision model, any module whose output holds floating-point tensors.
        config: a ModelOpt config, of any algorithm.
        forward_loop: calls the model with the calibration data.
        score_loop: calls it with the data to measure on. By default ``forward_loop``: then static scales are measured
            on data they were fitted to, and look a little better than they are.
        batches: how many calls of ``score_loop`` are measured, evenly spread over it.
        parts: also measure activations and weights apart.
        local_only: only the layers' own outputs.
        select: picks what to compare from the model's output; by default every floating-point tensor in it, in tuples,
            lists, mappings and dataclasses.

    Raises:
        ValueError: a model that is quantized already or offloaded, data that never reaches it or is not the same in
            both runs, outputs without tensors or with NaN, or what ``mtq.quantize`` refuses.
    """
    quantized = quantized_copy(model, config, forward_loop)
    return measure(
        model,
        quantized,
        score_loop or forward_loop,
        batches=batches,
        parts=parts,
        local_only=local_only,
        select=select,
    )


def quantized_copy(model: nn.Module, config: Mapping[str, Any], forward_loop: ForwardLoop | None) -> nn.Module:
    """A deep copy of ``model``, quantized with ``config``.

    Raises:
        ValueError: the model is quantized already or has no weights in memory to copy.
    """
    if ModeloptStateManager.is_converted(model):
        raise ValueError("the model went through ModelOpt already; pass the original, full-precision one")
    offloaded = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if offloaded is not None:
        raise ValueError(
            f"{offloaded} is not in memory (meta device or offloaded): sensitivity exchanges layers with those of a "
            "copy, so load the model onto one device first"
        )
    return mtq.quantize(copy.deepcopy(model), copy.deepcopy(dict(config)), forward_loop)


def quantized_layers(quantized: nn.Module) -> dict[str, nn.Module]:
    """The packed Linears, and the modules with a weight and at least one enabled quantizer, by qualified name."""
    found: dict[str, nn.Module] = {}
    for name, module in quantized.named_modules():
        if isinstance(module, PackedLinear):
            found[name] = module
            continue
        if not isinstance(module, QuantModule) or not isinstance(module._parameters.get("weight"), nn.Parameter):
            continue
        if any(quantizer.is_enabled for side in _SIDES for quantizer in _quantizers(module, side)):
            found[name] = module
    return found


_SIDES = ("input_quantizer", "weight_quantizer", "output_quantizer")


def _quantizers(module: nn.Module, side: str) -> list[TensorQuantizer]:
    """The quantizers of one side of a layer: a stock one, a sequence, or a bank with its blocks."""
    root = getattr(module, side, None)
    return [q for q in root.modules() if isinstance(q, TensorQuantizer)] if isinstance(root, nn.Module) else []


@dataclass
class _Layer:
    """A layer, its quantized twin, and what has been measured so far (sums over calls)."""

    original: nn.Module
    twin: nn.Module
    rows: int = 0
    calls: int = 0
    local_noise: float = 0.0
    local_signal: float = 0.0
    noise: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def weights(self) -> int:
        weight = self.original._parameters["weight"]
        assert weight is not None
        return weight.numel()

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Forward hook of the original: the twin on the same input."""
        rounded = self.twin(*args, **kwargs)
        self.local_noise += _energy(rounded.double() - output.double())
        self.local_signal += _energy(output)
        weight = self.original._parameters["weight"]
        assert weight is not None
        # A row is multiplied by the whole weight; that of a transposed convolution counts input channels first.
        transposed = isinstance(module, _ConvTransposeNd)
        multiplied = (args[0] if args else kwargs["input"]) if transposed else output
        self.rows += multiplied.numel() // weight.shape[0]
        self.calls += 1


def measure(
    model: nn.Module,
    quantized: nn.Module,
    score_loop: ForwardLoop,
    *,
    batches: int = 4,
    parts: bool = False,
    local_only: bool = False,
    select: Callable[[Any], Any] | None = None,
) -> SensitivityTable:
    """As :func:`layer_sensitivity`, with a copy that is quantized already (see :func:`quantized_copy`).

    Args:
        model: the full-precision model.
        quantized: a quantized copy of it, with simulated quantization or packed.
        score_loop, batches, parts, local_only, select: see :func:`layer_sensitivity`; ``parts`` needs simulated
            quantization.

    Raises:
        ValueError: see :func:`layer_sensitivity`.
    """
    if batches < 1:
        raise ValueError(f"batches is the number of calls to measure, at least 1, got {batches}")
    twins = quantized_layers(quantized)
    if not twins:
        raise ValueError("the config quantizes no layer with a weight: check the patterns of its quant_cfg")
    if parts and any(isinstance(twin, PackedLinear) for twin in twins.values()):
        raise ValueError("packed Linears round inputs and weights in one: measure parts before compress()")
    layers = {name: _Layer(model.get_submodule(name), twin) for name, twin in twins.items()}
    modes = {"all": ()} if not parts else {"all": (), "activations": _SIDES[1:2], "weights": _SIDES[:1]}
    session = _Session(model, layers, {} if local_only else modes, select)
    with torch.no_grad(), _evaluation(model), _evaluation(quantized):
        session.run(score_loop, session.count(score_loop), batches)
    return session.result()


class _Session:
    """Watches the calls of a model and replays the chosen ones, once a layer, with that layer's twin in its place."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, _Layer],
        modes: Mapping[str, Sequence[str]],
        select: Callable[[Any], Any] | None,
    ) -> None:
        self._model = model
        self._layers = layers
        self._modes = modes  # what to measure: the sides whose rounding is off, by name
        self._select = select or (lambda output: output)
        self._signal = self._floor = 0.0
        self._calls = 0

    def count(self, loop: ForwardLoop) -> int:
        """How many calls of the model the loop makes."""
        seen = 0

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal seen
            seen += 1

        handle = self._model.register_forward_hook(hook)
        try:
            loop(self._model)
        finally:
            handle.remove()
        if not seen:
            raise ValueError(
                "the loop never called the model: it gets the model as its argument and has to call that one, e.g. "
                "`for batch in data: model(**batch)`, anew each time it is run (a generator is empty after the first)"
            )
        return seen

    def run(self, loop: ForwardLoop, total: int, batches: int) -> None:
        """Run the loop, which makes ``total`` calls, and measure ``batches`` of them, evenly spread."""
        # The middles of equal spans: the first and the last call of a trajectory are its most peculiar ones.
        chosen = {(2 * i + 1) * total // (2 * batches) for i in range(batches)}
        index = -1
        replaying = False
        inputs: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal index, inputs
            if not replaying:
                index += 1
                # Copies: a model may write to the tensors it gets.
                inputs = _cloned((args, kwargs)) if index in chosen else ((), {})

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal replaying
            if replaying or index not in chosen:
                return
            replaying = True
            try:
                self._measure(*inputs, output)
            finally:
                replaying = False

        # First of all hooks, or replays would run those before it twice.
        handles = [
            self._model.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(after),
        ]
        try:
            loop(self._model)
        finally:
            for handle in handles:
                handle.remove()
        if self._calls < len(chosen):
            raise ValueError(
                f"the loop called the model {total} times when it was run first and {index + 1} times then: it must be "
                "repeatable. Keep the data in a list, and shuffle or drop nothing"
            )

    def _measure(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        reference = [tensor.clone() for tensor in self._tensors(output)]
        signal = sum(_energy(tensor) for tensor in reference)
        if not math.isfinite(signal):
            raise ValueError("the full-precision output holds NaN or infinity; check the data and the model's dtype")

        def noise() -> float:
            fresh_args, fresh_kwargs = _cloned((args, kwargs))
            result = self._tensors(self._model(*fresh_args, **fresh_kwargs))
            return sum(_energy(a.double() - b.double()) for a, b in zip(reference, result, strict=True))

        with ExitStack() as stack:
            for layer in self._layers.values():
                handle = layer.original.register_forward_hook(layer.observe, with_kwargs=True)
                stack.callback(handle.remove)
            self._floor += noise()
        for name, layer in self._layers.items():
            if not math.isfinite(layer.local_noise):
                raise ValueError(f"the output of {name}, quantized, holds NaN or infinity")
            if not layer.calls:
                continue
            for mode, off in self._modes.items():
                with _exchanged(layer.original, layer.twin), _unrounded(layer.twin, off):
                    found = noise()
                if not math.isfinite(found):
                    raise ValueError(f"with {name} quantized the model's output holds NaN or infinity")
                layer.noise[mode] = layer.noise.get(mode, 0.0) + found
        self._signal += signal
        self._calls += 1

    def _tensors(self, output: Any) -> list[Tensor]:
        found = list(_floating_tensors(self._select(output)))
        if not found:
            raise ValueError(
                f"no floating-point tensor in the model's output, a {type(output).__name__}; pick what to compare with "
                "select=lambda output: ..."
            )
        return found

    def result(self) -> SensitivityTable:
        if not self._signal > 0:
            raise ValueError("the model's output is zero on all measured calls: there is nothing to compare noise with")
        floor = self._floor / self._signal
        if floor:
            logger.warning(
                "sensitivity: full precision repeats itself to %.1f dB only; noise below that is not the layer's",
                decibels(floor),
            )
        uncalled = [name for name, layer in self._layers.items() if not layer.calls]
        if uncalled:
            logger.warning("sensitivity: the data never reached %s", ", ".join(uncalled))
        rows = []
        for name, layer in self._layers.items():
            noise = {mode: value / self._signal for mode, value in layer.noise.items()}
            rows.append(
                LayerSensitivity(
                    name,
                    weights=layer.weights,
                    rows=layer.rows / layer.calls if layer.calls else 0.0,
                    calls=layer.calls / self._calls,
                    local_noise=layer.local_noise / layer.local_signal if layer.local_signal else 0.0,
                    noise=noise.get("all", 0.0 if self._modes else None),
                    activation_noise=noise.get("activations"),
                    weight_noise=noise.get("weights"),
                )
            )
        return SensitivityTable(tuple(rows), self._calls, floor)


def _cloned(inputs: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, inputs)


def _energy(x: Tensor) -> float:
    return float(x.double().square().sum())


def _floating_tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):  # before dataclasses: Hugging Face's outputs are both
        for value in output.values():
            yield from _floating_tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _floating_tensors(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _floating_tensors(getattr(output, field.name))


@contextmanager
def _exchanged(original: nn.Module, twin: nn.Module) -> Iterator[None]:
    """Inside, calls of ``original`` run ``twin``, under whatever names the model holds it."""
    own = original.__dict__.get("forward")  # accelerate's hooks, for one, leave a forward of their own here
    object.__setattr__(original, "forward", partial(nn.Module.__call__, twin))
    try:
        yield
    finally:
        if own is None:
            object.__delattr__(original, "forward")
        else:
            object.__setattr__(original, "forward", own)


@contextmanager
def _unrounded(module: nn.Module, sides: Sequence[str]) -> Iterator[None]:
    """Inside, the quantizers of these sides of a layer round nothing."""
    quantizers = [quantizer for side in sides for quantizer in _quantizers(module, side)]
    before = [quantizer._if_quant for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer._if_quant = False
    try:
        yield
    finally:
        for quantizer, if_quant in zip(quantizers, before, strict=True):
            quantizer._if_quant = if_quant


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode: dropout would count as noise."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
