"""What Inductor makes of ``segquant::codes``: the operations that it stands for, without the way through the compiler.

Rounding takes twenty operations a Linear, each of which the compiler would trace, functionalize, decompose, propagate
and match, in models of hundreds of Linears that round alike. They are traced once for each kind of rounding here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import ir
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from .rounding import plain_codes

# By all that it depends on.
_TRACED: dict[tuple[Any, ...], fx.GraphModule] = {}


def register(operator: torch._ops.OpOverload) -> None:
    """Teach Inductor the operator."""

    @register_lowering(operator, type_promotion_kind=None)
    def _(*boxes: Any) -> Any:
        # The tensors that stand for them in the graph know their sizes and strides.
        values = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in _arguments()]
        tensors = [box for box, value in zip(boxes, values, strict=True) if isinstance(value, Tensor)]
        return _lowered(_traced(values), tensors)


def _arguments() -> Sequence[Any]:
    return V.graph.current_node.args


def _traced(values: Sequence[Any]) -> fx.GraphModule:
    """The operator's operations on its tensor arguments, in a graph of what Inductor has lowerings for."""
    key = tuple(
        (value.dtype, value.device, value.shape, value.stride()) if isinstance(value, Tensor) else str(value)
        for value in values
    )
    if key not in _TRACED:
        places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]

        def codes(*tensors: Tensor) -> Tensor:
            given = list(values)
            for place, tensor in zip(places, tensors, strict=True):
                given[place] = tensor
            return plain_codes(*given)

        with V.fake_mode, torch.no_grad():
            trace = make_fx(codes, decomposition_table=select_decomp_table())
            _TRACED[key] = trace(*(values[place] for place in places))
        _TRACED[key].graph.eliminate_dead_code()
    return _TRACED[key]


def _lowered(graph: fx.GraphModule, boxes: Sequence[Any]) -> Any:
    """The graph's output by Inductor's lowerings, with the choices of what to write to memory that it makes itself."""
    inputs, results = iter(boxes), dict[fx.Node, Any]()
    for node in graph.graph.nodes:
        if node.op == "output":
            return results[node.args[0]]
        if node.op == "placeholder":
            results[node] = next(inputs)
            continue
        arguments, named = fx.map_arg((node.args, node.kwargs), results.__getitem__)
        result = lowerings[node.target](*arguments, **named)
        if isinstance(result, ir.TensorBox):
            if len(node.users) > 1:
                result.mark_reuse(len(node.users))
            if result.has_exceeded_max_reads():
                result.realize_hint()
        results[node] = result
    raise AssertionError("a graph without an output")
