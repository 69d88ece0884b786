"""Low-rank branches on tensors: against full SVDs in float64, and the randomized form against the exact one."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from modelopt_ext.calibrate.low_rank import checked_rank, low_rank, weighted_low_rank


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(size: int, count: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(size, count, seed=seed).double()).Q


def with_singular_values(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    return (orthogonal(rows, len(values), seed) * values.double()) @ orthogonal(columns, len(values), seed + 1).T


def gram(channels: int, seed: int, rows: int = 300) -> Tensor:
    """X^T X of rows with dependent channels of very different size."""
    mixed = normal(rows, channels, seed=seed) @ normal(channels, channels, seed=seed + 1)
    x = mixed * normal(channels, seed=seed + 2).clamp(-2, 2).exp()
    return x.T @ x


def damped(hessian: Tensor, damping: float) -> Tensor:
    hessian = hessian.double()
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double()


def weighted_loss(error: Tensor, factors: tuple[Tensor, Tensor], hessian: Tensor) -> float:
    """tr((E - up down) H (E - up down)^T)."""
    down, up = factors
    left = error.double() - up.double() @ down.double()
    return float(((left @ hessian.double()) * left).sum())


def residual(weight: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    down, up = factors
    return float((weight.double() - up.double() @ down.double()).square().sum())


# -- plain ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("rank", [0, 1, 7, 24])
def test_exact_leaves_the_small_singular_values(shape: tuple[int, int], rank: int):
    weight = normal(*shape, seed=1)
    down, up = low_rank(weight, rank)
    assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
    values = torch.linalg.svdvals(weight.double())
    expected = float(values[rank:].square().sum())
    assert residual(weight, (down, up)) == pytest.approx(expected, rel=1e-5, abs=1e-8)
    # Each pair of vectors shares the root of its singular value.
    torch.testing.assert_close(down.norm(dim=1).double(), values[:rank].sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(up.norm(dim=0).double(), values[:rank].sqrt(), rtol=1e-4, atol=1e-5)


SPECTRA = {
    "flat": lambda n: torch.ones(n) + 0.01 * torch.arange(n, 0, -1) / n,
    "noise": lambda n: torch.linalg.svdvals(normal(n, n, seed=2)),
    "slow": lambda n: torch.arange(1, n + 1) ** -0.5,
    "steep": lambda n: torch.arange(1, n + 1) ** -2.0,
    "outliers": lambda n: torch.cat([torch.full((8,), 50.0), torch.linalg.svdvals(normal(n, n, seed=3))[8:]]),
}


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_randomized_residual_is_within_a_percent_of_the_exact_one(spectrum: str, rank: int):
    values = SPECTRA[spectrum](400).double().sort(descending=True).values
    weight = with_singular_values(values, 500, 400, seed=4).float()
    least = float(values[rank:].square().sum())
    assert residual(weight, low_rank(weight, rank, exact=True)) == pytest.approx(least, rel=1e-3)
    assert residual(weight, low_rank(weight, rank, exact=False)) < 1.01 * least
    tall = residual(weight.T, low_rank(weight.T, rank, exact=False))
    assert tall < 1.01 * least


def test_the_size_decides_whether_the_svd_is_exact():
    small, large = normal(100, 200, seed=5), normal(600, 500, seed=6)
    assert torch.equal(low_rank(small, 8)[0], low_rank(small, 8, exact=True)[0])
    assert torch.equal(low_rank(large, 8)[0], low_rank(large, 8, exact=False)[0])
    assert not torch.equal(low_rank(large, 8)[0], low_rank(large, 8, exact=True)[0])
    assert torch.equal(low_rank(large, 300)[0], low_rank(large, 300, exact=True)[0])


def test_without_power_iterations_the_sketch_is_worse():
    weight = with_singular_values(SPECTRA["slow"](400), 500, 400, seed=7).float()
    least = residual(weight, low_rank(weight, 32, exact=True))
    careless = low_rank(weight, 32, exact=False, power_iterations=0, oversampling=0)
    assert residual(weight, careless) > 1.1 * least


def test_the_sketch_is_deterministic_and_leaves_the_global_generator_alone():
    weight = normal(500, 400, seed=8)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = low_rank(weight, 16, exact=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = low_rank(weight, 16, exact=False)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(low_rank(weight, 16, exact=False, seed=1)[0], first[0])


def test_half_precision_holds_the_factors_of_extreme_weights():
    for size in (2.0**-18, 2.0**12):
        weight = (normal(64, 48, seed=9) * size).bfloat16()
        down, up = low_rank(weight, 8)
        least = residual(weight, (down, up))
        halves = down.half().float(), up.half().float()
        assert residual(weight, halves) < 1.0001 * least


def test_a_matrix_of_zeros_has_a_branch_of_zeros():
    for exact in (True, False):
        down, up = low_rank(torch.zeros(500, 400), 8, exact=exact)
        assert torch.equal(up @ down, torch.zeros(500, 400))


def test_bad_matrices_and_ranks_are_refused():
    weight = normal(6, 4, seed=10)
    for rank in (5, -1):
        with pytest.raises(ValueError, match=rf"rank {rank} of a matrix of shape \(6, 4\)"):
            low_rank(weight, rank)
    weight[2, 2] = float("nan")
    with pytest.raises(ValueError, match="contains NaN"):
        low_rank(weight, 2)
    with pytest.raises(ValueError, match="contains NaN"):
        weighted_low_rank(weight, torch.eye(4), 2)
    with pytest.raises(ValueError, match="Hessian contains NaN"):
        weighted_low_rank(torch.ones(6, 4), torch.full((4, 4), float("nan")), 2)
    with pytest.raises(ValueError, match=r"not \(6, 4\) with \(6, 6\)"):
        weighted_low_rank(torch.ones(6, 4), torch.eye(6), 2)


# -- weighted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("damping", [0.0001, 0.1])
def test_weighted_is_the_minimum_of_qera(shape: tuple[int, int], damping: float):
    error, hessian = normal(*shape, seed=11), gram(shape[1], seed=12)
    weights = damped(hessian, damping)
    # The paper's way: the symmetric root from the eigenvalues.
    eigenvalues, vectors = torch.linalg.eigh(weights)
    root = vectors @ torch.diag(eigenvalues.sqrt()) @ vectors.T
    left, values, right = torch.linalg.svd(error.double() @ root, full_matrices=False)
    expected = (left[:, :6] * values[:6]) @ right[:6] @ torch.linalg.inv(root)

    down, up = weighted_low_rank(error.double(), hessian.double(), 6, damping=damping)
    torch.testing.assert_close(up @ down, expected, rtol=1e-6, atol=1e-8)
    single = weighted_low_rank(error, hessian, 6, damping=damping)
    assert weighted_loss(error, single, weights) == pytest.approx(float(values[6:].square().sum()), rel=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_weighted_beats_plain_in_the_weighted_norm_only(exact: bool):
    for seed in range(5):
        error, hessian = normal(64, 96, seed=seed), gram(96, seed=20 + seed)
        weighted = weighted_low_rank(error, hessian, 8, exact=exact)
        plain = low_rank(error, 8, exact=exact)
        assert weighted_loss(error, weighted, hessian) < 0.8 * weighted_loss(error, plain, hessian)
        assert residual(error, weighted) > residual(error, plain)


def test_weighted_without_a_hessian_or_with_a_level_one_is_plain():
    error = normal(40, 24, seed=13)
    down, up = low_rank(error, 5)
    assert torch.equal(weighted_low_rank(error, None, 5)[0], down)
    level = weighted_low_rank(error, 7.0 * torch.eye(24), 5)
    torch.testing.assert_close(level[1] @ level[0], up @ down, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", [2.0**-300, 1.0, 2.0**300])
def test_the_unit_of_the_hessian_does_not_matter_and_the_factors_are_balanced(unit: float):
    error, hessian = normal(40, 24, seed=14), gram(24, seed=15)
    expected = weighted_low_rank(error, hessian, 5)
    down, up = weighted_low_rank(error, hessian.double() * unit, 5)
    torch.testing.assert_close(up @ down, expected[1] @ expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0), rtol=1e-5, atol=0.0)
    halves = down.half().float(), up.half().float()
    assert weighted_loss(error, halves, hessian) < 1.0001 * weighted_loss(error, (down, up), hessian)


def test_weighted_with_fewer_rows_than_channels_and_dead_channels():
    error, hessian = normal(32, 48, seed=16), gram(48, seed=17, rows=10)
    hessian[5], hessian[:, 5] = 0.0, 0.0
    for damping in (0.0, 0.01):
        factors = weighted_low_rank(error, hessian, 12, damping=damping)
        # Ten rows: a branch of rank 12 can serve them all.
        assert weighted_loss(error, factors, hessian) < 1e-3 * weighted_loss(error, low_rank(error, 12), hessian)
        assert all(torch.isfinite(factor).all() for factor in factors)
    with pytest.raises(ValueError, match="not positive definite"):
        weighted_low_rank(error[:, :2], torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 1)


# -- ranks ------------------------------------------------------------------------------------------------------------


def test_checked_rank_caps_or_refuses_by_name(caplog: pytest.LogCaptureFixture):
    assert checked_rank(32, (64, 48), "blocks.0.ff", "refuse") == 32
    assert checked_rank(48, (64, 48), "blocks.0.ff", "refuse") == 48
    with caplog.at_level(logging.INFO, logger="modelopt_ext.calibrate.low_rank"):
        assert checked_rank(49, (64, 48), "blocks.0.ff", "cap") == 48
    assert "blocks.0.ff: rank 49 capped at 48" in caplog.text
    with pytest.raises(ValueError, match=r"blocks\.0\.ff: rank 49 is above the largest, 48, of a block of 64 x 48"):
        checked_rank(49, (64, 48), "blocks.0.ff", "refuse")
    with pytest.raises(ValueError, match=r"blocks\.0\.ff: the rank of the low-rank branch is -1"):
        checked_rank(-1, (64, 48), "blocks.0.ff", "cap")
    with pytest.raises(ValueError, match="'cap' or 'refuse', not 'clip'"):
        checked_rank(8, (64, 48), "blocks.0.ff", "clip")
