"""Untrained pipelines, small enough to run in milliseconds, with the same classes as the real ones."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = "a large small red green blue circle square triangle left right of above below on".split()


def tiny_tokenizer(length: int = 16) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<start>", "<end>", "<unknown>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
        pad_token="<end>",
        model_max_length=length,
    )


def tiny_text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        shift_factor=0.0,
    )


def tiny_sd3_transformer(seed: int = 0, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """SD3.5's features in small: joint blocks, one dual-attention block, RMS-normed queries and keys."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return (transformer if dtype is torch.float32 else transformer.to(dtype)).eval()


def tiny_sd3_pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3 pipeline without T5; 16 x 16 images, about 0.1 M parameters."""
    torch.manual_seed(seed)
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_sd3_transformer(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=CLIPTextModelWithProjection(tiny_text_config()).eval(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config()).eval(),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_unet(seed: int = 0, text_channels: int = 16) -> UNet2DConditionModel:
    """A UNet with skip connections and one level of attention, for (B, 4, 8, 8) and text (B, T, text_channels)."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_channels,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def tiny_sd_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion 1 pipeline: its UNet gets sample and timestep as positional arguments."""
    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        unet=tiny_unet(seed, text_channels=32),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config()).eval(),
        tokenizer=tiny_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_controlnet_pipeline(seed: int = 0) -> StableDiffusionControlNetPipeline:
    """The same with a ControlNet, whose output convolutions are random where a fresh one's are zero."""
    base = tiny_sd_pipeline(seed)
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 8)).eval()
    torch.manual_seed(seed)
    for layer in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.3)
    pipeline = StableDiffusionControlNetPipeline(
        **base.components, controlnet=controlnet, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sdxl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL pipeline: two text encoders, sizes and pooled text added to the time embedding."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=1,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        norm_num_groups=4,
    ).eval()
    pipeline = StableDiffusionXLPipeline(
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config()).eval(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config()).eval(),
        tokenizer_2=tiny_tokenizer(),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux_pipeline(seed: int = 0) -> FluxPipeline:
    """A FLUX.1 pipeline: CLIP and T5, one double and two single blocks."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    text = T5Config(
        vocab_size=32, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config()).eval(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=T5EncoderModel(text).eval(),
        tokenizer_2=tiny_tokenizer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_wan_pipeline(seed: int = 0, boundary: float = 0.9) -> WanPipeline:
    """A Wan 2.2 pipeline: one transformer for the noisy steps, another one below ``boundary``; two calls a step."""
    torch.manual_seed(seed)

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=16,
            ffn_dim=64,
            num_layers=1,
            rope_max_seq_len=32,
        ).eval()

    text = UMT5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    pipeline = WanPipeline(
        transformer=transformer(),
        transformer_2=transformer(),
        boundary_ratio=boundary,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        text_encoder=UMT5EncoderModel(text).eval(),
        tokenizer=tiny_tokenizer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_qwen_image_pipeline(seed: int = 0) -> QwenImagePipeline:
    """A Qwen-Image pipeline: Qwen2.5-VL as text encoder, two calls a step for guidance, images of 16 x 16 and more."""
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text = {
        **sizes,
        "vocab_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3], "rope_type": "default"},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, bos_token_id=0, eos_token_id=1)
    pipeline = QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tiny_tokenizer(length=1058),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
