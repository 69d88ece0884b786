"""Choosing a format for every Linear, under a budget of weight bits, of time, or of both.

    mix = allocate(model, forward_loop, bits=4.5)
    print(mix)
    mtq.quantize(model, mix.config(), forward_loop)

Every candidate format is measured on every layer alone (:mod:`.sensitivity`). Taking errors of different layers as
independent, their energies add, and the best mix solves the integer program

    min  sum_l noise[l, c(l)]     subject to     sum_l cost[l, c(l)] <= budget     for each budget,

one candidate c(l) a layer, or a group of layers that must agree.

Where the assumption fails: errors of one sign (a clipped range, weights rounded the same way in all tokens) add in
amplitude and may be worse than predicted, or cancel; layers after a broken one see other inputs than they were measured
on; below some 15 dB nothing is small enough to add. Measure the mix before trusting it.

ModelOpt's ``auto_quantize`` solves a relative of this problem. Its exact solver, ``LPS`` on PuLP, is what runs here.
The rest does not fit: it scores by gradients of a loss or by the divergence of logits, and a denoiser has neither at
hand; counts weight bits only; swaps the quantizers of one set of modules between formats, where segments replace
modules; and drops the formats' algorithms (its configs say ``"algorithm": "max"``), while shift and splitting by sign
*are* the algorithm.
"""

from __future__ import annotations

import glob
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .config import LAYER_FIELDS
from .integer_program import SLACK, smallest, solve
from .mode import plan_of
from .nn import SegLinear
from .nn.layout import SPLIT_BY_SIGN
from .plan import fold_names
from .presets import PER_TOKEN
from .sensitivity import (
    ForwardLoop,
    LayerSensitivity,
    decibels,
    measure,
    quantized_copy,
    quantized_layers,
)

logger = logging.getLogger(__name__)

__all__ = [
    "DEFAULT_CANDIDATES",
    "Allocation",
    "Candidate",
    "CandidateScores",
    "CostModel",
    "LayerScores",
    "allocate",
    "score_candidates",
]

FULL_PRECISION_BITS = 16.0


@dataclass(frozen=True)
class Candidate:
    """One way to treat a Linear.

    Attributes:
        name: what tables call it.
        weight: ModelOpt quantizer attributes of the weight, e.g. ``{"num_bits": 4, "axis": 0}``; None keeps 16 bits.
        activation: the same for the input.
        algorithm: fields of :class:`~modelopt_ext.SegQuantCalibConfig` for the layers that get it, e.g.
            ``{"gptq": True}``: any that its ``layers`` takes.

    Raises:
        ValueError: a field that can't be set by layer.
    """

    name: str
    weight: Mapping[str, Any] | None = None
    activation: Mapping[str, Any] | None = None
    algorithm: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.algorithm) - LAYER_FIELDS)
        if unknown:
            raise ValueError(
                f"candidate {self.name!r}: {unknown[0]!r} can't be set by layer; those that can are "
                f"{', '.join(sorted(LAYER_FIELDS))}. What holds for all candidates goes into algorithm={{...}}"
            )

    @property
    def is_full_precision(self) -> bool:
        """Whether nothing is rounded."""
        return self.weight is None and self.activation is None

    @property
    def weight_bits(self) -> float:
        """Bits a weight element, scales of blocks included (16 bits each unless ``scale_bits`` says otherwise)."""
        return _bits(self.weight)

    @property
    def activation_bits(self) -> float:
        """Bits an activation element, without scales."""
        return _width(self.activation)

    @property
    def is_dynamic(self) -> bool:
        """Whether activation scales are found at run time."""
        if self.activation is None:
            return False
        blocks = self.activation.get("block_sizes") or {}
        return "dynamic" in (self.activation.get("type"), blocks.get("type"))

    def entries(self, layer: str | None = None) -> list[dict[str, Any]]:
        """Entries of a ``quant_cfg``, for one layer or for all Linears."""
        sides = {"weight_quantizer": self.weight, "input_quantizer": self.activation}
        chosen = {side: dict(attributes) for side, attributes in sides.items() if attributes is not None}
        if layer is None:
            return [{"quantizer_name": f"*{side}", "parent_class": "nn.Linear", "cfg": c} for side, c in chosen.items()]
        return [{"quantizer_name": f"{glob.escape(layer)}.{side}", "cfg": c} for side, c in chosen.items()]


