"""The parts of the shapes pipelines, untrained: tokenizers, text encoders, VAE, denoisers, and how they are saved.

Every part is a stock diffusers or transformers class in a small size, so that
``StableDiffusion3Pipeline.from_pretrained`` and its FLUX and SDXL relatives load the result without any code of ours.
All three share the text encoders and the VAE.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shapes
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLIP_TOKENS = 32  # context of both CLIP encoders
T5_WIDTH = 192  # also the width that the CLIP states are padded to
CLIP_WIDTHS = (64, 96)  # hidden and projection width of the two CLIP encoders
NEIGHBOURS = (-1, 1, -2, -3, 2, 0)  # words from a word to the one that a head of T5 begins by looking at
NEIGHBOUR_BIAS = 6.0  # attention logits: e^6 outweighs the other tokens of a caption
LATENT_CHANNELS = 8
LATENT_SIZE = shapes.CANVAS // 4

_START, _END = "<|startoftext|>", "<|endoftext|>"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers. They are written as files, the oldest form that every release of transformers reads.


def write_clip_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer in which every word of the captions is one token and any other text is bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(shapes.words())
    tokens = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges] + [_START, _END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n", encoding="utf-8"
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": CLIP_TOKENS,
            "bos_token": _START,
            "eos_token": _END,
            "unk_token": _END,
            "pad_token": _END,
        },
    )


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte pair merges, most frequent pair first, until every word is one piece.

    The trainer of the tokenizers library breaks ties by hash order: another vocabulary in every process.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in pieces for pair in itertools.pairwise(word)):
        a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((a, b))
        for word in pieces:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i : i + 2] = [a + b]
                i += 1
    return merges


def write_t5_tokenizer(folder: Path) -> None:
    """Write a Unigram tokenizer in which every word of the captions is one token and any other ASCII text is letters.

    T5's tokenizer has no bytes to fall back to in current transformers; a character outside ASCII is ``<unk>``.
    """
    words = [w for w in shapes.words() if w.isalpha()]
    whole = [f"▁{w}" for w in words] + [f"▁{w.capitalize()}" for w in words] + ["sized"]
    letters = ["▁"] + [chr(c) for c in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    seen = set()
    for token, score in [(t, -5.0) for t in whole] + [(t, -10.0) for t in letters]:
        if token not in seen:
            seen.add(token)
            pieces.append((token, score))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    space: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    tokenizer.decoder = decoders.Metaspace(**space)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "T5TokenizerFast",
            "model_max_length": 512,
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "extra_ids": 0,
            "additional_special_tokens": [],
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tokenizers(*, fast: bool = False) -> tuple[CLIPTokenizer | CLIPTokenizerFast, T5TokenizerFast]:
    """Build both tokenizers afresh; ``fast`` for the CLIP tokenizer's faster twin where the host still has two."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_clip_tokenizer(folder / "clip")
        write_t5_tokenizer(folder / "t5")
        clip = CLIPTokenizerFast if fast else CLIPTokenizer
        return clip.from_pretrained(folder / "clip"), T5TokenizerFast.from_pretrained(folder / "t5")


# ---------------------------------------------------------------------------------------------------------------------
# Models


def build_clip(which: int, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """One of the two CLIP text encoders (0: quick GELU, narrow; 1: GELU, wider), initialised at random."""
    width = CLIP_WIDTHS[which]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        max_position_embeddings=CLIP_TOKENS,
        hidden_act=("quick_gelu", "gelu")[which],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_t5(tokenizer: T5TokenizerFast, layers: int = 2, *, neighbours: bool = False) -> T5EncoderModel:
    """The T5 v1.1 encoder (gated GELU), initialised at random.

    With ``neighbours`` each head begins by looking at one neighbour of every word. T5 knows places by the bias of its
    attention alone, which is next to zero at random: every head sees an average of all words, and needs thousands of
    steps to tell "a red circle and a blue square" from "a blue circle and a red square".
    """
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=32,
        d_ff=2 * T5_WIDTH,
        num_layers=layers,
        num_heads=T5_WIDTH // 32,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    t5 = T5EncoderModel(config)
    if neighbours:
        half = config.relative_attention_num_buckets // 2
        with torch.no_grad():
            bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # (buckets, heads)
            for head in range(config.num_heads):
                offset = NEIGHBOURS[head % len(NEIGHBOURS)]
                # Words ahead have the upper half of the buckets; near offsets have a bucket each.
                bias[abs(offset) + (half if offset > 0 else 0), head] += NEIGHBOUR_BIAS
    return t5


def build_vae() -> AutoencoderKL:
    """A KL autoencoder, 4 pixels a latent, no attention and, as in Stable Diffusion 3, no quant convolutions."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=shapes.CANVAS,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )


def build_sd3() -> SD3Transformer2DModel:
    """Stable Diffusion 3.5's transformer: joint blocks, three with dual attention, queries and keys RMS-normalised."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=LATENT_SIZE,
        dual_attention_layers=(0, 1, 2),
        qk_norm="rms_norm",
    )


