"""GPTQ: weights rounded so that the outputs, not the weights, change least (Frantar et al., arXiv 2210.17323).

For one block let X be its sampled rows as the quantized layer sees them and H = X^T X. Rounding W to Q changes the
outputs by ||X (W - Q)^T||^2 = tr((W - Q) H (W - Q)^T), a sum over the rows of W, which therefore never interact.
Rounding one column leaves an error that the columns not rounded yet can partly undo: the best they can do is (eq. 2)

    w[later] -= (w[j] - q[j]) / [F^-1]_jj * [F^-1]_j,later          F = H of the columns j and later

and every [F^-1]_j / [F^-1]_jj needed is a row of one matrix: with H^-1 = U^T U, U upper triangular (the Cholesky factor
of the *inverse*, step 3 of the paper), it is row j of U divided by U_jj.

How it is computed here. U comes from one factorization without ever forming H^-1: reversing the order of rows and
columns gives H = R R^T with R upper triangular, and U = R^-1. Columns are worked on as rows of the transposed weight,
so that each step reads contiguous memory, updates only its own block of ``block_size`` columns, and the rest once per
block by one matrix product (lazy updates, step 2). No step waits for the device, and each is a handful of kernels: with
thousands of columns one after the other, starting them is what takes the time on a GPU.

Scales are fixed beforehand ("static groups"), so any order of columns keeps to them, and columns are taken by falling
diagonal of H: the most used ones are rounded while the most others can still correct for them.

The result is greedy, so a row may (rarely, mostly by clipping) end worse than rounding to nearest; such a row is given
back its nearest rounding. No row of the result is worse than nearest, on the Hessian given.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import E4M3_MAX, SMALLEST_AMAX, QuantFormat, quantize_dequantize

logger = logging.getLogger(__name__)

# Damping is raised from here (if it was less) by this factor until the factorization works, and no further than the
# largest: a matrix that needs more than its own mean diagonal is no Gram matrix with rounding errors, but a wrong one.
SMALLEST_RAISED_DAMPING = 1e-6
DAMPING_STEP = 10.0
LARGEST_DAMPING = 1.0


@dataclass(frozen=True)
class GPTQOptions:
    """How :func:`gptq` solves one block.

    Attributes:
        damping: added to the diagonal of the Hessian, as a share of its mean diagonal (of channels that are not dead);
            in [0, 1]. More of it trusts the sampled rows less. Raised where the Hessian is singular without.
        block_size: columns between two updates of all later columns; changes speed and memory, not the result.
        activation_order: round the columns with the largest diagonal of the Hessian first, else from left to right.
    """

    damping: float = 0.01
    block_size: int = 128
    activation_order: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= LARGEST_DAMPING:
            raise ValueError(f"damping is a share of the mean diagonal in [0, {LARGEST_DAMPING}], not {self.damping}")
        if self.block_size < 1:
            raise ValueError(f"block_size is a number of columns >= 1, not {self.block_size}")


def gptq(
    weight: Tensor, hessian: Tensor, amax: Tensor, fmt: QuantFormat, options: GPTQOptions = GPTQOptions()
) -> Tensor:
    """Round ``weight`` to ``fmt`` with the least change of the outputs that a greedy pass over the columns finds.

    Args:
        weight: (N, K) float32, one block's weight as it will be stored (smoothed, the low-rank branch taken off).
        hessian: (K, K) float32 or float64, symmetric: X^T X of the block's input rows X as quantized, times any
            positive number. A channel with a zero on the diagonal is dead; its weights are rounded to nearest.
        amax: float32 >= 0, what the largest code stands for: () for one scale, (N, 1) for one per output channel,
            (N, K) for groups, each group's value repeated over its columns.
        fmt: the weight's format.
        options: see :class:`GPTQOptions`.

    Returns:
        (N, K) float32: rounded and back, on the grid of ``quantize_dequantize(weight, amax, fmt)``.

    Raises:
        ValueError: shapes that don't fit, NaN or infinity in an argument, or a Hessian that is not positive
            semi-definite. The message doesn't know the layer; callers add its name.
    """
    if weight.dim() != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"a weight (N, K) goes with a Hessian (K, K), not {tuple(weight.shape)} with {tuple(hessian.shape)}"
        )
    if not (fmt.is_integer or fmt.num_bits == (4, 3)):
        raise ValueError(
            f"GPTQ rounds to integers or FP8 E4M3, with scales fixed beforehand, not to num_bits={fmt.num_bits}: NVFP4 "
            "finds the scales of its groups from the rounded weights. Use NVFP4 without GPTQ"
        )
    amax = _two_dimensional(amax, weight)
    for what, tensor in (("weight", weight), ("Hessian", hessian), ("amax", amax)):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the {what} contains NaN or infinity; check the calibration data and the layers before")

    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()):
        raise ValueError("the Hessian has a negative diagonal, so it is not X^T X of any rows X")
    if options.activation_order:
        order = diagonal.argsort(descending=True, stable=True)
    else:
        order = torch.arange(weight.shape[1], device=weight.device)
    corrections = _corrections(hessian, order, options.damping)
    rounded = _round_columns(weight, amax, order, corrections, fmt, options.block_size)

    nearest = quantize_dequantize(weight, amax, fmt)
    worse = _row_losses(weight - rounded, hessian) > _row_losses(weight - nearest, hessian)
    return torch.where(worse.unsqueeze(1), nearest, rounded)


def damped_cholesky(gram: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of ``gram`` + d * mean diagonal * I, for the smallest workable d >= ``damping``.

    Args:
        gram: (K, K) float32 or float64, symmetric, positive semi-definite up to rounding. Not changed.
        damping: share of the mean of the diagonal (over those that are not zero) to add. If the factor doesn't exist
            or is without meaning in float64, it grows in steps of ten.

    Returns:
        (K, K) float64, lower triangular.

    Raises:
        ValueError: no damping up to the mean diagonal itself helps.
    """
    damped = gram.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    original = diagonal.clone()
    alive = original > 0
    # An all-zero matrix has no size to go by: damped by d itself, the rows of nothing ask for nothing.
    mean = torch.where(alive.any(), original.sum() / alive.sum().clamp(min=1), torch.ones_like(original[0]))
    # A pivot is what is left of its diagonal entry; below this it is rounding error of the subtraction.
    smallest_pivot = len(original) * torch.finfo(torch.float64).eps
    while True:
        diagonal.copy_(original + damping * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool((factor.diagonal().square() > smallest_pivot * diagonal).all()):
            return factor
        raised = max(damping * DAMPING_STEP, SMALLEST_RAISED_DAMPING)
        if raised > LARGEST_DAMPING * 1.0001:
            raise ValueError(
                f"the Hessian is not positive definite, even with {damping:g} of its mean diagonal added: it is not "
                "X^T X of any rows X; collect it again, in float32 or float64"
            )
        logger.debug("Hessian not positive definite: damping raised from %g to %g", damping, raised)
        damping = raised


def corrected_target(rows: Tensor, rounded_rows: Tensor, weight: Tensor, hessian_damping: float) -> Tensor:
    """The weight that best reproduces, on rounded inputs, the outputs that ``weight`` has on the exact ones.

    Minimizes || X W^T - X' W*^T ||^2 + d * mean diagonal of X'^T X' * || W* - W ||^2 over W*, where X are the exact
    rows and X' the rounded ones: ridge regression towards W. It undoes the part of the input error that is a linear
    function of the input as rounded: of rounding itself, of clipping, and of the layers quantized before, if
    ``rounded_rows`` come from the quantized model. As || X W^T - X' Q^T ||^2 = || X' (W* - Q)^T ||^2 + constant (at
    d = 0), GPTQ of W* with the Hessian X'^T X' then minimizes the output's error itself.

    Args:
        rows: (M, K) floating point, the block's input rows before rounding. Sums over rows are taken in float32, in
            float64 if the rows are.
        rounded_rows: (M, K) floating point, the same rows as the quantized layer reads them.
        weight: (N, K) float32.
        hessian_damping: d above, in [0, 1]; the mean is over channels that are not all zero. Raised where X'^T X' is
            singular without.

    Returns:
        (N, K) float32; ``weight`` itself, bit for bit, where the rows are equal.

    Raises:
        ValueError: shapes that don't fit, or rows that contain NaN or infinity.
    """
    if rows.dim() != 2 or rows.shape != rounded_rows.shape or rows.shape[1] != weight.shape[1]:
        raise ValueError(
            f"rows (M, K), rounded rows (M, K) and weight (N, K) are needed, not {tuple(rows.shape)}, "
            f"{tuple(rounded_rows.shape)} and {tuple(weight.shape)}"
        )
    precision = torch.float64 if torch.float64 in (rows.dtype, rounded_rows.dtype) else torch.float32
    exact, rounded = rows.to(precision), rounded_rows.to(precision)
    if not bool((torch.isfinite(exact) & torch.isfinite(rounded)).all()):
        raise ValueError("the sampled rows contain NaN or infinity; check the calibration data and the layers before")
    return corrected_target_from_products(rounded.T @ rounded, rounded.T @ (exact - rounded), weight, hessian_damping)


def corrected_target_from_products(
    hessian: Tensor, error_product: Tensor, weight: Tensor, hessian_damping: float
) -> Tensor:
    """:func:`corrected_target` from sums over any number of rows instead of the rows.

    Args:
        hessian: (K, K) float32 or float64, X'^T X' of the rows as rounded.
        error_product: (K, K) float32 or float64, X'^T (X - X') in the same unit. Accumulate the difference, not
            X'^T X: of two nearly equal sums too little would be left.
        weight: (N, K) float32.
        hessian_damping: as in :func:`corrected_target`.

    Returns:
        (N, K) float32.
    """
    factor = damped_cholesky(hessian, hessian_damping)
    # D = W* - W solves (H + d I) D^T = X'^T (X - X') W^T; the damping falls out of the right-hand side.
    change = torch.cholesky_solve(error_product.double() @ weight.double().T, factor)
    return (weight.double() + change.T).to(weight.dtype)


def _two_dimensional(amax: Tensor, weight: Tensor) -> Tensor:
    """``amax`` as (1, 1), (N, 1), (1, K) or (N, K)."""
    if amax.dim() == 0:
        return amax.reshape(1, 1)
    if amax.dim() != 2 or any(have not in (1, full) for have, full in zip(amax.shape, weight.shape, strict=True)):
        raise ValueError(
            f"amax of shape {tuple(amax.shape)} doesn't fit a weight of shape {tuple(weight.shape)}; use () for one "
            "scale, (N, 1) for one per output channel, (N, K) for groups, repeated over their columns"
        )
    return amax


def _corrections(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """(K, K) float32, upper unit triangular: row j is U_j / U_jj, in the order of work.

    A dead channel has only the damping on its diagonal and nothing beside it, so it neither gives nor gets corrections.
    """
    # Cholesky of the reversed order gives the upper factor R of H = R R^T; its inverse, turned back, is U.
    backwards = order.flip(0)
    factor = damped_cholesky(hessian[backwards][:, backwards], damping)
    inverse = torch.linalg.solve_triangular(
        factor, torch.eye(len(order), dtype=factor.dtype, device=factor.device), upper=False
    )
    inverse /= inverse.diagonal().clone().unsqueeze(1)
    return inverse.flip(0, 1).float()


def _round_columns(
    weight: Tensor, amax: Tensor, order: Tensor, corrections: Tensor, fmt: QuantFormat, block_size: int
) -> Tensor:
    """The pass over the columns; returns (N, K) like ``weight``."""
    # (K, N): a column of the weight is contiguous, so are its scales.
    left = weight.T[order].contiguous()
    scales = _Scales(amax.T[order] if amax.shape[1] > 1 else amax.T, fmt)
    rounded, columns = torch.empty_like(left), len(order)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = left[start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            j = start + i
            scales.round(block[i], j, out=rounded[j])
            torch.sub(block[i], rounded[j], out=errors[i])
            if j + 1 < stop:
                block[i + 1 :].addr_(corrections[j, j + 1 : stop], errors[i], alpha=-1)
        if stop < columns:
            left[stop:].addmm_(corrections[start:stop, stop:].T, errors, alpha=-1)
    left[order] = rounded
    return left.T.contiguous()


class _Scales:
    """:func:`~modelopt_ext.formats.quantize_dequantize` of one column after the other, what they share done once.

    Bit for bit the same: the same operations, but where a scale is zero it divides by infinity, without a selection.

    Args:
        amax: (K, N), (K, 1), (1, N) or (1, 1): as in :func:`gptq`, transposed.
        fmt: integers or E4M3.
    """

    def __init__(self, amax: Tensor, fmt: QuantFormat) -> None:
        zero = amax <= SMALLEST_AMAX
        scale = fmt.max_code / torch.where(zero, torch.ones_like(amax), amax)
        self._per_column = len(amax) > 1
        self._multiplier = scale.contiguous()
        self._divisor = torch.where(zero, torch.full_like(scale, math.inf), scale).contiguous()
        self._fmt = fmt

    def round(self, values: Tensor, column: int, out: Tensor) -> None:
        """Round ``values`` (N,) of ``column`` into ``out`` (N,)."""
        row = column if self._per_column else 0
        codes = values * self._multiplier[row]
        if self._fmt.is_integer:
            codes.round_().clamp_(self._fmt.min_code, self._fmt.max_code)
        else:
            codes = codes.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(values.dtype)
        torch.div(codes, self._divisor[row], out=out)


def _row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """(N,): e H e^T of each row of ``error``."""
    return ((error @ hessian.to(error.dtype)) * error).sum(dim=1)
