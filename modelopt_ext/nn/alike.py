"""The same tensors in the same places of repeated blocks, so that blocks compiled one by one are compiled once.

``torch.compile`` of a block (diffusers' ``compile_repeated_blocks``) compiles anew for every block whose Linears have
other tensors. Calibration leaves shift and smoothing out where they bring nothing, which differs from block to block.
A shift by zero and a product with one change no number, and cost nothing beside the rounding that they are fused with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from .packed import PackedLinear


def make_alike(model: nn.Module) -> None:
    """Give packed Linears at one place of a model's repeated blocks the same optional tensors, in place.

    Blocks are the children of a ``ModuleList`` of one class, a place is a name in the block. Linears without a bias, or
    with other groups of outputs than the others at their place, are left alone.
    """
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList) and len({type(block) for block in blocks}) == 1:
            places: dict[str, list[PackedLinear]] = defaultdict(list)
            for block in blocks:
                for name, module in block.named_modules():
                    if isinstance(module, PackedLinear):
                        places[name].append(module)
            for layers in places.values():
                _equip(layers)


def _equip(layers: Sequence[PackedLinear]) -> None:
    if len({(layer.bias is None, layer.spec.layout.out_groups) for layer in layers}) > 1 or layers[0].bias is None:
        return
    if any(layer.shift is not None for layer in layers):
        for layer in _without(layers, "shift"):
            layer.shift = torch.zeros(layer.in_features, dtype=torch.float32, device=layer.weight.device)
            layer.spec = replace(layer.spec, shift=True)
    if any(layer.inverse_smoothing is not None for layer in layers):
        for layer in _without(layers, "inverse_smoothing"):
            groups = len(layer.spec.layout.out_groups)
            shape = (groups, layer.in_features)
            layer.inverse_smoothing = torch.ones(shape, dtype=torch.float32, device=layer.weight.device)
            layer.spec = replace(layer.spec, smoothing=True)


def _without(layers: Iterable[PackedLinear], name: str) -> list[PackedLinear]:
    return [layer for layer in layers if getattr(layer, name) is None]
