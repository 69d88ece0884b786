"""Denoisers of real sizes with random weights, and the inputs of one denoising step at 1024 x 1024."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

Call = dict[str, Any]


@dataclass(frozen=True)
class Denoiser:
    """A model to measure.

    Attributes:
        name: as in the tables.
        build: makes it with random weights in bfloat16 on a device; its argument says whether tiny.
        call: arguments of one forward: (model, batch size, whether tiny, seed).
    """

    name: str
    build: Callable[[torch.device, bool], nn.Module]
    call: Callable[[Any, int, bool, int], Call]


def _bfloat16_on(device: torch.device, make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def _noise(model: Any, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device=model.device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=model.device, dtype=model.dtype)


def _flux(device: torch.device, tiny: bool) -> nn.Module:
    from benchmark_calibration_flux import build

    return build(device, tiny)


def _flux_call(model: Any, batch: int, tiny: bool, seed: int) -> Call:
    from benchmark_calibration_flux import calls

    (call,) = calls(model, 1, side=8 if tiny else 64, text=16 if tiny else 512)
    noise = _noise(model, seed)
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        call[name] = noise(batch, *call[name].shape[1:])
    return {**call, "timestep": call["timestep"].expand(batch), "guidance": call["guidance"].expand(batch)}


def _sd35_large(device: torch.device, tiny: bool) -> nn.Module:
    heads, layers = (2, 2) if tiny else (38, 38)
    return _bfloat16_on(
        device,
        lambda: SD3Transformer2DModel(
            sample_size=128,
            in_channels=16,
            out_channels=16,
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=64,
            caption_projection_dim=64 * heads,
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
    )


def _sd35_call(model: Any, batch: int, tiny: bool, seed: int) -> Call:
    noise, side = _noise(model, seed), 16 if tiny else 128
    return {
        "hidden_states": noise(batch, 16, side, side),
        "encoder_hidden_states": noise(batch, 16 if tiny else 333, 4096),
        "pooled_projections": noise(batch, 2048),
        "timestep": torch.full((batch,), 500.0, device=model.device, dtype=model.dtype),
    }


def _sdxl(device: torch.device, tiny: bool) -> nn.Module:
    width = 32 if tiny else 320
    return _bfloat16_on(
        device,
        lambda: UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(width, 2 * width, 4 * width),
            transformer_layers_per_block=1 if tiny else [1, 2, 10],
            attention_head_dim=[2, 2, 2] if tiny else [5, 10, 20],
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        ),
    )


def _sdxl_call(model: Any, batch: int, tiny: bool, seed: int) -> Call:
    noise, side = _noise(model, seed), 16 if tiny else 128
    return {
        "sample": noise(batch, 4, side, side),
        "timestep": torch.tensor(500.0, device=model.device),
        "encoder_hidden_states": noise(batch, 77, 2048),
        "added_cond_kwargs": {
            "text_embeds": noise(batch, 1280),
            "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], device=model.device).expand(batch, 6),
        },
    }


DENOISERS = {
    "flux": Denoiser("FLUX.1-dev", _flux, _flux_call),
    "sd35": Denoiser("SD3.5-Large", _sd35_large, _sd35_call),
    "sdxl": Denoiser("SDXL", _sdxl, _sdxl_call),
}
