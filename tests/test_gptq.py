"""GPTQ on tensors: against a column-by-column reference that inverts every Hessian, and what holds for any input.

And where its Hessian comes from: sampled rows, or all rows accumulated.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from modelopt_ext import LinearPlan, SegQuantCalibConfig
from modelopt_ext.calibrate import LinearStatistics, SearchOptions, solve_linear
from modelopt_ext.calibrate.gptq import (
    GPTQOptions,
    _round_columns,
    corrected_target,
    corrected_target_from_products,
    damped_cholesky,
    gptq,
)
from modelopt_ext.calibrate.hessian import HessianMemory, SecondMoments, with_rounding
from modelopt_ext.calibrate.refine import Group, RefineOptions
from modelopt_ext.formats import QuantFormat, quantize_dequantize
from modelopt_ext.presets import PER_TOKEN, linear_only

INT8, INT4, INT3, E4M3 = QuantFormat(8), QuantFormat(4), QuantFormat(3), QuantFormat((4, 3))
FORMATS = pytest.mark.parametrize("fmt", [INT8, INT4, INT3, E4M3], ids=["int8", "int4", "int3", "e4m3"])
SCALES = pytest.mark.parametrize("scales", ["tensor", "channel", "group"])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_rows(count: int, channels: int, seed: int) -> Tensor:
    """Rows whose channels depend on each other and differ in size by up to e^2."""
    mixed = normal(count, channels, seed=seed) @ normal(channels, channels, seed=seed + 1) / channels**0.5
    return (mixed + 0.2 * normal(count, channels, seed=seed + 2)) * normal(channels, seed=seed + 3).clamp(-2, 2).exp()


def amax_of(weight: Tensor, scales: str, group: int = 8) -> Tensor:
    magnitude = weight.abs()
    if scales == "tensor":
        return magnitude.amax()
    if scales == "channel":
        return magnitude.amax(dim=1, keepdim=True)
    return magnitude.unflatten(1, (-1, group)).amax(dim=2).repeat_interleave(group, dim=1)


def row_losses(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    error = (weight - rounded).double()
    return ((error @ hessian.double()) * error).sum(dim=1)


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    return float(row_losses(weight, rounded, hessian).sum())


def greedy_reference(weight: Tensor, hessian: Tensor, amax: Tensor, fmt: QuantFormat, options: GPTQOptions) -> Tensor:
    """Optimal brain quantization in a fixed order, float64, the remaining Hessian inverted anew at every step."""
    hessian, left = hessian.double(), weight.double()
    damped = hessian + options.damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    order = hessian.diagonal().argsort(descending=True) if options.activation_order else torch.arange(len(hessian))
    scales, result = amax.expand_as(weight), torch.empty_like(weight)
    for step, column in enumerate(order):
        remaining = order[step:]
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        value = left[:, column].clone()
        result[:, column] = quantize_dequantize(value[:, None].float(), scales[:, column, None], fmt)[:, 0]
        left[:, remaining] -= torch.outer((value - result[:, column]) / inverse[0, 0], inverse[0])
    return result


# -- GPTQ -------------------------------------------------------------------------------------------------------------


@FORMATS
@SCALES
@pytest.mark.parametrize("activation_order", [True, False], ids=["by_activation", "left_to_right"])
def test_gptq_equals_the_naive_algorithm(fmt: QuantFormat, scales: str, activation_order: bool):
    options = GPTQOptions(block_size=5, activation_order=activation_order)
    corrected = 0
    for seed in range(3):
        weight, rows = normal(12, 24, seed=seed), correlated_rows(60, 24, seed=100 + seed)
        hessian, amax = rows.T @ rows, amax_of(weight, scales)
        expected = greedy_reference(weight, hessian, amax, fmt, options)
        nearest = quantize_dequantize(weight, amax, fmt)
        worse = row_losses(weight, expected, hessian) > row_losses(weight, nearest, hessian)
        assert torch.equal(gptq(weight, hessian, amax, fmt, options), torch.where(worse[:, None], nearest, expected))
        corrected += int((~worse).sum())
    assert corrected >= 27  # of 36 rows: the comparison is with the greedy result, seldom with nearest


@FORMATS
@SCALES
def test_no_row_is_worse_than_nearest_and_the_sum_is_far_better(fmt: QuantFormat, scales: str):
    shares = []
    for seed in range(8):
        weight, rows = normal(24, 48, seed=seed), correlated_rows(200, 48, seed=50 + seed)
        hessian, amax = rows.T @ rows, 0.8 * amax_of(weight, scales)
        rounded, nearest = gptq(weight, hessian, amax, fmt), quantize_dequantize(weight, amax, fmt)
        assert (row_losses(weight, rounded, hessian) <= 1.0001 * row_losses(weight, nearest, hessian)).all()
        shares.append(loss(weight, rounded, hessian) / loss(weight, nearest, hessian))
    assert max(shares) < 0.75
    assert sum(shares) / len(shares) < 0.55


def test_rows_that_greed_makes_worse_are_rounded_to_nearest():
    # Two bits and hard clipping: corrections pile up on columns that can't take them.
    fmt, replaced = QuantFormat(2), 0
    for seed in range(10):
        weight, rows = normal(32, 16, seed=seed), correlated_rows(100, 16, seed=20 + seed)
        hessian, amax = rows.T @ rows, torch.tensor(0.5)
        nearest = quantize_dequantize(weight, amax, fmt)
        greedy = greedy_reference(weight, hessian, amax, fmt, GPTQOptions())
        worse = row_losses(weight, greedy, hessian) > 1.001 * row_losses(weight, nearest, hessian)
        assert torch.equal(gptq(weight, hessian, amax, fmt)[worse], nearest[worse])
        replaced += int(worse.sum())
    assert replaced > 0


@FORMATS
@SCALES
def test_the_result_is_on_the_grid(fmt: QuantFormat, scales: str):
    weight, rows = normal(16, 32, seed=1), correlated_rows(80, 32, seed=2)
    amax = 0.7 * amax_of(weight, scales)
    codes = gptq(weight, rows.T @ rows, amax, fmt) * (fmt.max_code / amax)
    on_grid = codes.round() if fmt.is_integer else codes.to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(codes, on_grid, rtol=1e-6, atol=1e-3)
    assert fmt.min_code - 1e-3 <= codes.min() < codes.max() <= fmt.max_code + 1e-3
    assert len(on_grid.unique()) > 4


@pytest.mark.parametrize("activation_order", [True, False])
def test_the_block_size_does_not_matter(activation_order: bool):
    weight, rows = normal(32, 96, seed=3), correlated_rows(300, 96, seed=4)
    hessian, amax = rows.T @ rows, amax_of(weight, "group")
    results = [
        gptq(weight, hessian, amax, INT4, GPTQOptions(block_size=size, activation_order=activation_order))
        for size in (1, 7, 32, 96, 1000)
    ]
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_neither_the_unit_of_the_hessian_nor_its_dtype_matters():
    weight, rows = normal(16, 40, seed=5), correlated_rows(100, 40, seed=6)
    hessian, amax = rows.T @ rows, amax_of(weight, "channel")
    expected = gptq(weight, hessian, amax, INT4)
    assert torch.equal(gptq(weight, hessian.double() * 2.0**-30, amax, INT4), expected)
    assert torch.equal(gptq(weight, hessian * 2.0**20, amax, INT4), expected)


def test_activation_order_helps_on_average():
    ratios = []
    for seed in range(30):
        weight, rows = normal(16, 32, seed=seed), correlated_rows(100, 32, seed=300 + seed)
        hessian, amax = rows.T @ rows, amax_of(weight, "channel")
        by_activation, left_to_right = (
            loss(weight, gptq(weight, hessian, amax, INT4, GPTQOptions(activation_order=order)), hessian)
            for order in (True, False)
        )
        ratios.append(by_activation / left_to_right)
    assert torch.tensor(ratios).log().mean().exp() < 0.8


@pytest.mark.parametrize("scales", ["tensor", "channel", "group", "column"])
@pytest.mark.parametrize(
    "fmt",
    [INT8, INT4, INT3, E4M3, QuantFormat(4, narrow_range=True), QuantFormat(4, unsigned=True)],
    ids=["int8", "int4", "int3", "e4m3", "narrow", "unsigned"],
)
def test_columns_are_rounded_exactly_as_the_quantizer_does(fmt: QuantFormat, scales: str):
    # Below gptq(), which would give rows that are rounded wrongly back to the quantizer's own rounding.
    weight = normal(64, 96, seed=40) * normal(96, seed=41).exp()
    amax = 0.5 * (weight.abs().amax(dim=0, keepdim=True) if scales == "column" else amax_of(weight, scales))
    if scales == "group":
        amax[:4, :8] = 0.0
    elif scales == "column":
        amax[:, :8] = 0.0
    elif scales == "channel":
        amax[:4] = 0.0
    weight[:, 10] = (amax / fmt.max_code).expand_as(weight)[:, 10] * 2.5  # ties
    order = torch.randperm(96, generator=torch.Generator().manual_seed(42))
    spread = amax.reshape(1, 1) if amax.dim() == 0 else amax
    rounded = _round_columns(weight, spread, order, torch.eye(96), fmt, 10)
    assert torch.equal(rounded, quantize_dequantize(weight, amax, fmt))
    assert rounded.isfinite().all()
    assert scales == "tensor" or (rounded[0, :8] == 0).all()
    assert (rounded[5, 8:] != 0).any()


@FORMATS
def test_independent_channels_are_rounded_to_nearest(fmt: QuantFormat):
    weight, hessian = normal(16, 32, seed=7), torch.diag(normal(32, seed=8).exp())
    amax = amax_of(weight, "channel")
    assert torch.equal(gptq(weight, hessian, amax, fmt), quantize_dequantize(weight, amax, fmt))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_channels_are_rounded_to_nearest_and_leave_the_others_alone(damping: float):
    weight, rows = normal(16, 32, seed=9), correlated_rows(100, 32, seed=10)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[0, 5, 31]] = True
    rows[:, dead] = 0.0
    amax, options = amax_of(weight, "channel"), GPTQOptions(damping=damping)
    rounded = gptq(weight, rows.T @ rows, amax, INT4, options)
    assert torch.equal(rounded[:, dead], quantize_dequantize(weight[:, dead], amax, INT4))
    alive = rows[:, ~dead]
    assert torch.equal(rounded[:, ~dead], gptq(weight[:, ~dead], alive.T @ alive, amax, INT4, options))
    assert not torch.equal(rounded[:, ~dead], quantize_dequantize(weight[:, ~dead], amax, INT4))


def test_a_block_without_any_data_is_rounded_to_nearest():
    weight = normal(4, 8, seed=11)
    assert torch.equal(
        gptq(weight, torch.zeros(8, 8), amax_of(weight, "tensor"), INT4),
        quantize_dequantize(weight, amax_of(weight, "tensor"), INT4),
    )


def test_all_zero_weight_rows_stay_zero():
    weight, rows = normal(8, 16, seed=12), correlated_rows(40, 16, seed=13)
    weight[3] = 0.0
    rounded = gptq(weight, rows.T @ rows, amax_of(weight, "channel"), INT4)
    assert (rounded[3] == 0).all()
    assert rounded[[0, 7]].abs().sum() > 0


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_fewer_rows_than_channels(damping: float, caplog: pytest.LogCaptureFixture):
    weight, rows = normal(16, 64, seed=14), correlated_rows(10, 64, seed=15)
    hessian, amax = rows.T @ rows, amax_of(weight, "channel")
    with caplog.at_level(logging.DEBUG, logger="modelopt_ext.calibrate.gptq"):
        rounded = gptq(weight, hessian, amax, INT4, GPTQOptions(damping=damping))
    assert loss(weight, rounded, hessian) < 0.3 * loss(weight, quantize_dequantize(weight, amax, INT4), hessian)
    assert ("damping raised" in caplog.text) == (damping == 0.0)


def test_a_duplicated_channel_needs_no_luck():
    # Exactly singular, far from zero: without damping the last pivot is rounding error of either sign.
    weight, rows = normal(8, 12, seed=16), correlated_rows(50, 12, seed=17)
    rows[:, 11] = rows[:, 2]
    hessian, amax = rows.T @ rows, amax_of(weight, "channel")
    rounded = gptq(weight, hessian, amax, INT4, GPTQOptions(damping=0.0))
    assert loss(weight, rounded, hessian) < loss(weight, quantize_dequantize(weight, amax, INT4), hessian)


def test_arguments_are_not_changed():
    weight, rows = normal(8, 16, seed=18), correlated_rows(40, 16, seed=19)
    rows[:, 3] = 0.0
    arguments = weight, rows.T @ rows, amax_of(weight, "group")
    copies = [argument.clone() for argument in arguments]
    gptq(*arguments, INT4)
    corrected_target(rows, rows + 0.1, weight, 0.0)
    assert all(torch.equal(argument, copy) for argument, copy in zip(arguments, copies, strict=True))


@pytest.mark.parametrize("bad", ["weight", "Hessian", "amax"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad: str, value: float):
    arguments = {"weight": normal(4, 8, seed=20), "Hessian": torch.eye(8), "amax": torch.ones(4, 1)}
    arguments[bad][1, 0] = value
    with pytest.raises(ValueError, match=f"the {bad} contains NaN"):
        gptq(arguments["weight"], arguments["Hessian"], arguments["amax"], INT4)


def test_what_is_no_gram_matrix_is_refused():
    weight = normal(4, 2, seed=21)
    with pytest.raises(ValueError, match="not positive definite, even with 1 of its mean diagonal"):
        gptq(weight, torch.tensor([[1.0, 3.0], [3.0, 1.0]]), torch.tensor(1.0), INT4)
    with pytest.raises(ValueError, match="negative diagonal"):
        gptq(weight, torch.diag(torch.tensor([1.0, -1.0])), torch.tensor(1.0), INT4)


def test_shapes_formats_and_options_are_checked():
    weight, hessian = normal(4, 16, seed=22), torch.eye(16)
    with pytest.raises(ValueError, match=r"not \(4, 16\) with \(8, 8\)"):
        gptq(weight, torch.eye(8), torch.tensor(1.0), INT4)
    with pytest.raises(ValueError, match=r"repeated over their columns"):
        gptq(weight, hessian, torch.ones(4, 2), INT4)
    with pytest.raises(ValueError, match="NVFP4 without GPTQ"):
        gptq(weight, hessian, torch.tensor(1.0), QuantFormat((2, 1)))
    with pytest.raises(ValueError, match="damping"):
        GPTQOptions(damping=-0.1)
    with pytest.raises(ValueError, match="block_size"):
        GPTQOptions(block_size=0)


def test_damped_cholesky_is_the_factor_of_the_damped_matrix():
    rows = correlated_rows(100, 20, seed=23)
    gram = rows.T @ rows
    factor = damped_cholesky(gram, 0.1)
    expected = gram.double() + 0.1 * gram.double().diagonal().mean() * torch.eye(20).double()
    torch.testing.assert_close(factor @ factor.T, expected, rtol=1e-12, atol=0.0)
    assert torch.equal(factor, factor.tril())
    copy = gram.double()
    damped_cholesky(copy, 0.1)
    assert torch.equal(copy, gram.double())


def test_damped_cholesky_trusts_no_pivot_that_is_rounding_error():
    for seed in range(10):
        rows = correlated_rows(50, 12, seed=500 + seed).double()
        rows[:, 11] = rows[:, 2]
        gram = rows.T @ rows
        factor = damped_cholesky(gram, 0.0)
        assert (factor.diagonal().square() / gram.diagonal()).min() > 1e-9
        # The first step of damping was enough.
        torch.testing.assert_close(factor @ factor.T, gram, rtol=0.0, atol=2e-6 * float(gram.diagonal().mean()))


# -- the target that allows for rounded inputs --------------------------------------------------------------------


def rounded_inputs(rows: Tensor) -> Tensor:
    return quantize_dequantize(rows, 0.6 * rows.abs().amax(), INT4)


def test_without_rounding_the_target_is_the_weight():
    rows, weight = correlated_rows(50, 16, seed=24), normal(8, 16, seed=25)
    assert torch.equal(corrected_target(rows, rows, weight, 0.01), weight)
    assert not torch.equal(corrected_target(rows, rounded_inputs(rows), weight, 0.01), weight)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_the_target_is_the_ridge_regression_towards_the_weight(damping: float):
    rows, weight = correlated_rows(50, 16, seed=26).double(), normal(8, 16, seed=27)
    rounded = rounded_inputs(rows)
    # The same minimum as one least-squares problem: the rows, and below them one row a channel that asks for W.
    diagonal = rounded.square().sum(dim=0)
    assert 0 < (diagonal == 0).sum() < 8  # some channels are too small for any code: not part of the mean
    ridge = (damping * diagonal[diagonal > 0].mean()).sqrt() * torch.eye(16, dtype=torch.float64)
    left = torch.cat([rounded, ridge])
    right = torch.cat([rows @ weight.double().T, ridge @ weight.double().T])
    expected = torch.linalg.lstsq(left, right).solution.T.float()
    torch.testing.assert_close(corrected_target(rows, rounded, weight, damping), expected, rtol=1e-5, atol=1e-6)


def test_the_target_from_sums_over_batches_equals_the_one_from_rows():
    rows, weight = correlated_rows(60, 16, seed=28).double(), normal(8, 16, seed=29)
    rounded = rounded_inputs(rows)
    hessian, product = torch.zeros(16, 16).double(), torch.zeros(16, 16).double()
    for part in range(0, 60, 20):
        batch, batch_rounded = rows[part : part + 20], rounded[part : part + 20]
        hessian += batch_rounded.T @ batch_rounded
        product += batch_rounded.T @ (batch - batch_rounded)
    torch.testing.assert_close(
        corrected_target_from_products(hessian, product, weight, 0.01), corrected_target(rows, rounded, weight, 0.01)
    )


def test_the_target_reduces_the_output_error_on_unseen_rows_before_and_after_gptq():
    plain_errors, target_errors, plain_after, target_after = [], [], [], []
    for seed in range(10):
        rows, weight = correlated_rows(1200, 32, seed=400 + seed), normal(16, 32, seed=seed)
        rounded = rounded_inputs(rows)
        seen, unseen = slice(0, 600), slice(600, 1200)
        target = corrected_target(rows[seen], rounded[seen], weight, 0.01)
        hessian, amax = rounded[seen].T @ rounded[seen], amax_of(weight, "channel")

        def unseen_error(weight: Tensor, rows: Tensor, rounded: Tensor, changed: Tensor) -> float:
            return float((rows @ weight.T - rounded @ changed.T).square().sum())

        data = weight, rows[unseen], rounded[unseen]
        plain_errors.append(unseen_error(*data, weight))
        target_errors.append(unseen_error(*data, target))
        plain_after.append(unseen_error(*data, gptq(weight, hessian, amax, INT4)))
        target_after.append(unseen_error(*data, gptq(target, hessian, amax, INT4)))
    assert sum(target_errors) < 0.9 * sum(plain_errors)
    assert sum(target_after) < 0.9 * sum(plain_after)
    assert sum(better < worse for better, worse in zip(target_after, plain_after, strict=True)) >= 9


def test_bad_rows_are_refused():
    rows, weight = normal(5, 8, seed=30), normal(4, 8, seed=31)
    with pytest.raises(ValueError, match=r"rows \(M, K\)"):
        corrected_target(rows, rows[:3], weight, 0.01)
    with pytest.raises(ValueError, match="contain NaN"):
        corrected_target(rows, rows * float("nan"), weight, 0.01)


# -- accumulated Hessians ---------------------------------------------------------------------------------------------


def test_moments_are_those_of_all_rows():
    calls = [correlated_rows(count, 24, seed=count) + 3 for count in (1, 7, 200, 64)]
    moments = SecondMoments()
    for call in calls:
        moments.update(call)
    every, shift = torch.cat(calls).double(), normal(24, seed=5) + 3
    assert moments.count == 272
    for c in (None, shift):
        centred = every if c is None else every - c.double()
        found = moments.about(c, torch.device("cpu"))
        torch.testing.assert_close(found, found.T, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(found.double(), centred.T @ centred, rtol=1e-4, atol=1e-3)


def test_large_means_cancel_before_they_are_squared():
    # Spread 1 around 1000: squares of the plain values leave float32 no digit of the spread's square.
    rows = 1000 + normal(4096, 8, seed=1)
    moments = SecondMoments()
    for call in rows.split(512):
        moments.update(call)
    centred = (rows - 1000).double()
    found = moments.about(torch.full((8,), 1000.0), torch.device("cpu")).double()
    torch.testing.assert_close(found, centred.T @ centred, rtol=1e-4, atol=0.05)
    plain = (rows.T @ rows - 1000 * (rows.sum(0)[:, None] + rows.sum(0)) + 4096 * 1e6).double()
    assert (plain - centred.T @ centred).abs().max() > 50 * (found - centred.T @ centred).abs().max()


def test_moments_without_rows_are_refused():
    with pytest.raises(ValueError, match="no rows were accumulated"):
        SecondMoments().about(None, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_accumulate_every_row_of_every_shape(dtype: torch.dtype):
    statistics = LinearStatistics(samples=5, seed=0, moments=SecondMoments())
    calls = [normal(*shape, 16, seed=i).to(dtype) for i, shape in enumerate([(3,), (2, 40), (2, 3, 5), (), (0, 2)])]
    for call in calls:
        statistics.update(call)
    every = torch.cat([call.reshape(-1, 16) for call in calls]).double()
    assert statistics.rows is not None
    assert statistics.moments is not None
    assert (len(statistics.rows), statistics.moments.count, len(every)) == (5, 114, 114)
    found = statistics.moments.about(None, torch.device("cpu")).double()
    torch.testing.assert_close(found, every.T @ every, rtol=1e-5, atol=1e-4)


def test_smoothing_and_rotation_act_on_both_sides():
    rows, smoothing = correlated_rows(100, 48, seed=1), normal(48, seed=2).exp()
    group = Group(normal(8, 48, seed=3), smoothing, (slice(0, 32), slice(32, 48)), (32, 16), (8,), INT4)
    in_codes = group.rows_to_codes(rows)
    torch.testing.assert_close(group.products_to_codes(rows.T @ rows), in_codes.T @ in_codes, rtol=1e-4, atol=1e-3)


def rounded_rows(rows: Tensor, fmt: QuantFormat) -> Tensor:
    return quantize_dequantize(rows, rows.abs().amax(dim=1, keepdim=True), fmt)


def losses_by_hessian(bits: int, count: int, scale: str) -> dict[str, float]:
    """What GPTQ loses on unseen rows that are rounded, by where its Hessian comes from; 1 is the true one's loss."""
    fmt, channels = QuantFormat(bits), 64
    mixing = correlated_rows(channels, channels, seed=77) / channels**0.5
    rows, unseen = (normal(8000, channels, seed=seed) @ mixing for seed in (1, 2))
    clipped = 0.6 * rows.abs().amax()

    def rounded(x: Tensor) -> Tensor:
        return quantize_dequantize(x, clipped if scale == "static" else x.abs().amax(dim=1, keepdim=True), fmt)

    sample, weight = rows[:count], normal(32, channels, seed=3)
    amax, target = weight.abs().amax(dim=1, keepdim=True), rounded(unseen).T @ rounded(unseen)
    hessians = {
        "true": rounded(rows).T @ rounded(rows),
        "sampled": rounded(sample).T @ rounded(sample),
        "unrounded": rows.T @ rows,
        "found": with_rounding(rows.T @ rows * (count / 8000), sample, rounded(sample)),
    }
    losses = {name: loss(weight, gptq(weight, hessian, amax, INT4), target) for name, hessian in hessians.items()}
    return {name: value / losses["true"] for name, value in losses.items()}


