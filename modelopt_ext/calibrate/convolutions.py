"""Convolutions: which can be segmented, and the search over one convolution's input segments.

The decisions are a Linear's (:mod:`.search`) on windows instead of rows: smoothing, shift, polarity and clipping of
every input segment by the error of the output, on windows of calls that the scales were not fitted to. What differs: a
channel has one scale and one shift for all kh * kw places at which a window holds it, and no tag says what produced a
segment, so its values themselves tell whether it is polar.

Segments are those that dataflow found in front of the convolution (``SegmentPlan.convs``), usually with a GroupNorm in
between. Where one of its groups spans the cut, that group's statistics mix; but it is shifted and scaled as a whole, so
the two sides stay as unlike as they were, and the cut is kept.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule
from torch import Tensor, nn

from ..formats import SMALLEST_AMAX, QuantFormat, quantize_dequantize, row_amax
from ..nn.layout import SegLayout, input_block, weight_block
from ..plan import slices
from .polarity import Treatment, candidates, is_polar, shift_of
from .search import LinearSolution, SearchOptions, is_better, least, round_input, static_amax
from .smoothing import smoothing_scale
from .statistics import ChannelRange, LinearStatistics, RangedRows, Sample

logger = logging.getLogger(__name__)

# After SiLU or GELU about half the values are negative; a segment with fewer than this share of them has no use for
# codes of their own.
POLAR_NEGATIVES = 0.25


def with_convolutions(config: Mapping[str, Any], num_bits: int | tuple[int, int] = 8) -> dict[str, Any]:
    """A copy of a config that also quantizes 2-D convolutions: weights per output channel, static activations.

        mtq.quantize(unet, modelopt_ext.with_convolutions(modelopt_ext.SEGQUANT_CFG), forward_loop)

    Args:
        config: a ModelOpt config, a SegQuant preset say. Entries that exclude layers exclude convolutions, too.
        num_bits: 8 for INT8, (4, 3) for FP8 E4M3.
    """
    changed = copy.deepcopy(dict(config))
    entries = changed["quant_cfg"]
    start = 1 if entries and entries[0].get("quantizer_name") == "*" and "parent_class" not in entries[0] else 0
    entries[start:start] = [
        {"quantizer_name": name, "parent_class": "nn.Conv2d", "cfg": {"num_bits": num_bits, "axis": axis}}
        for name, axis in (("*weight_quantizer", 0), ("*input_quantizer", None))
    ]
    return changed


Formats = tuple[QuantFormat | None, QuantFormat | None]
"""Of a layer's input and of its weight; None where nothing is quantized."""


def segmentable_convolutions(model: nn.Module) -> dict[str, Formats]:
    """The quantized convolutions that :func:`solve_convolution` serves, by name; ModelOpt's max serves the others.

    Those are grouped and depthwise convolutions, Conv1d, Conv3d and transposed ones, and formats other than one scale a
    tensor (activations) and one an output channel or a tensor (weights).

    Raises:
        ValueError: a weight was folded by an earlier quantization.
    """
    found = {}
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Conv2d) and isinstance(module, QuantModule) and module.groups == 1):
            continue
        if not (hasattr(module, "weight_quantizer") and hasattr(module, "input_quantizer")):
            continue
        if getattr(module.weight_quantizer, "_folded", False):
            raise ValueError(f"{name}: its weight was folded; run segquant on a freshly loaded model")
        try:
            formats = _formats(name, module)
        except ValueError as error:
            logger.warning("segquant: %s; %s gets ModelOpt's max calibration, without segments", error, name)
            continue
        if formats != (None, None):
            found[name] = formats
    return found


def _formats(name: str, module: Any) -> Formats:
    """Formats of input and weight; ValueError where segments can't carry them."""
    input_format = QuantFormat.of(module.input_quantizer, f"{name}.input_quantizer")
    weight_format = QuantFormat.of(module.weight_quantizer, f"{name}.weight_quantizer")
    if input_format is not None and input_format != QuantFormat(input_format.num_bits, dynamic=input_format.dynamic):
        raise ValueError(f"{name}.input_quantizer: a convolution's activations have one scale: axis=None, signed")
    if weight_format is not None and weight_format != QuantFormat(weight_format.num_bits, weight_format.per_row):
        raise ValueError(f"{name}.weight_quantizer: a convolution's weight has static scales: axis=0 or axis=None")
    return input_format, weight_format


