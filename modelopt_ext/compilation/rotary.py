"""Rotary embeddings (arXiv 2104.09864) without masks: :func:`turn_pairs`.

With the norm before it, the rotation is the largest kernel of what Linears and attention leave of a step of FLUX.
Models write it as ``stack((-x[1], x[0]))``, and the compiler makes a kernel of that in which every output computes
both, masked, with loads that can't be joined. A reversal of each pair with a change of sign is the same, bit for bit,
with half the instructions.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten, prims = torch.ops.aten, torch.ops.prims


def turn_pairs(graph: fx.Graph) -> None:
    """Rewrite rotations of channels in a graph of ATen operators, in place.

    Two forms are found, both with x cut in two along one dimension: ``stack((-x[1], x[0]))`` (neighbours are a pair, as
    in FLUX) and ``cat((-x[1], x[0]))`` (so are the halves of a head, as in CogView4; where sizes are known).
    """
    found = [(node, pair) for node in graph.nodes if (pair := _rotated(node)) is not None]
    for node, (source, dim) in found:
        with graph.inserting_before(node):
            turned = _turned(graph, source, dim)
            if _value(node).dim() != _value(source).dim():
                turned = graph.call_function(aten.reshape.default, (turned, list(_value(node).shape)))
        node.replace_all_uses_with(turned)
    if found:
        graph.eliminate_dead_code()


def _rotated(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The tensor whose two parts along a dimension a node puts together as (-second, first), and the dimension."""
    if not _is(node, aten.cat.default):
        return None
    parts: Any = node.args[0]
    dim = _dimension(node, node, default=0)
    if all(_is(part, aten.unsqueeze.default) and _dimension(part, part) == dim for part in parts):
        parts = [part.args[0] for part in parts]
    if len(parts) != 2 or not _is(parts[0], aten.neg.default):
        return None
    second, first = _part(parts[0].args[0]), _part(parts[1])
    if first is None or second is None or first[0] is not second[0]:
        return None
    halves = _value(node).dim() != _value(first[0]).dim()
    if halves and not all(isinstance(size, int) for size in _value(node).shape):
        return None
    return (first[0], dim) if (first[1:], second[1:]) == ((dim, 0), (dim, 1)) else None


def _part(node: Any) -> tuple[fx.Node, int, int] | None:
    """The tensor of two parts, the dimension and the index that a node selects."""
    if _is(node, aten.select.int):
        source, index = node.args[0], node.args[2]
        dim = _dimension(node, source)
    elif _is(node, operator.getitem) and _is(node.args[0], aten.unbind.int):
        source, index = node.args[0].args[0], node.args[1]
        dim = _dimension(node.args[0], source, default=0)
    else:
        return None
    return (source, dim, index % 2) if _value(source).shape[dim] == 2 else None


def _turned(graph: fx.Graph, source: fx.Node, dim: int) -> fx.Node:
    """``(-x[1], x[0])`` along a dimension of two, without taking it apart."""
    x = _value(source)
    kind: dict[str, Any] = {"dtype": torch.int64, "device": x.device, "requires_grad": False}
    index = graph.call_function(prims.iota.default, (2,), {"start": 0, "step": 1, **kind})
    index = graph.call_function(aten.reshape.default, (index, [2] + [1] * (x.dim() - dim - 1)))
    is_first = graph.call_function(aten.eq.Scalar, (index, 0))
    reverse = graph.call_function(prims.rev.default, (source, [dim]))
    minus = graph.call_function(aten.neg.default, (reverse,))
    return graph.call_function(aten.where.self, (is_first, minus, reverse))


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _value(node: fx.Node) -> torch.Tensor:
    """The fake tensor that stands for a node's result."""
    value: torch.Tensor = node.meta["val"]
    return value


def _dimension(node: fx.Node, of: fx.Node, default: int | None = None) -> int:
    """The dimension, by its second argument, that a node names of a tensor, counted from the front."""
    named: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", default)
    return int(named) % _value(of).dim()
