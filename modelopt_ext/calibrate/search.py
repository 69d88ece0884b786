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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import QuantFormat, quantize_dequantize, row_amax, stored_amax
from ..nn.layout import SegLayout, input_block, weight_block
from ..nn.rotation import rotate, rotate_segments
from ..plan import LinearPlan, slices
from .polarity import Treatment, candidates, is_polar, shift_of
from .refine import Group, GroupWeights, RefineOptions, Rows, branch_dtype, refine_group
from .smoothing import smoothing_scale
from .statistics import GROUPS, ChannelRange, LinearStatistics, RangedRows

_Setting = TypeVar("_Setting")

# A dearer treatment has to win at least this share of the error, or noise on the sample would decide,
WORTHWHILE = 0.01
# and this many standard errors of that share, from how it differs between groups of rows (prompts).
SIGNIFICANT = 1.5


@dataclass(frozen=True)
class SearchOptions:
    """What may be tried.

    Attributes:
        polarity: policy, see :mod:`.polarity`.
        shift_per_channel: granularity of the shift.
        alphas: smoothing strengths to try; None stands for no smoothing.
        ranges: kinds of ranges to try for smoothing and static scales, see :meth:`Sample.select`.
        clips: shares of the calibrated range to try as the range of static activation scales.
        second_product: whether ``auto`` may split activations by sign, at the cost of a second product.
        second_product_if_polar: whether it may on polar segments in any case.
        rotate: whether segments are rotated; "search" decides by the output error.
        refine: what is done to the weights afterwards.
        storage: every number chosen is exact in this dtype. With that of the model, casting all its tensors to it, as
            loaders do, changes no scale.
    """

    polarity: str = "auto"
    shift_per_channel: bool = True
    alphas: tuple[float | None, ...] = (None,)
    ranges: tuple[str, ...] = ("max",)
    clips: tuple[float, ...] = (1.0,)
    second_product: bool = False
    second_product_if_polar: bool = False
    rotate: bool | str = False
    refine: RefineOptions = field(default_factory=RefineOptions)
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
        weight_amax: block name to (rows, 1), (rows * groups, 1) or () float32; empty when the weight is not quantized.
        down, up: the low-rank branch as :class:`WeightBank` holds it, 16 bits, or None.
        correction: (N,) float32 to add to the output, or None.
        weight: (N, K) float32, the weight to store in the place of the model's own; None to keep that one.
        treatments: of each input segment, for reports.
        alphas: per output group and input segment the smoothing strength, None without, for reports.
        stages: per output group what was done to its weights, for reports.
        too_few_rows: whether weights were to be fitted to the rows, but those are too few different ones.
        hessian: what GPTQ went by, "rows" or "accumulated"; "" where it was not asked for.
        sqnr: output signal to quantization noise on the sampled rows, dB; NaN without samples.
    """

    layout: SegLayout
    smoothing: Tensor | None
    shift: Tensor | None
    input_amax: dict[str, Tensor] = field(default_factory=dict)
    weight_amax: dict[str, Tensor] = field(default_factory=dict)
    down: Tensor | None = None
    up: Tensor | None = None
    correction: Tensor | None = None
    weight: Tensor | None = None
    treatments: tuple[Treatment, ...] = ()
    alphas: tuple[tuple[float | None, ...], ...] = ()
    stages: tuple[tuple[str, ...], ...] = ()
    too_few_rows: bool = False
    hessian: str = ""
    sqnr: float = math.nan

    @property
    def is_stock(self) -> bool:
        """True when two stock quantizers express it: one block and nothing but scales and codes."""
        extras = (self.smoothing, self.shift, self.down, self.correction)
        return self.layout.is_single and all(extra is None for extra in extras)


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
    rounded = [quantize_dequantize(part, row_amax(part, fmt), fmt) for part in weight.split(list(segments))]
    return rounded[0] if len(rounded) == 1 else torch.cat(rounded)


def solve_linear(
    weight: Tensor,
    plan: LinearPlan,
    statistics: LinearStatistics,
    input_format: QuantFormat | None,
    weight_format: QuantFormat | None,
    options: SearchOptions,
    has_statistics: bool = True,
    reference: Tensor | None = None,
) -> LinearSolution:
    """Choose smoothing, shift, polarity and scales of every block.

    Args:
        weight: the plain weight, (N, K), any float dtype, on the device to work on.
        plan: the Linear's segments.
        statistics: of its inputs.
        input_format, weight_format: None where nothing is quantized.
        options: what may be tried.
        has_statistics: False when the rows are generated ones, good for their number but not for their values.
        reference: (R, K), what the unquantized model has in the place of the sampled rows; None where they are that.

    Raises:
        ValueError: NaN or infinity where the weights are refined.
    """
    weight = weight.detach().float()
    too_few = has_statistics and not statistics.can_fit_ranges
    if too_few:  # a setting that leaves no choice stays what it is
        options = replace(options, alphas=options.alphas[:1], clips=options.clips[:1])
    settled = too_few and input_format is not None and not input_format.dynamic
    groups = plan.out_segments if options.alphas != (None,) else (weight.shape[0],)
    weight_segments = plan.out_segments if weight_format is not None and not weight_format.has_row_scales else groups
    folds = statistics.folds()
    chosen = [
        _solve_segment(
            {
                kind: _Ranged(
                    statistics.whole.select(channels, weight.device, kind),
                    [fold.select(channels, weight.device, kind) for fold in folds],
                )
                for kind in (options.ranges if has_statistics else ("max",))
            },
            weight[:, channels],
            _nested(groups, weight_segments),
            tag,
            input_format,
            weight_format,
            options,
            has_statistics,
            settled,
        )
        for channels, tag in zip(plan.in_slices, plan.activations, strict=True)
    ]
    if all(alpha is None for choice in chosen for alpha in choice.alphas):
        # A cut that changes no number is not made: without smoothing all groups read the same codes.
        groups = (weight.shape[0],)
        weight_segments = weight_segments if weight_format is not None and not weight_format.has_row_scales else groups
        chosen = [choice.merged() for choice in chosen]

    treatments = tuple(choice.treatment for choice in chosen)
    layout = SegLayout(
        in_segments=plan.in_segments,
        out_groups=groups,
        weight_segments=weight_segments,
        polarity=tuple(treatment.polarity for treatment in treatments),
        rotation=tuple(treatment.rotation for treatment in treatments),
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
    signal, noise = sum(choice.signal for choice in chosen), sum(float(choice.noise.sum()) for choice in chosen)
    if has_statistics and signal > 0:
        solution.sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise)
    if input_format is not None and not input_format.dynamic:
        for segment, choice in enumerate(chosen):
            for group, scales in enumerate(choice.input_amax):
                solution.input_amax[input_block(group, segment)] = scales[0]
                if len(scales) == 2:
                    solution.input_amax[input_block(group, segment, negative=True)] = scales[1]
    if weight_format is None or weight_format.dynamic:
        return solution
    if not has_statistics or options.refine.does_nothing:
        found = _weight_amax(weight, layout, solution.smoothing, weight_format)
        solution.weight_amax = {name: options.stored(amax) for name, amax in found.items()}
        return solution
    _refine(solution, weight, statistics, chosen, input_format, weight_format, options, reference)
    return solution


def _refine(
    solution: LinearSolution,
    weight: Tensor,
    statistics: LinearStatistics,
    chosen: Sequence[_Choice],
    input_format: QuantFormat | None,
    weight_format: QuantFormat,
    options: SearchOptions,
    reference: Tensor | None,
) -> None:
    """Choose the codes of every output group and what goes with them, and write that into ``solution``."""
    layout, device = solution.layout, weight.device
    assert statistics.rows is not None
    rows = statistics.rows.to(device).float()
    unquantized = rows if reference is None else reference.to(device).float()
    if solution.shift is not None:
        rows, unquantized = rows - solution.shift, unquantized - solution.shift
    products = _products(statistics, solution.shift, device)
    first = statistics.first_half()
    stages = options.refine if statistics.can_fit_weights else options.refine.without_fitting()
    stored, solved = weight.clone(), []
    signal = noise = 0.0
    for index, out in enumerate(layout.out_slices):
        inside = [number for number, r in enumerate(layout.weight_slices) if out.start <= r.start < out.stop]
        group = Group(
            weight[out],
            None if solution.smoothing is None else solution.smoothing[index],
            layout.in_slices,
            layout.rotation,
            tuple(layout.weight_segments[number] for number in inside),
            weight_format,
            options.storage,
        )
        seen = _rows_of(group, rows, unquantized, layout.polarity, input_format, [c.input_amax[index] for c in chosen])
        if products is not None:
            seen.products = group.products_to_codes(products)
        halves = None if first is None else (seen.select(first.to(device)), seen.select(~first.to(device)))
        found = refine_group(group, seen, halves, stages)
        signal += float(seen.target.square().sum())
        noise += found.noise(seen)
        if found.replaced:
            # What is stored, in the model's own domain, rounds to exactly these codes again.
            stored[out] = group.weight_to_model(found.codes if found.branch is None else found.codes + found.branch)
        for number in inside:
            part = slice(layout.weight_slices[number].start - out.start, layout.weight_slices[number].stop - out.start)
            for segment, channels in enumerate(layout.in_slices):
                solution.weight_amax[weight_block(number, segment)] = _block_amax(
                    found.amax[part, channels], weight_format
                )
        if found.down is not None:
            found.down = group.weight_to_model(found.down)
        solved.append(found)
    solution.stages = tuple(found.stages for found in solved)
    solution.too_few_rows = stages != options.refine
    if stages.gptq is not None:
        solution.hessian = "rows" if statistics.moments is None else "accumulated"
    if signal > 0:
        solution.sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise)
    if any(found.replaced for found in solved):
        solution.weight = stored
    if any(found.bias is not None for found in solved):
        parts = [weight.new_zeros(len(found.codes)) if found.bias is None else found.bias for found in solved]
        solution.correction = torch.cat(parts)
    solution.down, solution.up = _branch_buffers(solved, options.storage)


def _products(statistics: LinearStatistics, shift: Tensor | None, device: torch.device) -> Tensor | None:
    """Sum of (x - shift)(x - shift)^T over all rows in the unit of the sample, (K, K); None if not accumulated.

    And None where the sample holds every row: rounding them says more than :func:`with_rounding` can.
    """
    if statistics.moments is None or statistics.rows is None or len(statistics.rows) == statistics.moments.count:
        return None
    return statistics.moments.about(shift, device).mul_(len(statistics.rows) / statistics.moments.count)


def _rows_of(
    group: Group,
    rows: Tensor,
    unquantized: Tensor,
    polarity: Sequence[str],
    fmt: QuantFormat | None,
    amax: Sequence[tuple[Tensor, ...]],
) -> Rows:
    """Shifted rows (R, K) as ``group`` reads and rounds them."""
    z = group.rows_to_codes(rows)
    rounded = z
    if fmt is not None:
        parts = zip(group.columns, polarity, amax, strict=True)
        rounded = torch.cat([round_input(z[:, c], sign, fmt, scales or None) for c, sign, scales in parts], dim=1)
    reference = z if unquantized is rows else group.rows_to_codes(unquantized)
    return Rows(z, rounded, reference, unquantized @ group.plain.T)


def _block_amax(amax: Tensor, fmt: QuantFormat) -> Tensor:
    """What the quantizer of a block holds, of the amax (n, k) of its weights."""
    if fmt.per_row:
        return amax[:, :1].clone()
    return amax[0, 0].clone() if fmt.group is None or fmt.is_nvfp4 else stored_amax(amax, fmt).clone()


def _branch_buffers(solved: Sequence[GroupWeights], storage: torch.dtype) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The factors of all groups, padded to the largest rank: (groups * rank, K) and (N, rank), 16 bits."""
    if all(found.down is None for found in solved):
        return None, None
    rank = max(0 if found.down is None else len(found.down) for found in solved)
    downs, ups = [], []
    for found in solved:
        down, up = found.down, found.up
        if down is None or up is None:
            down, up = found.codes.new_zeros(0, found.codes.shape[1]), found.codes.new_zeros(len(found.codes), 0)
        downs.append(pad(down, (0, 0, 0, rank - len(down))))
        ups.append(pad(up, (0, rank - up.shape[1])))
    dtype = branch_dtype(storage)
    return torch.cat(downs).to(dtype), torch.cat(ups).to(dtype)


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
        part = rotate_segments(part, layout.in_slices, layout.rotation)
        for segment, channels in enumerate(layout.in_slices):
            found[weight_block(index, segment)] = stored_amax(row_amax(part[:, channels], fmt), fmt)
    return found


