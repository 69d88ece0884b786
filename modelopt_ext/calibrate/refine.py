"""Making the weights of one Linear fit their codes better, once smoothing, shift, polarity and input scales are chosen.

For one output group with its segments side by side, in the domain where codes live (shifted, smoothed, rotated):
Z (R, K) sampled rows, Z' the same as the input quantizers round them, W (n, K) the weight. The group's output error is

    || Z W^T  -  Z' Q^T  -  Z L^T ||^2           Q on the weight's grid, L of low rank, evaluated in 16 bits

and the stages below lower it, each kept only if it does so on rows it was not fitted to:

    low rank      L = SVD of each block of W (SVDQuant, arXiv 2411.05007), what is left gets finer codes
    scales        each weight scale shrunk where clipping few weights helps the many
    correction    W replaced by the weight that best reproduces Z W^T from Z' (ridge regression towards W)
    GPTQ          codes that make up for each other's errors on Z' (arXiv 2210.17323)
    refit         L fitted again to what the codes left, weighted by Z (QERA, arXiv 2410.06040), codes once more
    bias          the mean of what error remains goes into the bias
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import QuantFormat, quantize_dequantize, row_amax
from ..nn.rotation import rotate_segments
from ..plan import slices
from .gptq import GPTQOptions, corrected_target, gptq
from .hessian import with_rounding
from .low_rank import checked_rank, low_rank, weighted_low_rank

# A stage has to win this share of the error on unseen rows, or noise of the sample would decide.
WORTHWHILE = 0.01
# rank="auto" takes a (larger) rank while that removes this share of the error that is left.
WORTH_A_RANK = 0.1
SMALLEST_RANK = 8


@dataclass(frozen=True)
class LowRankOptions:
    """The low-rank branch.

    Attributes:
        rank: of every block's branch; "auto" doubles it from 8 on while the output error falls by a tenth.
        max_rank: largest rank that "auto" tries.
        max_share: the rank is at most this share of the block's smaller side.
        over: what to do about a fixed rank above the block's size: "cap" it or "refuse".
    """

    rank: int | str = 32
    max_rank: int = 64
    max_share: float = 1.0
    over: str = "cap"

    def check(self, shape: tuple[int, int], name: str) -> None:
        """Refuse a fixed rank above a block's size, if so configured.

        Raises:
            ValueError: the message has the layer's ``name``.
        """
        if not isinstance(self.rank, str):
            checked_rank(self.rank, shape, name, self.over)

    def ranks(self, smaller_side: int) -> list[int]:
        """The ranks to try for blocks with that smaller side, smallest first."""
        limit = max(1, int(smaller_side * self.max_share))
        if not isinstance(self.rank, str):
            return [min(self.rank, limit)]
        largest = min(self.max_rank, limit)
        ranks = [min(SMALLEST_RANK, largest)]
        while ranks[-1] * 2 <= largest:
            ranks.append(ranks[-1] * 2)
        return ranks


@dataclass(frozen=True)
class RefineOptions:
    """Which stages may run.

    Attributes:
        low_rank: settings of the branch; None for no branch.
        gptq: settings of GPTQ; None rounds to nearest.
        correct_activations: whether the weight may make up for the rounding of the activations.
        weight_clips: shares of a weight scale's range to try; (1.0,) takes the maximum.
        bias_correction: whether the mean output error goes into the bias.
        rounds: how often the branch is fitted to the codes' error and the codes chosen again.
    """

    low_rank: LowRankOptions | None = None
    gptq: GPTQOptions | None = None
    correct_activations: bool = False
    weight_clips: tuple[float, ...] = (1.0,)
    bias_correction: bool = False
    rounds: int = 1

    def without_fitting(self) -> RefineOptions:
        """Only what does not take its numbers from the rows."""
        return replace(self, gptq=None, correct_activations=False, bias_correction=False, rounds=0)

    @property
    def does_nothing(self) -> bool:
        """True when the weight's own scales and nearest codes are the answer."""
        return (
            self.low_rank is None
            and self.gptq is None
            and self.weight_clips == (1.0,)
            and not (self.correct_activations or self.bias_correction)
        )


