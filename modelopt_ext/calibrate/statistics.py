"""What one pass over the calibration data leaves behind for every Linear: channel ranges and a sample of input rows.

Everything that calibration decides later is local to a layer and uses only this. Memory is the sample: at most
``samples`` rows a Linear, kept on the CPU in 16 bits, however long the pass is, and for Linears whose Hessian is asked
for over all rows, that matrix (:mod:`.hessian`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, Protocol

import numpy
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from ..positions import CallPositions
from .hessian import SecondMoments

# Ranges are kept apart for up to this many spans of consecutive positions (calls, unless marked otherwise), and for
# every other item of a batch, so that a choice can be tried on data that its ranges do not come from.
SPANS = 8
# Fewer items a call may be one prompt with and without guidance, which are no two samples of the same thing.
ITEMS_TO_SPLIT = 4
# Rows are told apart by where they come from in at most this many groups: prompts, or spans of calls.
GROUPS = 8
# Different rows that a Linear needs for each of its channels before what depends on single rows is fitted to them.
ROWS_A_CHANNEL = 4


class Rows(Protocol):
    """A tensor (rows, channels), or what stands in for one too large to be made."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows, then of channels."""

    @property
    def dtype(self) -> torch.dtype:
        """That of the rows."""

    @property
    def device(self) -> torch.device:
        """Where the rows are."""

    def index_select(self, dim: int, index: Tensor, /) -> Tensor:
        """Some rows, with ``dim`` 0."""


@dataclass
class ChannelRange:
    """Largest and smallest value of every channel over some rows, each (K,) float32."""

    high: Tensor
    low: Tensor

    @property
    def amax(self) -> Tensor:
        """(K,) float32 >= 0, largest magnitudes."""
        return torch.maximum(self.high, -self.low)

    @property
    def is_finite(self) -> bool:
        """False when any value was NaN or infinite."""
        return bool(torch.isfinite(self.high).all() and torch.isfinite(self.low).all())

    def __or__(self, other: ChannelRange) -> ChannelRange:
        """The range of both sets of rows."""
        device = self.high.device
        return ChannelRange(
            torch.maximum(self.high, other.high.to(device)), torch.minimum(self.low, other.low.to(device))
        )

    def __sub__(self, shift: Tensor) -> ChannelRange:
        """The range after subtracting ``shift`` (K,)."""
        return ChannelRange(self.high - shift, self.low - shift)

    def select(self, channels: slice, device: torch.device) -> ChannelRange:
        """The range of some channels, on ``device``."""
        return ChannelRange(self.high[channels].to(device), self.low[channels].to(device))


@dataclass
class RunningRange:
    """The range of some calls, and the mean of the ranges of each."""

    range: ChannelRange
    total: ChannelRange  # sums over calls, float64: exact for float32 numbers of like size, so in whatever order
    calls: int = 1

    @classmethod
    def of_call(cls, seen: ChannelRange) -> RunningRange:
        """Of one call."""
        return cls(seen, ChannelRange(seen.high.double(), seen.low.double()))

    def __or__(self, other: RunningRange) -> RunningRange:
        """The same of both sets of calls."""
        device = self.total.high.device
        total = ChannelRange(self.total.high + other.total.high.to(device), self.total.low + other.total.low.to(device))
        return RunningRange(self.range | other.range, total, self.calls + other.calls)

    @property
    def mean(self) -> ChannelRange:
        """The mean over calls, in diffusion over timesteps, of each channel's largest and smallest value."""
        return ChannelRange((self.total.high / self.calls).float(), (self.total.low / self.calls).float())


@dataclass
class Sample:
    """Some rows (R, K) and where the range of their channels is taken from, themselves or other rows.

    Attributes:
        rows: (R, K).
        seen: ranges of the calls to take the range from.
        source: rows of those calls, (R', K), for percentiles.
        groups: (R,) int64, which of :data:`GROUPS` groups of items or calls each row comes from.
    """

    rows: Tensor
    seen: RunningRange
    source: Tensor
    groups: Tensor

    @property
    def range(self) -> ChannelRange:
        """The full range of those calls."""
        return self.seen.range

    def select(self, channels: slice, device: torch.device, kind: str = "max") -> RangedRows:
        """Some channels, on ``device``, rows in float32, with a range of one kind.

        Args:
            channels: which.
            device: where to.
            kind: ``"max"``; ``"mean"``, of the maxima of each call (per-timestep maxima); or ``"p99.9"`` and the like,
                the percentile of each channel's values on either side, over the sampled rows.
        """
        if kind == "mean":
            range_ = self.seen.mean
        elif kind == "max":
            range_ = self.seen.range
        else:
            return RangedRows(
                self.rows[:, channels].to(device).float(),
                _percentile_range(self.source[:, channels].to(device).float(), float(kind[1:]) / 100),
                self.groups.to(device),
            )
        rows = self.rows[:, channels].to(device).float()
        return RangedRows(rows, range_.select(channels, device), self.groups.to(device))


