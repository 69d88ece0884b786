"""Size and speed of 8-bit ONNX at a realistic width."""

from __future__ import annotations

import time
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import nn

import modelopt_ext
from modelopt_ext.export.onnx import export_module, file_bytes
from optimum_segquant.exporters import session
from optimum_segquant.exporters.compare import run

TOKENS, WIDTH = 1024, 1536  # of SD3.5-Medium at 512 x 512


def exported(folder: Path, width: int, tokens: int) -> tuple[Path, Path, torch.Tensor]:
    """A feed-forward layer in float32 and quantized."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)).eval()
    x = torch.randn(1, tokens, width)
    plain = folder / "float32.onnx"
    torch.onnx.export(model, (x,), str(plain), input_names=["input"], opset_version=20, dynamo=False)
    config = modelopt_ext.presets.linear_only(
        {"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}, alpha=None, clip_grid=(1.0,), polarity="none"
    )
    mtq.quantize(model, config, lambda layers: layers(x))
    return plain, export_module(model, folder / "int8.onnx", {"input": x}), x


def test_int8_files_are_a_quarter(tmp_path: Path) -> None:
    plain, quantized, _ = exported(tmp_path, 256, 4)
    assert file_bytes(quantized) < 0.27 * file_bytes(plain)


@pytest.mark.slow
def test_int8_is_faster_than_float32(tmp_path: Path) -> None:
    """Two threads, default options, in turn, so that a busy machine slows both."""
    *paths, x = exported(tmp_path, WIDTH, TOKENS)
    sessions = [session(path, threads=2) for path in paths]
    best = [float("inf"), float("inf")]
    for _ in range(8):
        for index, runtime in enumerate(sessions):
            start = time.perf_counter()
            run(runtime, {"input": x})
            best[index] = min(best[index], time.perf_counter() - start)
    assert best[1] < 0.9 * best[0], f"float32 {1e3 * best[0]:.0f} ms, int8 {1e3 * best[1]:.0f} ms"
