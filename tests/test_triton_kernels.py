"""The Triton kernels against their references: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton is not installed")

import triton

from modelopt_ext.formats import QuantFormat
from modelopt_ext.kernels import rounding, triton_gemm, triton_rounding
from modelopt_ext.kernels.operands import Operands
from modelopt_ext.kernels.scaled_mm import reference, scaled_mm
from modelopt_ext.kernels.triton_gemm import _few_rows, _tiles, launch_few_rows, launch_tiles
from modelopt_ext.kernels.triton_rounding import (
    MOST_KEPT,
    POLARITIES,
    STORED_AT_ONCE,
    _per_token_blocks,
    _unwrapped,
    launch,
)

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
TILES = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "PER_SM": 1, "processors": 3}
FEW = {"BLOCK_N": 16, "BLOCK_K": 32}
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")


def codes(rows: int, channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (rows, channels), dtype=torch.int8, generator=generator).to(DEVICE)


def skip_without_descriptors(tma: bool) -> None:
    if tma and HAS_GPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no tensor descriptors")


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("zero", [0, -128])
@pytest.mark.parametrize("size", [(40, 64, 96), (1, 48, 64), (33, 72, 80)])
def test_many_rows_give_the_references_numbers(
    size: tuple[int, int, int], zero: int, per_token: bool, dual: bool, tma: bool
) -> None:
    rows, columns, channels = size
    skip_without_descriptors(tma)
    a, a2, b = codes(rows, channels, 0), codes(rows, channels, 1), codes(columns, channels, 2)
    scale = torch.rand(rows if per_token else 1, 1, device=DEVICE) + 0.1
    scale_b, bias = torch.rand(columns, device=DEVICE), torch.randn(columns, device=DEVICE)
    sums = b.sum(dim=1, dtype=torch.int32)
    second = (a2, 2 * scale) if dual else (None, None)
    operands = Operands(a, b, scale, scale_b, bias, zero, sums, *second, -1)
    found = launch_tiles(_tiles.fn, operands, torch.float32, tma, **TILES)
    expected = reference(*operands)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("zero", [0, -128])
@pytest.mark.parametrize("rows", [1, 8, 21])
def test_few_rows_give_the_references_numbers(rows: int, zero: int, per_token: bool, dual: bool, groups: int) -> None:
    channels, columns = 80, groups * 32
    a, a2, b = (codes(n, channels, seed) for seed, n in enumerate((groups * rows, groups * rows, columns)))
    scale = torch.rand(groups * rows if per_token else groups, 1, device=DEVICE) + 0.1
    scale_b, bias = torch.rand(columns, device=DEVICE), torch.randn(columns, device=DEVICE)
    sums = b.sum(dim=1, dtype=torch.int32)
    second = (a2, 2 * scale) if dual else (None, None)
    operands = Operands(a, b, scale, scale_b, bias, zero, sums, *second, -1, groups)
    found = launch_few_rows(operands, torch.float32, **FEW)
    expected = reference(*operands)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-2)


def test_scales_of_groups_that_do_not_lie_side_by_side() -> None:
    groups, segments = 3, 2
    a, a2, b = codes(groups * 4, 64, 0), codes(groups * 4, 64, 1), codes(groups * 16, 64, 2)
    table, table2 = torch.rand(2, groups, segments, device=DEVICE).unbind()
    scale_b = torch.rand(groups * 16, device=DEVICE)
    operands = Operands(a, b, table[:, 1:], scale_b, a2=a2, scale_a2=table2[:, 1:], groups=groups)
    found = launch_few_rows(operands, torch.float32, **FEW)
    torch.testing.assert_close(found, reference(*operands), rtol=1e-5, atol=1e-2)


def test_a_segment_of_strided_operands_and_half_precision_output() -> None:
    wide, b = codes(20, 128, 0), codes(48, 128, 1)
    a, part = wide[:, 32:96], b[:, 64:]
    one, scale_b = torch.ones(1, 1, device=DEVICE), torch.full((48,), 2.0**-6, device=DEVICE)
    expected = reference(a[:, 16:48], part[:, 16:48], one, scale_b).to(torch.float16)
    operands = Operands(a, part, one, scale_b, start=16, size=32)
    found = launch_tiles(_tiles.fn, operands, torch.float16, False, **TILES)
    assert found.dtype == torch.float16
    assert torch.equal(found, expected)
    assert torch.equal(launch_few_rows(operands, torch.float16, **FEW), expected)


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize(("rows", "groups"), [(3, 2), (100, 1)])
def test_the_kernel_is_chosen_by_the_rows(
    rows: int, groups: int, choices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that of many rows is tuned where there are several tiles to choose from."""
    a, b = codes(groups * rows, 64, 0), codes(groups * 32, 64, 1)
    scale, scale_b = torch.rand(groups, 1, device=DEVICE), torch.rand(groups * 32, device=DEVICE)
    operands = Operands(a.t().contiguous().t(), b, scale, scale_b, groups=groups, size=64)

    tiles = {name: size for name, size in TILES.items() if name != "processors"}
    few, many = kernels = _WithTiles(_few_rows, FEW), _WithTiles(_tiles.fn, tiles)
    monkeypatch.setattr(triton_gemm, "_few_rows", few.fn)
    monkeypatch.setattr(triton_gemm, "few_rows_tile", lambda *_: few.best_config)
    monkeypatch.setattr(triton_gemm, "_tiles", many)
    monkeypatch.setattr(triton_gemm, "fitting_tiles", lambda *_: [many.best_config] * choices)
    monkeypatch.setattr(triton_gemm, "_AGAIN", {})
    if not HAS_GPU:
        monkeypatch.setattr(triton_gemm, "_properties", lambda _: (False, 3))
    for codes_of_a in (operands.a, a, a):
        found = triton_gemm.launch_gemm(operands._replace(a=codes_of_a), torch.float32)
        torch.testing.assert_close(found, reference(*operands), rtol=1e-5, atol=1e-2)
    # What was copied to be launched is not kept, and Triton's interpreter leaves nothing to launch again.
    used, unused = kernels if rows == 3 else reversed(kernels)
    assert used.launches == [used is many and choices > 1] * (2 if HAS_GPU else 3)
    assert unused.launches == []