@dataclass
class Rows:
    """Sampled rows of a group, each (R, K) float32 in the codes' domain.

    Attributes:
        exact: Z, what the layer reads.
        rounded: Z', the same as its input quantizers round it.
        reference: the rows that the layer of the unquantized model reads in their place; ``exact`` where the layers
            before are not quantized yet.
        target: (R, n), what the group's output should be: that of W on ``reference``.
        products: (K, K) float32, Z^T Z of all calibration rows, sampled or not, times R and divided by their number;
            None to go by ``exact`` alone.
    """

    exact: Tensor
    rounded: Tensor
    reference: Tensor
    target: Tensor
    products: Tensor | None = None

    @property
    def hessian(self) -> Tensor:
        """Z'^T Z', (K, K) float32."""
        if self.products is None:
            return self.rounded.T @ self.rounded
        return with_rounding(self.products, self.exact, self.rounded)

    def select(self, chosen: Tensor) -> Rows:
        """Some of the rows, without what was seen of others; ``chosen`` is a boolean (R,)."""
        exact = self.exact[chosen]
        reference = exact if self.reference is self.exact else self.reference[chosen]
        return Rows(exact, self.rounded[chosen], reference, self.target[chosen])


@dataclass
class GroupWeights:
    """What stands for one group's W.

    Attributes:
        codes: Q, (n, K) float32, rounded and back.
        amax: of the codes, (n, K) float32.
        down, up: L = up @ down with (r, K) and (n, r); None without a branch.
        replaced: whether ``codes`` are something else than W - L rounded to nearest.
        bias: (n,) to be added to the output; None without.
        stages: what was done, for reports.
    """

    codes: Tensor
    amax: Tensor
    down: Tensor | None = None
    up: Tensor | None = None
    replaced: bool = False
    bias: Tensor | None = None
    stages: tuple[str, ...] = ()

    def output(self, rows: Rows) -> Tensor:
        """(R, n): what the quantized group gives for ``rows``, without ``bias``."""
        output = rows.rounded @ self.codes.T
        if self.down is not None and self.up is not None:
            output += (rows.exact @ self.down.T) @ self.up.T
        return output

    def noise(self, rows: Rows) -> float:
        """Squared output error on ``rows``."""
        error = self.output(rows) - rows.target
        return float((error if self.bias is None else error + self.bias).square().sum())

    @property
    def branch(self) -> Tensor | None:
        """L, (n, K)."""
        return None if self.down is None or self.up is None else self.up @ self.down