@dataclass
class _Choice:
    """The outcome for one input segment; lists run over the output groups."""

    treatment: Treatment
    shift: Tensor  # (k,)
    alphas: tuple[float | None, ...] = ()
    smoothing: Tensor = field(default_factory=lambda: torch.empty(0))  # (groups, k)
    input_amax: list[tuple[Tensor, ...]] = field(default_factory=list)
    noise: Tensor = field(default_factory=lambda: torch.zeros(GROUPS))  # by group of rows
    signal: float = 0.0

    def merged(self) -> _Choice:
        """The same without smoothing, for one group."""
        return replace(self, alphas=(None,), smoothing=self.smoothing[:1], input_amax=self.input_amax[:1])


@dataclass
class _Ranged:
    """The sampled rows with their own range of one kind, and the folds with those of the other halves."""

    whole: RangedRows
    folds: list[RangedRows]


def _solve_segment(
    samples: Mapping[str, _Ranged],
    weight: Tensor,
    groups: list[tuple[int, ...]],
    tag: str,
    input_format: QuantFormat | None,
    weight_format: QuantFormat | None,
    options: SearchOptions,
    has_statistics: bool,
    settled: bool,
) -> _Choice:
    """Try every treatment with every smoothing; weight is (N, k), ``groups`` has the weight segments of each group.

    With ``settled`` the cheapest treatment is taken as it is.
    """
    usual, *others = samples.values()
    low, high = float(usual.whole.range.low.min()), float(usual.whole.range.high.max())
    polar = is_polar(tag, low, high) if has_statistics else bool(tag)
    treatments = candidates(
        options.polarity,
        polar=polar,
        affordable=options.second_product or (polar and options.second_product_if_polar),
        fmt=input_format,
        has_statistics=has_statistics,
        rotate=options.rotate,
        channels=weight.shape[1],
    )
    if not has_statistics:
        # Generated rows say nothing about errors: the finest treatment on offer is taken as it is.
        treatments = treatments[-1:]
    elif settled:
        treatments = treatments[:1]

    def tried(sample: _Ranged, treatment: Treatment) -> _Choice:
        return _try_treatment(sample, weight, groups, treatment, input_format, weight_format, options)

    best = tried(usual, treatments[0])
    for treatment in treatments[1:]:
        choice = tried(usual, treatment)
        if is_better(choice.noise, best.noise):
            best = choice
    for sample in others:  # other kinds of ranges, for the treatment that is best with the first
        choice = tried(sample, best.treatment)
        if is_better(choice.noise, best.noise):
            best = choice
    return best


