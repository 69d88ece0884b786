"""Products of 8-bit codes on a GPU: Triton kernels with the scales in their epilogue.

Two kernels:

- :func:`_tiles`, for many rows of int8 codes; with those of E4M3 cuBLAS is faster. As many programs as the GPU holds at
  once walk over the tiles of the output, in groups of ``GROUP_M`` row tiles, so that the weight tiles of a group stay
  in the L2 cache. The loop over tiles and the one over channels are flattened into one, so that the loads of the next
  tile run under the epilogue of this one; with two small programs on each multiprocessor, one multiplies while the
  other writes. The epilogue goes in two halves, which keeps its registers low enough for that.
- :func:`_few_rows`, for as few rows as :func:`few_rows` says, where all that counts is how fast the weight is read. The
  smallest tile of the matrix units has 16 rows anyway, so both signs of a split segment (arXiv 2507.14811, DualScale)
  share one tile, and the second product costs nothing.

Loads go through tensor-memory-accelerator descriptors where the GPU has them, else through pointers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cuda import on_device_of
from .operands import Operands
from .scaled_mm import FEW_ROWS

Grid: TypeAlias = Callable[[dict[str, Any]], tuple[int, int, int]]

# Rows of the smallest tile that the matrix units take.
TILE_ROWS = 16
# The kernels' first arguments are so many tensors.
TENSORS = 9
# Of activations; they may be a segment's column of a table. A kernel is compiled once for all places of them, and for
# all numbers of rows: nothing in it depends on that.
SCALES = ["scale_a_ptr", "scale_a2_ptr"]


def _config(sizes: tuple[int, int, int], warps: int, stages: int, per_sm: int) -> triton.Config:
    m, n, k = sizes
    return triton.Config(
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "PER_SM": per_sm}, num_warps=warps, num_stages=stages
    )


# (rows, columns, channels), warps, stages, programs on a multiprocessor: for many rows, for few, for two operands.
WITH_TMA = [
    _config((128, 128, 128), 4, 3, 2),
    _config((64, 128, 128), 4, 4, 2),
    _config((128, 128, 128), 8, 3, 1),
]
WITH_POINTERS = [
    _config((128, 128, 64), 4, 4, 2),
    _config((64, 128, 64), 4, 4, 2),
    _config((128, 128, 64), 8, 3, 1),
]
# Bytes of shared memory of the tiles for two operands with float32 outputs. The others fit in the 99 KiB of small GPUs.
SHARED_OF_DUAL_WITH_TMA = 180 * 1024
SMALL_ROWS = 1024  # up to which tiles of 64 rows may be faster: the others leave multiprocessors idle
# How long a round of small tiles takes, a round of large ones being 1 (measured on an H200, 0.7 to 0.8), and how much
# of a difference decides.
SMALL_ROUND, UNDECIDED = 0.74, 0.15


def _fitting(configs: list[triton.Config], named_args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
    given = {**named_args, **kwargs}
    return fitting_tiles(given["M"], given["N"], given["PROCESSORS"], given["TMA"], given["DUAL"])


def fitting_tiles(rows: int, columns: int, processors: int, tma: bool, dual: bool) -> list[triton.Config]:
    """The tiles to try at a size; one for most, so that nothing has to be timed, nor compiled for that."""
    large, small, of_two = WITH_TMA if tma else WITH_POINTERS
    if rows <= small.kwargs["BLOCK_M"]:
        return [small]
    if dual:
        # Two accumulators of a tile share the registers: eight warps have enough.
        return [of_two]
    if rows > SMALL_ROWS:
        return [large]

    def rounds(config: triton.Config) -> int:
        sizes = config.kwargs
        tiles = _cdiv(rows, sizes["BLOCK_M"]) * _cdiv(columns, sizes["BLOCK_N"])
        return _cdiv(tiles, processors * sizes["PER_SM"])

    ratio = SMALL_ROUND * rounds(small) / rounds(large)
    if abs(ratio - 1) < UNDECIDED:
        return [large, small]
    return [small] if ratio < 1 else [large]


@triton.jit
def _outputs(
    total,
    total2,
    scale_a,
    scale_a2,
    columns,
    N,
    scale_b_ptr,
    bias_ptr,
    sum_b_ptr,
    ZERO: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DUAL: tl.constexpr,
):
    """The epilogue: float32 outputs of sums of products."""
    inside = columns < N
    if ZERO != 0:
        constant = ZERO * tl.load(sum_b_ptr + columns, mask=inside, other=0)[None, :]
        total = total - constant
        if DUAL:
            total2 = total2 - constant
    out = total.to(tl.float32) * scale_a
    if DUAL:
        out = out + SIGN * (total2.to(tl.float32) * scale_a2)
    out = out * tl.load(scale_b_ptr + columns, mask=inside, other=0.0)[None, :]
    if HAS_BIAS:
        out = out + tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return out


@triton.autotune(
    configs=[*WITH_TMA, *WITH_POINTERS],
    key=["M", "N", "K", "TMA", "DUAL"],
    prune_configs_by={"early_config_prune": _fitting},
    cache_results=True,
)
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=SCALES)
def _tiles(
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
    START,
    PROCESSORS: tl.constexpr,
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
    PER_SM: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_N // 2
    a_ptr += START
    a2_ptr += START
    b_ptr += START
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    in_group = GROUP_M * tiles_n
    if TMA:
        a_tiles = tl.make_tensor_descriptor(a_ptr, [M, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
        b_tiles = tl.make_tensor_descriptor(b_ptr, [N, K], [stride_b, 1], [BLOCK_N, BLOCK_K])
        out_tiles = tl.make_tensor_descriptor(out_ptr, [M, N], [N, 1], [BLOCK_M, HALF])
        if DUAL:
            a2_tiles = tl.make_tensor_descriptor(a2_ptr, [M, K], [stride_a2, 1], [BLOCK_M, BLOCK_K])
    channels = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROCESSORS * PER_SM, flatten=True):
        first_m = (tile // in_group) * GROUP_M
        group_m = min(tiles_m - first_m, GROUP_M)
        row = (first_m + (tile % in_group) % group_m) * BLOCK_M
        column = ((tile % in_group) // group_m) * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        # Rows and columns past the end read the last ones; they are not stored.
        a_rows = tl.minimum(rows, M - 1).to(tl.int64)[:, None]
        b_rows = tl.minimum(column + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        total2 = total
        for step in range(steps):
            k = step * BLOCK_K
            if TMA:
                a = a_tiles.load([row, k])
                b = b_tiles.load([column, k])
                if DUAL:
                    a2 = a2_tiles.load([row, k])
            else:
                inside = (k + channels < K)[None, :]
                a = tl.load(a_ptr + a_rows * stride_a + (k + channels)[None, :], mask=inside, other=0.0)
                b = tl.load(b_ptr + b_rows * stride_b + (k + channels)[None, :], mask=inside, other=0.0)
                if DUAL:
                    a2 = tl.load(a2_ptr + a_rows * stride_a2 + (k + channels)[None, :], mask=inside, other=0.0)
            total = tl.dot(a, b.T, total, out_dtype=tl.int32)
            if DUAL:
                total2 = tl.dot(a2, b.T, total2, out_dtype=tl.int32)

        if PER_TOKEN:
            scale_a = tl.load(scale_a_ptr + rows, mask=rows < M, other=0.0)[:, None]
            scale_a2 = tl.load(scale_a2_ptr + rows, mask=rows < M, other=0.0)[:, None]
        else:
            scale_a = tl.load(scale_a_ptr)
            scale_a2 = tl.load(scale_a2_ptr)
        left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        if DUAL:
            left2, right2 = tl.split(tl.permute(tl.reshape(total2, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        else:
            left2, right2 = left, right
        for half in tl.static_range(2):
            start = column + half * HALF
            columns = start + tl.arange(0, HALF)
            if half == 0:
                sums, sums2 = left, left2
            else:
                sums, sums2 = right, right2
            out = _outputs(
                sums,
                sums2,
                scale_a,
                scale_a2,
                columns,
                N,
                scale_b_ptr,
                bias_ptr,
                sum_b_ptr,
                ZERO,
                SIGN,
                HAS_BIAS,
                DUAL,
            ).to(out_ptr.dtype.element_ty)
            if TMA:
                out_tiles.store([row, start], out)
            else:
                places = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
                tl.store(places, out, mask=(rows < M)[:, None] & (columns < N)[None, :])


# Values of a weight from which on wide tiles are the fastest. Below, narrower ones are, for more programs.
LARGE_WEIGHT = 20_000_000
FEW_ROWS_TILES = [
    triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=4)
    for n, k, warps in ((64, 256, 4), (32, 256, 4), (16, 512, 2))
]


def few_rows_tile(columns: int, channels: int, group: int, processors: int) -> triton.Config:
    """The tile for a weight (columns, channels) whose outputs are cut into groups of ``group``, none over two of them.

    One, so that nothing is compiled to be timed; from tiles that were timed at 14 sizes on an H200.
    """

    def suits(width: int) -> bool:
        large = columns * channels >= LARGE_WEIGHT
        return (large or (width < 64 and columns >= width * processors)) and (group == columns or group % width == 0)

    return next((tile for tile in FEW_ROWS_TILES if suits(tile.kwargs["BLOCK_N"])), FEW_ROWS_TILES[-1])


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=SCALES)
def _few_rows(
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
    START,
    GROUP_COLUMNS,
    ZERO: tl.constexpr,
    SIGN: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of ``a`` are (group, row): columns of group g are multiplied with a's rows g M to (g + 1) M."""
    TILE: tl.constexpr = 16
    a_ptr += START
    a2_ptr += START
    b_ptr += START
    # Where there are two operands, the second has the lower half of the tile.
    OWN: tl.constexpr = TILE // 2 if DUAL else TILE
    column = tl.program_id(0) * BLOCK_N
    group = column // GROUP_COLUMNS
    place = tl.arange(0, TILE)
    row = tl.program_id(1) * OWN + place % OWN
    is_row = row < M
    a_row = (group * M + tl.minimum(row, M - 1)).to(tl.int64)
    starts = a_ptr + a_row * stride_a
    if DUAL:
        starts = tl.where(place < OWN, starts, a2_ptr + a_row * stride_a2)
    columns = column + tl.arange(0, BLOCK_N)
    b_rows = tl.minimum(columns, N - 1).to(tl.int64)[:, None]
    channels = tl.arange(0, BLOCK_K)
    if a_ptr.dtype.element_ty == tl.int8:
        total = tl.zeros((TILE, BLOCK_N), dtype=tl.int32)
    else:
        total = tl.zeros((TILE, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = (k + channels < K)[None, :]
        b = tl.load(b_ptr + b_rows * stride_b + (k + channels)[None, :], mask=inside, other=0.0)
        a = tl.load(starts[:, None] + (k + channels)[None, :], mask=inside & is_row[:, None], other=0.0)
        total = tl.dot(a, b.T, total, out_dtype=total.dtype)

    scale_row = group
    if PER_TOKEN:
        scale_row = a_row
    scale_a = tl.load(scale_a_ptr + scale_row + tl.zeros((TILE,), dtype=tl.int32))
    if DUAL:
        scale_a2 = tl.load(scale_a2_ptr + scale_row + tl.zeros((TILE,), dtype=tl.int32))
        scale_a = tl.where(place < OWN, scale_a, SIGN * scale_a2)
    inside_columns = columns < N
    if ZERO != 0:
        total = total - ZERO * tl.load(sum_b_ptr + columns, mask=inside_columns, other=0)[None, :]
    out = total.to(tl.float32) * scale_a[:, None]
    if DUAL:
        out = tl.sum(tl.reshape(out, (2, OWN, BLOCK_N)), axis=0)
    out = out * tl.load(scale_b_ptr + columns, mask=inside_columns, other=0.0)[None, :]
    if HAS_BIAS:
        out = out + tl.load(bias_ptr + columns, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
    rows = tl.program_id(1) * OWN + tl.arange(0, OWN)
    places = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(places, out.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & inside_columns[None, :])


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel puts its tensor descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def fits_descriptors(operands: Operands, out_dtype: torch.dtype) -> bool:
    """Tensor descriptors need 16-byte aligned rows, and a GPU that has them and room for their tiles."""
    matrices = [x for x in (operands.a, operands.b, operands.a2) if x is not None]
    # Allocations are aligned; pointers are not looked at, so that this can be traced.
    aligned = all(x.storage_offset() % 16 == 0 and x.stride(0) % 16 == 0 for x in matrices)
    out_row = operands.b.shape[0] * out_dtype.itemsize
    if not aligned or operands.start % 16 or out_row % 16 or not _properties(operands.a.device)[0]:
        return False
    return not operands.is_dual or shared_memory(operands.a.device) >= SHARED_OF_DUAL_WITH_TMA


def processor_count(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    return _properties(device)[1]


@cache
def _properties(device: torch.device) -> tuple[bool, int]:
    """Whether a GPU has tensor descriptors, and how many multiprocessors."""
    if device.type == "cpu":  # Triton's interpreter
        return True, 1
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor) >= (9, 0), properties.multi_processor_count


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have, as Triton asks before it launches one."""
    if device.type == "cpu":  # Triton's interpreter
        return 227 * 1024
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]


# How to launch compiled kernels again, by all that Triton specializes them for. Its own look-up, which it repeats at
# each launch, takes more of the host's time than the smaller products take of the GPU's. Versions before 3.3 take a
# compiled kernel's arguments in another form.
_AGAIN: dict[tuple[Any, ...], Callable[[Operands], Tensor]] = {}
_LAUNCHES_AGAIN = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


def launch_gemm(operands: Operands, out_dtype: torch.dtype) -> Tensor:
    """:func:`modelopt_ext.kernels.scaled_mm` on a GPU, (M, N) in ``out_dtype``.

    With more than one group, at most ``FEW_ROWS`` rows a group.
    """
    key: Any = _signature(operands, out_dtype)
    with on_device_of(operands.a):
        again = _AGAIN.get(key)
        if again is not None:
            return again(operands)
        if operands.rows == 0:
            return torch.empty(0, operands.b.shape[0], dtype=out_dtype, device=operands.a.device)
        given, operands = operands, _with_contiguous_rows(operands)
        if operands is not given:
            key = None  # says nothing about the copies
        (columns, channels), groups = operands.b.shape, operands.groups
        processors = processor_count(operands.a.device)
        if operands.rows <= FEW_ROWS:
            tile = few_rows_tile(columns, channels, columns // groups, processors)
            return launch_few_rows(operands, out_dtype, key, **tile.all_kwargs())
        tma = fits_descriptors(operands, out_dtype)
        tiles = fitting_tiles(operands.rows, columns, processors, tma, operands.is_dual)
        if len(tiles) > 1:
            return launch_tiles(_tiles, operands, out_dtype, tma, key)
        # Tuning would time a single one as well.
        return launch_tiles(_tiles.fn, operands, out_dtype, tma, key, **tiles[0].all_kwargs())


def _with_contiguous_rows(operands: Operands) -> Operands:
    """The same, copied where rows are not; codes have the strides of the activations that they are of."""
    matrices = {"a": operands.a, "b": operands.b, "a2": operands.a2}
    copies: dict[str, Any] = {
        name: x.contiguous() for name, x in matrices.items() if x is not None and x.stride(1) != 1
    }
    return operands._replace(**copies) if copies else operands


def _signature(operands: Operands, out_dtype: torch.dtype) -> tuple[Any, ...]:
    """What two products have in common that run the same compiled kernel in the same way."""
    signature: list[Any] = [out_dtype, operands.a.device]
    for value in operands:
        if isinstance(value, Tensor):
            signature += (value.dtype, value.shape, value.stride(), value.data_ptr() % 16)
        else:
            signature.append(value)
    return tuple(signature)


def launch_tiles(
    kernel: Any,
    operands: Operands,
    out_dtype: torch.dtype,
    tma: bool,
    key: Any = None,
    processors: int | None = None,
    **tiles: int,
) -> Tensor:
    """Run ``kernel``: the tuned one, or with given ``tiles`` (BLOCK_M, BLOCK_N, ...) the bare one.

    Args:
        kernel: ``_tiles`` or ``_tiles.fn``.
        operands: of one group, rows contiguous.
        out_dtype: of the result.
        tma: whether to load through tensor descriptors.
        key: where to keep how it is launched again.
        processors: multiprocessors to fill; by default the GPU's.
        tiles: sizes of the tiles, and warps and stages of a program.

    Returns:
        (M, N) in ``out_dtype``.
    """
    out = torch.empty(operands.rows, operands.b.shape[0], dtype=out_dtype, device=operands.a.device)
    grid, switches = tiles_grid(operands, tma, processors)
    _launch(kernel, grid, operands, out, numbers_of(operands), switches, tiles, key)
    return out


def tiles_grid(operands: Operands, tma: bool, processors: int | None = None) -> tuple[Grid, dict[str, Any]]:
    """How many programs of the kernel of many rows there are, by the tiles, and its compile-time constants but those.

    Args:
        operands: of one group; tensors that stand for others will do.
        tma: whether to load through tensor descriptors.
        processors: multiprocessors to fill; by default the GPU's.
    """
    rows, columns = operands.rows, operands.b.shape[0]
    count = processors or processor_count(operands.a.device)
    least = min if isinstance(rows, int) else torch.sym_min

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return (least(count * meta["PER_SM"], _cdiv(rows, meta["BLOCK_M"]) * _cdiv(columns, meta["BLOCK_N"])), 1, 1)

    return grid, {"PROCESSORS": count, "PER_TOKEN": operands.scale_a.numel() > 1, "TMA": tma, **_switches(operands)}


def launch_few_rows(operands: Operands, out_dtype: torch.dtype, key: Any = None, **tile: int) -> Tensor:
    """:func:`launch_tiles` for few rows, and for several groups of columns with activations of their own.

    Args:
        operands: rows contiguous.
        out_dtype: of the result.
        key: where to keep how it is launched again.
        tile: its sizes, and warps and stages of a program.

    Returns:
        (M, N) in ``out_dtype``.
    """
    columns = operands.b.shape[0]
    out = torch.empty(operands.rows, columns, dtype=out_dtype, device=operands.a.device)
    grid, switches = few_rows_grid(operands)
    numbers = (*numbers_of(operands), columns // operands.groups)
    _launch(_few_rows, grid, operands, out, numbers, switches, tile, key)
    return out


def few_rows_grid(operands: Operands) -> tuple[Grid, dict[str, Any]]:
    """:func:`tiles_grid` of the kernel of few rows."""
    rows, columns = operands.rows, operands.b.shape[0]
    own = TILE_ROWS // 2 if operands.is_dual else TILE_ROWS

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return _cdiv(columns, meta["BLOCK_N"]), _cdiv(rows, own), 1

    return grid, {"PER_TOKEN": operands.scale_a.numel() > operands.groups, **_switches(operands)}


def _cdiv(size: int, part: int) -> int:
    """Rounded up. Triton's own takes 10 us of the host's time."""
    return -(-size // part)


def _launch(
    kernel: Any,
    grid: Grid,
    operands: Operands,
    out: Tensor,
    numbers: tuple[int, ...],
    switches: dict[str, Any],
    tiles: dict[str, int],
    key: Any,
) -> None:
    """Launch a kernel, and keep how by a ``key``, if there is one.

    Args:
        kernel: the tuned one, or a bare one with given ``tiles``.
        grid: programs, by the tiles.
        operands: rows contiguous.
        out: (M, N), written.
        numbers: what the kernel takes after the tensors that is no compile-time constant.
        switches: compile-time constants, but for the tiles.
        tiles: sizes, for a bare kernel.
        key: of :data:`_AGAIN`, or None.
    """
    tma = switches.get("TMA", False)
    if tma:
        triton.set_allocator(_workspace)
    compiled = kernel[grid](*_tensors(operands, out), *numbers, **switches, **tiles)
    if key is None or compiled is None or not _LAUNCHES_AGAIN:  # Triton's interpreter compiles nothing
        return
    constants = {**switches, **(tiles or kernel.best_config.kwargs)}
    rest = (*numbers, *[constants[name] for name in kernel.arg_names[TENSORS + len(numbers) :]])
    start, shape, dtype = compiled[grid(constants)], out.shape, out.dtype

    def again(operands: Operands) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=operands.a.device)
        if tma:
            triton.set_allocator(_workspace)
        start(*_tensors(operands, out), *rest)
        return out

    _AGAIN[key] = again


def _tensors(operands: Operands, out: Tensor) -> tuple[Tensor, ...]:
    # Static scales are columns of a table with one for each group and segment.
    scale_a2, sum_b = operands.scale_a2, operands.sum_b
    contiguous = operands._replace(
        scale_a=operands.scale_a.contiguous(),
        scale_b=operands.scale_b.contiguous(),
        scale_a2=None if scale_a2 is None else scale_a2.contiguous(),
        sum_b=None if sum_b is None else sum_b.contiguous(),
    )
    return with_stand_ins(contiguous, out)


def with_stand_ins(operands: Operands, out: Any) -> tuple[Any, ...]:
    """What both kernels take first; absent tensors are replaced by others, which are not read."""
    return (
        operands.a,
        # Not a itself: a compiler would write it twice.
        operands.scale_b if operands.a2 is None else operands.a2,
        operands.b,
        out,
        operands.scale_a,
        operands.scale_a if operands.scale_a2 is None else operands.scale_a2,
        operands.scale_b,
        operands.scale_b if operands.bias is None else operands.bias,
        operands.scale_b if operands.sum_b is None else operands.sum_b,
    )


def numbers_of(operands: Operands) -> tuple[int, ...]:
    """What they take next."""
    a, b, a2 = operands.a, operands.b, operands.b if operands.a2 is None else operands.a2
    size = operands.channels.stop - operands.start
    return operands.rows, b.shape[0], size, a.stride(0), a2.stride(0), b.stride(0), operands.start


def _switches(operands: Operands) -> dict[str, Any]:
    """The compile-time arguments that both kernels have."""
    return {
        "ZERO": operands.zero,
        "SIGN": operands.sign,
        "HAS_BIAS": operands.bias is not None,
        "DUAL": operands.is_dual,
    }