def build_flux() -> FluxTransformer2DModel:
    """FLUX's transformer without guidance embedding: two double-stream blocks, then four single-stream blocks."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTHS[0],
        guidance_embeds=False,
        axes_dims_rope=(4, 14, 14),
    )


def build_sdxl() -> UNet2DConditionModel:
    """SDXL's UNet: attention below the first level, text and time-id embeddings added to the time embedding."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 3),
        cross_attention_dim=sum(CLIP_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=CLIP_WIDTHS[1] + 6 * 16,
        norm_num_groups=16,
    )


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow with Stable Diffusion 3's shift towards noise."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)


def sdxl_scheduler() -> EulerDiscreteScheduler:
    """SDXL's sampler, with v-prediction and zero terminal signal, so that flat backgrounds get the colour asked for."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines


def without_projection(encoder: CLIPTextModelWithProjection) -> CLIPTextModel:
    """The same encoder as a plain CLIPTextModel: what FLUX and the first encoder of SDXL want."""
    # By way of a file: the releases of transformers name the parameters differently, and translate only on loading.
    with tempfile.TemporaryDirectory() as scratch:
        encoder.save_pretrained(scratch)
        return CLIPTextModel.from_pretrained(scratch).to(encoder.device, encoder.dtype)


def assemble(
    kind: str,
    denoiser: torch.nn.Module,
    vae: AutoencoderKL,
    clips: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
    t5: T5EncoderModel,
) -> DiffusionPipeline:
    """Put the parts together as the stock pipeline of ``kind`` ("sd3", "flux" or "sdxl")."""
    clip_tokenizer, t5_tokenizer = load_tokenizers()
    if kind == "sd3":
        return StableDiffusion3Pipeline(
            transformer=denoiser,
            scheduler=flow_scheduler(),
            vae=vae,
            text_encoder=clips[0],
            tokenizer=clip_tokenizer,
            text_encoder_2=clips[1],
            tokenizer_2=clip_tokenizer,
            text_encoder_3=t5,
            tokenizer_3=t5_tokenizer,
        )
    if kind == "flux":
        return FluxPipeline(
            transformer=denoiser,
            scheduler=flow_scheduler(),
            vae=vae,
            text_encoder=without_projection(clips[0]),
            tokenizer=clip_tokenizer,
            text_encoder_2=t5,
            tokenizer_2=t5_tokenizer,
        )
    if kind == "sdxl":
        return StableDiffusionXLPipeline(
            unet=denoiser,
            scheduler=sdxl_scheduler(),
            vae=vae,
            text_encoder=without_projection(clips[0]),
            tokenizer=clip_tokenizer,
            text_encoder_2=clips[1],
            tokenizer_2=clip_tokenizer,
            add_watermarker=False,
        )
    raise ValueError(f"unknown kind of pipeline {kind!r}: use 'sd3', 'flux' or 'sdxl'")


def save(pipe: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline in half precision so that old and new releases of the hosts load it alike, as float32 by default.

    Releases differ in what they write: the tokenizers' files and class names are replaced by those that all of them
    read, and the text encoders' config asks for float32, which transformers 5 would else take from the file.
    """
    pipe.to(torch.float16)
    pipe.save_pretrained(folder)
    pipe.to(torch.float32)
    index = json.loads((folder / "model_index.json").read_text())
    for part in sorted(p.name for p in folder.iterdir() if p.name.startswith("tokenizer")):
        for file in (folder / part).iterdir():
            file.unlink()
        if "CLIP" in index[part][1]:
            write_clip_tokenizer(folder / part)
            index[part] = ["transformers", "CLIPTokenizer"]
        else:
            write_t5_tokenizer(folder / part)
            index[part] = ["transformers", "T5TokenizerFast"]
    index.pop("_name_or_path", None)
    _write_json(folder / "model_index.json", index)
    for path in sorted(folder.glob("text_encoder*/config.json")):
        config = json.loads(path.read_text())
        config.pop("torch_dtype", None)
        config.pop("_name_or_path", None)
        _write_json(path, config | {"dtype": "float32"})