def _try_treatment(
    sample: _Ranged,
    weight: Tensor,
    groups: list[tuple[int, ...]],
    treatment: Treatment,
    input_format: QuantFormat | None,
    weight_format: QuantFormat | None,
    options: SearchOptions,
) -> _Choice:
    """The best smoothing of every group under one treatment: tried on the folds, then fitted to all calls."""

    whole, folds = sample.whole, sample.folds

    def shift_for(rows: RangedRows) -> Tensor:
        if treatment.shift:
            return options.stored(shift_of(rows.range.high, rows.range.low, options.shift_per_channel))
        return torch.zeros_like(rows.range.high)

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

    def noise_of(
        part: Tensor, references: list[Tensor], sizes: Sequence[int], alpha: float | None, clips: Sequence[float]
    ) -> list[Tensor]:
        """Squared output error on all folds, by group of rows, for every clipping ratio."""
        noise = torch.zeros(len(clips), GROUPS, device=part.device)
        for fold, reference in zip(shifted, references, strict=True):
            scale, static = fit(fold.range, part, alpha)
            z = rotate(fold.rows / scale, treatment.rotation)
            smoothed = rotate(part * scale, treatment.rotation)
            rounded = round_weight(smoothed, sizes, weight_format)
            for index, clip in enumerate(clips):
                codes = z
                if input_format is not None:
                    codes = round_input(z, treatment.polarity, input_format, clipped(static, clip) or None)
                noise[index].index_add_(0, fold.groups, (codes @ rounded.T).sub_(reference).square_().sum(dim=1))
        return list(noise.cpu())

    choice = _Choice(treatment, shift=shift_for(whole))
    shifted = [fold - shift_for(fold) for fold in folds]
    clips = options.clips if input_format is not None and not input_format.dynamic else (1.0,)
    fitted = []
    for sizes, part in zip(groups, weight.split([sum(sizes) for sizes in groups]), strict=True):
        # The signal is the whole output, shift included, or shifted segments would look worse than they are.
        choice.signal += sum(float((fold.rows @ part.T).square().sum()) for fold in folds)
        references = [fold.rows @ part.T for fold in shifted]
        # One after the other: trying every pair took four times as long on a trained model and came out no better.
        alpha, noise = least(
            (alpha, noise_of(part, references, sizes, alpha, clips[:1])[0]) for alpha in options.alphas
        )
        clip, noise = least(zip(clips, (noise, *noise_of(part, references, sizes, alpha, clips[1:])), strict=True))
        choice.noise += noise
        choice.alphas += (alpha,)
        scale, static = fit(whole.range - choice.shift, part, alpha)
        fitted.append((scale, clipped(static, clip)))
    choice.smoothing = torch.stack([scale for scale, _ in fitted])
    choice.input_amax = [static for _, static in fitted]
    return choice


