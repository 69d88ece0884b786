"""The Triton kernel against the reference: on a GPU, or in the interpreter where Triton is installed without one."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton is not installed")

from modelopt_ext.kernels.scaled_mm import reference, scaled_mm
from modelopt_ext.kernels.triton_gemm import _gemm, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2}


def codes(rows: int, channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (rows, channels), dtype=torch.int8, generator=generator).to(DEVICE)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("zero", [0, -128])
@pytest.mark.parametrize("size", [(40, 64, 96), (1, 48, 64), (33, 70, 80)])
def test_the_kernel_gives_the_references_numbers(
    size: tuple[int, int, int], zero: int, per_token: bool, dual: bool, tma: bool
) -> None:
    rows, columns, channels = size
    if tma and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no tensor descriptors")
    a, a2, b = codes(rows, channels, 0), codes(rows, channels, 1), codes(columns, channels, 2)
    scale = torch.rand(rows if per_token else 1, 1, device=DEVICE) + 0.1
    scale_b, bias = torch.rand(columns, device=DEVICE), torch.randn(columns, device=DEVICE)
    sums = b.sum(dim=1, dtype=torch.int32)
    other = (a2, 2 * scale, -1) if dual else None
    found = launch(_gemm.fn, a, b, scale, scale_b, bias, zero, sums, other, torch.float32, tma, **TILES)
    second = (a2, 2 * scale) if dual else (None, None)
    expected = reference(a, b, scale, scale_b, bias, zero, sums, *second, -1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-2)


def test_strided_operands_and_half_precision_output() -> None:
    wide, b = codes(20, 128, 0), codes(48, 128, 1)
    a, part = wide[:, 32:96], b[:, 64:]
    one, scale_b = torch.ones(1, 1, device=DEVICE), torch.full((48,), 2.0**-6, device=DEVICE)
    found = launch(_gemm.fn, a, part, one, scale_b, None, 0, None, None, torch.float16, False, **TILES)
    assert found.dtype == torch.float16
    assert torch.equal(found, reference(a, part, one, scale_b).to(torch.float16))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("size", [(1, 9216, 3072), (512, 3072, 3072), (4096, 1536, 6144)])
def test_tuned_tiles_at_real_sizes(size: tuple[int, int, int]) -> None:
    rows, columns, channels = size
    a, b = codes(rows, channels, 0), codes(columns, channels, 1)
    one, scale_b = torch.ones(1, 1, device=DEVICE), torch.full((columns,), 2.0**-10, device=DEVICE)
    found = scaled_mm(a, b, one, scale_b)
    assert torch.equal(found, reference(a, b, one, scale_b))
