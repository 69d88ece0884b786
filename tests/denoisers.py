"""Tiny untrained denoisers and ControlNets of diffusers, each with inputs for one forward.

    model, inputs = build("SD3Transformer2DModel")
    model(**inputs)

Sizes: batch B = 2, D = HEADS * HEAD_DIM channels, TEXT tokens of CONTEXT channels. More than one head in nearly all,
so that cuts inside heads can be told from cuts of channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

B = 2
HEADS = 4
HEAD_DIM = 8
D = HEADS * HEAD_DIM
TEXT = 5
CONTEXT = 24
POOLED = 20

Inputs = dict[str, Any]
_BUILDERS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {}


def names() -> list[str]:
    """The denoisers that can be built with the installed diffusers."""
    return [name for name in _BUILDERS if hasattr(diffusers, name.partition("-")[0])]


def build(name: str, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """A model in eval mode with seeded weights, and its inputs; names are class names with an optional ``-variant``."""
    torch.manual_seed(seed)
    model, inputs = _BUILDERS[name]()
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.any():
            # ControlNets and gates start at zero, which would hide everything behind them.
            nn.init.normal_(parameter, std=0.1)
    return model.eval(), inputs


def denoiser(name: str) -> Callable[[Callable[[type], tuple[nn.Module, Inputs]]], None]:
    def register(function: Callable[[type], tuple[nn.Module, Inputs]]) -> None:
        _BUILDERS[name] = lambda: function(getattr(diffusers, name.partition("-")[0]))

    return register


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def tokens(length: int = TEXT, channels: int = CONTEXT) -> Tensor:
    return torch.randn(B, length, channels)


def times() -> Tensor:
    return torch.tensor([7, 3])


def sigmas() -> Tensor:
    return torch.tensor([0.7, 0.3])


def ones(length: int = TEXT) -> Tensor:
    return torch.ones(B, length, dtype=torch.long)


# -- Stable Diffusion 3 ------------------------------------------------------------------------------------------------


def sd3_config(**changes: Any) -> Inputs:
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": CONTEXT,
        "caption_projection_dim": D,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 8,
    }
    return config | changes


def sd3_inputs() -> Inputs:
    return {
        "hidden_states": noise(B, 4, 8, 8),
        "encoder_hidden_states": tokens(),
        "pooled_projections": noise(B, POOLED),
        "timestep": times(),
    }


@denoiser("SD3Transformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**sd3_config()), sd3_inputs()


@denoiser("SD3Transformer2DModel-3.5")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**sd3_config(dual_attention_layers=(0, 1), qk_norm="rms_norm")), sd3_inputs()


@denoiser("SD3ControlNetModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**sd3_config()), sd3_inputs() | {"controlnet_cond": noise(B, 4, 8, 8)}


# -- FLUX and its kin --------------------------------------------------------------------------------------------------


def flux_config(**changes: Any) -> Inputs:
    config = {
        "patch_size": 1,
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": CONTEXT,
        "axes_dims_rope": (2, 2, 4),
    }
    return config | changes


def flux_inputs(axes: int = 3) -> Inputs:
    return {
        "hidden_states": noise(B, 16, 8),
        "encoder_hidden_states": tokens(),
        "timestep": sigmas(),
        "img_ids": torch.arange(16 * axes).reshape(16, axes).float() % 4,
        "txt_ids": torch.zeros(TEXT, axes),
    }


@denoiser("FluxTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(**flux_config(pooled_projection_dim=POOLED, guidance_embeds=True))
    return model, flux_inputs() | {"pooled_projections": noise(B, POOLED), "guidance": torch.full((B,), 3.5)}


@denoiser("FluxControlNetModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    inputs = flux_inputs() | {"pooled_projections": noise(B, POOLED), "controlnet_cond": noise(B, 16, 8)}
    return cls(**flux_config(pooled_projection_dim=POOLED)), inputs


@denoiser("Flux2Transformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(**flux_config(axes_dims_rope=(2, 2, 2, 2), timestep_guidance_channels=16, guidance_embeds=True))
    return model, flux_inputs(4) | {"guidance": torch.full((B,), 3.5)}


@denoiser("ChromaTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    channels = {"approximator_num_channels": 16, "approximator_hidden_dim": D, "approximator_layers": 2}
    return cls(**flux_config(**channels)), flux_inputs()


@denoiser("BriaTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**flux_config()), flux_inputs()


@denoiser("BriaFiboTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    layers = [tokens(TEXT, D // 2) for _ in range(4)]
    model = cls(**flux_config(text_encoder_dim=D // 2, joint_attention_dim=D))
    inputs = flux_inputs() | {"encoder_hidden_states": tokens(TEXT, D), "text_encoder_layers": layers}
    return model, inputs


@denoiser("OvisImageTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**flux_config(out_channels=8)), flux_inputs()


@denoiser("LongCatImageTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**flux_config(pooled_projection_dim=POOLED)), flux_inputs()


@denoiser("AuraFlowTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=D,
        pos_embed_max_size=16,
    )
    return model, {"hidden_states": noise(B, 4, 8, 8), "encoder_hidden_states": tokens(), "timestep": sigmas()}


@denoiser("HiDreamImageTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        caption_channels=[CONTEXT, CONTEXT],
        text_emb_dim=POOLED,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    inputs = {
        "hidden_states": noise(B, 4, 8, 8),
        "timesteps": times(),
        "encoder_hidden_states_t5": tokens(),
        "encoder_hidden_states_llama3": noise(2, B, TEXT, CONTEXT),
        "pooled_embeds": noise(B, POOLED),
    }
    return model, inputs


@denoiser("QwenImageTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**qwen_config()), qwen_inputs()


def qwen_config() -> Inputs:
    return {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": CONTEXT,
        "axes_dims_rope": (2, 2, 4),
    }


def qwen_inputs() -> Inputs:
    return {
        "hidden_states": noise(B, 16, 16),
        "encoder_hidden_states": tokens(),
        "encoder_hidden_states_mask": ones(),
        "timestep": sigmas(),
        "img_shapes": [[(1, 4, 4)]] * B,
    }


@denoiser("QwenImageControlNetModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**qwen_config()), qwen_inputs() | {"controlnet_cond": noise(B, 16, 16)}


@denoiser("NucleusMoEImageTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=CONTEXT,
        axes_dims_rope=(2, 2, 4),
        mlp_ratio=8.0,
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    return model, qwen_inputs()


# -- PixArt, Sana, DiT and other image transformers --------------------------------------------------------------------


@denoiser("DiTTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return model, {"hidden_states": noise(B, 4, 8, 8), "timestep": times(), "class_labels": torch.tensor([1, 2])}


@denoiser("PixArtTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=D,
        sample_size=8,
        patch_size=2,
        caption_channels=CONTEXT,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": noise(B, 4, 8, 8),
        "encoder_hidden_states": tokens(),
        "timestep": times(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs


@denoiser("PixArtTransformer2DModel-sizes")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=8,
        patch_size=2,
        caption_channels=CONTEXT,
        use_additional_conditions=True,
    )
    inputs = {
        "hidden_states": noise(B, 4, 8, 8),
        "encoder_hidden_states": tokens(),
        "timestep": times(),
        "added_cond_kwargs": {"resolution": torch.full((B, 2), 64.0), "aspect_ratio": torch.ones(B, 1)},
    }
    return model, inputs


def sana_config() -> Inputs:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 2,
        "num_cross_attention_heads": HEADS,
        "cross_attention_head_dim": HEAD_DIM,
        "cross_attention_dim": D,
        "caption_channels": CONTEXT,
    }


def sana_inputs(*size: int) -> Inputs:
    return {"hidden_states": noise(B, 4, *size), "encoder_hidden_states": tokens(), "timestep": times()}


@denoiser("SanaTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**sana_config(), sample_size=8), sana_inputs(8, 8)


@denoiser("SanaTransformer2DModel-sprint")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(**sana_config(), sample_size=8, guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return model, sana_inputs(8, 8) | {"guidance": torch.full((B,), 4.5)}


@denoiser("SanaControlNetModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**sana_config(), sample_size=8), sana_inputs(8, 8) | {"controlnet_cond": noise(B, 4, 8, 8)}


@denoiser("SanaVideoTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**sana_config(), sample_size=8), sana_inputs(2, 8, 8)


@denoiser("HunyuanDiT2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**hunyuan_dit_config(), num_layers=4), hunyuan_dit_inputs()


def hunyuan_dit_config() -> Inputs:
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": D,
        "cross_attention_dim": CONTEXT,
        "cross_attention_dim_t5": CONTEXT,
        "pooled_projection_dim": POOLED,
        "text_len": TEXT,
        "text_len_t5": TEXT,
        "activation_fn": "gelu-approximate",
    }


def hunyuan_dit_inputs() -> Inputs:
    return {
        "hidden_states": noise(B, 4, 8, 8),
        "timestep": times().float(),
        "encoder_hidden_states": tokens(),
        "text_embedding_mask": ones().float(),
        "encoder_hidden_states_t5": tokens(),
        "text_embedding_mask_t5": ones().float(),
        "image_meta_size": torch.full((B, 6), 8.0),
        "style": torch.zeros(B, dtype=torch.long),
        "image_rotary_emb": [noise(16, HEAD_DIM), noise(16, HEAD_DIM)],
    }


@denoiser("HunyuanDiT2DControlNetModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(**hunyuan_dit_config(), transformer_num_layers=4, conditioning_channels=4)
    return model, hunyuan_dit_inputs() | {"controlnet_cond": noise(B, 4, 8, 8)}


@denoiser("LuminaNextDiT2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=D,
        num_layers=2,
        num_attention_heads=HEADS,
        num_kv_heads=2,
        multiple_of=8,
        cross_attention_dim=CONTEXT,
    )
    inputs = {
        "hidden_states": noise(B, 4, 8, 8),
        "timestep": sigmas(),
        "encoder_hidden_states": tokens(),
        "encoder_mask": ones(),
        "image_rotary_emb": torch.polar(torch.ones(8, 8, HEAD_DIM // 2), torch.rand(8, 8, HEAD_DIM // 2)),
        "cross_attention_kwargs": {},
    }
    return model, inputs


@denoiser("Lumina2Transformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=D,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=HEADS,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 16, 16),
        cap_feat_dim=CONTEXT,
    )
    inputs = {
        "hidden_states": noise(B, 4, 8, 8),
        "timestep": sigmas(),
        "encoder_hidden_states": tokens(),
        "encoder_attention_mask": ones().bool(),
    }
    return model, inputs


@denoiser("ZImageTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=4,
        dim=D,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=CONTEXT,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 32, 32],
    )
    return model, {"x": [noise(4, 1, 8, 8)] * B, "t": sigmas(), "cap_feats": [noise(TEXT, CONTEXT)] * B}


@denoiser("CogView3PlusTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        text_embed_dim=CONTEXT,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
    )
    return model, cogview_inputs()


def cogview_inputs() -> Inputs:
    size = torch.full((B, 2), 8.0)
    return {
        "hidden_states": noise(B, 4, 8, 8),
        "encoder_hidden_states": tokens(),
        "timestep": times(),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(B, 2),
    }


@denoiser("CogView4Transformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        text_embed_dim=CONTEXT,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    return model, cogview_inputs()


@denoiser("GlmImageTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        text_embed_dim=CONTEXT,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    )
    inputs = cogview_inputs()
    del inputs["original_size"]
    inputs["prior_token_id"] = torch.zeros(B, 16, dtype=torch.long)
    inputs["prior_token_drop"] = torch.zeros(B, 16, dtype=torch.bool)
    return model, inputs


@denoiser("PRXTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=4, patch_size=2, context_in_dim=CONTEXT, hidden_size=D, num_heads=HEADS, depth=2, axes_dim=[4, 4]
    )
    return model, {"hidden_states": noise(B, 4, 8, 8), "timestep": sigmas(), "encoder_hidden_states": tokens()}


@denoiser("OmniGenTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=4,
        patch_size=2,
        hidden_size=D,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=64,
        num_layers=2,
        pad_token_id=0,
        vocab_size=32,
        max_position_embeddings=256,
        pos_embed_max_size=16,
        time_step_dim=16,
        rope_scaling={"long_factor": [1.0] * (HEAD_DIM // 2), "short_factor": [1.0] * (HEAD_DIM // 2)},
    )
    length = TEXT + 1 + 16
    inputs = {
        "hidden_states": noise(B, 4, 8, 8),
        "timestep": sigmas(),
        "input_ids": torch.ones(B, TEXT, dtype=torch.long),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(B, length, length),
        "position_ids": torch.arange(length).expand(B, -1),
    }
    return model, inputs


@denoiser("ErnieImageTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        hidden_size=D,
        num_attention_heads=HEADS,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=4,
        out_channels=4,
        patch_size=1,
        text_in_dim=CONTEXT,
        rope_axes_dim=(4, 2, 2),
    )
    inputs = {
        "hidden_states": noise(B, 4, 4, 4),
        "timestep": sigmas(),
        "text_bth": tokens(),
        "text_lens": torch.full((B,), TEXT),
    }
    return model, inputs


@denoiser("Ideogram4Transformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=8,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        intermediate_size=64,
        adaln_dim=16,
        llm_features_dim=CONTEXT,
        mrope_section=(2, 1, 1),
    )
    length = TEXT + 16
    inputs = {
        "hidden_states": noise(B, length, 8),
        "timestep": sigmas(),
        "encoder_hidden_states": tokens(length),
        "position_ids": torch.zeros(B, length, 3, dtype=torch.long),
        "segment_ids": torch.zeros(B, length, dtype=torch.long),
        "indicator": torch.tensor([[3] * TEXT + [2] * 16] * B),
    }
    return model, inputs


@denoiser("Krea2Transformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=8,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=CONTEXT,
        num_text_layers=3,
        text_num_attention_heads=3,
        text_num_key_value_heads=3,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    inputs = {
        "hidden_states": noise(B, 16, 8),
        "encoder_hidden_states": noise(B, TEXT, 3, CONTEXT),
        "timestep": sigmas(),
        "position_ids": torch.zeros(TEXT + 16, 3),
    }
    return model, inputs


@denoiser("HunyuanImageTransformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=True,
        text_embed_dim=CONTEXT,
        rope_axes_dim=(4, 4),
    )
    inputs = {
        "hidden_states": noise(B, 4, 4, 4),
        "timestep": times().float(),
        "encoder_hidden_states": tokens(),
        "encoder_attention_mask": ones(),
        "guidance": torch.full((B,), 3500.0),
    }
    return model, inputs


@denoiser("PriorTransformer")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=2, embedding_dim=CONTEXT, num_embeddings=TEXT
    )
    inputs = {
        "hidden_states": noise(B, CONTEXT),
        "timestep": times(),
        "proj_embedding": noise(B, CONTEXT),
        "encoder_hidden_states": tokens(),
    }
    return model, inputs


@denoiser("Transformer2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=D,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=CONTEXT,
        use_linear_projection=True,
    )
    return model, {"hidden_states": noise(B, D, 4, 4), "encoder_hidden_states": tokens()}


@denoiser("UVit2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        hidden_size=D,
        cond_embed_dim=POOLED,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=CONTEXT,
        vocab_size=33,
        codebook_size=32,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=64,
        sample_size=4,
    )
    inputs = {
        "input_ids": torch.zeros(B, 4, 4, dtype=torch.long),
        "encoder_hidden_states": tokens(),
        "pooled_text_emb": noise(B, POOLED),
        "micro_conds": torch.ones(B, 5),
    }
    return model, inputs


# -- video transformers ------------------------------------------------------------------------------------------------


def video(frames: int = 2, size: int = 8, channels: int = 4) -> Tensor:
    return noise(B, channels, frames, size, size)


def wan_config(**changes: Any) -> Inputs:
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": CONTEXT,
        "freq_dim": 16,
        "ffn_dim": 64,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return config | changes


def wan_inputs() -> Inputs:
    return {"hidden_states": video(), "timestep": times(), "encoder_hidden_states": tokens()}


def wan_image_inputs() -> Inputs:
    # With an image, the models take the last 512 tokens for the text and what is before them for the image.
    return {"encoder_hidden_states": tokens(512), "encoder_hidden_states_image": noise(B, 3, 16)}


@denoiser("WanTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**wan_config()), wan_inputs()


@denoiser("WanTransformer3DModel-i2v")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(**wan_config(image_dim=16, added_kv_proj_dim=48))
    return model, wan_inputs() | wan_image_inputs()


@denoiser("WanVACETransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(**wan_config(vace_layers=[0, 1], vace_in_channels=8))
    return model, wan_inputs() | {"control_hidden_states": video(channels=8)}


@denoiser("WanAnimateTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        **wan_config(in_channels=12, image_dim=16, added_kv_proj_dim=48),
        latent_channels=4,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    inputs = wan_inputs() | wan_image_inputs()
    inputs |= {
        "hidden_states": video(frames=3, channels=12),
        "pose_hidden_states": video(frames=2),
        "face_pixel_values": noise(B, 3, 5, 16, 16),
    }
    return model, inputs


@denoiser("SkyReelsV2Transformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**wan_config(inject_sample_info=True)), wan_inputs() | {"fps": torch.tensor([0, 1])}


@denoiser("ChronoEditTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**wan_config()), wan_inputs()


@denoiser("AnyFlowTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    inputs = wan_inputs() | {
        "hidden_states": noise(B, 2, 4, 8, 8),
        "timestep": torch.full((B, 2), 7),
        "r_timestep": torch.full((B, 2), 3),
    }
    return cls(**wan_config()), inputs


@denoiser("AnyFlowFARTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(**wan_config(chunk_partition=(1, 1), compressed_patch_size=(1, 4, 4)))
    inputs = wan_inputs() | {
        "hidden_states": noise(B, 2, 4, 8, 8),
        "timestep": torch.full((B, 2), 7),
        "r_timestep": torch.full((B, 2), 3),
        "chunk_partition": (1, 1),
    }
    return model, inputs


@denoiser("HeliosTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        **{k: v for k, v in wan_config().items() if k != "rope_max_seq_len"},
        rope_dim=(4, 4, 4),
    )
    return model, wan_inputs()


@denoiser("LTXVideoTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=D,
        num_layers=2,
        caption_channels=CONTEXT,
    )
    inputs = {
        "hidden_states": noise(B, 2 * 4 * 4, 4),
        "encoder_hidden_states": tokens(),
        "timestep": times(),
        "encoder_attention_mask": ones(),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }
    return model, inputs


@denoiser("LTX2VideoTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=D,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=CONTEXT,
    )
    inputs = {
        "hidden_states": noise(B, 2 * 4 * 4, 4),
        "audio_hidden_states": noise(B, 6, 4),
        "encoder_hidden_states": tokens(),
        "audio_encoder_hidden_states": tokens(),
        "timestep": times(),
        "encoder_attention_mask": ones(),
        "audio_encoder_attention_mask": ones(),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 6,
    }
    return model, inputs


@denoiser("HunyuanVideoTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**hunyuan_video_config()), hunyuan_video_inputs()


def hunyuan_video_config(**changes: Any) -> Inputs:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": CONTEXT,
        "pooled_projection_dim": POOLED,
        "rope_axes_dim": (4, 2, 2),
    }
    return config | changes


def hunyuan_video_inputs() -> Inputs:
    return {
        "hidden_states": video(),
        "timestep": times(),
        "encoder_hidden_states": tokens(),
        "encoder_attention_mask": ones(),
        "pooled_projections": noise(B, POOLED),
        "guidance": torch.full((B,), 6000.0),
    }


@denoiser("HunyuanVideoTransformer3DModel-i2v")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**hunyuan_video_config(image_condition_type="token_replace")), hunyuan_video_inputs()


@denoiser("HunyuanVideoFramepackTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(**hunyuan_video_config(has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True))
    inputs = hunyuan_video_inputs() | {
        "image_embeds": noise(B, 3, 16),
        "indices_latents": torch.arange(2),
        "latents_clean": video(frames=2),
        "indices_latents_clean": torch.arange(2),
        "latents_history_2x": video(frames=2),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": video(frames=4, size=8),
        "indices_latents_history_4x": torch.arange(4),
    }
    return model, inputs


@denoiser("HunyuanVideo15Transformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=CONTEXT,
        text_embed_2_dim=CONTEXT,
        image_embed_dim=16,
        rope_axes_dim=(4, 2, 2),
    )
    inputs = {
        "hidden_states": video(size=4),
        "timestep": times().float(),
        "encoder_hidden_states": tokens(),
        "encoder_attention_mask": ones().bool(),
        "encoder_hidden_states_2": tokens(),
        "encoder_attention_mask_2": ones().bool(),
        "image_embeds": noise(B, 3, 16),
    }
    return model, inputs


@denoiser("MotifVideoTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=2,
        num_decoder_layers=1,
        text_embed_dim=CONTEXT,
        rope_axes_dim=(4, 2, 2),
    )
    inputs = {
        "hidden_states": video(),
        "timestep": times(),
        "encoder_hidden_states": tokens(),
        "encoder_attention_mask": ones().bool(),
    }
    return model, inputs


@denoiser("CogVideoXTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**cogvideo_config()), cogvideo_inputs()


def cogvideo_config(**changes: Any) -> Inputs:
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 16,
        "text_embed_dim": CONTEXT,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "max_text_seq_length": TEXT,
    }
    return config | changes


def cogvideo_inputs() -> Inputs:
    return {"hidden_states": noise(B, 2, 4, 8, 8), "encoder_hidden_states": tokens(), "timestep": times()}


@denoiser("CogVideoXTransformer3DModel-1.5")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        **cogvideo_config(patch_size_t=2, patch_bias=False, use_rotary_positional_embeddings=True, ofs_embed_dim=16)
    )
    rotary = (noise(16, HEAD_DIM), noise(16, HEAD_DIM))
    return model, cogvideo_inputs() | {"image_rotary_emb": rotary, "ofs": torch.full((B,), 2.0)}


@denoiser("ConsisIDTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        **cogvideo_config(),
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=8,
        LFE_vit_dim=8,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=2,
        LFE_output_dim=D * 2 // 3,
        LFE_ff_mult=2,
        LFE_num_scale=1,
    )
    inputs = cogvideo_inputs() | {"id_cond": noise(B, 8), "id_vit_hidden": [noise(B, 3, 8)]}
    return model, inputs


@denoiser("AllegroTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        num_attention_heads=HEADS,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=8,
        sample_width=8,
        sample_frames=2,
        caption_channels=CONTEXT,
    )
    grid = torch.zeros(1, 2 * 4 * 4, dtype=torch.long)
    inputs = {
        "hidden_states": video(),
        "encoder_hidden_states": tokens()[:, None],
        "timestep": times(),
        "attention_mask": torch.ones(B, 2, 8, 8),
        "encoder_attention_mask": ones(),
        "image_rotary_emb": (((noise(2, 4),) * 2,) * 3, (grid, grid, grid)),
    }
    return model, inputs


@denoiser("LatteTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=D,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=10,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=CONTEXT,
        video_length=2,
    )
    return model, {"hidden_states": video(), "timestep": times(), "encoder_hidden_states": tokens()}


@denoiser("MochiTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        patch_size=2,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        qk_norm="rms_norm",
        text_embed_dim=CONTEXT,
        time_embed_dim=16,
        max_sequence_length=TEXT,
    )
    inputs = {
        "hidden_states": video(),
        "encoder_hidden_states": tokens(),
        "timestep": times(),
        "encoder_attention_mask": ones().bool(),
    }
    return model, inputs


@denoiser("CosmosTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=16,
        num_layers=2,
        text_embed_dim=CONTEXT,
        adaln_lora_dim=12,
        max_size=(4, 16, 16),
        concat_padding_mask=False,
    )
    inputs = {
        "hidden_states": video(),
        "timestep": times(),
        "encoder_hidden_states": tokens(),
        "fps": 24,
    }
    return model, inputs


@denoiser("EasyAnimateTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        num_attention_heads=HEADS,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=8,
        sample_height=8,
        num_layers=2,
        mmdit_layers=2,
        time_embed_dim=16,
        text_embed_dim=CONTEXT,
    )
    return model, {"hidden_states": video(), "timestep": times(), "encoder_hidden_states": tokens()}


@denoiser("JoyImageEditTransformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=4, hidden_size=D, num_attention_heads=HEADS, text_dim=CONTEXT, num_layers=2, rope_dim_list=[4, 2, 2]
    )
    return model, {"hidden_states": video(), "timestep": times(), "encoder_hidden_states": tokens()}


@denoiser("Kandinsky5Transformer3DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=CONTEXT,
        in_text_dim2=POOLED,
        time_dim=16,
        model_dim=D,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 2, 2),
    )
    inputs = {
        "hidden_states": noise(1, 2, 8, 8, 4),
        "encoder_hidden_states": noise(1, TEXT, CONTEXT),
        "timestep": torch.tensor([7.0]),
        "pooled_projections": noise(1, POOLED),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(TEXT),
    }
    return model, inputs


# -- audio -------------------------------------------------------------------------------------------------------------


@denoiser("StableAudioDiTModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        time_proj_dim=16,
        global_states_input_dim=POOLED,
        cross_attention_input_dim=CONTEXT,
    )
    rotary = (noise(17, HEAD_DIM // 2), noise(17, HEAD_DIM // 2))
    inputs = {
        "hidden_states": noise(B, 4, 16),
        "timestep": sigmas(),
        "encoder_hidden_states": tokens(),
        "global_hidden_states": noise(B, 1, POOLED),
        "rotary_embedding": rotary,
    }
    return model, inputs


@denoiser("AceStepTransformer1DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        hidden_size=D,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        encoder_hidden_size=CONTEXT,
    )
    inputs = {
        "hidden_states": noise(B, 16, 4),
        "timestep": sigmas(),
        "timestep_r": sigmas(),
        "encoder_hidden_states": tokens(),
        "context_latents": noise(B, 16, 8),
    }
    return model, inputs


@denoiser("LongCatAudioDiTTransformer")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(dit_dim=D, dit_depth=2, dit_heads=HEADS, dit_text_dim=CONTEXT, latent_dim=4)
    inputs = {
        "hidden_states": noise(B, 16, 4),
        "encoder_hidden_states": tokens(),
        "encoder_attention_mask": ones().bool(),
        "timestep": sigmas(),
        "attention_mask": ones(16).bool(),
        "latent_cond": noise(B, 16, 4),
    }
    return model, inputs


@denoiser("T5FilmDecoder")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(input_dims=8, targets_length=16, d_model=D, num_layers=2, num_heads=HEADS, d_kv=HEAD_DIM, d_ff=64)
    inputs = {
        "encodings_and_masks": [(tokens(TEXT, D), ones().float())],
        "decoder_input_tokens": noise(B, 16, 8),
        "decoder_noise_time": sigmas(),
    }
    return model, inputs


# -- UNets -------------------------------------------------------------------------------------------------------------

CROSS_2D = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": 4,
}
UP_2D = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}


def image_inputs(channels: int = 4) -> Inputs:
    return {"sample": noise(B, channels, 8, 8), "timestep": times(), "encoder_hidden_states": tokens()}


def size_condition() -> Inputs:
    return {"added_cond_kwargs": {"text_embeds": noise(B, POOLED), "time_ids": torch.full((B, 6), 8.0)}}


SIZE_CONDITION = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": POOLED + 6 * 8,
}


@denoiser("UNet2DConditionModel-sd15")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    return cls(**CROSS_2D, **UP_2D, sample_size=8), image_inputs()


@denoiser("UNet2DConditionModel-sdxl")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(**CROSS_2D, **UP_2D, **SIZE_CONDITION, sample_size=8, use_linear_projection=True)
    return model, image_inputs() | size_condition()


@denoiser("UNet2DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    )
    return model, {"sample": noise(B, 3, 8, 8), "timestep": times()}


@denoiser("UNet1DModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        sample_size=32,
        extra_in_channels=64,
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
        block_out_channels=(32, 32, 64),
    )
    return model, {"sample": noise(B, 2, 32), "timestep": times()}


@denoiser("UNet1DModel-policy")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=6,
        out_channels=6,
        time_embedding_type="positional",
        use_timestep_embedding=True,
        flip_sin_to_cos=False,
        freq_shift=1,
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
        mid_block_type="MidResTemporalBlock1D",
        up_block_types=("UpResnetBlock1D",),
        out_block_type="OutConv1DBlock",
        act_fn="swish",
        block_out_channels=(16, 32),
        norm_num_groups=8,
    )
    return model, {"sample": noise(B, 6, 16), "timestep": times()}


@denoiser("UNet3DConditionModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=CONTEXT,
        attention_head_dim=8,
    )
    return model, image_inputs() | {"sample": video()}


@denoiser("I2VGenXLUNet")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=CONTEXT,
        attention_head_dim=4,
    )
    inputs = image_inputs() | {
        "sample": video(),
        "fps": torch.full((B,), 16),
        "image_latents": video(),
        "image_embeddings": noise(B, CONTEXT),
    }
    return model, inputs


@denoiser("UNetMotionModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        sample_size=8,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=CONTEXT,
        num_attention_heads=4,
        motion_num_attention_heads=4,
        motion_max_seq_length=4,
    )
    return model, image_inputs() | {"sample": video(), "encoder_hidden_states": noise(B * 2, TEXT, CONTEXT)}


@denoiser("UNetSpatioTemporalConditionModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=CONTEXT,
        num_attention_heads=(2, 4),
        num_frames=2,
    )
    inputs = {
        "sample": noise(B, 2, 8, 8, 8),
        "timestep": times(),
        "encoder_hidden_states": noise(B, 1, CONTEXT),
        "added_time_ids": torch.ones(B, 3),
    }
    return model, inputs


@denoiser("Kandinsky3UNet")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        time_embedding_dim=32,
        groups=4,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(16, 32, 32, 32),
        cross_attention_dim=CONTEXT,
        encoder_hid_dim=16,
    )
    return model, image_inputs() | {"encoder_hidden_states": tokens(TEXT, 16), "encoder_attention_mask": ones()}


@denoiser("StableCascadeUNet")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=32,
        block_out_channels=(16, 32),
        num_attention_heads=(0, 4),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        clip_text_in_channels=CONTEXT,
        clip_text_pooled_in_channels=POOLED,
        clip_image_in_channels=16,
        clip_seq=2,
        kernel_size=3,
        timestep_conditioning_type=("sca", "crp"),
        switch_level=[False],
    )
    inputs = {
        "sample": noise(B, 4, 8, 8),
        "timestep_ratio": sigmas(),
        "clip_text_pooled": noise(B, 1, POOLED),
        "clip_text": tokens(),
        "clip_img": noise(B, 1, 16),
    }
    return model, inputs


@denoiser("DreamLiteUNetModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        sample_size=8,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=CONTEXT,
        attention_head_dim=4,
        use_linear_projection=True,
        ff_mult=2,
    )
    return model, image_inputs()


# -- ControlNets of UNets ----------------------------------------------------------------------------------------------


def image_condition() -> Inputs:
    return {"controlnet_cond": torch.rand(B, 3, 64, 64)}


CONDITION_CHANNELS = (8, 8, 8, 8)


@denoiser("ControlNetModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(**CROSS_2D, conditioning_embedding_out_channels=CONDITION_CHANNELS)
    return model, image_inputs() | image_condition()


@denoiser("ControlNetModel-sdxl")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        **CROSS_2D, **SIZE_CONDITION, conditioning_embedding_out_channels=CONDITION_CHANNELS, use_linear_projection=True
    )
    return model, image_inputs() | image_condition() | size_condition()


@denoiser("ControlNetUnionModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        **CROSS_2D,
        **SIZE_CONDITION,
        conditioning_embedding_out_channels=CONDITION_CHANNELS,
        num_trans_channel=16,
        num_trans_head=2,
        num_proj_channel=16,
    )
    inputs = image_inputs() | size_condition()
    inputs["controlnet_cond"] = [torch.rand(B, 3, 64, 64)]
    inputs["control_type"] = torch.tensor([[1.0, 0, 0, 0, 0, 0]] * B)
    inputs["control_type_idx"] = [0]
    return model, inputs


@denoiser("SparseControlNetModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        **CROSS_2D | {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion")},
        conditioning_channels=4,
        motion_num_attention_heads=4,
        motion_max_seq_length=4,
    )
    inputs = image_inputs() | {
        "sample": video(),
        "encoder_hidden_states": noise(B * 2, TEXT, CONTEXT),
        "controlnet_cond": video(),
        "conditioning_mask": torch.ones(B, 1, 2, 8, 8),
    }
    return model, inputs


@denoiser("UNetControlNetXSModel")
def _(cls: type) -> tuple[nn.Module, Inputs]:
    model = cls(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        norm_num_groups=4,
        cross_attention_dim=CONTEXT,
        num_attention_heads=2,
        ctrl_conditioning_embedding_out_channels=CONDITION_CHANNELS,
        ctrl_block_out_channels=(8, 8),
        ctrl_num_attention_heads=2,
        ctrl_max_norm_num_groups=4,
    )
    return model, image_inputs() | image_condition()
