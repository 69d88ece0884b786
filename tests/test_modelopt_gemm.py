"""``mtq.compress`` of ModelOpt's own INT8 configs multiplies codes by codes."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.backends.gemm_registry import enable_real_quant_gemm, gemm_registry
from test_quantize import sqnr
from torch import nn

from modelopt_ext.kernels import modelopt_gemm
from modelopt_ext.presets import PER_TOKEN


def config(activation: dict[str, Any]) -> dict[str, Any]:
    entries: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, **activation}},
    ]
    return {"quant_cfg": entries, "algorithm": "max"}


CONFIGS = {
    "default": mtq.INT8_DEFAULT_CFG,
    "smoothquant": mtq.INT8_SMOOTHQUANT_CFG,
    "per token": config(PER_TOKEN),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32, bias=False))


@pytest.fixture
def without_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelOpt marks the product for a profiler, which a CPU build of torch has no functions for."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda.nvtx, "range", lambda _: contextlib.nullcontext())


@pytest.mark.usefixtures("without_ranges")
@pytest.mark.parametrize("name", CONFIGS)
def test_products_of_codes_are_found_and_give_the_simulations_numbers(name: str) -> None:
    data = torch.randn(5, 20, 64) * torch.linspace(0.1, 4, 64)
    quantized = mtq.quantize(model(), copy.deepcopy(CONFIGS[name]), lambda module: module(data))
    with torch.no_grad():
        expected = quantized(data)
        mtq.compress(quantized)
        enable_real_quant_gemm(quantized)
        found = quantized(data)
    for layer in (quantized[0], quantized[2]):
        assert layer._real_quant_gemm_impl is modelopt_gemm.int8_linear
    assert found.shape == expected.shape
    assert sqnr(expected, found) > 60


@pytest.mark.usefixtures("without_ranges")
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_simulations(name: str) -> None:
    """Of the input and of a bias, as training an adapter beside a compressed Linear needs them."""
    data = torch.randn(5, 20, 64) * torch.linspace(0.1, 4, 64)
    quantized = mtq.quantize(model(), copy.deepcopy(CONFIGS[name]), lambda module: module(data))
    bias = quantized[0].bias

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        x = data.clone().requires_grad_()
        return torch.autograd.grad(quantized(x).square().sum(), (x, bias))

    expected = gradients()
    mtq.compress(quantized)
    enable_real_quant_gemm(quantized)
    found = gradients()
    assert quantized[0]._real_quant_gemm_impl is modelopt_gemm.int8_linear
    for of_simulation, of_codes in zip(expected, found, strict=True):
        assert of_codes.dtype == of_simulation.dtype
        assert sqnr(of_simulation, of_codes) > 50


def test_other_formats_are_left_to_modelopt() -> None:
    data = torch.randn(8, 64)
    quantized = mtq.quantize(model(), copy.deepcopy(mtq.FP8_DEFAULT_CFG), lambda module: module(data))
    mtq.compress(quantized)
    assert gemm_registry.find_match(quantized[0], data) is not modelopt_gemm.int8_linear
    assert not modelopt_gemm._fits(nn.Linear(4, 4), data, [], {})


def test_it_is_registered_once() -> None:
    before = len(gemm_registry._registry)
    modelopt_gemm.register()
    assert len(gemm_registry._registry) == before
    assert modelopt_gemm.int8_linear in gemm_registry