@dataclass
class Group:
    """One output group: its weight and where its scales begin and end.

    Attributes:
        plain: the group's rows of the model's weight, (n, K) float32.
        smoothing: (K,) float32, or None.
        columns: its input segments.
        rotation: channels that a Hadamard matrix mixes, for each input segment.
        row_segments: sizes along n that have scales of their own (per-tensor weights of several segments).
        fmt: the weight's format.
        storage: every scale is exact in this dtype; so is the branch if it has 16 bits, else in float16.
    """

    plain: Tensor
    smoothing: Tensor | None
    columns: tuple[slice, ...]
    rotation: tuple[int, ...]
    row_segments: tuple[int, ...]
    fmt: QuantFormat
    storage: torch.dtype = torch.float32
    weight: Tensor = field(init=False)
    _branches: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weight = self.weight_to_codes(self.plain)

    def weight_to_codes(self, weight: Tensor) -> Tensor:
        """A weight (rows, K) of the model in the domain of the codes: smoothed, rotated."""
        return rotate_segments(
            weight if self.smoothing is None else weight * self.smoothing, self.columns, self.rotation
        )

    def weight_to_model(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`weight_to_codes`."""
        weight = rotate_segments(weight, self.columns, self.rotation)
        return weight if self.smoothing is None else weight / self.smoothing

    def rows_to_codes(self, rows: Tensor) -> Tensor:
        """Shifted input rows (R, K) in the domain of the codes."""
        return rotate_segments(rows if self.smoothing is None else rows / self.smoothing, self.columns, self.rotation)

    def products_to_codes(self, products: Tensor) -> Tensor:
        """X^T X of shifted input rows X, (K, K) symmetric, in the domain of the codes."""
        return self.rows_to_codes(self.rows_to_codes(products).T)

    def blocks(self) -> list[tuple[slice, slice]]:
        """(rows, columns) of everything that has scales of its own, row by row."""
        return [(rows, columns) for rows in slices(self.row_segments) for columns in self.columns]

    def amax(self, weight: Tensor) -> Tensor:
        """The full range of ``weight`` for each of the group's scales, (n, K)."""
        spread = torch.empty_like(weight)
        for block in self.blocks():
            spread[block] = row_amax(weight[block], self.fmt)
        return self.stored(spread)

    def stored(self, value: Tensor) -> Tensor:
        """``value`` as it comes back from storage, float32."""
        return value.to(self.storage).float()

    def rounded(self, weight: Tensor, amax: Tensor) -> Tensor:
        """``weight`` (n, K) rounded to nearest."""
        if not self.fmt.is_nvfp4:
            return quantize_dequantize(weight, amax, self.fmt)
        codes = torch.empty_like(weight)
        for block in self.blocks():  # one scale for the whole tensor, the groups' scales follow from the values
            codes[block] = quantize_dequantize(weight[block], amax[block][0, 0], self.fmt)
        return codes

    def clipped_amax(self, weight: Tensor, importance: Tensor, clips: Sequence[float]) -> Tensor:
        """For each scale the share of the full range with the least error, channels weighted by ``importance`` (K,)."""
        full = self.amax(weight)
        best, least = full, torch.full_like(full, math.inf)
        for clip in clips:
            amax = self.stored(full * clip)
            error = (self.rounded(weight, amax) - weight).square() * importance
            pooled = torch.empty_like(error)
            for block in self.blocks():
                pooled[block] = _sum_per_scale(error[block], self.fmt)
            better = pooled < least
            best, least = torch.where(better, amax, best), torch.where(better, pooled, least)
        return best

    def branch(self, rank: int) -> tuple[Tensor, Tensor]:
        """Rank-``rank`` factors of every block side by side: (segments * rank, K) and (n, segments * rank)."""
        if rank not in self._branches:
            down = self.weight.new_zeros(rank * len(self.columns), self.weight.shape[1])
            ups = []
            for index, columns in enumerate(self.columns):
                factor, up = low_rank(self.weight[:, columns], min(rank, *self.weight[:, columns].shape))
                down[index * rank : index * rank + len(factor), columns] = factor
                ups.append(pad(up, (0, rank - up.shape[1])))
            self._branches[rank] = self.branch_in_16_bit(down, torch.cat(ups, dim=1))
        return self._branches[rank]

    def branch_in_16_bit(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The factors (codes' domain, float32) as they come back from where the module keeps them.

        Raises:
            ValueError: they overflow float16.
        """
        dtype = branch_dtype(self.storage)
        kept = self.weight_to_model(down).to(dtype).float()
        if not torch.isfinite(kept).all():
            raise ValueError("the low-rank branch overflows float16; cast the model to bfloat16 or lower the rank")
        return self.weight_to_codes(kept), up.to(dtype).float()


def branch_dtype(storage: torch.dtype) -> torch.dtype:
    """The 16-bit dtype of the low-rank branch of a model stored as ``storage``."""
    return storage if storage.itemsize == 2 else torch.float16


def _sum_per_scale(error: Tensor, fmt: QuantFormat) -> Tensor:
    """Sums of a block (n, k) over what each scale covers, expandable to (n, k)."""
    if fmt.per_row:
        return error.sum(dim=1, keepdim=True)
    if fmt.group is None or fmt.is_nvfp4:
        return error.sum()
    return error.unflatten(1, (-1, fmt.group)).sum(dim=2).repeat_interleave(fmt.group, dim=1)


@dataclass(frozen=True)
class _Recipe:
    """Stages to run on one group."""

    rank: int = 0
    clip: bool = False
    correct: bool = False
    gptq: bool = False
    refits: int = 0
    bias: bool = False

    @property
    def stages(self) -> tuple[str, ...]:
        names = {
            f"rank {self.rank}": self.rank,
            "scales": self.clip,
            "correction": self.correct,
            "gptq": self.gptq,
            "refit": self.refits,
            "bias": self.bias,
        }
        return tuple(name for name, done in names.items() if done)

    def solve(self, group: Group, rows: Rows, options: RefineOptions) -> GroupWeights:
        """Run the stages, fitted to ``rows``."""
        damping = (options.gptq or GPTQOptions()).damping
        needs_hessian = self.gptq or self.refits
        hessian = rows.hessian if needs_hessian else None
        importance = rows.rounded.square().mean(dim=0)
        wanted = group.weight
        if self.correct:
            wanted = corrected_target(rows.reference, rows.rounded, group.weight, damping)
        down, up = group.branch(self.rank) if self.rank else (None, None)
        for refit in range(self.refits + 1):
            if down is not None and up is not None:
                branch = up @ down
                rest = group.weight - branch
                # The branch reads the exact rows, the codes make up for the rounded ones.
                target = wanted - corrected_target(rows.exact, rows.rounded, branch, damping) if self.correct else rest
            else:
                rest, target = group.weight, wanted
            amax = group.clipped_amax(rest, importance, options.weight_clips) if self.clip else group.amax(rest)
            if self.gptq:
                assert hessian is not None
                assert options.gptq is not None
                codes = gptq(target, hessian, amax, group.fmt, options.gptq)
            else:
                codes = group.rounded(target, amax)
            if refit < self.refits:
                assert hessian is not None
                assert down is not None
                down, up = weighted_low_rank(wanted - codes, hessian, len(down))
                down, up = group.branch_in_16_bit(down, up)
        solved = GroupWeights(codes, amax, down, up, replaced=self.correct or self.gptq, stages=self.stages)
        if self.bias:
            solved.bias = group.stored((rows.target - solved.output(rows)).mean(dim=0))
        return solved


def nearest_codes(group: Group) -> GroupWeights:
    """The group's weight rounded to nearest, each scale at its full range."""
    amax = group.amax(group.weight)
    return GroupWeights(group.rounded(group.weight, amax), amax)


def refine_group(group: Group, rows: Rows, halves: tuple[Rows, Rows] | None, options: RefineOptions) -> GroupWeights:
    """Run the stages that lower the group's output error on rows they were not fitted to.

    Args:
        group: the weight and its grid.
        rows: all sampled rows, as the finished layer will read them.
        halves: two parts of them from different data, one to fit to and one unseen; None if nothing can be held out.
        options: which stages may run.

    Returns:
        The solution, fitted to all rows. On ``rows`` it is never worse than rounding to nearest.

    Raises:
        ValueError: rows that can't be used: NaN, infinity.
    """
    fit, unseen = halves or (rows, rows)
    best = _Recipe()
    least = best.solve(group, fit, options).noise(unseen)
    for change in _changes(group, options):
        if change.get("refits") and not best.rank:
            continue
        tried = replace(best, **change)
        noise = tried.solve(group, fit, options).noise(unseen)
        if noise < least * (1 - _worthwhile(best, tried, options)):
            best, least = tried, noise
    solution, plain = best.solve(group, rows, options), nearest_codes(group)
    return solution if solution.noise(rows) < plain.noise(rows) else plain


def _worthwhile(kept: _Recipe, tried: _Recipe, options: RefineOptions) -> float:
    """The share of the error that a stage has to remove."""
    if tried.rank == kept.rank:
        return WORTHWHILE
    if options.low_rank is not None and not isinstance(options.low_rank.rank, str):
        return 0.0  # a rank that was asked for only has to do no harm
    return WORTH_A_RANK


def _changes(group: Group, options: RefineOptions) -> list[dict[str, Any]]:
    """What to try, one after the other, on top of what was kept."""
    changes: list[dict[str, Any]] = []
    if options.low_rank is not None:
        smallest = min((len(group.weight), *(c.stop - c.start for c in group.columns)))
        changes += [{"rank": rank} for rank in options.low_rank.ranks(smallest)]
    if options.weight_clips != (1.0,):
        changes.append({"clip": True})
    if options.gptq is not None:
        changes.append({"gptq": True})
    if options.correct_activations:
        changes.append({"correct": True})
    if options.low_rank is not None and options.rounds:
        changes.append({"refits": options.rounds})
    if options.bias_correction:
        changes.append({"bias": True})
    return changes
