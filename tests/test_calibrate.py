"""The parts of calibration as functions on tensors: statistics, smoothing, polarity, and the search of one Linear."""

from __future__ import annotations

import math
from collections.abc import Callable

import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.nn.functional as F
from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer
from torch import Tensor, nn

from modelopt_ext import LinearPlan
from modelopt_ext.calibrate import LinearStatistics, SearchOptions, collect, solve_linear
from modelopt_ext.calibrate.driver import fill
from modelopt_ext.calibrate.polarity import Treatment, affordable_second_products, candidates, is_polar, shift_of
from modelopt_ext.calibrate.search import SIGNIFICANT, WORTHWHILE, is_better, least
from modelopt_ext.calibrate.smoothing import smoothing_scale
from modelopt_ext.calibrate.statistics import GROUPS, SPANS
from modelopt_ext.formats import QuantFormat, quantize_dequantize, row_amax
from modelopt_ext.nn import to_seg_linear
from modelopt_ext.positions import ITEM, CallPositions, at

INT8 = QuantFormat(8)
INT8_ROWS = QuantFormat(8, per_row=True)
PER_TOKEN = QuantFormat(8, per_row=True, dynamic=True)
ALPHAS = (None, 0.1, 0.3, 0.5, 0.7, 0.9)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def watched(*calls: Tensor, samples: int = 10_000, seed: int = 0) -> LinearStatistics:
    """Statistics after calls of (tokens, K), each one item, or of (items, tokens, K)."""
    statistics = LinearStatistics(samples, seed)
    for call in calls:
        statistics.update(call if call.dim() == 3 else call.unsqueeze(0))
    return statistics


def sqnr(reference: Tensor, value: Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (value - reference).square().sum()))


# -- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fmt", [INT8, INT8_ROWS, QuantFormat(4), QuantFormat(8, narrow_range=True), QuantFormat((4, 3))]
)
def test_rounding_equals_modelopts(fmt: QuantFormat):
    x = normal(32, 16)
    amax = 0.7 * row_amax(x, fmt)
    quantizer = TensorQuantizer()
    quantizer.set_from_attribute_config(
        {"num_bits": fmt.num_bits, "axis": 0 if fmt.per_row else None, "narrow_range": fmt.narrow_range}
    )
    quantizer.amax = amax
    # The two divide and multiply in another order: a rounding in the last place of float32, never another code.
    torch.testing.assert_close(quantize_dequantize(x, amax, fmt), quantizer(x), rtol=3e-7, atol=1e-7)


def test_rounding_of_an_all_zero_range_is_zero():
    assert torch.equal(quantize_dequantize(normal(4, 4), torch.tensor(0.0), INT8), torch.zeros(4, 4))


# -- statistics -------------------------------------------------------------------------------------------------------


def test_ranges_cover_all_rows_of_all_calls():
    calls = [normal(2, 5, 8, seed=seed) for seed in range(40)]
    statistics = watched(*calls, samples=3)
    rows = torch.cat([call.reshape(-1, 8) for call in calls])
    assert torch.equal(statistics.range.high, rows.amax(0))
    assert torch.equal(statistics.range.low, rows.amin(0))
    assert statistics.rows_seen == 400
    assert statistics.calls == 40
    assert len(statistics._spans) <= SPANS


def test_sample_is_bounded_repeatable_and_uniform():
    # Every row is its own number, so that the sample says which rows were kept.
    calls = [torch.arange(100 * i, 100 * (i + 1)).float().reshape(-1, 1) for i in range(2)]
    kept = watched(*calls, samples=20, seed=5).rows
    assert kept.shape == (20, 1)
    assert torch.equal(kept, watched(*calls, samples=20, seed=5).rows)
    assert not torch.equal(kept, watched(*calls, samples=20, seed=6).rows)
    assert len(set(kept.float().flatten().tolist())) == 20, "a row was kept twice"
    counts = torch.zeros(2)
    for seed in range(300):
        rows = watched(*calls, samples=20, seed=seed).rows.float().flatten()
        counts += torch.tensor([(rows < 100).sum(), (rows >= 100).sum()])
    # 6000 draws at probability 1/2: the standard deviation of the share is 0.6 %.
    assert counts[0] / counts.sum() == pytest.approx(0.5, abs=0.02)


