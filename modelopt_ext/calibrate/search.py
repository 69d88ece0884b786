"""Choosing the treatment of every block of one Linear by the error of its output on sampled rows.

Pure functions on tensors; the driver moves modules. Letters: K input channels, N output channels, R sampled rows;
for input segment t and output group g the block's share of the output is  x[t] W[g,t]^T,  and its error

    || (x[t] - c) W[g,t]^T  -  Q((x[t] - c) / s) Q(W[g,t] * s)^T ||^2      over the sampled rows

(the shift's W c comes back exactly, so it cancels), with c, s and static scales fitted to other calls than the rows
come from (:meth:`LinearStatistics.folds`). Blocks are chosen apart: the sum over t of their errors is the
layer's, up to correlations between segments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..formats import QuantFormat, quantize_dequantize, row_amax
from ..nn.layout import SegLayout, input_block, weight_block
from ..plan import LinearPlan, slices
from .polarity import Treatment, candidates, is_polar, shift_of
from .smoothing import smoothing_scale
from .statistics import ChannelRange, LinearStatistics, Sample

_Setting = TypeVar("_Setting")

# A dearer treatment has to win at least this share of the error, or noise on the sample would decide.
WORTHWHILE = 0.01


@dataclass(frozen=True)
class SearchOptions:
    """What may be tried.

    Attributes:
        polarity: policy, see :mod:`.polarity`.
        shift_per_channel: granularity of the shift.
        alphas: smoothing strengths to try; None stands for no smoothing.
        clips: shares of the calibrated range to try as the range of static activation scales.
        second_product: whether ``auto`` may split activations by sign, at the cost of a second product.
        storage: every number chosen is exact in this dtype. With that of the model, casting all its tensors to it, as
            loaders do, changes no scale.
    """

    polarity: str = "auto"
    shift_per_channel: bool = True
    alphas: tuple[float | None, ...] = (None,)
    clips: tuple[float, ...] = (1.0,)
    second_product: bool = False
    storage: torch.dtype = torch.float32

    def stored(self, value: Tensor) -> Tensor:
        """``value`` as it comes back from storage, float32."""
        return value.to(self.storage).float()


@dataclass
class LinearSolution:
    """Everything that calibration decides about one Linear.

    Attributes:
        layout: its blocks.
        smoothing: (output groups, K) float32, or None.
        shift: (K,) float32, or None.
        input_amax: block name to () float32; empty when activations are dynamic or not quantized.
        weight_amax: block name to (rows, 1) or () float32; empty when the weight is not quantized.
        treatments: of each input segment, for reports.
        alphas: per output group and input segment the smoothing strength, None without, for reports.
        sqnr: output signal to quantization noise on the sampled rows, dB; NaN without samples.
    """

    layout: SegLayout
    smoothing: Tensor | None
    shift: Tensor | None
    input_amax: dict[str, Tensor] = field(default_factory=dict)
    weight_amax: dict[str, Tensor] = field(default_factory=dict)
    treatments: tuple[Treatment, ...] = ()
    alphas: tuple[tuple[float | None, ...], ...] = ()
    sqnr: float = math.nan

    @property
    def is_stock(self) -> bool:
        """True when two stock quantizers express it: one block, no smoothing, no shift."""
        return self.layout.is_single and self.smoothing is None and self.shift is None


def static_amax(range_: ChannelRange, smoothing: Tensor, polarity: str, fmt: QuantFormat) -> tuple[Tensor, ...]:
    """The static scales' amax of a (shifted) segment with channel ranges ``range_`` (k,) and ``smoothing`` (k,).

    Returns:
        One () tensor, or two, (positive, negative), where the polarity splits by sign.
    """
    if polarity == "none":
        return ((range_.amax / smoothing).amax(),)
    positive = (range_.high / smoothing).amax().clamp(min=0)
    negative = (-range_.low / smoothing).amax().clamp(min=0)
    if polarity == "dual" and fmt.is_integer:
        # The negative codes reach one further than the positive ones: -128 stands for the minimum.
        negative = negative * (fmt.max_code / -fmt.min_code)
    return positive, negative


def round_input(z: Tensor, polarity: str, fmt: QuantFormat, amax: tuple[Tensor, ...] | None) -> Tensor:
    """Round z (R, k) as an :class:`InputBank` block would; ``amax`` None means dynamic scales."""
    if polarity == "none":
        return quantize_dequantize(z, row_amax(z, fmt) if amax is None else amax[0], fmt)
    positive, negative = z.clamp(min=0), (-z).clamp(min=0)
    if polarity == "dual8":
        fmt = fmt.as_unsigned()
    else:
        negative = -negative
    amax = amax or (row_amax(positive, fmt), row_amax(negative, fmt))
    rounded = quantize_dequantize(negative, amax[1], fmt)
    return quantize_dequantize(positive, amax[0], fmt) + (-rounded if polarity == "dual8" else rounded)


def round_weight(weight: Tensor, segments: Sequence[int], fmt: QuantFormat | None) -> Tensor:
    """Round W (n, k), each of ``segments`` (sizes along n) with its own scales."""
    if fmt is None:
        return weight
    parts = weight.split(list(segments))
    return torch.cat([quantize_dequantize(part, row_amax(part, fmt), fmt) for part in parts])


def solve_linear(
    weight: Tensor,
    plan: LinearPlan,
    statistics: LinearStatistics,
    input_format: QuantFormat | None,
    weight_format: QuantFormat | None,
    options: SearchOptions,
    has_statistics: bool = True,
) -> LinearSolution:
    """Choose smoothing, shift, polarity and scales of every block.

    Args:
        weight: the plain weight, (N, K), any float dtype, on the device to work on.
        plan: the Linear's segments.
        statistics: of its inputs.
        input_format, weight_format: None where nothing is quantized.
        options: what may be tried.
        has_statistics: False when the rows are generated ones, good for their number but not for their values.
    """
    weight = weight.detach().float()
    groups = plan.out_segments if options.alphas != (None,) else (weight.shape[0],)
    weight_segments = plan.out_segments if weight_format is not None and not weight_format.per_row else groups
    folds = statistics.folds()
    chosen = [
        _solve_segment(
            statistics.whole.select(channels, weight.device),
            [fold.select(channels, weight.device) for fold in folds],
            weight[:, channels],
            _nested(groups, weight_segments),
            tag,
            input_format,
            weight_format,
            options,
            has_statistics,
        )
        for channels, tag in zip(plan.in_slices, plan.activations, strict=True)
    ]
    if all(alpha is None for choice in chosen for alpha in choice.alphas):
        # A cut that changes no number is not made: without smoothing all groups read the same codes.
        groups = (weight.shape[0],)
        weight_segments = weight_segments if weight_format is not None and not weight_format.per_row else groups
        chosen = [choice.merged() for choice in chosen]

    treatments = tuple(choice.treatment for choice in chosen)
    layout = SegLayout(
        in_segments=plan.in_segments,
        out_groups=groups,
        weight_segments=weight_segments,
        polarity=tuple(treatment.polarity for treatment in treatments),
    )
    smoothing = torch.cat([choice.smoothing for choice in chosen], dim=1)
    shift = torch.cat([choice.shift for choice in chosen]) if any(choice.treatment.shift for choice in chosen) else None
    solution = LinearSolution(
        layout=layout,
        smoothing=smoothing if any(alpha is not None for choice in chosen for alpha in choice.alphas) else None,
        shift=shift,
        treatments=treatments,
        alphas=tuple(zip(*(choice.alphas for choice in chosen), strict=True)),
    )
    signal, noise = sum(choice.signal for choice in chosen), sum(choice.noise for choice in chosen)
    if has_statistics and signal > 0:
        solution.sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise)
    if input_format is not None and not input_format.dynamic:
        for segment, choice in enumerate(chosen):
            for group, scales in enumerate(choice.input_amax):
                solution.input_amax[input_block(group, segment)] = scales[0]
                if len(scales) == 2:
                    solution.input_amax[input_block(group, segment, negative=True)] = scales[1]
    if weight_format is not None and not weight_format.dynamic:
        found = _weight_amax(weight, layout, solution.smoothing, weight_format)
        solution.weight_amax = {name: options.stored(amax) for name, amax in found.items()}
    return solution


def _nested(groups: tuple[int, ...], segments: tuple[int, ...]) -> list[tuple[int, ...]]:
    """For every group the sizes of the segments inside it."""
    bounds = slices(segments)
    return [
        tuple(part.stop - part.start for part in bounds if group.start <= part.start < group.stop)
        for group in slices(groups)
    ]


def _weight_amax(weight: Tensor, layout: SegLayout, smoothing: Tensor | None, fmt: QuantFormat) -> dict[str, Tensor]:
    found = {}
    for index, rows in enumerate(layout.weight_slices):
        part = weight[rows] if smoothing is None else weight[rows] * smoothing[layout.group_of(index)]
        for segment, channels in enumerate(layout.in_slices):
            found[weight_block(index, segment)] = row_amax(part[:, channels], fmt)
    return found


@dataclass
class _Choice:
    """The outcome for one input segment; lists run over the output groups."""

    treatment: Treatment
    shift: Tensor  # (k,)
    alphas: tuple[float | None, ...] = ()
    smoothing: Tensor = field(default_factory=lambda: torch.empty(0))  # (groups, k)
    input_amax: list[tuple[Tensor, ...]] = field(default_factory=list)
    noise: float = 0.0
    signal: float = 0.0

    def merged(self) -> _Choice:
        """The same without smoothing, for one group."""
        return replace(self, alphas=(None,), smoothing=self.smoothing[:1], input_amax=self.input_amax[:1])


def _solve_segment(
    whole: Sample,
    folds: list[Sample],
    weight: Tensor,
    groups: list[tuple[int, ...]],
    tag: str,
    input_format: QuantFormat | None,
    weight_format: QuantFormat | None,
    options: SearchOptions,
    has_statistics: bool,
) -> _Choice:
    """Try every treatment with every smoothing; weight is (N, k), ``groups`` has the weight segments of each group."""
    low, high = float(whole.range.low.min()), float(whole.range.high.max())
    polar = is_polar(tag, low, high) if has_statistics else bool(tag)
    treatments = candidates(
        options.polarity,
        polar=polar,
        affordable=options.second_product,
        fmt=input_format,
        has_statistics=has_statistics,
    )
    if not has_statistics:
        # Generated rows say nothing about errors: the finest treatment on offer is taken as it is.
        treatments = treatments[-1:]
    best: _Choice | None = None
    for treatment in treatments:
        choice = _try_treatment(whole, folds, weight, groups, treatment, input_format, weight_format, options)
        if best is None or choice.noise < best.noise * (1 - WORTHWHILE):
            best = choice
    assert best is not None
    return best


def _try_treatment(
    whole: Sample,
    folds: list[Sample],
    weight: Tensor,
    groups: list[tuple[int, ...]],
    treatment: Treatment,
    input_format: QuantFormat | None,
    weight_format: QuantFormat | None,
    options: SearchOptions,
) -> _Choice:
    """The best smoothing of every group under one treatment: tried on the folds, then fitted to all calls."""

    def shift_for(sample: Sample) -> Tensor:
        if treatment.shift:
            return options.stored(shift_of(sample.range.high, sample.range.low, options.shift_per_channel))
        return torch.zeros_like(sample.range.high)

    def fit(range_: ChannelRange, part: Tensor, alpha: float | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Smoothing (k,) and, for a shifted range, the static scales' unclipped amax; () where scales are dynamic."""
        scale = torch.ones_like(range_.high)
        if alpha is not None:
            scale = options.stored(smoothing_scale(range_.amax, part.abs().amax(dim=0), alpha))
        if input_format is None or input_format.dynamic:
            return scale, ()
        return scale, static_amax(range_, scale, treatment.polarity, input_format)

    def clipped(static: tuple[Tensor, ...], clip: float) -> tuple[Tensor, ...]:
        return tuple(options.stored(amax * clip) for amax in static)

    def noise_of(part: Tensor, sizes: Sequence[int], alpha: float | None, clips: Sequence[float]) -> list[float]:
        """Squared output error on all folds, for every clipping ratio."""
        noise = torch.zeros(len(clips), device=part.device)
        for fold in shifted:
            scale, static = fit(fold.range, part, alpha)
            z = fold.rows / scale
            rounded, reference = round_weight(part * scale, sizes, weight_format), fold.rows @ part.T
            for index, clip in enumerate(clips):
                codes = z
                if input_format is not None:
                    codes = round_input(z, treatment.polarity, input_format, clipped(static, clip) or None)
                noise[index] += (codes @ rounded.T - reference).square().sum()
        return noise.tolist()

    choice = _Choice(treatment, shift=shift_for(whole))
    shifted = [fold - shift_for(fold) for fold in folds]
    clips = options.clips if input_format is not None and not input_format.dynamic else (1.0,)
    fitted = []
    for sizes, part in zip(groups, weight.split([sum(sizes) for sizes in groups]), strict=True):
        # The signal is the whole output, shift included, or shifted segments would look worse than they are.
        choice.signal += sum(float((fold.rows @ part.T).square().sum()) for fold in folds)
        # One after the other: trying every pair took four times as long on a trained model and came out no better.
        alpha, least = _least((alpha, noise_of(part, sizes, alpha, clips[:1])[0]) for alpha in options.alphas)
        clip, least = _least(zip(clips, (least, *noise_of(part, sizes, alpha, clips[1:])), strict=True))
        choice.noise += least
        choice.alphas += (alpha,)
        scale, static = fit(whole.range - choice.shift, part, alpha)
        fitted.append((scale, clipped(static, clip)))
    choice.smoothing = torch.stack([scale for scale, _ in fitted])
    choice.input_amax = [static for _, static in fitted]
    return choice


def _least(tried: Iterable[tuple[_Setting, float]]) -> tuple[_Setting, float]:
    """The first setting with its noise, or a later one that is worthwhile."""
    (best, least), *others = tried
    for setting, noise in others:
        if noise < least * (1 - WORTHWHILE):
            best, least = setting, noise
    return best, least
