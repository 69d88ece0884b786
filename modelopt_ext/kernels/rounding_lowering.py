"""What Inductor makes of ``segquant::codes`` and ``codes_of_signs``: the operations that they stand for.

Rounding takes twenty operations a Linear, each of which the compiler would trace, functionalize, decompose, propagate
and match, in models of hundreds of Linears that round alike. Here they are traced once for each kind of rounding; the
kernels are the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import ir
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from . import rounding

# By the operator, and by all that it depends on.
_TRACED: dict[tuple[Any, ...], fx.GraphModule] = {}


def register() -> None:
    """Teach Inductor both operators."""
    _register(torch.ops.segquant.codes.default, rounding.plain_codes)
    _register(torch.ops.segquant.codes_of_signs.default, rounding.plain_codes_of_signs)


def _register(overload: torch._ops.OpOverload, plain: Callable[..., Any]) -> None:
    @register_lowering(overload, type_promotion_kind=None)
    def _(*boxes: Any) -> Any:
        # The tensors that stand for them in the graph know their sizes and strides.
        given = V.graph.current_node.args
        values = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in given]
        tensors = [box for box, value in zip(boxes, values, strict=True) if isinstance(value, Tensor)]
        return _lowered(_traced(plain, values), tensors)


def _traced(plain: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule:
    """The operations of an operator on its tensor arguments, in a graph of what Inductor has lowerings for."""
    described = (
        (value.dtype, value.device, value.shape, value.stride()) if isinstance(value, Tensor) else str(value)
        for value in values
    )
    key = plain.__name__, *described
    if key not in _TRACED:
        places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]

        def codes(*tensors: Tensor) -> Any:
            given = list(values)
            for place, tensor in zip(places, tensors, strict=True):
                given[place] = tensor
            return plain(*given)

        with V.fake_mode, torch.no_grad():
            trace = make_fx(codes, decomposition_table=select_decomp_table())
            _TRACED[key] = trace(*(values[place] for place in places))
        _TRACED[key].graph.eliminate_dead_code()
    return _TRACED[key]


def _lowered(graph: fx.GraphModule, boxes: Sequence[Any]) -> Any:
    """What a graph gives by Inductor's lowerings, with the choices of what to write to memory that it makes itself."""
    inputs, results = iter(boxes), dict[fx.Node, Any]()
    for node in graph.graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], results.__getitem__)
        if node.op == "placeholder":
            results[node] = next(inputs)
            continue
        arguments, named = fx.map_arg((node.args, node.kwargs), results.__getitem__)
        if node.target is operator.getitem:
            results[node] = operator.getitem(*arguments)
            continue
        result = lowerings[node.target](*arguments, **named)
        if isinstance(result, ir.TensorBox):
            if len(node.users) > 1:
                result.mark_reuse(len(node.users))
            if result.has_exceeded_max_reads():
                result.realize_hint()
        results[node] = result
    raise AssertionError("a graph without an output")