def dealt(calls: list[Tensor], processes: int, **options: int) -> list[LinearStatistics]:
    """What each of some processes holds that got the calls one after the other."""
    parts = [LinearStatistics(**{"samples": 10_000, "seed": 0, **options}) for _ in range(processes)]
    for position, call in enumerate(calls):
        parts[position % processes].update(call, position)
    return parts


def assert_same(one: LinearStatistics, other: LinearStatistics) -> None:
    """Everything that choices depend on, bit by bit."""
    assert (one.calls, one.rows_seen) == (other.calls, other.rows_seen)
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(one.groups, other.groups)
    assert (one.can_fit_weights, one.can_fit_ranges) == (other.can_fit_weights, other.can_fit_ranges)
    halves = one.first_half(), other.first_half()
    assert halves[0] is halves[1] is None or torch.equal(*halves)
    for a, b in zip([one.whole, *one.folds()], [other.whole, *other.folds()], strict=True):
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.source, b.source)
        for kind in ("max", "mean", "p99"):
            of_a, of_b = (sample.select(slice(None), torch.device("cpu"), kind).range for sample in (a, b))
            assert torch.equal(of_a.high, of_b.high)
            assert torch.equal(of_a.low, of_b.low)


@pytest.mark.parametrize("samples", [10, 10_000])
@pytest.mark.parametrize("items", [1, 6])
@pytest.mark.parametrize(("calls", "processes"), [(37, 2), (37, 3), (3, 2), (1, 2), (70, 5)])
def test_joined_statistics_are_those_of_one_process(calls: int, processes: int, items: int, samples: int):
    data = [normal(items, 3 + call % 2, 8, seed=call) for call in range(calls)]
    parts = dealt(data, processes, samples=samples, seed=3)
    joined = parts[0]
    for part in parts[1:]:
        joined = joined | part
    assert_same(joined, watched(*data, samples=samples, seed=3))
    backwards = parts[-1]
    for part in parts[-2::-1]:
        backwards = backwards | part
    assert_same(backwards, joined)


def test_a_layers_sample_depends_on_the_seed_and_its_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def kept(seed: int) -> list[Tensor]:
        found = collect(model, {"0": model[0], "1": model[0]}, lambda: model(normal(50, 4)), samples=9, seed=seed)
        return [found[name].rows for name in ("0", "1")]

    assert torch.equal(kept(0)[0], kept(0)[0])
    assert not torch.equal(kept(0)[0], kept(1)[0])
    assert not torch.equal(kept(0)[0], kept(0)[1])


