"""Rows of a results table and the cost of layers, on tiny pipelines."""

from __future__ import annotations

import math

import modelopt.torch.quantization as mtq
import pytest
import torch
from tiny_pipelines import tiny_sd3_pipeline
from torch import nn

from modelopt_ext import compress
from modelopt_ext.presets import linear_only
from optimum_segquant.evaluation import (
    DenoiserCall,
    LayerCost,
    Trajectories,
    compare,
    denoiser_replaced,
    embedders,
    generate_images,
    layer_costs,
    sample_trajectories,
    share,
)

PROMPTS = ["a red circle", "a blue square"]
SAMPLING = {"num_inference_steps": 3, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_sd3_pipeline()


@pytest.fixture(scope="module")
def trajectories(pipeline):
    return sample_trajectories(pipeline, PROMPTS, **SAMPLING)


def test_compare_measures_a_copy(pipeline, trajectories):
    original = pipeline.transformer
    weights = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    reference = generate_images(pipeline, PROMPTS, **SAMPLING)
    row = compare(
        pipeline,
        mtq.INT8_DEFAULT_CFG,
        calibration=trajectories,
        unseen=trajectories,
        prompts=PROMPTS,
        reference=reference,
        **SAMPLING,
    )
    assert 15 < row.sqnr.overall < 60
    assert len(row.sqnr.per_timestep) == 3
    assert 20 < row.metrics.psnr < 90
    assert 0.5 < row.metrics.ssim <= 1
    assert row.images.shape == reference.shape
    assert not torch.equal(row.images, reference)
    assert row.seconds > 0
    assert row.denoiser is not original
    assert any("quantizer" in name for name, _ in row.denoiser.named_modules())
    assert pipeline.transformer is original
    assert not any("quantizer" in name for name, _ in original.named_modules())
    assert all(torch.equal(weights[name], tensor) for name, tensor in original.state_dict().items())
    # The quantized images came from the quantized denoiser.
    with denoiser_replaced(pipeline, row.denoiser):
        assert pipeline.transformer is row.denoiser
        assert torch.equal(generate_images(pipeline, PROMPTS, **SAMPLING), row.images)


def test_more_bits_lose_less(pipeline, trajectories):
    def config(bits: int) -> dict:
        entries = [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "parent_class": "nn.Linear", "cfg": {"num_bits": bits, "axis": 0}},
        ]
        return {"quant_cfg": entries, "algorithm": "max"}

    sqnr = [
        compare(pipeline, config(bits), calibration=trajectories, unseen=trajectories).sqnr.overall
        for bits in (4, 7, 10)
    ]
    assert sqnr == sorted(sqnr)
    assert sqnr[2] - sqnr[0] == pytest.approx(20 * math.log10(511 / 7), abs=5)  # 6 dB a bit


def test_images_need_a_reference(pipeline, trajectories, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("quantized before the arguments were checked")

    monkeypatch.setattr(mtq, "quantize", refuse)
    data = {"calibration": trajectories, "unseen": trajectories, "prompts": PROMPTS}
    with pytest.raises(ValueError, match="belong together"):
        compare(pipeline, mtq.INT8_DEFAULT_CFG, **data)
    with pytest.raises(ValueError, match="2 prompts but 1 reference images"):
        compare(pipeline, mtq.INT8_DEFAULT_CFG, reference=torch.zeros(1, 3, 16, 16), **data)


def test_the_original_denoiser_comes_back_after_an_exception(pipeline):
    original = pipeline.transformer
    other = tiny_sd3_pipeline(seed=1).transformer
    with pytest.raises(ValueError, match="prompts is empty"), denoiser_replaced(pipeline, other):
        generate_images(pipeline, [])
    assert pipeline.transformer is original


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(4, 6, kernel_size=2, stride=2)
        self.blocks = nn.ModuleList([nn.Linear(6, 10, bias=False), nn.Linear(10, 6)])
        self.up = nn.ConvTranspose2d(6, 4, kernel_size=2, stride=2)

    def forward(self, sample):
        x = self.embed(sample).flatten(2).mT
        x = self.blocks[1](self.blocks[0](x))
        return (self.up(x.mT.unflatten(2, (4, 4))),)


def test_layer_costs_by_hand():
    model = Layers()
    call = DenoiserCall({"sample": torch.zeros(3, 4, 8, 8)}, torch.zeros(3, 4, 8, 8), 1.0, 0)
    costs = layer_costs(model, Trajectories((call, call)))
    pixels = 3 * 4 * 4
    assert costs == {
        "embed": LayerCost(6 * 4 * 2 * 2, pixels * 6 * 4 * 2 * 2),
        "blocks.0": LayerCost(60, pixels * 60),
        "blocks.1": LayerCost(60, pixels * 60),
        "up": LayerCost(6 * 4 * 2 * 2, pixels * 6 * 4 * 2 * 2),
    }
    assert embedders(model, costs) == ["embed"]
    part = share(costs, ["embed", "embed", "blocks.0"])
    assert math.isclose(part.weights, (96 + 60) / (96 + 60 + 60 + 96))
    assert math.isclose(part.multiply_adds, (96 + 60) / (96 + 60 + 60 + 96))
    assert not any(module._forward_hooks for module in model.modules())


def test_layer_costs_of_packed_weights():
    """Two INT4 codes a byte: the layer has as many weights and multiply-adds as before."""
    torch.manual_seed(0)
    model = Layers()
    call = DenoiserCall({"sample": torch.randn(3, 4, 8, 8)}, torch.zeros(3, 4, 8, 8), 1.0, 0)
    trajectories = Trajectories((call,))
    before = layer_costs(model, trajectories)
    config = linear_only({"num_bits": 4, "axis": 0}, None, alpha=None, progress=False)
    compress(mtq.quantize(model, config, trajectories.forward_loop))
    assert model.blocks[1].weight.shape == (6, 5)
    assert layer_costs(model, trajectories) == before


def test_a_model_without_repeated_blocks_has_no_embedders():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert embedders(model, {"0": LayerCost(16, 16), "1": LayerCost(16, 16)}) == []


def test_embedders_of_sd3(pipeline, trajectories):
    names = embedders(pipeline.transformer, layer_costs(pipeline.transformer, trajectories))
    assert sorted(names) == [
        "context_embedder",
        "pos_embed.proj",
        "time_text_embed.text_embedder.linear_1",
        "time_text_embed.text_embedder.linear_2",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
    ]