def _width(attributes: Mapping[str, Any] | None) -> float:
    """Bits of a code, without scales."""
    if attributes is None:
        return FULL_PRECISION_BITS
    bits = attributes.get("num_bits", 8)  # ModelOpt's default
    return float(bits if isinstance(bits, int) else sum(bits) + 1)


def _bits(attributes: Mapping[str, Any] | None) -> float:
    """Bits of a code and its share of a block's scale."""
    blocks = (attributes or {}).get("block_sizes") or {}
    sizes = [size for axis, size in blocks.items() if isinstance(axis, int) and size is not None]
    if not sizes:
        return _width(attributes)
    scale = blocks.get("scale_bits")
    return _width(attributes) + (FULL_PRECISION_BITS if scale is None else sum(scale) + 1) / math.prod(sizes)


_W8, _W4, _A8 = {"num_bits": 8, "axis": 0}, {"num_bits": 4, "axis": 0}, {"num_bits": 8, "axis": None}
_A8_TOKEN = {"num_bits": 8, **PER_TOKEN}
_SPLIT, _GPTQ = {"second_product": True}, {"gptq": True}

DEFAULT_CANDIDATES = (
    Candidate("w8a8", _W8, _A8),
    Candidate("w8a8 split", _W8, _A8, _SPLIT),
    Candidate("w8a8 token", _W8, _A8_TOKEN),
    Candidate("w8a8 token split", _W8, _A8_TOKEN, _SPLIT),
    Candidate("w8a16", _W8),
    Candidate("w4a8 token", _W4, _A8_TOKEN, _GPTQ),
    Candidate("w4a8 token split", _W4, _A8_TOKEN, {**_GPTQ, **_SPLIT}),
    Candidate("w4a16", _W4, None, _GPTQ),
    Candidate("w16a16"),
)
"""INT8 weights and INT4 ones by GPTQ, per channel; activations INT8 with a static scale or one a token, or 16 bits;
"split" may take a second product to split activations by sign, polar or not. A shift costs nothing, so no candidate is
without: the calibration takes it wherever it lowers the error."""


@dataclass(frozen=True)
class CostModel:
    """Time of a Linear relative to others, in units of one multiply-add in 16 bits.

        max(R K N * compute[width] * (1 + split),  K N * weight_read * bits / 16)  +  per_token * R K  (dynamic scales)

    for R rows, K and N features, ``width`` the wider of both operands, ``split`` the share of K whose product is done
    once for each sign. Few rows make a Linear bound by reading its weight; a second product is free then. A low-rank
    branch adds a 16-bit multiply-add for each row and element of its factors.

    Attributes:
        compute: cost of a multiply-add by operand width in bits. The default has 8 bits at half of 16, as on the tensor
            cores of the last generations, and no faster 4 bits, which only Blackwell has.
        per_token: finding and applying a row's scale in the kernel that produces the row, per element. A kernel of its
            own would have to read the activations again, which is ``weight_read``, ten times as dear.
        weight_read: reading one 16-bit weight from memory: 674e12 / 2 multiply-adds and 4.27e12 / 2 weights a second
            were measured on an H200.
    """

    compute: Mapping[int, float] = field(default_factory=lambda: {16: 1.0, 8: 0.5, 4: 0.5})
    per_token: float = 16.0
    weight_read: float = 160.0

    def __post_init__(self) -> None:
        if FULL_PRECISION_BITS not in self.compute:
            raise ValueError(
                f"compute needs a cost for 16 bits, got widths {sorted(self.compute)}: give e.g. {{16: 1.0, 8: 0.5}}"
            )

    def time(
        self,
        rows: float,
        in_features: int,
        out_features: int,
        candidate: Candidate,
        split: float = 0.0,
        branch: int = 0,
    ) -> float:
        """Evaluate the formula above.

        Args:
            rows: R of one call.
            in_features, out_features: K and N.
            candidate: the format.
            split: share of K that is multiplied twice, 0 to 1.
            branch: elements of the low-rank branch's factors.
        """
        needed = max(_width(candidate.weight), candidate.activation_bits)
        width = min(width for width in self.compute if width >= needed)
        product = rows * in_features * out_features * self.compute[width] * (1 + split)
        read = in_features * out_features * self.weight_read * candidate.weight_bits / FULL_PRECISION_BITS
        scales = self.per_token * rows * in_features if candidate.is_dynamic else 0.0
        return max(product, read) + scales + rows * branch * self.compute[16]