def test_calls_are_items_unless_they_are_marked():
    """Row r of call c holds 10 c + r; each call of the model calls the layer twice."""
    layer = nn.Linear(1, 1)
    model = nn.Sequential(layer, layer)
    layer.weight.data.fill_(1.0)
    layer.bias.data.fill_(0.0)

    def positions(rank: int, size: int, run: Callable[[], object]) -> list[tuple[int, int]]:
        numbers = CallPositions(rank, size)
        found = collect(model, {"layer": layer}, run, samples=100, seed=0, positions=numbers)["layer"]
        return [tuple(origin[:2]) for origin in found._origin.tolist()]

    def calls(count: int) -> None:
        for call in range(count):
            model(torch.full((1, 1), float(call)))

    assert positions(0, 1, lambda: calls(2)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert positions(1, 3, lambda: calls(2)) == [(1, 0), (1, 1), (4, 0), (4, 1)]
    assert positions(1, 3, lambda: [layer(torch.ones(1, 1)) for _ in range(2)]) == [(1, 0), (4, 0)]

    def marked() -> None:
        for item in (5, 6):
            with at(item):
                calls(2)

    first, second = 5 * ITEM, 6 * ITEM
    both = [(position + call, n) for position in (first, second) for call in (0, 1) for n in (0, 1)]
    assert positions(1, 3, marked) == both

    def twice() -> None:  # an epoch more: no two calls have the same keys
        for _ in range(2):
            for item in (0, 1):
                with at(item):
                    layer(torch.ones(1, 1))

    assert positions(0, 1, twice) == [(0, 0), (ITEM, 0), (0, 1), (ITEM, 2)]


@pytest.mark.parametrize("count", [2, 5, 8, 9, 16, 37])
def test_folds_hold_out_other_calls(count: int):
    """Call i holds the constant i, so ranges and rows say which calls they come from."""
    statistics = watched(*[torch.full((3, 2), float(i)) for i in range(count)])
    folds = statistics.folds()
    assert sum(len(fold.rows) for fold in folds) == 3 * count
    for fold in folds:
        inside = (fold.rows >= fold.range.low) & (fold.rows <= fold.range.high)
        assert not inside.any(), "a fold's range saw the fold's rows"
    fine = statistics.fine_folds()
    assert len(fine) == len(statistics.groups.unique())
    assert sum(len(fold.rows) for fold in fine) == 3 * count
    for fold in fine:
        rest = set(range(count)) - set(fold.rows[:, 0].int().tolist())
        assert (int(fold.range.low[0]), int(fold.range.high[0])) == (min(rest), max(rest))
        assert set(fold.source[:, 0].int().tolist()) == rest


def test_folds_hold_out_every_other_item_of_large_batches():
    """Item i of each call holds the constant i, at every timestep (call) another offset."""
    items = torch.arange(6.0).reshape(6, 1, 1).expand(6, 3, 2)
    folds = watched(*[items + 100 * step for step in range(10)]).folds()
    for fold, parity in zip(folds, (0, 1), strict=True):
        assert len(fold.rows) == 3 * 3 * 10
        small = fold.rows.float()[:9, 0]  # later rows are rounded to bfloat16
        assert (small % 2 == parity).all()
        assert fold.range.low.tolist() == [1 - parity] * 2
        assert fold.range.high.tolist() == [904 + (1 - parity)] * 2


def test_fine_folds_hold_out_single_items_of_large_batches():
    """Item i of each call holds the constant i; the joined statistics of two halves give the same folds."""
    items = torch.arange(10.0).reshape(10, 1, 1).expand(10, 3, 2)
    both = watched(*[items] * 4)
    halves = LinearStatistics(both.samples, both.seed), LinearStatistics(both.samples, both.seed)
    for position in range(4):
        halves[position % 2].update(items, position)
    for folds in (both.fine_folds(), (halves[0] | halves[1]).fine_folds()):
        assert len(folds) == GROUPS
        for group, fold in enumerate(folds):
            own = {float(item) for item in range(10) if item % GROUPS == group}
            rest = set(range(10)) - own
            assert set(fold.rows[:, 0].tolist()) == own
            assert fold.groups.unique().tolist() == [group]
            assert (fold.range.low.tolist(), fold.range.high.tolist()) == ([min(rest)] * 2, [max(rest)] * 2)


def test_a_single_call_has_nothing_to_hold_out():
    statistics = watched(normal(10, 4))
    for (fold,) in (statistics.folds(), statistics.fine_folds()):
        assert torch.equal(fold.range.high, statistics.range.high)


def test_groups_are_items_of_large_batches_and_spans_of_small_ones():
    """Item i of each call holds the constant i, call c adds 100 c."""
    items = torch.arange(12.0).reshape(12, 1, 1).expand(12, 3, 2)
    large = watched(*[items for _ in range(4)])
    assert torch.equal(large.groups, large.rows[:, 0].long() % GROUPS)
    folds = large.folds()
    assert [sorted(set(fold.groups.tolist())) for fold in folds] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    for fold in folds:
        assert torch.equal(fold.groups, fold.rows[:, 0].long() % GROUPS)
        selected = fold.select(slice(0, 1), torch.device("cpu")) - torch.ones(1)
        assert torch.equal(selected.groups, fold.groups)
    small = watched(*[torch.full((1, 3, 2), float(call)) for call in range(40)])
    assert torch.equal(small.groups, small.rows[:, 0].long() // 8)  # 8 calls a span, once spans were joined three times
    assert int(small.groups.max()) == 4 < GROUPS


def test_empty_calls_leave_no_trace():
    statistics = watched(normal(3, 4, 8))
    rows = statistics.rows.clone()
    for shape in ((0, 4, 8), (3, 0, 8), (0, 8)):
        statistics.update(torch.empty(shape))
    assert (statistics.calls, statistics.rows_seen) == (1, 12)
    assert torch.equal(statistics.rows, rows)


def test_a_gain_has_to_show_in_more_than_one_group():
    kept = torch.tensor([1.0, 2.0, 40.0, 5.0, 0.0])
    assert is_better(0.9 * kept, kept)  # a tenth in every group, however they differ in size
    assert not is_better((1 - WORTHWHILE / 2) * kept, kept)
    assert not is_better(kept, kept)
    assert not is_better(torch.zeros(5), torch.zeros(5))
    one_wins = torch.tensor([5.0, 10.0, 10.0, 10.0])
    assert not is_better(torch.tensor([1.0, 10.0, 10.0, 10.0]), one_wins)  # 11 % in all, from a single group
    assert is_better(torch.tensor([1.0]), torch.tensor([2.0]))  # nothing to compare it with
    assert not is_better(torch.tensor([math.nan, 1.0]), torch.tensor([2.0, 2.0]))
    assert not is_better(torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 2.0]))


