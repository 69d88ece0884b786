"""Static scales of activations for E4M3 products, all by one kernel: :func:`spread_together`.

The product with a scale for each output takes one for each row, too, and so a static scale is repeated. The compiler
launches a kernel for each product's: some 300 in a step of FLUX, a microsecond or two of work each and as much of
waiting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .. import kernels  # noqa: F401 (registers the operator)

aten, prims = torch.ops.aten, torch.ops.prims

# They take scales for each row.
PRODUCTS = (aten._scaled_mm.default, torch.ops.segquant.scaled_mm.default)
# Scales that one kernel chooses from for each value that it writes.
TOGETHER = 8
# Rows start at multiples of 128 bytes.
MULTIPLE = 32


def spread_together(graph: fx.Graph) -> None:
    """Repeat the scales that products of E4M3 codes get in a graph of ATen operators together, in place."""
    by_device: dict[torch.device, list[fx.Node]] = {}
    for node in graph.nodes:
        if _is_spread_scale(node):
            by_device.setdefault(node.meta["val"].device, []).append(node)
    parts = [found[at : at + TOGETHER] for found in by_device.values() for at in range(0, len(found), TOGETHER)]
    for part in parts:
        if len(part) > 1:
            _spread(graph, part)
    if parts:
        graph.eliminate_dead_code()


def _is_spread_scale(node: fx.Node) -> bool:
    """Whether a node is one number, of the graph's inputs, copied to every row for products of codes."""
    if node.target is not aten.clone.default or not all(user.target in PRODUCTS for user in node.users):
        return False
    expand: Any = node.args[0]
    if expand.target is not aten.expand.default:
        return False
    scale, rows = expand.args[0], node.meta["val"].shape
    if scale.meta["val"].numel() != 1 or len(rows) != 2 or not isinstance(rows[0], int) or rows[1] != 1:
        return False
    return scale.op == "placeholder" or all(source.op == "placeholder" for source in scale.all_input_nodes)


def _spread(graph: fx.Graph, copies: list[fx.Node]) -> None:
    """Replace copies of scales by columns of one tensor, a row for each, that follows the graph's inputs."""
    most = max(copy.meta["val"].shape[0] for copy in copies)
    width = -(-most // MULTIPLE) * MULTIPLE
    count, device = len(copies), copies[0].meta["val"].device
    after_inputs = [node for node in graph.nodes if node.op == "placeholder"][-1].next
    with graph.inserting_before(after_inputs):
        scales = []
        for copy in copies:
            expand: Any = copy.args[0]
            scale = expand.args[0]
            here = scale if scale.op == "placeholder" else graph.node_copy(scale)
            scales.append(graph.call_function(aten.reshape.default, (here, [1, 1])))
        # In full size: the compiler would make a kernel of its own of what is repeated afterwards.
        kind = {"start": 0, "step": 1, "dtype": torch.int64, "device": device, "requires_grad": False}
        row = graph.call_function(prims.iota.default, (count,), kind)
        row = graph.call_function(aten.reshape.default, (row, [count, 1]))
        spread = graph.call_function(aten.expand.default, (scales[0], [count, width]))
        for index, scale in enumerate(scales[1:], start=1):
            is_here = graph.call_function(aten.eq.Scalar, (row, index))
            spread = graph.call_function(aten.where.self, (is_here, scale, spread))
    for index, copy in enumerate(copies):
        rows = copy.meta["val"].shape[0]
        with graph.inserting_before(copy):
            # Views that the compiler knows would be computed again, each by itself.
            part = graph.call_function(aten.as_strided.default, (spread, [rows, 1], [1, 1], index * width))
        copy.replace_all_uses_with(part)
