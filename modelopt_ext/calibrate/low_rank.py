"""Low-rank branches: the part of a weight, or of its rounding error, that 16 bits carry beside the codes.

SVDQuant (Li et al., arXiv 2411.05007) takes the largest singular directions L of W out before rounding: what is left,
W - L, is smaller and gets finer codes. By Eckart and Young the truncated SVD leaves the least squared sum behind.

QERA (Zhang et al., arXiv 2410.06040, the exact form) asks for the least error of the *outputs* instead. With H = X^T X
of the rows X that the layer reads, || X (E - L)^T ||^2 = || (E - L) S ||^2 for any S with S S^T = H, and the minimum
over L of rank r is SVD_r(E S) S^-1. The paper takes the symmetric root of H; here S is its Cholesky factor, which is
cheaper and gives the same L: two roots differ by a rotation on the right, which goes through a truncated SVD unchanged.

Both factors get the square roots of the singular values, so that neither leaves half precision's range.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .gptq import damped_cholesky

logger = logging.getLogger(__name__)

# Below this side, or where the sketch would be a good part of the matrix, the exact SVD is as fast.
SMALLEST_SKETCHED_SIDE = 384
LARGEST_SKETCHED_SHARE = 0.25
OVERSAMPLING = 16
POWER_ITERATIONS = 6


def low_rank(
    weight: Tensor,
    rank: int,
    *,
    exact: bool | None = None,
    seed: int = 0,
    oversampling: int = OVERSAMPLING,
    power_iterations: int = POWER_ITERATIONS,
) -> tuple[Tensor, Tensor]:
    """The best approximation of ``weight`` by a product of rank ``rank``, in the sum of squares.

    Args:
        weight: (N, K) floating point; computed in float32, float64 stays.
        rank: r, from 0 to min(N, K); see :func:`checked_rank`.
        exact: by full SVD, or by subspace iteration from a random sketch (Halko, Martinsson and Tropp, arXiv 0909.4061,
            algorithm 4.4), whose residual is within a percent; None decides by the size.
        seed: of the sketch. The global random state is neither read nor changed.
        oversampling: columns of the sketch beyond the rank.
        power_iterations: products with W W^T before the projection; more for slowly falling singular values.

    Returns:
        down (r, K) and up (N, r), float32 or float64, with up @ down ~ weight; row i of down and column i of up have
        the same length, sqrt(singular value i), longest first.

    Raises:
        ValueError: a rank the matrix doesn't have, or NaN or infinity in it.
    """
    matrix = _checked(weight, rank)
    left, values, right = _largest_components(matrix, rank, exact, seed, oversampling, power_iterations)
    roots = values.sqrt()
    return roots.unsqueeze(1) * right, left * roots


def weighted_low_rank(
    error: Tensor,
    hessian: Tensor | None,
    rank: int,
    *,
    damping: float = 0.01,
    exact: bool | None = None,
    seed: int = 0,
    oversampling: int = OVERSAMPLING,
    power_iterations: int = POWER_ITERATIONS,
) -> tuple[Tensor, Tensor]:
    """The product of rank ``rank`` that takes the most of ``error`` out of a layer's outputs.

    Minimizes tr((E - up down) H (E - up down)^T) with H damped, exactly.

    Args:
        error: (N, K) floating point, E: the weight, or what its codes left of it.
        hessian: (K, K) float32 or float64, X^T X of the rows the branch reads, in any unit; None weighs all channels
            alike, as :func:`low_rank`.
        rank: r, from 0 to min(N, K).
        damping: share of the mean diagonal that is added to the diagonal; raised where ``hessian`` is singular
            without. More of it comes nearer to :func:`low_rank`.
        exact, seed, oversampling, power_iterations: as in :func:`low_rank`.

    Returns:
        down (r, K) and up (N, r), float32 or float64; row i of down and column i of up have the same length.

    Raises:
        ValueError: as :func:`low_rank`, or a Hessian that doesn't fit or is no X^T X.
    """
    if hessian is None:
        return low_rank(
            error, rank, exact=exact, seed=seed, oversampling=oversampling, power_iterations=power_iterations
        )
    matrix = _checked(error, rank)
    if hessian.shape != (matrix.shape[1], matrix.shape[1]):
        raise ValueError(
            f"a matrix (N, K) goes with a Hessian (K, K), not {tuple(matrix.shape)} with {tuple(hessian.shape)}"
        )
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian contains NaN or infinity; check the calibration data and the layers before")
    root = damped_cholesky(hessian, damping)
    # Of any unit: a Hessian summed over millions of rows would otherwise push the product out of float32's middle.
    root = (root / root.diagonal().mean()).to(matrix.dtype)
    left, values, right = _largest_components(matrix @ root, rank, exact, seed, oversampling, power_iterations)
    down = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    # The columns of ``left`` have length 1; each pair shares the length of its product.
    lengths = down.norm(dim=1)
    shared = (values * lengths).sqrt()
    down = down * (shared / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)).unsqueeze(1)
    return down, left * shared


def checked_rank(rank: int, shape: tuple[int, int] | torch.Size, name: str, policy: str) -> int:
    """``rank``, or the largest that a matrix of ``shape`` has.

    Args:
        rank: what is asked for.
        shape: (N, K) of the block.
        name: of the layer, for messages.
        policy: what to do about a rank above min(N, K): "cap" or "refuse".

    Raises:
        ValueError: a rank that is refused, negative, or an unknown policy.
    """
    if policy not in ("cap", "refuse"):
        raise ValueError(f"{name}: a rank above the layer's size can be handled by 'cap' or 'refuse', not {policy!r}")
    if rank < 0:
        raise ValueError(f"{name}: the rank of the low-rank branch is {rank}; use 0 for no branch")
    limit = min(shape)
    if rank <= limit:
        return rank
    if policy == "refuse":
        raise ValueError(
            f"{name}: rank {rank} is above the largest, {limit}, of a block of {shape[0]} x {shape[1]}; lower the "
            "rank, cap it, or exclude the layer"
        )
    logger.info("%s: rank %d capped at %d, the smaller side of a block of %d x %d", name, rank, limit, *shape)
    return limit


def _checked(weight: Tensor, rank: int) -> Tensor:
    """``weight`` in float32 or float64, if it can have ``rank`` singular values."""
    if weight.dim() not in (1, 2) or not 0 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} of a matrix of shape {tuple(weight.shape)}: use 0 to its smaller side")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the matrix contains NaN or infinity; check the checkpoint and the layers before")
    return weight if weight.dtype == torch.float64 else weight.float()


def _largest_components(
    matrix: Tensor, rank: int, exact: bool | None, seed: int, oversampling: int, power_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, r), (r,), (r, K): the largest singular values, falling, with their vectors."""
    side, width = min(matrix.shape), rank + oversampling
    if exact is None:
        exact = side < SMALLEST_SKETCHED_SIDE or width > LARGEST_SKETCHED_SHARE * side
    if exact or rank == 0:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    # Drawn on the CPU: the same sketch on every device.
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], min(width, side), generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ sketch.to(matrix.device)).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left[:, :rank]), values[:rank], right[:rank]