@pytest.mark.parametrize(
    ("rows", "columns", "dual", "expected"),
    [
        (64, 9216, False, [64]),
        (512, 3072, False, [64]),  # one round of either
        (1024, 3072, False, [128]),  # two rounds of small tiles
        (512, 9216, False, [128, 64]),  # three, and two of large ones
        (1025, 1280, False, [128]),
        (512, 3072, True, [128]),
    ],
)
def test_tiles_of_many_rows_keep_all_processors_busy(rows: int, columns: int, dual: bool, expected: list[int]) -> None:
    tiles = triton_gemm.fitting_tiles(rows, columns, 132, True, dual)
    assert [tile.kwargs["BLOCK_M"] for tile in tiles] == expected


@pytest.mark.parametrize(
    ("columns", "channels", "group", "expected"),
    [
        (18432, 3072, 18432, 64),
        (18432, 3072, 32 * 9, 32),
        (9216, 1536, 9216, 32),
        (3072, 3072, 3072, 16),
        (1000, 256, 1000, 16),
        (9999, 256, 9999, 32),  # one group need not be a multiple of anything
        (9216, 1536, 48, 16),
    ],
)
def test_tiles_of_few_rows_lie_in_one_group(columns: int, channels: int, group: int, expected: int) -> None:
    """And leave no multiprocessor without work."""
    assert triton_gemm.few_rows_tile(columns, channels, group, 132).kwargs["BLOCK_N"] == expected


@pytest.mark.parametrize("static", [False, True], ids=["per-token", "static"])
def test_no_rows_need_no_kernel(static: bool) -> None:
    x, b, scale_b = torch.empty(0, 64, device=DEVICE), codes(32, 64, 0), torch.rand(32, device=DEVICE)
    scale = torch.ones(2, 1, device=DEVICE) if static else None
    smoothing = torch.ones(2, 64, device=DEVICE)
    found, scales, _, _ = launch(_unwrapped, x, None, smoothing, scale, None, (64,), (0,), 127.0, -128.0, 127.0, 128)
    operands = Operands(found, b, scales.reshape(0, 1) if scale is None else scale, scale_b, groups=2)
    assert found.shape == (0, 64)
    assert triton_gemm.launch_gemm(operands, torch.bfloat16).shape == (0, 32)


