"""Inputs for one forward of a model on the meta device, made from its config alone.

Only shapes matter: the forward shows which channels belong together, no number of it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_TOKENS = 8

Inputs = dict[str, Any]


def forward_once(model: nn.Module) -> Callable[[nn.Module], object]:
    """A forward loop of one call, on inputs that fit the model's config.

    Args:
        model: a diffusers denoiser or transformers text encoder, all of it on the meta device.

    Raises:
        ValueError: nobody knows inputs for this class.
    """
    from modelopt_ext.calibrate.generated_inputs import generated_forward_loop

    make = next((_MAKERS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in _MAKERS), None)
    if make is None and getattr(model, "main_input_name", None) == "input_ids":
        make = _token_inputs
    if make is None:
        return generated_forward_loop(model)
    inputs = make(model)

    def forward_loop(module: nn.Module) -> None:
        with torch.no_grad():
            module(**inputs)

    return forward_loop


def _empty(model: nn.Module, *shape: int) -> Tensor:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.empty(shape, dtype=dtype, device="meta")


def _unet(model: Any) -> Inputs:
    config = model.config
    size = 2 ** len(config.block_out_channels)
    width = config.cross_attention_dim
    inputs: Inputs = {
        "sample": _empty(model, 1, config.in_channels, size, size),
        "timestep": torch.empty(1, dtype=torch.long, device="meta"),
        "encoder_hidden_states": _empty(model, 1, _TOKENS, width if isinstance(width, int) else max(width)),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": _empty(model, 1, pooled), "time_ids": _empty(model, 1, 6)}
    elif config.addition_embed_type is not None or config.class_embed_type is not None:
        raise ValueError(f"{type(model).__name__} with {config.addition_embed_type} or class embeddings")
    return inputs


def _pixart(model: Any) -> Inputs:
    config = model.config
    sizes = model.use_additional_conditions
    return {
        "hidden_states": _empty(model, 1, config.in_channels, 4 * config.patch_size, 4 * config.patch_size),
        "encoder_hidden_states": _empty(model, 1, _TOKENS, config.caption_channels),
        "timestep": torch.empty(1, dtype=torch.long, device="meta"),
        "added_cond_kwargs": {
            "resolution": _empty(model, 1, 2) if sizes else None,
            "aspect_ratio": _empty(model, 1, 1) if sizes else None,
        },
    }


def _sana(model: Any) -> Inputs:
    config = model.config
    inputs: Inputs = {
        "hidden_states": _empty(model, 1, config.in_channels, 4 * config.patch_size, 4 * config.patch_size),
        "encoder_hidden_states": _empty(model, 1, _TOKENS, config.caption_channels),
        "timestep": torch.empty(1, dtype=torch.long, device="meta"),
    }
    if getattr(config, "guidance_embeds", False):
        inputs["guidance"] = _empty(model, 1)
    return inputs


def _token_inputs(model: Any) -> Inputs:
    positions = getattr(model.config, "max_position_embeddings", None) or _TOKENS
    return {"input_ids": torch.empty(1, min(_TOKENS, positions), dtype=torch.long, device="meta")}


_MAKERS: dict[str, Callable[[Any], Inputs]] = {
    "UNet2DConditionModel": _unet,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _sana,
}
