"""GPTQ on tensors: against a column-by-column reference that inverts every Hessian, and what holds for any input."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from modelopt_ext.calibrate.gptq import (
    GPTQOptions,
    _round_columns,
    corrected_target,
    corrected_target_from_products,
    damped_cholesky,
    gptq,
)
from modelopt_ext.formats import QuantFormat, quantize_dequantize

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
    torch.testing.assert_close(codes, on_grid, rtol=1e-6, atol=1e-5)
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
