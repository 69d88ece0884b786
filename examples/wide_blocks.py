"""Two transformer blocks of SD3.5-Medium's width, random weights: wide enough to be typical, small enough for a CPU."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

IMAGE_TOKENS, TEXT_TOKENS = 1024, 154
NAME = f"two blocks of SD3.5-Medium's width, {IMAGE_TOKENS} + {TEXT_TOKENS} tokens"


def build(heads: int = 24) -> SD3Transformer2DModel:
    """The model, float32, 64 channels a head."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=64,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=4096,
        caption_projection_dim=64 * heads,
        pooled_projection_dim=2048,
        pos_embed_max_size=64,
        qk_norm="rms_norm",
    ).eval()


def inputs() -> dict[str, Tensor]:
    """Arguments of one call, batch 1."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 64, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 4096, generator=generator),
        "pooled_projections": torch.randn(1, 2048, generator=generator),
        "timestep": torch.tensor([500.0]),
    }
