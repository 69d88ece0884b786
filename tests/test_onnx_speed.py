"""Size and speed of 8-bit ONNX at a realistic width."""

from __future__ import annotations

import time
from pathlib import Path

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import modelopt_ext
from modelopt_ext.export.onnx import export_module, file_bytes
from optimum_segquant.exporters import session
from optimum_segquant.exporters.cpu import multiplies_signed_weights

TOKENS, WIDTH = 1024, 1536  # of SD3.5-Medium at 512 x 512


def exported(folder: Path, width: int, tokens: int) -> tuple[Path, Path, Path, torch.Tensor]:
    """A feed-forward layer in float32 and quantized, for any CPU and for those with VNNI."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)).eval()
    x = torch.randn(1, tokens, width)
    plain = folder / "float32.onnx"
    torch.onnx.export(model, (x,), str(plain), input_names=["input"], opset_version=20, dynamo=False)
    config = modelopt_ext.presets.linear_only(
        {"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}, alpha=None, clip_grid=(1.0,), polarity="none"
    )
    mtq.quantize(model, config, lambda layers: layers(x))
    quantized = export_module(model, folder / "int8.onnx", {"input": x})
    return plain, quantized, export_module(model, folder / "vnni.onnx", {"input": x}, target="onnxruntime-vnni"), x


def test_int8_files_are_a_quarter(tmp_path: Path) -> None:
    plain, *quantized, _ = exported(tmp_path, 256, 4)
    assert all(file_bytes(path) < 0.27 * file_bytes(plain) for path in quantized)


def bare_products(path: Path, width: int, tokens: int) -> dict[str, np.ndarray]:
    """Writes the layer's two products of unsigned codes, and nothing else; returns inputs for them."""
    generator = np.random.default_rng(0)

    def codes(*shape: int) -> np.ndarray:
        return generator.integers(0, 256, shape, dtype=np.uint8)

    inputs = {"x": codes(tokens, width), "hidden": codes(tokens, 4 * width)}
    weights = {"up": codes(width, 4 * width), "down": codes(4 * width, width)}
    graph = helper.make_graph(
        [
            helper.make_node("MatMulInteger", [*pair], [f"y{i}"])
            for i, pair in enumerate(zip(inputs, weights, strict=True))
        ],
        "products",
        [helper.make_tensor_value_info(name, TensorProto.UINT8, list(value.shape)) for name, value in inputs.items()],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.INT32, None) for i in range(2)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return inputs


@pytest.mark.slow
def test_int8_is_faster_than_float32(tmp_path: Path) -> None:
    """Two threads, default options, in turn, so that a busy machine slows all.

    On CPUs with AMX the runtime multiplies unsigned weights no faster than float32; there it adds little to that.
    """
    *paths, x = exported(tmp_path, WIDTH, TOKENS)
    inputs = {path: {"input": x.numpy()} for path in paths}
    bare = tmp_path / "bare.onnx"
    inputs[bare] = bare_products(bare, WIDTH, TOKENS)
    sessions = {path: session(path, threads=2) for path in inputs}
    best = dict.fromkeys(inputs, float("inf"))
    for _ in range(8):
        for path, runtime in sessions.items():
            start = time.perf_counter()
            runtime.run(None, inputs[path])
            best[path] = min(best[path], time.perf_counter() - start)
    plain, int8, vnni, products = best.values()
    amx = torch.cpu.get_capabilities().get("amx_int8")
    times = ", ".join(f"{path.stem} {1e3 * seconds:.0f} ms" for path, seconds in best.items())
    assert int8 < (1.4 * products if amx else 0.9 * plain), times
    if multiplies_signed_weights():
        assert vnni < (0.4 if amx else 0.7) * plain, times