def test_the_gains_standard_error_is_that_of_a_ratio():
    """Against the spread of the ratio over many draws of eight groups."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(20_000, 8, generator=generator) + 0.5
    tried = size * (0.9 + 0.2 * torch.randn(20_000, 8, generator=generator))
    ratio = tried.sum(1) / size.sum(1)
    threshold = 1 - SIGNIFICANT * float(ratio.std())
    chosen = torch.tensor([is_better(t, k) for t, k in zip(tried[:3000], size[:3000], strict=True)])
    # The mean gain, 0.1, is 1.4 standard errors: less than the 1.5 asked for, so somewhat under half the draws win.
    assert float(ratio.mean()) > threshold - 0.01
    assert 0.35 < float(chosen.float().mean()) < 0.5


def test_the_first_setting_stays_unless_another_is_better():
    noises = {"first": [4.0, 4.0, 4.0], "same": [3.99, 3.99, 3.99], "lucky": [0.5, 4.1, 4.1], "better": [3.0, 3.1, 2.9]}
    tried = [(name, torch.tensor(noise)) for name, noise in noises.items()]
    assert least(tried)[0] == "better"
    assert least(tried[:3])[0] == "first"


# -- smoothing and polarity -------------------------------------------------------------------------------------------


def test_smoothing_equation():
    x, w = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([2.0, 2.0, 0.5])
    expected = x**0.75 / w**0.25
    expected = expected / expected.log().mean().exp()
    torch.testing.assert_close(smoothing_scale(x, w, 0.75), expected)


def test_dead_channels_are_not_smoothed():
    scale = smoothing_scale(torch.tensor([0.0, 3.0, 5.0]), torch.tensor([1.0, 0.0, 2.0]), 0.5)
    assert torch.equal(scale, torch.ones(3))


def test_smoothing_stays_in_half_precision():
    scale = smoothing_scale(torch.tensor([1e-30, 1e30]), torch.tensor([1.0, 1.0]), 1.0)
    assert torch.isfinite(scale.half()).all()
    assert (scale.half() > 0).all()


@pytest.mark.parametrize(
    ("tag", "low", "high", "polar"),
    [
        ("silu", -0.28, 9, True),
        ("gelu", -0.17, 0.2, False),
        ("gated", -8, 3, True),
        ("", -0.1, 9, False),
        ("silu", 0, 9, False),
    ],
)
def test_is_polar(tag: str, low: float, high: float, polar: bool):
    assert is_polar(tag, low, high) is polar


def test_candidates():
    def names(policy: str, **changes: object) -> set[tuple[bool, str]]:
        facts = {"polar": True, "affordable": False, "fmt": INT8, "has_statistics": True, **changes}
        return {(treatment.shift, treatment.polarity) for treatment in candidates(policy, **facts)}

    assert names("none") == {(False, "none")}
    assert names("dual") == {(False, "dual")}
    assert names("dual", polar=False) == {(False, "none")}
    assert names("shift") == {(False, "none"), (True, "none")}
    assert names("auto") == {(False, "none"), (True, "none")}
    assert names("auto", affordable=True) == {(s, p) for s in (False, True) for p in ("none", "dual8")}
    assert names("auto", affordable=True, has_statistics=False) == {(False, "none"), (False, "dual8")}
    assert names("auto", affordable=True, fmt=QuantFormat((4, 3))) == {(False, "none"), (True, "none")}
    assert names("auto", fmt=None) == {(False, "none")}


def test_second_products_stay_within_their_budget():
    costs = {"adaln": 1, "last": 4, "query": 40, "ff": 55}
    assert affordable_second_products(costs, 0.0) == set()
    assert affordable_second_products(costs, 0.04) == {"adaln"}
    assert affordable_second_products(costs, 0.05) == {"adaln", "last"}
    assert affordable_second_products(costs, 1.0) == set(costs)


@pytest.mark.parametrize(("share", "expected"), [(0.24, 2), (0.25, 6), (0.44, 6), (0.45, 10), (1.0, 12)])
def test_repeated_blocks_are_treated_alike(share: float, expected: int) -> None:
    """All of a place within the budget, or none; sizes apart, as UNets have them."""
    costs = {f"blocks.{block}.{name}": 10 for name in ("a", "b") for block in range(4)}
    costs |= {f"blocks.{block}.a": 5 for block in (4, 5)} | {"x": 10, "y": 100}
    chosen = affordable_second_products(costs, share)
    assert len(chosen) == expected
    assert {"blocks.4.a", "blocks.5.a"} <= chosen


def test_shift_is_the_middle_and_exact_in_bfloat16():
    high, low = normal(50).abs() * 10, -normal(50, seed=1).abs()
    shift = shift_of(high, low, per_channel=True)
    assert torch.equal(shift.to(torch.bfloat16).float(), shift)
    torch.testing.assert_close(shift, (high + low) / 2, rtol=2**-8, atol=0)
    assert len(set(shift_of(high, low, per_channel=False).tolist())) == 1


# -- the search -------------------------------------------------------------------------------------------------------


def outlier_rows(rows: int, seed: int) -> Tensor:
    """Activations as in diffusion transformers: a few channels reach thirty times as far as the others."""
    x = normal(rows, 32, seed=seed)
    x[:, :3] *= 30
    return x


def applied(weight: Tensor, solution, input_format: QuantFormat, x: Tensor) -> Tensor:
    """Outputs of a SegLinear that holds ``weight`` and the solution."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    linear = QuantModuleRegistry.convert(linear)
    cfg = {"num_bits": input_format.num_bits, "axis": None}
    if input_format.dynamic:
        cfg = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None, "type": "dynamic"}}
    linear.input_quantizer.set_from_attribute_config(cfg)
    linear.weight_quantizer.set_from_attribute_config({"num_bits": 8, "axis": 0})
    module = to_seg_linear(linear, solution.layout)
    fill(module, solution)
    with torch.no_grad():
        return module(x)