@pytest.mark.parametrize("scale", ["static", "per_token"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [32, 256])
def test_rounding_is_a_gain_and_noise_of_each_channel(bits: int, count: int, scale: str):
    losses = losses_by_hessian(bits, count, scale)
    assert losses["found"] < 1.06
    assert losses["sampled"] > losses["found"] + 0.05
    if bits == 4:
        assert losses["unrounded"] > losses["found"] + 0.03


@pytest.mark.parametrize("count", [1, 4, 64])
def test_any_samples_rounding_leaves_the_hessian_positive(count: int):
    rows = correlated_rows(4000, 64, seed=2)
    sample, weight = rows[:count], normal(8, 64, seed=3)
    coarse = quantize_dequantize(sample, sample.abs().amax(dim=1, keepdim=True), QuantFormat(2))
    found = with_rounding(rows.T @ rows * (count / 4000), sample, coarse)
    torch.testing.assert_close(found, found.T, rtol=1e-5, atol=1e-4)
    assert torch.linalg.eigvalsh(found.double()).min() > -1e-5 * found.diagonal().mean()
    assert torch.isfinite(gptq(weight, found, weight.abs().amax(), INT4)).all()


def test_without_rounding_the_hessian_stays_and_channels_that_round_to_zero_are_dead():
    rows = correlated_rows(500, 8, seed=4)
    hessian = rows.T @ rows
    torch.testing.assert_close(with_rounding(hessian, rows[:50], rows[:50]), hessian)
    rounded = rows[:50].clone()
    rounded[:, 3] = 0
    found = with_rounding(hessian, rows[:50], rounded)
    assert (found[3] == 0).all()
    assert (found[:, 3] == 0).all()
    assert (found.diagonal() > 0).sum() == 7


def test_a_channel_that_the_sample_misses_keeps_what_all_rows_say():
    rows = correlated_rows(500, 8, seed=4)
    rows[:100, 5] = 0
    hessian = rows.T @ rows
    found = with_rounding(hessian, rows[:100], rows[:100])
    assert hessian[5, 5] > 1
    torch.testing.assert_close(found, hessian)


def solved(calls: list[Tensor], samples: int, accumulated: bool, weight: Tensor, **options: Any) -> Any:
    statistics = LinearStatistics(samples, 0, moments=SecondMoments() if accumulated else None)
    for call in calls:
        statistics.update(call)
    plan = LinearPlan((weight.shape[1],), (weight.shape[0],), ("",))
    per_token, refine = QuantFormat(8, per_row=True, dynamic=True), RefineOptions(gptq=GPTQOptions())
    search = SearchOptions(refine=refine, **options)
    return solve_linear(weight, plan, statistics, per_token, QuantFormat(4, per_row=True), search)


def similar_calls(count: int, seed: int, channels: int = 64) -> list[Tensor]:
    mixing = correlated_rows(channels, channels, seed=77) / channels**0.5
    return [(normal(4, 64, channels, seed=seed + i) @ mixing + 0.3).bfloat16() for i in range(count)]


OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"polarity": "shift"}, {"alphas": (0.5,)}, {"alphas": (0.4,), "polarity": "auto", "rotate": True}],
    ids=["plain", "shift", "smoothed", "rotated"],
)


