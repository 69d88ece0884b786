"""Which models of a pipeline are meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["GROUPS", "choose_components", "denoisers_of", "family_of", "modules_of"]

GROUPS = {
    "denoiser": re.compile(r"(transformer|unet|prior|decoder)(_\d+)?"),
    "text_encoders": re.compile(r"text_encoder(_\d+)?"),
    "controlnet": re.compile(r"controlnet(_\d+)?"),
}
"""Names for several components: all of a pipeline that match the pattern are meant."""


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """A pipeline's models by component.

    Raises:
        ValueError: this is no pipeline.
    """
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        raise ValueError(f"expected a diffusers pipeline, got {type(pipeline).__name__}")
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def denoisers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The models that a pipeline calls at every timestep: ``transformer``, ``transformer_2``, ``unet``, ..."""
    return {name: part for name, part in modules_of(pipeline).items() if GROUPS["denoiser"].fullmatch(name)}


def family_of(name: str) -> str:
    """A component's name without its number: ``transformer`` and ``transformer_2`` work on one trajectory."""
    return re.sub(r"_\d+$", "", name)


def choose_components(pipeline: Any, names: str | Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The components of some names.

    Args:
        pipeline: a diffusers pipeline.
        names: component names, or the groups ``denoiser``, ``text_encoders``, ``controlnet``; by default all denoisers.

    Returns:
        Models by component name, at least one.

    Raises:
        ValueError: the pipeline has no such model; those it has are named.
    """
    modules = modules_of(pipeline)
    asked = (names,) if isinstance(names, str) else ("denoiser",) if names is None else tuple(names)
    chosen: dict[str, nn.Module] = {}
    for name in asked:
        found = {name: modules[name]} if name in modules else {}
        if not found and name in GROUPS:
            found = {key: part for key, part in modules.items() if GROUPS[name].fullmatch(key)}
        if not found:
            raise ValueError(
                f"{type(pipeline).__name__} has no {name}; its models are {', '.join(sorted(modules)) or 'none'}: "
                "choose components among them"
            )
        chosen |= found
    if not chosen:
        raise ValueError("no components were named: leave them out for the denoiser, or name at least one")
    return chosen