@pytest.mark.parametrize("input_format", [INT8, PER_TOKEN], ids=["static", "per-token"])
@pytest.mark.parametrize("polarity", ["none", "shift", "dual", "dual8", "auto"])
def test_module_gives_what_the_search_promised(polarity: str, input_format: QuantFormat):
    """The SQNR of the search against that of the module on rows it has never seen.

    The search's is that of held-out calls with the ranges of half the calls, so it is the more cautious one.
    """
    weight = normal(48, 32, seed=9)
    plan = LinearPlan((16, 16), (24, 24), ("silu", ""))

    def rows(seed: int) -> Tensor:
        x = outlier_rows(64, seed)
        return torch.cat([F.silu(x[:, :16]), x[:, 16:]], dim=1)

    statistics = watched(*[rows(seed) for seed in range(12)])
    options = SearchOptions(polarity, alphas=ALPHAS, second_product=True)
    solution = solve_linear(weight, plan, statistics, input_format, INT8_ROWS, options)
    x = torch.cat([rows(seed) for seed in range(100, 110)])
    assert -0.5 < sqnr(x @ weight.T, applied(weight, solution, input_format, x)) - solution.sqnr < 3


def on_unseen_rows(draw: Callable[[int], Tensor], options: SearchOptions) -> float:
    """SQNR in dB on other rows than those of calibration; ``draw`` makes rows (..., 32) from a seed."""
    weight = normal(48, 32, seed=9)
    calls = [draw(seed) for seed in range(16)]
    x = torch.cat([draw(seed) for seed in range(100, 110)])
    solution = solve_linear(weight, LinearPlan.trivial(32, 48), watched(*calls), INT8, INT8_ROWS, options)
    return sqnr(x @ weight.T, applied(weight, solution, INT8, x))


