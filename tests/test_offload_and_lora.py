"""SegQuant beside accelerate's offloading hooks and PEFT's LoRA adapters."""

from __future__ import annotations

import copy

import modelopt.torch.quantization as mtq
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig
from test_quantize import CALIBRATION, outputs, quiet, sqnr
from tiny_pipelines import tiny_sd3_transformer
from torch import nn

import modelopt_ext
from modelopt_ext import SegLinear

ADALN = "transformer_blocks.1.norm1.linear"
CONFIG = quiet(modelopt_ext.SEGQUANT_CFG, alpha=0.5)  # a fixed alpha, so that every planned cut is made


def lora(seed: int = 3) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "linear", "ff.net.2"], init_lora_weights=False)


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    model = tiny_sd3_transformer()
    return mtq.quantize(model, CONFIG, CALIBRATION)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(quantized: nn.Module, where: str, tmp_path):
    model = tiny_sd3_transformer()
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.get_submodule(ADALN).weight.is_meta
    mtq.quantize(model, CONFIG, CALIBRATION)
    segmented = model.get_submodule(ADALN)
    assert isinstance(segmented, SegLinear)
    assert segmented.plain_weight.is_meta, "the weight stayed in memory"
    assert torch.equal(outputs(model), outputs(quantized))


def test_offload_after_quantizing(quantized: nn.Module):
    model = copy.deepcopy(quantized)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(outputs(model), outputs(quantized))


def test_lora_on_top_of_segmented_layers(quantized: nn.Module):
    """The adapter's share is the same as on the full-precision model, up to what quantization changes."""
    plain, model = tiny_sd3_transformer(), copy.deepcopy(quantized)
    before = outputs(model)
    for target in (plain, model):
        torch.manual_seed(3)
        target.add_adapter(lora())
    assert isinstance(model.get_submodule(ADALN).base_layer, SegLinear)
    assert sqnr(outputs(plain), outputs(model)) > 30
    assert not torch.equal(outputs(model), before)
    model.disable_adapters()
    assert torch.equal(outputs(model), before)
    model.delete_adapters("default")
    assert torch.equal(outputs(model), before)


def test_adapters_fused_before_quantizing_are_quantized_like_any_weight():
    plain = tiny_sd3_transformer()
    torch.manual_seed(3)
    plain.add_adapter(lora())
    plain.fuse_lora()
    plain.unload_lora()
    reference = outputs(plain)
    assert sqnr(outputs(tiny_sd3_transformer()), reference) < 20, "the adapter does nothing"
    model = mtq.quantize(copy.deepcopy(plain), CONFIG, CALIBRATION)
    assert isinstance(model.get_submodule(ADALN), SegLinear)
    assert sqnr(reference, outputs(model)) > 30


def test_adapters_fused_into_a_quantized_model(quantized: nn.Module):
    """The stored weights are plain ones, so fusing means what it says; the scales are those of before."""
    plain, model = tiny_sd3_transformer(), copy.deepcopy(quantized)
    for target in (plain, model):
        torch.manual_seed(3)
        target.add_adapter(LoraConfig(r=4, lora_alpha=1, target_modules=["to_q", "linear"], init_lora_weights=False))
        target.fuse_lora()
        target.unload_lora()
    torch.testing.assert_close(model.get_submodule(ADALN).plain_weight, plain.get_submodule(ADALN).weight)
    assert sqnr(outputs(plain), outputs(model)) > 15


def test_quantizing_with_an_adapter_loaded_says_what_to_do():
    model = tiny_sd3_transformer()
    model.add_adapter(lora())
    with pytest.raises(ValueError, match=r"carries a LoRA adapter.*fuse it"):
        mtq.quantize(model, CONFIG, CALIBRATION)