def least(tried: Iterable[tuple[_Setting, Tensor]]) -> tuple[_Setting, Tensor]:
    """The first setting with its noise (by group of rows), or a later one that is better."""
    (best, noise), *others = tried
    for setting, its_noise in others:
        if is_better(its_noise, noise):
            best, noise = setting, its_noise
    return best, noise


def is_better(tried: Tensor, kept: Tensor) -> bool:
    """Whether a setting's held-out error is so much less that it will be on other data, too.

    The sum has to fall by the share :data:`WORTHWHILE`, and by :data:`SIGNIFICANT` standard errors of that share: what
    one prompt in eight gains says little about the ninth. With r = sum(tried) / sum(kept) the share is 1 - r, and the
    variance of a ratio of sums over n groups g is about n / (n - 1) sum (tried_g - r kept_g)^2 / sum(kept)^2. Groups
    that gain alike leave it small, however they differ in size.

    Args:
        tried, kept: (groups,) squared errors of two settings on the same rows; 0 for a group without rows.
    """
    seen = (kept > 0) | (tried > 0)
    tried, kept = tried[seen].double(), kept[seen].double()
    count, total = len(kept), float(kept.sum())
    ratio = float(tried.sum()) / total if total > 0 else math.inf
    if not ratio < 1 - WORTHWHILE:
        return False
    if count < 2:
        return True
    error = math.sqrt(count / (count - 1)) * float((tried - ratio * kept).norm()) / total
    return 1 - ratio > SIGNIFICANT * error