@pytest.mark.parametrize(("shared", "dual", "tma"), [(227, True, True), (99, True, False), (99, False, True)])
def test_two_operands_need_the_shared_memory_of_a_data_center_gpu(
    shared: int, dual: bool, tma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_gemm, "_properties", lambda _: (True, 3))
    monkeypatch.setattr(triton_gemm, "shared_memory", lambda _: shared * 1024)
    a, b, one, scale_b = codes(100, 64, 0), codes(32, 64, 1), torch.ones(1, 1), torch.ones(32)
    second = {"a2": a, "scale_a2": one} if dual else {}
    assert triton_gemm.fits_descriptors(Operands(a, b, one, scale_b, **second), torch.bfloat16) is tma


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two CUDA devices, or none and fake ones")
def test_kernels_run_on_the_device_of_their_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    current, launched = [0], []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        assert device.index is not None
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *_, **__: launched.append(current[0])

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(triton_gemm, "_properties", lambda _: (False, 3))
    monkeypatch.setattr(triton_rounding, "shared_memory", lambda _: 0)
    monkeypatch.setattr(triton_gemm, "_signature", lambda *_: None)
    monkeypatch.setattr(triton_gemm, "_launch", lambda *_: launched.append(current[0]))
    with FakeTensorMode():
        for device in ("cuda:0", "cuda:1"):
            make = partial(torch.empty, device=device)
            launch(lambda _: Kernel(), make(100, 64), None, None, None, None, (64,), (0,), 127.0, -128.0, 127.0, 128)
            for rows in (100, 4):
                a, b = (make(n, 64, dtype=torch.int8) for n in (rows, 32))
                triton_gemm.launch_gemm(Operands(a, b, make(1, 1), make(32)), torch.float32)
    assert launched == [0, 0, 0, 1, 1, 1]
    assert current == [0]


class _WithTiles:
    """A tuned kernel that finds tiles of given sizes, and the bare one in it. Notes which of them is launched."""

    def __init__(self, kernel: Any, sizes: dict[str, int]) -> None:
        self.kernel, self.arg_names, self.best_config = kernel, kernel.arg_names, triton.Config(sizes)
        self.launches: list[bool] = []
        self.fn = _Bare(self)

    def __getitem__(self, grid: Any) -> Any:
        self.launches.append(True)
        return partial(self.kernel[grid], **self.best_config.all_kwargs())


class _Bare:
    def __init__(self, tuned: _WithTiles) -> None:
        self.tuned, self.arg_names = tuned, tuned.arg_names

    def __getitem__(self, grid: Any) -> Any:
        self.tuned.launches.append(False)
        return self.tuned.kernel[grid]


def mostly_equal(found: Tensor, expected: Tensor) -> bool:
    """Ties may fall the other way: the kernel multiplies by inverses."""
    difference = (found.float() - expected.float()).abs()
    neighbour = expected.float().abs().clamp(min=16) / 8 if found.dtype == torch.float8_e4m3fn else 1
    return bool((difference <= neighbour).all()) and int((difference > 0).sum()) <= found.numel() // 500


@pytest.mark.parametrize("fmt", [QuantFormat(8), QuantFormat(4), QuantFormat((4, 3))], ids=["int8", "int4", "fp8"])
@pytest.mark.parametrize("static", [False, True], ids=["per-token", "static"])
@pytest.mark.parametrize("polarity", [("none", "none"), ("none", "dual"), ("dual8", "dual8")], ids="-".join)
@pytest.mark.parametrize("fits", [False, True], ids=["several-blocks", "one-block"])
def test_activations_are_rounded_to_the_references_codes(
    fits: bool,
    polarity: tuple[str, str],
    static: bool,
    fmt: QuantFormat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fmt.num_bits == (4, 3) and ("dual8" in polarity or not HAS_GPU):
        pytest.skip("dual8 is for integers, and the interpreter rounds floats to E4M3 in its own way")
    monkeypatch.setattr(triton_rounding, "KEPT_AT_ONCE", 0)  # few programs, so that each has several rows
    monkeypatch.setattr(triton_rounding, "processor_count", lambda _: 2)
    torch.manual_seed(0)
    segments, groups, rows = (40, 72), 2, 9
    x = 3 * torch.randn(rows, sum(segments), device=DEVICE)
    shift = torch.randn(sum(segments), device=DEVICE)
    smoothing = torch.rand(groups, sum(segments), device=DEVICE) + 0.5
    scale = torch.rand(groups, 2, device=DEVICE) / fmt.max_code * 9 if static else None
    negative = scale / 2 if scale is not None and polarity != ("none", "none") else None
    arguments = (shift, smoothing, scale, negative)
    expected = rounding.reference(x, fmt, segments, polarity, *arguments)
    low, high = (fmt.min_code, fmt.max_code) if fmt.is_integer else (-448.0, 448.0)
    signs = [POLARITIES.index(sign) for sign in polarity]
    block = {True: {True: (2, 128, 4), False: (4, 32, 4)}, False: {True: (64, 32, 4), False: (16, 8, 4)}}[static][fits]
    found = launch(_unwrapped, x, *arguments, segments, signs, fmt.max_code, low, high, rounding.offset_of(fmt), block)
    assert mostly_equal(found[0], expected.codes)
    for segment, sign in enumerate(polarity):
        if not static:
            torch.testing.assert_close(found[1][segment], expected.scales[segment].flatten(), rtol=1e-6, atol=0)
        if sign != "none":
            columns = slice(0, segments[0]) if segment == 0 else slice(segments[0], None)
            assert expected.negative is not None
            assert mostly_equal(found[2][:, columns], expected.negative[:, columns])
            if not static and expected.negative_scales is not None:
                below = expected.negative_scales[segment].flatten()
                torch.testing.assert_close(found[3][segment], below, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 320, 2432, 3072, 4096, 9728, 12288, 16384, 20000])
