"""Which Linears are solved together when calibration goes block by block, and in what order.

A stage is a run of Linears (and convolutions), consecutive in the order of their first call, that belong to the same
block, an item of an outermost ``nn.ModuleList``. What runs outside of any block (before the first one, between two,
after the last) makes up stages of its own. All layers of a stage are solved at once: each reads what the quantized
stages before it and the unquantized layers of its own stage give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Stage:
    """Layers that are solved together.

    Attributes:
        name: of the block, or of the first layer where there is none.
        layers: their names, in the order of their first call.
    """

    name: str
    layers: tuple[str, ...]


def block_of(model: nn.Module, name: str) -> str | None:
    """The item of the outermost ``nn.ModuleList`` that holds the module ``name``; None if there is none.

    >>> block_of(transformer, "transformer_blocks.3.attn.to_q")
    'transformer_blocks.3'
    """
    parts = name.split(".")
    module = model
    for depth, part in enumerate(parts):
        if isinstance(module, nn.ModuleList):
            return ".".join(parts[: depth + 1])
        module = module.get_submodule(part)
    return None


def stages_of(model: nn.Module, called: Sequence[str]) -> list[Stage]:
    """Cut the layers of a model into stages.

    Args:
        model: the model.
        called: names of its layers in the order of their first call.
    """
    runs: list[tuple[str | None, list[str]]] = []
    for name in called:
        block = block_of(model, name)
        if not runs or runs[-1][0] != block:
            runs.append((block, []))
        runs[-1][1].append(name)
    return [Stage(block or layers[0], tuple(layers)) for block, layers in runs]