def test_smoothing_levels_outlier_channels():
    def draw(seed: int) -> Tensor:
        return outlier_rows(64, seed).clamp(-60, 60)  # bounded, so that the errors are those of rounding

    plain = on_unseen_rows(draw, SearchOptions("none"))
    smoothed = on_unseen_rows(draw, SearchOptions("none", alphas=ALPHAS))
    assert smoothed > plain + 1
    # One bit more is worth up to 6 dB of the activations' share of the error.
    assert on_unseen_rows(draw, SearchOptions("auto", alphas=ALPHAS, second_product=True)) > smoothed + 3


def test_shift_centres_channels():
    offsets = 6 * normal(32, seed=77)

    def draw(seed: int) -> Tensor:
        return normal(64, 32, seed=seed) + offsets

    smoothed = on_unseen_rows(draw, SearchOptions("none", alphas=ALPHAS))
    per_tensor = on_unseen_rows(draw, SearchOptions("shift", shift_per_channel=False, alphas=ALPHAS))
    per_channel = on_unseen_rows(draw, SearchOptions("shift", alphas=ALPHAS))
    assert per_channel > smoothed + 5
    assert per_channel > per_tensor + 5


def test_held_out_calls_decide_against_overfitted_scales():
    """Two rows a call, every call elsewhere: ranges of single channels do not carry over to other calls."""
    weight = normal(16, 8, seed=9)
    calls = [normal(2, 8, seed=seed) + 20 * normal(1, 8, seed=1000 + seed) for seed in range(6)]
    options = SearchOptions("shift", alphas=ALPHAS)
    solution = solve_linear(weight, LinearPlan.trivial(8, 16), watched(*calls), INT8, INT8_ROWS, options)
    x = torch.cat([normal(2, 8, seed=seed) + 20 * normal(1, 8, seed=1000 + seed) for seed in range(100, 140)])
    overfitted = solve_linear(
        weight,
        LinearPlan.trivial(8, 16),
        watched(torch.cat(calls)),
        INT8,
        INT8_ROWS,
        SearchOptions("shift", alphas=(0.9,)),
    )
    reference = x @ weight.T
    chosen = sqnr(reference, applied(weight, solution, INT8, x))
    assert chosen > sqnr(reference, applied(weight, overfitted, INT8, x))


def test_clipping_is_chosen_for_rare_outliers():
    weight = normal(48, 32, seed=9)

    def rows(seed: int) -> Tensor:
        x = normal(4000, 32, seed=seed)
        x[0, seed % 32] = 40.0  # one value in 128,000
        return x

    statistics = watched(*[rows(seed) for seed in range(8)], samples=512, seed=2)  # a sample without these values
    plan = LinearPlan.trivial(32, 48)
    clipped = solve_linear(weight, plan, statistics, INT8, INT8_ROWS, SearchOptions("none", clips=(1.0, 0.5, 0.25)))
    assert clipped.input_amax["block0_0"] == 10.0
    whole = solve_linear(weight, plan, statistics, INT8, INT8_ROWS, SearchOptions("none"))
    assert whole.input_amax["block0_0"] == 40.0
    assert clipped.sqnr > whole.sqnr + 10


def test_groups_without_smoothing_are_merged():
    statistics = watched(*[normal(64, 32, seed=seed) for seed in range(4)])
    plan = LinearPlan((32,), (16, 32), ())
    merged = solve_linear(normal(48, 32), plan, statistics, INT8, INT8_ROWS, SearchOptions("none"))
    assert merged.layout.out_groups == (48,)
    assert merged.is_stock
    per_tensor = solve_linear(normal(48, 32), plan, statistics, INT8, INT8, SearchOptions("none"))
    assert per_tensor.layout.out_groups == (48,)
    assert per_tensor.layout.weight_segments == (16, 32)
    cut = solve_linear(normal(48, 32), plan, statistics, INT8, INT8_ROWS, SearchOptions("none", alphas=(0.5,)))
    assert cut.layout.out_groups == (16, 32)
    assert cut.smoothing.shape == (2, 32)