@dataclass
class RangedRows:
    """Some rows (R, k) float32, a range of channels to quantize them with, and each row's group (R,), see Sample."""

    rows: Tensor
    range: ChannelRange
    groups: Tensor

    def __sub__(self, shift: Tensor) -> RangedRows:
        """The rows and their range after subtracting ``shift`` (k,)."""
        return RangedRows(self.rows - shift, self.range - shift, self.groups)


def _percentile_range(rows: Tensor, share: float) -> ChannelRange:
    # Sorted once for both ends; torch.quantile refuses large tensors.
    ordered = rows.sort(dim=0).values
    last = len(rows) - 1
    return ChannelRange(ordered[round(share * last)], ordered[round((1 - share) * last)])


@dataclass
class LinearStatistics:
    """The inputs that a Linear saw, x (rows, K) over all calls.

    ``one | other`` are the statistics of both sets of calls: the same, up to the rounding of sums, that one object
    would hold after all of them, if both were made with one ``samples`` and ``seed`` and no position occurs in both.

    Attributes:
        samples: largest number of rows to keep.
        seed: of the sample. A row's chance to stay follows from this and from where the row comes from alone.
        rows: (at most ``samples``, K) bfloat16 or float16, on the CPU: a uniform sample without replacement.
        rows_seen: number of rows over all calls.
        calls: number of calls.
        moments: of all rows, sampled or not; None where nobody asked for them.
    """

    samples: int
    seed: int
    rows: Tensor | None = None
    rows_seen: int = 0
    calls: int = 0
    moments: SecondMoments | None = None
    _spans: dict[int, RunningRange] = field(default_factory=dict)  # by position // _positions_a_span
    _positions_a_span: int = 1
    _alternate: tuple[RunningRange, RunningRange] | None = None
    _by_item: dict[int, RunningRange] = field(default_factory=dict)  # by item of the batch % GROUPS
    _items: int = ITEMS_TO_SPLIT
    _tokens: int = 0
    _keys: Tensor | None = None  # (R,) float64
    _origin: Tensor | None = None  # (R, 4) int64: position, call of the position, item of the batch, row of the call
    _first: int = -1  # the position of the first call
    _latest: int = -1  # the largest position so far
    _repeats: int = 0  # calls since it was reached, the one that reached it not counted

    @torch.no_grad()
    def update(self, x: Tensor, position: int | None = None) -> None:
        """Take in the input of one call.

        Args:
            x: (..., K).
            position: of the call in the whole calibration data, see :mod:`..positions`; by default its number.
        """
        if x.numel() == 0:
            return
        x = x.detach().reshape(x.shape[0] if x.dim() > 1 else 1, -1, x.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        self._take(x, rows, position)
        if self.moments is not None:
            self.moments.update(rows)

    def _take(self, x: Tensor, rows: Rows, position: int | None) -> None:
        """Take in one call.

        Args:
            x: (items, tokens, K), the values whose ranges count.
            rows: what to sample, as many rows of each item, item after item.
            position: see :meth:`update`.
        """
        position = self.calls if position is None else position
        self._first = position if not self.calls else self._first
        self._repeats = 0 if position > self._latest else self._repeats + 1
        self._latest = max(self._latest, position)
        self._extend_ranges(x, position)
        self._sample(rows, position, len(x))
        self.rows_seen += rows.shape[0]
        self.calls += 1

    def _extend_ranges(self, x: Tensor, position: int) -> None:
        """Take in the ranges of one call, x (items, tokens, K)."""
        items = [_range_of(x[item::GROUPS]) for item in range(min(len(x), GROUPS))]
        self._by_item = _union(self._by_item, {item: RunningRange.of_call(seen) for item, seen in enumerate(items)})
        even, odd = (RunningRange.of_call(reduce(ChannelRange.__or__, items[start::2] or items)) for start in (0, 1))
        self._items = min(self._items, len(x))
        self._tokens = max(self._tokens, x.shape[1])
        if self._alternate is not None:
            even, odd = self._alternate[0] | even, self._alternate[1] | odd
        self._alternate = even, odd
        while position // self._positions_a_span >= SPANS:
            self._spans = _joined(self._spans)
            self._positions_a_span *= 2
        whole = RunningRange.of_call(reduce(ChannelRange.__or__, items))
        self._spans = _union(self._spans, {position // self._positions_a_span: whole})

    def _sample(self, x: Rows, position: int, items: int) -> None:
        # Every row draws a random key; the rows with the smallest keys stay. One pass, exact, and most rows of a long
        # pass are turned away before they are copied. Keys come from a counter-based generator, so that they depend on
        # nothing but where a row comes from, not on what was drawn before, or in which process.
        stream = numpy.random.Philox(key=[self.seed, 0], counter=[0, self._repeats, position, 0])
        keys = torch.from_numpy(numpy.random.Generator(stream).random(x.shape[0]))
        if self._keys is not None and len(self._keys) == self.samples:
            chosen = (keys < self._keys.max()).nonzero().squeeze(1)
        else:
            chosen = torch.arange(len(keys))
        if len(chosen) > self.samples:
            chosen = chosen[_smallest(keys[chosen], self.samples)]
        if not len(chosen):
            return
        dtype = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
        rows = x.index_select(0, chosen.to(x.device)).to("cpu", dtype)
        call = torch.tensor([[position, self._repeats]]).expand(len(chosen), 2)
        origin = torch.cat([call, torch.stack([chosen // (x.shape[0] // items), chosen], dim=1)], dim=1)
        self._keep(rows, keys[chosen], origin)

    def _keep(self, rows: Tensor, keys: Tensor, origin: Tensor) -> None:
        """Add rows to the sample, and drop what is too much."""
        if self.rows is not None and self._keys is not None and self._origin is not None:
            rows = torch.cat([self.rows, rows])
            keys, origin = torch.cat([self._keys, keys]), torch.cat([self._origin, origin])
        if len(keys) > self.samples:
            kept = _smallest(keys, self.samples)
            rows, keys, origin = rows[kept], keys[kept], origin[kept]
        self.rows, self._keys, self._origin = rows, keys, origin

    def __or__(self, other: LinearStatistics) -> LinearStatistics:
        """The statistics of both sets of calls; ``moments`` only where both have them."""
        if not self.calls or not other.calls:
            return self if self.calls else other
        assert self._alternate is not None
        assert other._alternate is not None
        joined = LinearStatistics(self.samples, self.seed, _first=min(self._first, other._first))
        joined.rows_seen, joined.calls = self.rows_seen + other.rows_seen, self.calls + other.calls
        joined._items, joined._tokens = min(self._items, other._items), max(self._tokens, other._tokens)
        joined._alternate = self._alternate[0] | other._alternate[0], self._alternate[1] | other._alternate[1]
        joined._by_item = _union(self._by_item, other._by_item)
        joined._positions_a_span = max(self._positions_a_span, other._positions_a_span)
        for part in (self, other):
            spans, size = part._spans, part._positions_a_span
            while size < joined._positions_a_span:
                spans, size = _joined(spans), 2 * size
            joined._spans = _union(joined._spans, spans)
            if part.rows is not None and part._keys is not None and part._origin is not None:
                joined._keep(part.rows, part._keys, part._origin)
        if joined.rows is not None and joined._keys is not None and joined._origin is not None:
            # In the order in which one process would have drawn them.
            order = torch.from_numpy(numpy.lexsort(joined._origin.T.flip(0).numpy()))
            joined.rows, joined._keys, joined._origin = joined.rows[order], joined._keys[order], joined._origin[order]
        if self.moments is not None and other.moments is not None:
            joined.moments = self.moments | other.moments
        return joined

    def with_keys_up_to(self, largest: float) -> LinearStatistics:
        """The same with only part of the sample, for merging.

        Args:
            largest: no row with a larger key is in the sample of all processes.
        """
        assert self.rows is not None
        assert self._origin is not None
        kept = self.keys <= largest
        fields = {name: getattr(self, name) for name in LinearStatistics.__dataclass_fields__}
        changed = {"rows": self.rows[kept], "_keys": self.keys[kept], "_origin": self._origin[kept]}
        return LinearStatistics(**{**fields, **changed})

    @property
    def keys(self) -> Tensor:
        """(R,) float64, the keys that :attr:`rows` have drawn; the smallest of all."""
        assert self._keys is not None
        return self._keys

    @property
    def first_position(self) -> int:
        """Position of the first call."""
        return self._first

    @property
    def range(self) -> ChannelRange:
        """Over all rows of all calls, sampled or not."""
        return self._seen.range

    @property
    def _seen(self) -> RunningRange:
        return reduce(RunningRange.__or__, self._spans.values())

    @property
    def whole(self) -> Sample:
        """All sampled rows with the range of all calls."""
        assert self.rows is not None
        return Sample(self.rows, self._seen, self.rows, self.groups)

    def folds(self) -> list[Sample]:
        """Rows with ranges of *other* data: two halves of what was seen, each with the other's range.

        Scales fitted to a range look perfect on the rows that set it; on the next prompt they clip. What is chosen by
        its error on these folds has been tried on unseen prompts. The halves are the even and the odd items of every
        batch: other prompts at the same timesteps. Batches too small for that are halved by time, first calls and last
        calls: other trajectories. With a single small call there is nothing to hold out, and the only fold is
        :attr:`whole`.
        """
        in_first = self.first_half()
        if in_first is None:
            return [self.whole]
        assert self.rows is not None
        assert self._alternate is not None
        if self._items >= ITEMS_TO_SPLIT:
            first, second = self._alternate
        else:
            middle = self._middle
            first, second = (
                reduce(RunningRange.__or__, (seen for span, seen in self._spans.items() if (span < middle) is before))
                for before in (True, False)
            )
        halves, groups = (self.rows[in_first], self.rows[~in_first]), self.groups
        return [
            Sample(halves[0], second, halves[1], groups[in_first]),
            Sample(halves[1], first, halves[0], groups[~in_first]),
        ]

    def fine_folds(self) -> list[Sample]:
        """Like :meth:`folds`, but a fold for each of :attr:`groups`, with the range of all others.

        Ranges of seven eighths of the data are nearly those of all of it, where ranges of a half leave out more values
        beyond them than there will be; but scales have to be fitted, and weights rounded, more often.
        """
        if self.first_half() is None:
            return [self.whole]
        assert self.rows is not None
        seen, groups = self._by_item if self._items >= ITEMS_TO_SPLIT else self._spans, self.groups
        folds = []
        for group in groups.unique().tolist():
            others = reduce(RunningRange.__or__, (range_ for other, range_ in seen.items() if other != group))
            inside = groups == group
            folds.append(Sample(self.rows[inside], others, self.rows[~inside], groups[inside]))
        return folds

    @property
    def groups(self) -> Tensor:
        """(R,) int64: the group each of :attr:`rows` comes from, items of a batch or, if those are few, spans of calls.

        Rows of one group are much alike, those of different ones are not: how far a gain varies from group to group
        says whether it would be one on the next prompt.
        """
        assert self._origin is not None
        position, _, item, _ = self._origin.unbind(dim=1)
        return item % GROUPS if self._items >= ITEMS_TO_SPLIT else position // self._positions_a_span

    @property
    def can_fit_weights(self) -> bool:
        """Whether the rows are diverse enough to fit weights to them.

        Where a call has one row an item (AdaLN, embedders of time and text), all rows of one timestep are nearly equal:
        weights fitted to the few timesteps of calibration go wrong at others, by 5 dB on a trained model, and no rows
        of calibration show it. So such a Linear needs four times as many different rows as it has channels.
        """
        return self.rows is not None and (self._tokens > 1 or not self._is_scarce)

    @property
    def can_fit_ranges(self) -> bool:
        """Whether the rows are diverse enough to choose smoothing, clipping and treatments of static ranges by them.

        The tokens of a prompt come again at every timestep, so Linears that read them (cross-attention's keys and
        values, text embedders) see few different rows however long the pass is: with 8 prompts, smoothing chosen on
        them costs such a Linear 2.5 dB on other prompts, up to 9; a static shift or split by sign, up to 1.2.
        """
        if self.rows is None or self._tokens <= 1:
            return self.rows is not None
        return not self._is_scarce or 2 * self._distinct > len(self.rows)

    @property
    def _distinct(self) -> int:
        return 0 if self.rows is None else len(self.rows.unique(dim=0))

    @property
    def _is_scarce(self) -> bool:
        return self.rows is None or self._distinct < ROWS_A_CHANNEL * self.rows.shape[1]

    def first_half(self) -> Tensor | None:
        """Which of :attr:`rows` belong to the first of the two halves of :meth:`folds`, (R,) boolean.

        Returns:
            None where there is nothing to hold out.
        """
        if self.rows is None or self._origin is None or self._alternate is None:
            return None
        if self._items >= ITEMS_TO_SPLIT:
            in_first = self._origin[:, 2] % 2 == 0
        elif len(self._spans) > 1:
            in_first = self._origin[:, 0] // self._positions_a_span < self._middle
        else:
            return None
        return in_first if 0 < int(in_first.sum()) < len(in_first) else None

    @property
    def _middle(self) -> int:
        """The first span of the second half."""
        return sorted(self._spans)[len(self._spans) // 2]


def _joined(spans: Mapping[int, RunningRange]) -> dict[int, RunningRange]:
    """Spans twice as long."""
    joined: dict[int, RunningRange] = {}
    for span, seen in spans.items():
        joined = _union(joined, {span // 2: seen})
    return joined


def _union(one: Mapping[int, RunningRange], other: Mapping[int, RunningRange]) -> dict[int, RunningRange]:
    both = dict(one)
    for span, seen in other.items():
        both[span] = both[span] | seen if span in both else seen
    return both


def _smallest(keys: Tensor, count: int) -> Tensor:
    """Where the ``count`` smallest of keys (n,) are, in ascending order: (count,) int64."""
    return keys.topk(count, largest=False).indices.sort().values


def _range_of(x: Tensor) -> ChannelRange:
    """Of x (items, tokens, K)."""
    return ChannelRange(x.amax(dim=(0, 1)).float(), x.amin(dim=(0, 1)).float())


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Inside, no quantizer of the model rounds, rotates or collects; afterwards each is as it was."""
    quantizers = [module for module in model.modules() if isinstance(module, TensorQuantizer)]
    before = [(quantizer._if_quant, quantizer._if_calib, quantizer._rotate) for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer._if_quant = quantizer._if_calib = False
        quantizer.disable_rotate()
    try:
        yield
    finally:
        for quantizer, (if_quant, if_calib, rotation) in zip(quantizers, before, strict=True):
            quantizer._if_quant, quantizer._if_calib, quantizer._rotate = if_quant, if_calib, rotation


def layer_seed(seed: int, name: str) -> int:
    """The seed of a layer's sample, 64 bits."""
    # crc32, not hash(): the latter differs from process to process.
    return (seed % 2**32 << 32) ^ zlib.crc32(name.encode())


def _of_linear(layer: nn.Module, samples: int, seed: int) -> LinearStatistics:
    return LinearStatistics(samples, seed)


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    run: Callable[[], object],
    *,
    samples: int,
    seed: int,
    new: Callable[[nn.Module, int, int], LinearStatistics] = _of_linear,
    positions: CallPositions | None = None,
) -> dict[str, LinearStatistics]:
    """Run the calibration data through the model in full precision and watch the inputs of ``layers``.

    Args:
        model: the model that ``run`` calls.
        layers: name to Linear, or what else `new` makes statistics for.
        run: calls the model with all calibration data.
        samples: rows to keep a Linear.
        seed: of the row samples; a layer's sample depends on this, its name and its inputs alone.
        new: makes the empty statistics of a layer from (layer, samples, seed).
        positions: numbers the calls.

    Returns:
        Statistics by name, of the layers that were called, in the order of their first call.
    """
    found: dict[str, LinearStatistics] = {}
    positions = positions or CallPositions()

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in found:
            found[name] = new(module, samples, layer_seed(seed, name))
        found[name].update(args[0] if args else kwargs["input"], positions(found[name].calls))

    handles = [
        layer.register_forward_pre_hook(partial(watch, name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        with full_precision(model), positions.counting(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found