@dataclass(frozen=True)
class LayerScores:
    """What every candidate does to one layer.

    Attributes:
        name: qualified module name.
        in_features, out_features: K and N.
        rows: per call of the layer.
        calls: of the layer per call of the model.
        noise: by candidate, of the model's output relative to its signal.
        split: by candidate, the share of K that calibration chose to split by sign.
        branch: by candidate, the elements of the low-rank branch's factors, which stay in 16 bits.
    """

    name: str
    in_features: int
    out_features: int
    rows: float
    calls: float
    noise: Mapping[str, float]
    split: Mapping[str, float] = field(default_factory=dict)
    branch: Mapping[str, int] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """K N."""
        return self.in_features * self.out_features

    def bits(self, candidate: Candidate) -> float:
        """Of the whole weight, low-rank branch included."""
        return self.weights * candidate.weight_bits + self.branch.get(candidate.name, 0) * FULL_PRECISION_BITS

    def time(self, candidate: Candidate, costs: CostModel) -> float:
        """Per call of the model."""
        split, branch = self.split.get(candidate.name, 0.0), self.branch.get(candidate.name, 0)
        return self.calls * costs.time(self.rows, self.in_features, self.out_features, candidate, split, branch)


@dataclass(frozen=True)
class CandidateScores:
    """The measurements, from which mixes for any budget follow without measuring again.

    Attributes:
        candidates: what was tried.
        layers: in the order of the model's modules.
        algorithm: fields of the algorithm that all candidates share.
        shared_inputs: groups of layers that read one tensor.
        kept: weight elements by name of the Linears that stay in full precision whatever the budget: excluded ones and
            those that the data never reached.
    """

    candidates: tuple[Candidate, ...]
    layers: tuple[LayerScores, ...]
    algorithm: Mapping[str, Any] = field(default_factory=dict)
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    kept: Mapping[str, int] = field(default_factory=dict)

    def candidate(self, name: str) -> Candidate:
        """By name.

        Raises:
            ValueError: there is none.
        """
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise ValueError(f"no candidate {name!r}; there are {', '.join(c.name for c in self.candidates)}")

    def uniform(self, name: str, costs: CostModel | None = None) -> Allocation:
        """The same candidate everywhere."""
        self.candidate(name)
        return Allocation(self, {layer.name: name for layer in self.layers}, costs or CostModel())

    def allocate(
        self,
        *,
        bits: float | None = None,
        time: float | None = None,
        time_of: str | None = None,
        costs: CostModel | None = None,
        tie_shared_inputs: bool = False,
        only: Iterable[str] | None = None,
    ) -> Allocation:
        """The mix with the least predicted noise.

        Args:
            bits: largest average over all weight elements of the model's Linears, those kept in 16 bits included.
            time: largest time of the layers here (:class:`CostModel`), as a multiple of what candidate ``time_of``
                (by default the first one) takes on all of them: 1.05 is 5 % more.
            time_of: see ``time``.
            costs: constants of the cost model.
            tie_shared_inputs: layers that read one tensor, as q, k and v do, get the same candidate, as engines that
                fuse them need.
            only: names of the candidates to choose among; by default all.

        Raises:
            ValueError: no budget, ``time_of`` without ``time``, an unknown name, or a budget that no mix meets (the
                message has the smallest one).
        """
        costs = costs or CostModel()
        if bits is None and time is None:
            raise ValueError("give a budget: bits=4.5 (average bits a weight), time=1.05 (times the first candidate's)")
        if time is None and time_of is not None:
            raise ValueError(f"time_of={time_of!r} says what time counts in: give time, too, or leave time_of out")
        chosen = self.candidates if only is None else tuple(self.candidate(name) for name in only)
        if not chosen:
            raise ValueError("only=() leaves no candidate to choose among")
        groups = self._groups(tie_shared_inputs)
        noise = [[sum(layer.noise[c.name] for layer in group) for c in chosen] for group in groups]
        used: dict[str, list[list[float]]] = {}
        limits: dict[str, float] = {}
        elements = sum(layer.weights for layer in self.layers) + sum(self.kept.values())
        fixed = FULL_PRECISION_BITS * sum(self.kept.values())
        if bits is not None:
            used["bits"] = [[sum(layer.bits(c) for layer in group) for c in chosen] for group in groups]
            limits["bits"] = bits * elements - fixed
        unit = self.uniform(time_of or self.candidates[0].name, costs).time
        if time is not None:
            used["time"] = [[sum(layer.time(c, costs) for layer in group) for c in chosen] for group in groups]
            limits["time"] = time * unit

        picks = solve(noise, used, limits)
        if picks is None:
            units = {"bits": lambda value: (value + fixed) / elements, "time": lambda value: value / unit}
            raise ValueError(_why_impossible([c.name for c in chosen], used, limits, units))
        choices = {layer.name: chosen[pick].name for group, pick in zip(groups, picks, strict=True) for layer in group}
        return Allocation(self, {layer.name: choices[layer.name] for layer in self.layers}, costs)

    def _groups(self, tied: bool) -> list[list[LayerScores]]:
        leader = {layer.name: layer.name for layer in self.layers}
        for group in self.shared_inputs if tied else ():
            members = [name for name in group if name in leader]
            merged = {leader[name] for name in members}
            for name, first in leader.items():
                if first in merged:
                    leader[name] = leader[members[0]]
        groups: dict[str, list[LayerScores]] = {}
        for layer in self.layers:
            groups.setdefault(leader[layer.name], []).append(layer)
        return list(groups.values())


