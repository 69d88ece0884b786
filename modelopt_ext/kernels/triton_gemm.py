"""Products of int8 codes on a GPU: a Triton kernel with the scales in its epilogue.

One kernel serves all cases, by compile-time switches: tensor-memory-accelerator or pointer loads, scales per token or
for all, and a second activation operand that shares each weight tile (both signs of a split segment cost one read of
the weight, which is all that counts where rows are few).

Tiles are walked in groups of ``GROUP_M`` row tiles, so that the weight tiles of a group stay in the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

# Rows up to which the product is bound by reading the weight: the smallest tile that the matrix units take.
FEW_ROWS = 16


def _configs() -> list[triton.Config]:
    tiles = [  # (rows, columns, channels, warps, stages)
        (128, 256, 128, 8, 3),
        (256, 128, 128, 8, 3),
        (128, 128, 128, 8, 4),
        (128, 128, 64, 4, 5),
        (64, 128, 128, 4, 4),
        (16, 64, 256, 4, 5),
        (16, 32, 512, 4, 4),
    ]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in tiles
    ]


def _fitting(configs: list[triton.Config], named_args: dict[str, object], **kwargs: object) -> list[triton.Config]:
    """Leave out tiles that only waste time at this size."""
    rows, dual = named_args["M"], kwargs.get("DUAL", named_args.get("DUAL"))
    assert isinstance(rows, int)
    chosen = []
    for config in configs:
        few = config.kwargs["BLOCK_M"] == FEW_ROWS
        # Two accumulators of the largest tiles do not fit into the registers.
        large = config.kwargs["BLOCK_M"] * config.kwargs["BLOCK_N"] > 128 * 128
        if few == (rows <= 4 * FEW_ROWS) and not (dual and large):
            chosen.append(config)
    return chosen


@triton.autotune(
    configs=_configs(),
    key=["ROWS", "N", "K", "TMA", "DUAL"],
    prune_configs_by={"early_config_prune": _fitting},
    cache_results=True,
)
@triton.jit
def _gemm(
    a_ptr,
    a2_ptr,
    b_ptr,
    out_ptr,
    scale_a_ptr,
    scale_a2_ptr,
    scale_b_ptr,
    bias_ptr,
    sum_b_ptr,
    M,
    N,
    K,
    stride_a,
    stride_a2,
    stride_b,
    stride_out,
    ROWS,
    ZERO: tl.constexpr,
    SIGN: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DUAL: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    in_group = GROUP_M * tiles_n
    first_m = (tile // in_group) * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    row = (first_m + (tile % in_group) % group_m) * BLOCK_M
    column = ((tile % in_group) // group_m) * BLOCK_N

    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_K)
    if TMA:
        a_tiles = tl.make_tensor_descriptor(a_ptr, [M, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
        b_tiles = tl.make_tensor_descriptor(b_ptr, [N, K], [stride_b, 1], [BLOCK_N, BLOCK_K])
        if DUAL:
            a2_tiles = tl.make_tensor_descriptor(a2_ptr, [M, K], [stride_a2, 1], [BLOCK_M, BLOCK_K])
    # Rows and columns past the end read the last ones; they are masked when stored.
    a_rows = tl.minimum(rows, M - 1).to(tl.int64)[:, None]
    b_rows = tl.minimum(columns, N - 1).to(tl.int64)[:, None]

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    if DUAL:
        total2 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        if TMA:
            a = a_tiles.load([row, k])
            b = b_tiles.load([column, k])
            if DUAL:
                a2 = a2_tiles.load([row, k])
        else:
            inside = (k + channels < K)[None, :]
            a = tl.load(a_ptr + a_rows * stride_a + (k + channels)[None, :], mask=inside, other=0)
            b = tl.load(b_ptr + b_rows * stride_b + (k + channels)[None, :], mask=inside, other=0)
            if DUAL:
                a2 = tl.load(a2_ptr + a_rows * stride_a2 + (k + channels)[None, :], mask=inside, other=0)
        total = tl.dot(a, b.T, total, out_dtype=tl.int32)
        if DUAL:
            total2 = tl.dot(a2, b.T, total2, out_dtype=tl.int32)

    scale_b = tl.load(scale_b_ptr + columns, mask=columns < N, other=0.0)[None, :]
    if ZERO != 0:
        constant = ZERO * tl.load(sum_b_ptr + columns, mask=columns < N, other=0)[None, :]
        total = total - constant
        if DUAL:
            total2 = total2 - constant
    if PER_TOKEN:  # noqa: SIM108
        scale_a = tl.load(scale_a_ptr + rows, mask=rows < M, other=0.0)[:, None]
    else:
        scale_a = tl.load(scale_a_ptr)
    out = total.to(tl.float32) * scale_a
    if DUAL:
        if PER_TOKEN:
            scale_a2 = tl.load(scale_a2_ptr + rows, mask=rows < M, other=0.0)[:, None]
        else:
            scale_a2 = tl.load(scale_a2_ptr)
        out = out + SIGN * (total2.to(tl.float32) * scale_a2)
    out = out * scale_b
    if HAS_BIAS:
        out = out + tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    places = out_ptr + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    tl.store(places, out.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where the kernel puts its tensor descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _tma_fits(*operands: Tensor) -> bool:
    """Tensor descriptors need 16-byte aligned rows, and a GPU that has them."""
    # Allocations are aligned; pointers are not looked at, so that this can be traced.
    aligned = all(x.storage_offset() % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) == 1 for x in operands)
    return aligned and torch.cuda.get_device_capability(operands[0].device) >= (9, 0)


@torch.library.triton_op("segquant::int8_gemm", mutates_args={})
def int8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    zero: int,
    sum_b: Tensor | None,
    a2: Tensor | None,
    scale_a2: Tensor | None,
    sign: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """:func:`modelopt_ext.kernels.scaled_mm` of int8 codes on a GPU. ``torch.compile`` sees the kernel itself."""
    a, b = _with_contiguous_rows(a), _with_contiguous_rows(b)
    second = None if a2 is None or scale_a2 is None else (_with_contiguous_rows(a2), scale_a2, sign)
    tma = _tma_fits(a, b) and (second is None or _tma_fits(second[0]))
    if tma:
        triton.set_allocator(_workspace)
    return launch(wrap_triton(_gemm), a, b, scale_a, scale_b, bias, zero, sum_b, second, out_dtype, tma)


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def launch(
    kernel: Any,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    zero: int,
    sum_b: Tensor | None,
    second: tuple[Tensor, Tensor, int] | None,
    out_dtype: torch.dtype,
    tma: bool,
    **tiles: int,
) -> Tensor:
    """Run ``kernel``: the tuned one, or with given ``tiles`` (BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M) the bare one.

    Args:
        kernel: ``_gemm`` or ``_gemm.fn``.
        a: (M, K) int8, rows contiguous.
        b: (N, K) int8, rows contiguous.
        scale_a: float32 (1, 1) or (M, 1).
        scale_b: float32 (N,).
        bias: (N,) or None.
        zero: the code that means 0.0.
        sum_b: int32 (N,), the sums of b's rows; needed with ``zero``.
        second: (a2, scale_a2, sign), a second operand that shares b; sign is 1 or -1.
        out_dtype: of the result.
        tma: whether to load through tensor descriptors.
        tiles: sizes of the tiles.

    Returns:
        (M, N) in ``out_dtype``.
    """
    a2, scale_a2, sign = second if second is not None else (a, scale_a, 1)
    (rows, channels), columns = a.shape, b.shape[0]
    out = torch.empty(rows, columns, dtype=out_dtype, device=a.device)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(columns, meta["BLOCK_N"]),)

    kernel[grid](
        a,
        a2,
        b,
        out,
        scale_a,
        scale_a2,
        scale_b.contiguous(),
        bias if bias is not None else scale_b,
        b if sum_b is None else sum_b.contiguous(),
        rows,
        columns,
        channels,
        a.stride(0),
        a2.stride(0),
        b.stride(0),
        out.stride(0),
        triton.next_power_of_2(rows),  # sizes within a factor of two share a choice of tiles
        ZERO=zero,
        SIGN=sign,
        PER_TOKEN=scale_a.numel() > 1,
        HAS_BIAS=bias is not None,
        DUAL=second is not None,
        TMA=tma,
        **tiles,
    )
    return out
