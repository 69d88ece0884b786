"""Every denoiser of diffusers computes with packed Linears: none reads what a packed weight does not mean."""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from denoisers import build, names
from test_quantize import sqnr
from torch import Tensor, nn

import modelopt_ext
from modelopt_ext import PackedLinear
from modelopt_ext.calibrate.without_data import Observation, WithoutData, without_fitting
from modelopt_ext.dataflow import record
from modelopt_ext.presets import PRESETS, linear_only

# These guard or cast by the dtype of a weight, or multiply with one themselves.
TRICKY = {"AnyFlowTransformer3DModel", "HunyuanDiT2DModel", "WanTransformer3DModel", "ZImageTransformer2DModel"}
# Weight-only int8, measured: all but one above 39 dB.
BOUND = {"Kandinsky3UNet": 28.0}
# Its attention can't run on a CPU in every torch; its blocks are those of AnyFlowTransformer3DModel.
NOT_ON_A_CPU = {"AnyFlowFARTransformer3DModel"}


def first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in TRICKY else pytest.mark.slow)
        for name in names()
        if name not in NOT_ON_A_CPU
    ],
)
def test_weight_only(name: str):
    model, inputs = build(name)
    plan = record(model, lambda: model(**inputs))
    config = copy.deepcopy(PRESETS["SEGQUANT_W8A16_CFG"])
    config["algorithm"] = {**without_fitting(config["algorithm"])[0], "plan": plan}
    packer = WithoutData(copy.deepcopy(model).to("meta"), config, Observation())
    with torch.no_grad():
        torch.manual_seed(1)
        expected = first_tensor(model(**inputs))
        for key in packer.names:
            plain = model.get_submodule(key)
            model.set_submodule(key, packer.pack(key, plain.weight.data, plain.bias))
        torch.manual_seed(1)
        assert sqnr(expected, first_tensor(model(**inputs))) > BOUND.get(name, 37.0)
    assert packer.names


def test_projections_that_attention_reads_stay_plain():
    """HunyuanDiT pools its text by a function of torch that takes the weights of four Linears."""
    model, inputs = build("HunyuanDiT2DModel")
    config = linear_only({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}, alpha=None, progress=False)
    mtq.quantize(model, config, lambda module: [module(**inputs) for _ in range(2)])
    with torch.no_grad():
        simulated = model(**inputs)[0]
        packed = modelopt_ext.compress(model)(**inputs)[0]
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert plain == [f"time_extra_emb.pooler.{name}" for name in ("k_proj", "q_proj", "v_proj", "c_proj")]
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) > 20
    assert sqnr(simulated, packed) > 30