def _why_impossible(
    names: Sequence[str],
    used: Mapping[str, Sequence[Sequence[float]]],
    limits: Mapping[str, float],
    units: Mapping[str, Callable[[float], float]],
) -> str:
    """Which budget no mix meets, and the smallest that one does; ``units`` has them as the caller gave them."""

    def say(budget: str, value: float) -> str:
        return f"{budget}={units[budget](value):.4g}"

    for budget, limit in limits.items():
        least = smallest(used[budget])
        if least > limit * (1 + SLACK):
            possible = f"the smallest possible is {say(budget, least)}"
            return f"no mix of {', '.join(names)} meets {say(budget, limit)}: {possible}"
    message = "no mix meets " + " and ".join(say(budget, limit) for budget, limit in limits.items())
    cheapest = solve(used["time"], {"bits": used["bits"]}, {"bits": limits["bits"]}) if len(limits) > 1 else None
    if cheapest is None:
        return f"{message}, which is too close to the smallest possible"
    least = math.fsum(row[pick] for row, pick in zip(used["time"], cheapest, strict=True))
    return f"{message} together: within these bits the smallest possible is {say('time', least)}"


@dataclass(frozen=True)
class Allocation:
    """A candidate for every layer.

    Attributes:
        scores: what it was made from.
        choices: layer name to candidate name.
        costs: of the time.
    """

    scores: CandidateScores
    choices: Mapping[str, str]
    costs: CostModel = field(default_factory=CostModel)

    @property
    def predicted_sqnr(self) -> float:
        """SQNR of the model's output in dB, if the errors of layers add."""
        return decibels(math.fsum(layer.noise[self.choices[layer.name]] for layer in self.scores.layers))

    @property
    def bits(self) -> float:
        """Average bits a weight element, over all Linears."""
        kept = sum(self.scores.kept.values())
        used = math.fsum(layer.bits(self._of(layer)) for layer in self.scores.layers)
        return (used + FULL_PRECISION_BITS * kept) / (sum(layer.weights for layer in self.scores.layers) + kept)

    @property
    def time(self) -> float:
        """Time of the chosen layers a call of the model, in 16-bit multiply-adds."""
        return math.fsum(layer.time(self._of(layer), self.costs) for layer in self.scores.layers)

    def time_relative_to(self, name: str) -> float:
        """Time as a multiple of what one candidate takes on all layers."""
        return self.time / self.scores.uniform(name, self.costs).time

    def _of(self, layer: LayerScores) -> Candidate:
        return self.scores.candidate(self.choices[layer.name])

    def config(self) -> dict[str, Any]:
        """A config for ``mtq.quantize(model, config, forward_loop)``: an entry a quantizer, a set of fields a layer."""
        entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        layers: dict[str, dict[str, Any]] = {}
        for layer in self.scores.layers:
            candidate = self._of(layer)
            entries += candidate.entries(layer.name)
            if candidate.algorithm and not candidate.is_full_precision:
                layers[glob.escape(layer.name)] = {**candidate.algorithm, **self._shared_settings(layer.name)}
        if len(entries) == 1:
            raise ValueError("every layer stays in full precision: there is nothing to quantize")
        algorithm = {"method": "segquant", **_ALONE, **self.scores.algorithm}
        if layers:
            algorithm["layers"] = {**algorithm.get("layers", {}), **layers}
        return {"quant_cfg": entries, "algorithm": algorithm}

    def _shared_settings(self, name: str) -> dict[str, Any]:
        """The settings by layer that all candidates were measured with, which count for more than a candidate's own."""
        settings: dict[str, Any] = {}
        for pattern, fields in self.scores.algorithm.get("layers", {}).items():
            if fnmatchcase(name, pattern):
                settings |= fields
        return settings

    def table(self) -> str:
        """One row a candidate in use: its layers, and their share of weights and multiply-adds."""
        weights = sum(layer.weights for layer in self.scores.layers)
        work = sum(layer.rows * layer.calls * layer.weights for layer in self.scores.layers)
        lines = [("candidate", "layers", "weights, %", "multiply-adds, %", "noise, %", "which")]
        noise = math.fsum(layer.noise[self.choices[layer.name]] for layer in self.scores.layers)
        for candidate in self.scores.candidates:
            chosen = [layer for layer in self.scores.layers if self.choices[layer.name] == candidate.name]
            if not chosen:
                continue
            own = math.fsum(layer.noise[candidate.name] for layer in chosen)
            lines.append(
                (
                    candidate.name,
                    str(len(chosen)),
                    f"{100 * sum(layer.weights for layer in chosen) / weights:.1f}",
                    f"{100 * sum(layer.rows * layer.calls * layer.weights for layer in chosen) / work:.1f}",
                    f"{100 * own / noise:.1f}" if noise else "",
                    fold_names([layer.name for layer in chosen]),
                )
            )
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        text = [
            "  ".join(
                (cell.ljust if column == 0 else cell.rjust)(widths[column]) for column, cell in enumerate(line[:5])
            )
            + f"  {line[5]}"
            for line in lines
        ]
        if self.scores.kept:
            text.append(f"kept in full precision: {fold_names(list(self.scores.kept))}")
        text.append(f"{self.bits:.3f} bits a weight; predicted {self.predicted_sqnr:.1f} dB")
        return "\n".join(text)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Plain types: the choices and what they amount to."""
        return {
            "choices": dict(self.choices),
            "kept": list(self.scores.kept),
            "bits": self.bits,
            "predicted_sqnr_db": None if math.isinf(self.predicted_sqnr) else self.predicted_sqnr,
            "noise": {layer.name: dict(layer.noise) for layer in self.scores.layers},
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


# Splitting by sign is a candidate's business, paid for from the budget here and not from the calibration's own.
_ALONE = {"second_product_budget": 0.0}


def score_candidates(
    model: nn.Module,
    forward_loop: ForwardLoop | None,
    *,
    candidates: Sequence[Candidate] = DEFAULT_CANDIDATES,
    algorithm: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
    scores: Literal["measured", "local"] = "measured",
    score_loop: ForwardLoop | None = None,
    batches: int = 4,
) -> CandidateScores:
    """Measure every candidate on every Linear. The model stays as it is: copies are quantized, one after the other.

    Args:
        model: the full-precision model.
        forward_loop: calls it with the calibration data.
        candidates: what to try.
        algorithm: fields of :class:`~modelopt_ext.SegQuantCalibConfig` for all candidates; ``exclude`` among them too.
            Its ``layers`` count for more than a candidate's own fields.
        exclude: shell-style patterns of Linears to leave in full precision.
        scores: ``"measured"`` runs the model once for every layer, candidate and batch. ``"local"`` does so for the
            coarsest candidate only, and takes the ratio of two candidates' noise at the layer's own output for their
            ratio at the model's output: the time of one sensitivity table, and a rougher prediction.
        score_loop: calls the model with the data to measure on, best not the calibration's; by default
            ``forward_loop``.
        batches: how many of its calls are measured.

    Raises:
        ValueError: no data, no or equally named candidates, a pattern that matches no Linear, or what a candidate's
            quantization refuses (the candidate is named).
    """
    if forward_loop is None:
        raise ValueError(
            "mixed precision is chosen by measuring: pass forward_loop, which calls the model on real data"
        )
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    algorithm = dict(algorithm or {})
    exclude = [*exclude, *algorithm.pop("exclude", ())]
    _check_candidates(candidates)
    _check_algorithm(algorithm, exclude, linears)
    if scores not in ("measured", "local"):
        raise ValueError(f"scores is 'measured' or 'local', got {scores!r}")
    excluded = [name for name in linears if any(fnmatchcase(name, pattern) for pattern in exclude)]

    quantizing = [candidate for candidate in candidates if not candidate.is_full_precision]
    reference = min(quantizing, key=lambda c: c.weight_bits + c.activation_bits)  # of equal ones the first
    measured: dict[str, _Measured] = {}
    shared: tuple[tuple[str, ...], ...] = ()
    for candidate in quantizing:
        config = _uniform_config(candidate, algorithm, excluded)
        try:
            quantized = quantized_copy(model, config, forward_loop)
            table = measure(
                model,
                quantized,
                score_loop or forward_loop,
                batches=batches,
                local_only=scores == "local" and candidate is not reference,
            )
        except ValueError as error:
            raise ValueError(f"candidate {candidate.name!r}: {error}") from error
        plan = plan_of(quantized)
        shared = plan.shared_inputs if plan is not None else shared
        measured[candidate.name] = _Measured({row.name: row for row in table.layers if row.rows}, *_extras(quantized))
        logger.info("mixed precision: measured candidate %s", candidate.name)
        del quantized

    reached = set.intersection(*(set(candidate.rows) for candidate in measured.values()))
    unreached = [name for name in linears if name not in reached and name not in excluded]
    if unreached:
        logger.warning("mixed precision: the data never reached %s; they stay in full precision", fold_names(unreached))
    exact = dict.fromkeys((c.name for c in candidates if c.is_full_precision), 0.0)
    layers = [
        _layer_scores(name, linear, measured, reference.name, exact)
        for name, linear in linears.items()
        if name in reached
    ]
    kept = {name: module.weight.numel() for name, module in linears.items() if name not in reached}
    return CandidateScores(tuple(candidates), tuple(layers), algorithm, shared, kept)


def _check_candidates(candidates: Sequence[Candidate]) -> None:
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"candidates need names of their own, and there must be at least one, got {names}")
    if all(candidate.is_full_precision for candidate in candidates):
        raise ValueError("all candidates are full precision: add one that quantizes")


def _check_algorithm(algorithm: Mapping[str, Any], exclude: Sequence[str], linears: Iterable[str]) -> None:
    names = list(linears)
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude pattern {pattern!r} matches no Linear; names are like {', '.join(names[:3])}")
    for policy in ("embedders", "last_layers"):
        if algorithm.get(policy, "as_configured") != "as_configured":
            raise ValueError(f"{policy} get candidates like any other layer; leave {policy}='as_configured'")


@dataclass(frozen=True)
class _Measured:
    """What one candidate does to the layers that were called, by name; see :func:`_extras` for the last two."""

    rows: Mapping[str, LayerSensitivity]
    splits: Mapping[str, float]
    branches: Mapping[str, int]


def _layer_scores(
    name: str, linear: nn.Linear, measured: Mapping[str, _Measured], reference: str, exact: Mapping[str, float]
) -> LayerScores:
    """The scores of one layer; ``exact`` has the noise of the candidates that round nothing."""
    row = measured[reference].rows[name]
    return LayerScores(
        name,
        linear.in_features,
        linear.out_features,
        rows=row.rows,
        calls=row.calls,
        noise={**exact, **{candidate: _noise(found.rows[name], row) for candidate, found in measured.items()}},
        split={candidate: found.splits[name] for candidate, found in measured.items() if name in found.splits},
        branch={candidate: found.branches[name] for candidate, found in measured.items() if name in found.branches},
    )


def allocate(
    model: nn.Module,
    forward_loop: ForwardLoop | None,
    *,
    bits: float | None = None,
    time: float | None = None,
    time_of: str | None = None,
    candidates: Sequence[Candidate] = DEFAULT_CANDIDATES,
    algorithm: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
    tie_shared_inputs: bool = False,
    costs: CostModel | None = None,
    scores: Literal["measured", "local"] = "measured",
    score_loop: ForwardLoop | None = None,
    batches: int = 4,
) -> Allocation:
    """:func:`score_candidates`, then :meth:`CandidateScores.allocate`; arguments and errors are theirs."""
    if bits is None and time is None:
        raise ValueError("give a budget: bits=4.5 (average bits a weight), time=1.05 (times the first candidate's)")
    measured = score_candidates(
        model,
        forward_loop,
        candidates=candidates,
        algorithm=algorithm,
        exclude=exclude,
        scores=scores,
        score_loop=score_loop,
        batches=batches,
    )
    return measured.allocate(bits=bits, time=time, time_of=time_of, costs=costs, tie_shared_inputs=tie_shared_inputs)


def _uniform_config(candidate: Candidate, algorithm: Mapping[str, Any], excluded: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            *candidate.entries(),
            *({"quantizer_name": f"{glob.escape(name)}.*", "enable": False} for name in excluded),
        ],
        "algorithm": {"method": "segquant", "progress": False, **_ALONE, **algorithm, **candidate.algorithm},
    }


def _extras(quantized: nn.Module) -> tuple[dict[str, float], dict[str, int]]:
    """By layer: the share of its input channels that are split by sign, and the elements of its low-rank factors."""
    splits, factors = {}, {}
    for name, module in quantized_layers(quantized).items():
        if not isinstance(module, SegLinear):
            continue
        layout, bank = module.layout, module.weight_quantizer
        sizes = zip(layout.in_segments, layout.polarity, strict=True)
        splits[name] = sum(size for size, polarity in sizes if polarity in SPLIT_BY_SIGN) / layout.in_features
        if bank.down is not None and bank.up is not None:
            factors[name] = bank.down.numel() + bank.up.numel()
    return splits, factors


def _noise(row: LayerSensitivity, reference: LayerSensitivity) -> float:
    """Of the model's output: as measured, or the reference's, scaled by the ratio of the local noises."""
    if row.noise is not None:
        return row.noise
    assert reference.noise is not None
    if not reference.local_noise:
        if row.local_noise:
            raise ValueError(f"{row.name} has no noise in the reference candidate to scale; use scores='measured'")
        return 0.0
    return reference.noise * row.local_noise / reference.local_noise