def test_segments_get_their_own_scales():
    """Two inputs of very different size: one scale for both loses the small one."""
    weight = normal(48, 32, seed=9)
    weight[:, :16] *= 100  # what is small in the input matters as much in the output
    calls = [torch.cat([normal(64, 16, seed=s), 100 * normal(64, 16, seed=s + 50)], 1) for s in range(8)]
    results = {}
    for plan in (LinearPlan.trivial(32, 48), LinearPlan((16, 16), (48,))):
        solution = solve_linear(weight, plan, watched(*calls), INT8, INT8_ROWS, SearchOptions("none"))
        results[len(plan.in_segments)] = solution.sqnr
    assert results[2] > results[1] + 20


def test_scales_are_exact_in_the_models_dtype():
    weight = normal(48, 32).to(torch.bfloat16)
    statistics = watched(*[outlier_rows(64, seed).to(torch.bfloat16) for seed in range(4)])
    options = SearchOptions("shift", alphas=(0.5,), storage=torch.bfloat16)
    solution = solve_linear(weight, LinearPlan.trivial(32, 48), statistics, INT8, INT8_ROWS, options)
    numbers = [solution.smoothing, *solution.input_amax.values(), *solution.weight_amax.values()]
    for number in numbers:
        assert torch.equal(number.to(torch.bfloat16).float(), number)


def test_a_noiseless_layer_has_infinite_sqnr():
    statistics = watched(normal(16, 8), normal(16, 8, seed=1))
    assert (
        solve_linear(normal(4, 8), LinearPlan.trivial(8, 4), statistics, None, None, SearchOptions()).sqnr == math.inf
    )


def test_treatment_defaults_to_nothing():
    assert Treatment() == Treatment(shift=False, polarity="none")


def test_disabled_layers_of_a_config_are_not_solved():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "0.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        ],
        "algorithm": {"method": "segquant", "progress": False},
    }
    mtq.quantize(model, config, lambda m: m(normal(32, 8)))
    assert model[0].weight_quantizer.is_enabled
    assert not model[1].weight_quantizer.is_enabled


def test_rows_that_come_again_are_few():
    """Tokens of a prompt at every timestep, one row an item, activations that change: what may be fitted to each."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(8, 6, 16, generator=generator)
    text = watched(*[prompts] * 10)
    assert text.can_fit_weights
    assert not text.can_fit_ranges
    conditioning = watched(*[torch.full((8, 1, 16), float(step)) for step in range(40)])
    assert conditioning.can_fit_ranges
    assert not conditioning.can_fit_weights
    image = watched(*[torch.randn(8, 6, 16, generator=generator) for _ in range(10)])
    assert image.can_fit_ranges
    assert image.can_fit_weights


def test_smoothing_is_not_searched_on_rows_that_come_again():
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-2, 0, 16)
    weight = torch.randn(24, 16, generator=generator)
    options = SearchOptions(polarity="none", alphas=(None, 0.3, 0.5, 0.7), clips=(1.0, 0.7))
    plan = LinearPlan.trivial(16, 24)

    def solved(*calls: torch.Tensor):
        return solve_linear(weight, plan, watched(*calls), QuantFormat(8), QuantFormat(8, per_row=True), options)

    prompts = torch.randn(8, 6, 16, generator=generator) * spread
    assert solved(*[prompts] * 10).smoothing is None
    assert solved(*[torch.randn(8, 6, 16, generator=generator) * spread for _ in range(10)]).smoothing is not None


def test_static_treatments_are_not_searched_on_rows_that_come_again():
    """Only static ranges: another prompt would leave them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator)
    plan, options = LinearPlan.trivial(16, 24), SearchOptions(second_product=True)

    def polarity(fmt: QuantFormat, *calls: Tensor) -> tuple[Treatment, ...]:
        return solve_linear(weight, plan, watched(*calls), fmt, INT8_ROWS, options).treatments

    prompts = [5 + torch.rand(8, 6, 16, generator=generator) for _ in range(10)]
    assert polarity(INT8, *prompts[:1] * 10) == (Treatment(),)
    assert polarity(INT8, *prompts) != (Treatment(),)
    assert polarity(PER_TOKEN, *prompts[:1] * 10) != (Treatment(),)