@OPTIONS
def test_with_all_rows_sampled_both_hessians_give_the_same_codes(options: dict[str, Any]):
    calls, weight = similar_calls(4, seed=10), normal(48, 64, seed=1)
    rows, accumulated = (solved(calls, 10_000, which, weight, **options) for which in (False, True))
    assert (rows.hessian, accumulated.hessian) == ("rows", "accumulated")
    assert "gptq" in rows.stages[0]
    assert torch.equal(rows.weight, accumulated.weight)


@OPTIONS
def test_with_nearly_all_rows_sampled_the_codes_are_nearly_the_same(options: dict[str, Any]):
    calls, weight = similar_calls(4, seed=10), normal(48, 64, seed=1)
    rows, accumulated = (solved(calls, 1023, which, weight, **options) for which in (False, True))
    assert rows.stages == accumulated.stages
    assert rows.layout == accumulated.layout
    moved, apart = (float((rows.weight - other).square().mean()) for other in (weight, accumulated.weight))
    assert 0 < apart < 0.3 * moved


def test_accumulated_is_better_on_unseen_rows_where_few_are_sampled():
    weight, gains = normal(48, 64, seed=1), []
    unseen = torch.cat(similar_calls(4, seed=900)).float().flatten(0, 1)

    def error(solution: Any) -> float:
        assert "gptq" in solution.stages[0]
        return float((unseen @ (solution.weight - weight).T).square().sum())

    for seed in range(5):
        calls = similar_calls(8, seed=100 + 20 * seed)
        few, many, every = (solved(calls, n, a, weight) for n, a in [(96, False), (96, True), (10_000, False)])
        gains.append(error(few) / error(many))
        assert error(many) < 1.03 * error(every)
    assert min(gains) > 1.15