def test_rows_are_kept_in_two_blocks(size: int) -> None:
    first, second, warps = _per_token_blocks(size)
    assert second in (first, first // 2)
    assert first + second <= MOST_KEPT
    assert first + second >= min(size, MOST_KEPT)
    assert size > (first + second) * (2 / 3 if second >= warps * STORED_AT_ONCE else 1 / 2) or size <= 4
    assert all(number & (number - 1) == 0 for number in (first, second, warps))


@pytest.mark.parametrize(("shared", "size", "stages"), [(227, 12288 * 2, 4), (99, 16384 * 4, 2), (48, 16384 * 4, 1)])
def test_rows_on_their_way_fit_into_shared_memory(
    shared: int, size: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_rounding, "shared_memory", lambda _: shared * 1024)
    assert triton_rounding._stages(size, torch.device("cuda")) == stages


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("channels", [320, 640, 2432, 3072, 12288, 15360, 20000])
@pytest.mark.parametrize("polarity", ["none", "dual", "dual8"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("smoothed", [False, True])
def test_rows_of_real_sizes_are_rounded_by_scales_per_token(
    smoothed: bool, kind: torch.dtype, polarity: str, channels: int
) -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(1000, channels, device=DEVICE, dtype=kind)
    shift = torch.randn(channels, device=DEVICE) if smoothed else None
    smoothing = torch.rand(1, channels, device=DEVICE) + 0.5 if smoothed else None
    found = rounding.quantize(x, QuantFormat(8), (channels,), (polarity,), shift, smoothing)
    expected = rounding.reference(x, QuantFormat(8), (channels,), (polarity,), shift, smoothing)
    pairs = [(found.codes, expected.codes), (found.scales[0], expected.scales[0])]
    if found.negative_scales and expected.negative_scales:
        pairs += [(found.negative, expected.negative), (found.negative_scales[0], expected.negative_scales[0])]
    assert len(pairs) == (2 if polarity == "none" else 4)
    for ours, theirs in pairs:
        if ours.dtype == torch.int8:
            assert mostly_equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [(1, 9216, 3072), (40, 3072, 3072), (512, 3072, 3072), (4096, 1536, 6144)])
@pytest.mark.parametrize("dual", [False, True])
def test_tuned_tiles_at_real_sizes(size: tuple[int, int, int], dual: bool) -> None:
    rows, columns, channels = size
    a, a2, b = codes(rows, channels, 0), codes(rows, channels, 2), codes(columns, channels, 1)
    one, scale_b = torch.ones(1, 1, device=DEVICE), torch.full((columns,), 2.0**-10, device=DEVICE)
    second = {"a2": a2, "scale_a2": one} if dual else {}
    found = scaled_mm(a, b, one, scale_b, **second)
    assert torch.equal(found, reference(a, b, one, scale_b, **second))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_groups_and_both_formats(kind: torch.dtype, groups: int, rows: int) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(n, 256, device=DEVICE) for n in (groups * rows, groups * 64))
    if kind == torch.int8:
        a, b = 40 * a, 40 * b
    a, b = a.to(kind), b.to(kind)
    scale, scale_b = torch.rand(groups, 1, device=DEVICE), torch.rand(groups * 64, device=DEVICE)
    found = scaled_mm(a, b, scale, scale_b, groups=groups)
    expected = reference(a, b, scale, scale_b, groups=groups)
    torch.testing.assert_close(
        found, expected, rtol=2e-2 if kind != torch.int8 else 1e-5, atol=2e-2 * expected.abs().max().item()
    )