def solve_convolution(
    weight: Tensor,
    segments: tuple[int, ...],
    statistics: LinearStatistics,
    input_format: QuantFormat | None,
    weight_format: QuantFormat | None,
    options: SearchOptions,
    has_statistics: bool = True,
) -> LinearSolution:
    """Choose smoothing, shift, polarity and scales of every input segment.

    Args:
        weight: the plain weight, (N, C, kh, kw), any float dtype, on the device to work on.
        segments: sizes of the input segments; they add up to C.
        statistics: ranges of C channels and rows of C * kh * kw values (:class:`.windows.WindowStatistics`).
        input_format, weight_format: None where nothing is quantized.
        options: what may be tried.
        has_statistics: False when the rows are generated ones; no shift and no polarity is then chosen.

    Returns:
        A solution with one output group over C input channels; per-channel ``weight_amax`` has the shape (N, 1, 1, 1).
    """
    weight = weight.detach().float().flatten(2)
    samples = [statistics.whole, *statistics.fine_folds()]
    chosen = []
    for channels in slices(segments):
        whole, *folds = (_cut(sample, channels, weight) for sample in samples)
        block = _Block(weight[:, channels], whole, folds, input_format, weight_format, options, has_statistics)
        chosen.append(block.solve())
    smoothed = any(choice.alpha is not None for choice in chosen)
    solution = LinearSolution(
        layout=SegLayout(
            in_segments=segments,
            out_groups=(weight.shape[0],),
            weight_segments=(weight.shape[0],),
            polarity=tuple(choice.treatment.polarity for choice in chosen),
        ),
        smoothing=torch.cat([choice.smoothing for choice in chosen])[None] if smoothed else None,
        shift=torch.cat([choice.shift for choice in chosen]) if any(c.treatment.shift for c in chosen) else None,
        treatments=tuple(choice.treatment for choice in chosen),
        alphas=(tuple(choice.alpha for choice in chosen),),
    )
    signal, noise = sum(choice.signal for choice in chosen), sum(float(choice.noise.sum()) for choice in chosen)
    if has_statistics and signal > 0:
        solution.sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise)
    for segment, (channels, choice) in enumerate(zip(slices(segments), chosen, strict=True)):
        for negative, amax in enumerate(choice.input_amax):
            solution.input_amax[input_block(0, segment, bool(negative))] = amax
        if weight_format is not None:
            part = weight[:, channels] * choice.smoothing[:, None]
            amax = options.stored(row_amax(part.flatten(1), weight_format))
            solution.weight_amax[weight_block(0, segment)] = amax.reshape(-1, 1, 1, 1) if amax.dim() else amax
    return solution


def _cut(sample: Sample, channels: slice, weight: Tensor) -> RangedRows:
    """A segment of a sample beside ``weight`` (N, C, taps), rows as (R, c, taps)."""
    rows = sample.rows.unflatten(1, (-1, weight.shape[2]))[:, channels]
    range_, groups = sample.seen.range.select(channels, weight.device), sample.groups.to(weight.device)
    return RangedRows(rows.to(weight.device).float(), range_, groups)


@dataclass
class _Choice:
    """The outcome for one input segment of c channels."""

    treatment: Treatment
    shift: Tensor  # (c,)
    alpha: float | None
    smoothing: Tensor  # (c,)
    input_amax: tuple[Tensor, ...]
    noise: Tensor  # (folds,)
    signal: float