def test_the_memory_bound_counts_bytes():
    memory = HessianMemory()
    limit = 5 * 4 * 64 * 64 / 2**30
    assert [memory.admit(64, limit) for _ in range(4)] == [True] * 4
    assert not memory.admit(128, limit)
    assert memory.admit(64, limit)  # a later, smaller one that still fits
    assert not memory.admit(64, limit)
    assert memory.bytes_used == 5 * 4 * 64 * 64


class Two(nn.Module):
    """Two Linears, each a block of its own; the second is called twice a forward, with different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 32), nn.Linear(32, 32)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        return second(second(first(x)).flatten(0, 1))


def quantized_two(gptq_fields: dict[str, Any], dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = Two().to(dtype)
    config = linear_only(
        {"num_bits": 4, "axis": 0}, {"num_bits": 8, **PER_TOKEN}, gptq=gptq_fields, progress=False, **fields
    )

    def loop(module: nn.Module) -> None:
        for call in similar_calls(6, seed=30):
            module(call.to(dtype))

    return mtq.quantize(copy.deepcopy(model), config, loop)


@pytest.mark.parametrize("sequential", [False, True], ids=["at_once", "sequential"])
def test_layers_beyond_the_memory_bound_take_rows_and_are_named(sequential: bool, caplog: pytest.LogCaptureFixture):
    first, second = 4 * 64 * 64 / 2**30, 4 * 32 * 32 / 2**30
    for limit, at_once, by_blocks in (
        (first + second, None, None),
        (first, "blocks.1", None),  # enough for one block at a time
        (second, "blocks.0", "blocks.0"),
        (second / 2, "blocks.{0-1}", "blocks.{0-1}"),
    ):
        caplog.clear()
        quantized_two({"hessian": "accumulated", "hessian_memory": limit}, sequential=sequential)
        warnings = [record.getMessage() for record in caplog.records if "hessian_memory" in record.getMessage()]
        named = by_blocks if sequential else at_once
        assert len(warnings) == (named is not None)
        assert named is None or f"those of {named} come from the sampled rows" in warnings[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"sequential": True}, {"layerwise": {"enable": True}}], ids=str)
def test_a_model_gets_other_weights_from_accumulated_hessians(dtype: torch.dtype, fields: dict[str, Any]):
    """With 128 of 1536 rows sampled, the error falls by 7 to 13 %; single samples vary by 8 %."""
    calls = [call.to(dtype) for call in similar_calls(4, seed=600)]
    torch.manual_seed(0)
    original = Two().to(dtype)
    errors = {"rows": 0.0, "accumulated": 0.0}
    for seed in range(3):
        few = {"samples": 128, "seed": seed, **fields}
        models = {kind: quantized_two({"hessian": kind}, dtype, **few) for kind in errors}
        with torch.no_grad():
            for kind, model in models.items():
                errors[kind] += sum(float((model(c) - original(c)).square().sum()) for c in calls)
                assert model.blocks[0].weight.dtype == dtype
        assert not torch.equal(models["rows"].blocks[0].weight, models["accumulated"].blocks[0].weight)
    assert errors["accumulated"] < 0.97 * errors["rows"]


def test_the_config_knows_where_hessians_come_from():
    assert SegQuantCalibConfig(gptq=True).accumulated_memory is None
    assert SegQuantCalibConfig().accumulated_memory is None
    assert SegQuantCalibConfig(gptq={"hessian": "accumulated"}).accumulated_memory == 16
    config = SegQuantCalibConfig(layers={"a": {"gptq": {"hessian": "accumulated", "hessian_memory": 0.5}}})
    assert config.accumulated_memory is None
    assert config.for_layer("a").accumulated_memory == 0.5
    for wrong in ({"hessian": "all"}, {"hessian_memory": 0}, {"hessian": "accumulated", "hessian_memory": -1}):
        with pytest.raises(ValidationError, match="hessian"):
            SegQuantCalibConfig(gptq=wrong)
