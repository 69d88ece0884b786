"""Tiny packed denoisers and text encoders, calibrated quickly, with inputs to compare outputs on."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from denoisers import build
from diffusers import SD3Transformer2DModel
from tiny_pipelines import tiny_text_config
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

import modelopt_ext
from modelopt_ext.presets import PRESETS

PACKABLE = sorted(set(PRESETS) - {"SEGQUANT_NVFP4_CFG", "SEGQUANT_CFG"})
MODELS = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel", "sdxl": "UNet2DConditionModel-sdxl"}


def quick(preset: str) -> dict[str, Any]:
    """A preset with less searching than in earnest, and every kind of result."""
    config = copy.deepcopy(PRESETS[preset])
    config["algorithm"].update(samples=128, alpha_grid=[0.5], clip_grid=[1.0, 0.8], progress=False)
    if config["algorithm"].get("weight_clip_grid"):
        config["algorithm"]["weight_clip_grid"] = [1.0, 0.8]
    return config


@cache
def plain_denoiser(kind: str = "sd3") -> tuple[nn.Module, dict[str, Any]]:
    """A denoiser and its inputs; take copies."""
    return build(MODELS[kind])


def jitter(inputs: Any, seed: int) -> Any:
    """Other values of the same kind."""
    if isinstance(inputs, dict):
        return {name: jitter(value, seed) for name, value in inputs.items()}
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.dim() > 1:
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed))
        return inputs + 0.5 * noise.to(inputs.dtype)
    return inputs


def outputs(model: nn.Module, kind: str = "sd3", dtype: torch.dtype = torch.float32) -> Tensor:
    """What a denoiser gives on three inputs that calibration has not seen."""

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cast(item) for name, item in value.items()}
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    _, inputs = plain_denoiser(kind)
    with torch.no_grad():
        return torch.cat([model(**cast(jitter(inputs, seed)), return_dict=False)[0] for seed in (100, 101, 102)])


@cache
def _calibrated(preset: str, kind: str) -> nn.Module:
    model, inputs = plain_denoiser(kind)

    def loop(module: nn.Module) -> None:
        for seed in range(4):
            module(**jitter(inputs, seed))

    return modelopt_ext.compress(mtq.quantize(copy.deepcopy(model), quick(preset), loop))


def packed_denoiser(preset: str = "SEGQUANT_INT8_SVD_CFG", kind: str = "sd3") -> nn.Module:
    """A copy of a packed denoiser."""
    return copy.deepcopy(_calibrated(preset, kind))


def plain_text_encoder(kind: str = "clip") -> nn.Module:
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPTextModelWithProjection(tiny_text_config()).eval()
    config = T5Config(
        vocab_size=32, d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def text_outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).reshape(3, 8))[0]


@cache
def _packed_text_encoder(kind: str, preset: str) -> nn.Module:
    def loop(module: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            module(input_ids=torch.randint(0, 30, (4, 8), generator=generator))

    return modelopt_ext.compress(mtq.quantize(plain_text_encoder(kind), quick(preset), loop))


def packed_text_encoder(kind: str = "clip", preset: str = "SEGQUANT_INT8_CFG") -> nn.Module:
    """A copy of a packed text encoder."""
    return copy.deepcopy(_packed_text_encoder(kind, preset))


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models have the same tensors, bit for bit, of the same dtypes."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def tiny_wide_sd3(layers: int = 2, heads: int = 16) -> SD3Transformer2DModel:
    """A denoiser whose Linears are nearly all of it, for measuring memory: 64 channels a head."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=64,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    ).eval()