@dataclass
class _Block:
    """One input segment: weight (N, c, taps) and samples with rows (R, c, taps) and ranges (c,)."""

    weight: Tensor
    whole: RangedRows
    folds: list[RangedRows]
    input_format: QuantFormat | None
    weight_format: QuantFormat | None
    options: SearchOptions
    has_statistics: bool
    _outputs: list[Tensor] = field(default_factory=list)

    def solve(self) -> _Choice:
        """The treatment with the least error of the output; a dearer one has to be worthwhile."""
        options = self.options
        treatments = candidates(
            options.polarity,
            polar=self.has_statistics and self._is_polar(),
            affordable=options.second_product,
            fmt=self.input_format,
            has_statistics=self.has_statistics,
        )
        if not self.has_statistics:
            treatments = treatments[:1]
        best: _Choice | None = None
        for treatment in treatments:
            choice = self._try(treatment)
            if best is None or is_better(choice.noise, best.noise):
                best = choice
        assert best is not None
        return best

    def _is_polar(self) -> bool:
        many = float((self.whole.rows < 0).float().mean()) >= POLAR_NEGATIVES
        low, high = float(self.whole.range.low.min()), float(self.whole.range.high.max())
        return many and is_polar("by its values", low, high)

    def _try(self, treatment: Treatment) -> _Choice:
        """Search the smoothing, then the clipping, under one treatment; then fit both to all calls."""
        clips = self.options.clips if self.input_format is not None and not self.input_format.dynamic else (1.0,)
        alpha, noise = least((alpha, self._noise(treatment, alpha, clips[0])) for alpha in self.options.alphas)
        others = ((clip, self._noise(treatment, alpha, clip)) for clip in clips[1:])
        clip, noise = least(chain([(clips[0], noise)], others))
        shift, smoothing, amax = self._fit(self.whole.range, treatment, alpha, clip)
        signal = sum(float(output.square().sum()) for output in self._references())
        return _Choice(treatment, shift, alpha, smoothing, amax, noise, signal)

    def _fit(
        self, range_: ChannelRange, treatment: Treatment, alpha: float | None, clip: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Shift (c,), smoothing (c,) and the static scales' amax, () where scales are dynamic."""
        stored = self.options.stored
        shift, smoothing = torch.zeros_like(range_.high), torch.ones_like(range_.high)
        if treatment.shift:
            shift = stored(shift_of(range_.high, range_.low, self.options.shift_per_channel))
        range_ = range_ - shift
        if alpha is not None:
            smoothing = stored(smoothing_scale(range_.amax, self.weight.abs().amax(dim=(0, 2)), alpha))
        if self.input_format is None or self.input_format.dynamic:
            return shift, smoothing, ()
        static = static_amax(range_, smoothing, treatment.polarity, self.input_format)
        amax = tuple(stored(value * clip) for value in static)
        if treatment == Treatment(shift=True) and self.input_format.is_integer:
            # Zero gets a code of its own: padding, and most of what SiLU leaves, is (nearly) zero, and one rounding
            # error that all of it shares would add up over a window.
            step = smoothing * amax[0].clamp(min=SMALLEST_AMAX) / self.input_format.max_code
            shift = stored((shift / step).round() * step)
        return shift, smoothing, amax

    def _references(self) -> list[Tensor]:
        if not self._outputs:
            self._outputs = [fold.rows.flatten(1) @ self.weight.flatten(1).T for fold in self.folds]
        return self._outputs

    def _noise(self, treatment: Treatment, alpha: float | None, clip: float) -> Tensor:
        """Squared error of the output on every fold, (folds,), each rounded with scales fitted to the others' range."""
        noise = []
        for fold, reference in zip(self.folds, self._references(), strict=True):
            shift, smoothing, amax = self._fit(fold.range, treatment, alpha, clip)
            weight = (self.weight * smoothing[:, None]).flatten(1)
            rounded = weight
            if self.weight_format is not None:
                rounded = quantize_dequantize(weight, row_amax(weight, self.weight_format), self.weight_format)
            z = ((fold.rows - shift[:, None]) / smoothing[:, None]).flatten(1)
            codes = z
            if self.input_format is not None:
                codes = round_input(z, treatment.polarity, self.input_format, amax or None)
            output = codes @ rounded.T
            if treatment.shift:  # what the shift took out comes back through the bias
                output = output + rounded @ (shift / smoothing).repeat_interleave(self.weight.shape[2])
            noise.append((output - reference).square().sum())
        return torch.stack(noise).cpu()
