"""A dispatch mode that keeps, per live tensor, what is known about its channels.

Every op of the forward runs unchanged; afterwards a rule, chosen once per op from its schema and tags, derives the
facts of the outputs from those of the inputs. Facts live in a weak-keyed dictionary: no tensor is kept alive, and a
tensor without facts costs nothing. A rule that fails makes the op's outputs unknown, with a debug log; it never breaks
the forward.

    rule        ops                                       output side   input side        polarity
    view        views, splits, permutes                   replayed      by op             kept
    same        casts, clones                             kept          kept              kept
    pointwise   all ops tagged torch.Tag.pointwise        joined        union of cuts     by op
    cat, stack                                            over tokens   parts appended    per part
    norm        layer, group, batch, RMS norm             ends          cuts kept         ends
    opaque      the rest: matmul, attention, gather       ends          ends              ends

An op that writes in place renews the facts of the tensor that it is given, not those of other views of the same memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from modelopt_ext.dataflow import activations, axes, channels
from modelopt_ext.dataflow.activations import Form
from modelopt_ext.dataflow.axes import Axes
from modelopt_ext.dataflow.channels import Shadows

logger = logging.getLogger(__name__)

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What is known about one tensor.

    Attributes:
        shadows: the Linear outputs in it (output side).
        axes: the parts along its dims (input side), None if plain.
        token: identity, assigned when first needed; equal tokens mean the very same values.
        form: the tensor as a function of one other, None if it is only a function of itself.
    """

    shadows: Shadows = ()
    axes: Axes | None = None
    token: int = 0
    form: Form | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known."""
        return not self.shadows and self.axes is None and not self.token and self.form is None

    def as_function(self) -> Form | None:
        """The tensor as a function of some tensor, itself included if it has a token."""
        return self.form or (Form(self.token, "root") if self.token else None)


_NOTHING = Facts()


@dataclass(frozen=True, slots=True)
class Op:
    """How an op is treated; computed once per op."""

    name: str
    rule: str
    mutates: bool
    composite: bool


_SAME = {"clone", "_to_copy", "native_dropout"}
_VIEW_COPIES = {"_unsafe_view", "_reshape_copy", "repeat"}
_NORMS = {"native_layer_norm", "_fused_rms_norm", "native_group_norm", "native_batch_norm", "cudnn_batch_norm"}
_MOVES_VALUES = {"transpose", "permute", "t", "repeat", "as_strided", "_conj", "_neg_view"}
"""View ops that may keep the shape and yet change what is where."""

_HEAVY = {"linear", "matmul", "scaled_dot_product_attention", "conv1d", "conv2d", "conv3d", "einsum"}
"""Composite ops that are run whole, not taken apart, since nothing inside them is followed."""


@cache
def classify(func: Any) -> Op:
    """The treatment of an op overload."""
    namespace, _, name = func._schema.name.partition("::")
    mutates = func._schema.is_mutable
    base = name.removesuffix("_") if mutates and not name.startswith("_") else name
    composite = (
        namespace == "aten"
        and base not in _HEAVY
        and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )
    if namespace != "aten":
        rule = "opaque"
    elif base in ("cat", "stack"):
        rule = base
    elif base in _SAME:
        rule = "same"
    elif base in _VIEW_COPIES or func.is_view:
        rule = "view"
    elif base in _NORMS:
        rule = "norm"
    elif base == "copy" or torch.Tag.pointwise in func.tags:
        rule = "pointwise"
    else:
        rule = "opaque"
    if func.is_view and func._overloadname == "dtype":
        rule = "opaque"
    return Op(base, rule, mutates, composite)


class ChannelTracker(TorchDispatchMode):
    """Follows channels from op to op while it is entered.

    Compiled functions run compiled; they and higher-order operators (flex attention) are opaque.

    Args:
        merge_heads: whether merging two dims into the last one counts as joining parts.
        on_cut: called with (calls, piece) whenever an op cuts channels: the Linear calls whose output was cut, and the
            channels [lo, hi) that the piece holds, or None if they are strided.
        on_weight: called with a parameter that an op reads.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        *,
        merge_heads: bool,
        on_cut: Callable[[frozenset[int], tuple[int, int] | None], None],
        on_weight: Callable[[nn.Parameter], None],
    ) -> None:
        super().__init__()
        self.paused = 0
        """While positive, ops run untracked."""
        self._merge_heads = merge_heads
        self._on_cut = on_cut
        self._on_weight = on_weight
        self._facts = WeakTensorKeyDictionary()
        self._tokens: Iterator[int] = count(1)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let ``torch.compile`` work inside: it refuses to run below other dispatch modes."""
        return True

    # -- facts of tensors ---------------------------------------------------------------------------------------------

    def facts(self, tensor: Tensor) -> Facts:
        """What is known about a tensor."""
        return self._facts.get(tensor, _NOTHING)

    def token(self, tensor: Tensor) -> int:
        """The identity of a tensor; views and copies have their own, except views that change nothing."""
        facts = self.facts(tensor)
        if not facts.token:
            facts = replace(facts, token=next(self._tokens))
            self._facts[tensor] = facts
        return facts.token

    def set_output(self, tensor: Tensor, call: int) -> None:
        """Start to follow the output of a Linear call, shape (..., N)."""
        self._facts[tensor] = Facts(shadows=(channels.shadow_of_output(tensor.shape, call),))

    def copy_facts(self, source: Tensor, target: Tensor) -> None:
        """Give a tensor the facts of another of the same shape, as a fake quantizer's output has."""
        if target is not source and target.shape == source.shape:
            self._store(target, replace(self.facts(source), token=0, form=None))

    def reset(self) -> None:
        """Drop all facts, and follow ops again."""
        self._facts = WeakTensorKeyDictionary()
        self.paused = 0

    def _store(self, tensor: Tensor, facts: Facts) -> None:
        if facts.is_empty:
            self._facts.pop(tensor, None)
        else:
            self._facts[tensor] = facts

    # -- dispatch -----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused or not isinstance(func, torch._ops.OpOverload):  # the latter: flex_attention and the like
            return func(*args, **kwargs)
        op = classify(func)
        if op.composite:
            # Under inference_mode composite ops arrive whole: take them apart, as autograd does in the other modes.
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        result = func(*args, **kwargs)
        try:
            for arg in args:
                if type(arg) is nn.Parameter:
                    self._on_weight(arg)
            self._follow(func, op, args, kwargs, result)
        except Exception:
            logger.debug("%s: channels are lost here", func, exc_info=True)
            for tensor in _tensors((result,)):
                self._facts.pop(tensor, None)
        return result

    def _follow(self, func: Any, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if op.rule == "pointwise":
            self._pointwise(op, args, kwargs, result)
        elif op.rule == "view":
            self._view(func, op, args, kwargs, result)
        elif op.rule == "same":
            target = result[0] if isinstance(result, tuple) else result
            source = self._facts.get(args[0])
            if source is not None:
                self._store(target, replace(source, token=0, form=source.as_function()))
        elif op.rule in ("cat", "stack"):
            self._join(op, args, kwargs, result)
        elif op.rule == "norm":
            source = self._facts.get(args[0])
            if source is not None and source.axes is not None:
                untagged = tuple(axis.retagged(lambda tag: "") for axis in source.axes)
                self._store(result[0], Facts(axes=axes.simplified(untagged)))
        elif op.mutates:
            for tensor in _tensors((result,)):
                self._facts.pop(tensor, None)

    def _view(self, func: Any, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        source = self._facts.get(args[0])
        if source is None and not self._merge_heads:
            return
        source = source or _NOTHING
        results: Sequence[Tensor] = result if isinstance(result, list | tuple) else (result,)
        shapes = [tuple(tensor.shape) for tensor in results]
        shadows: list[Shadows] = []
        if source.shadows:
            if op.name == "repeat":
                shadows = [channels.repeat(source.shadows, results[0].shape)]
            else:
                shadows, cuts = channels.replay(func, op.name, source.shadows, args, kwargs)
                for calls, piece in cuts:
                    self._on_cut(calls, piece)
        parts: list[Axes] = []
        if source.axes is not None or self._merge_heads:
            known = source.axes or axes.plain(args[0].shape)
            parts = axes.view(op.name, known, args, kwargs, shapes, self._merge_heads)
        unchanged = len(results) == 1 and shapes[0] == args[0].shape and op.name not in _MOVES_VALUES
        for i, tensor in enumerate(results):
            facts = Facts(
                shadows=shadows[i] if shadows else (),
                axes=axes.simplified(parts[i]) if parts else None,
                token=source.token if unchanged else 0,
                form=source.form if unchanged else None,
            )
            self._store(tensor, facts)

    def _join(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        rank = result.dim() - (op.name == "stack")
        tensors = [tensor for tensor in args[0] if tensor.dim() == rank]  # cat skips empty tensors of shape (0,)
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        dim %= result.dim()
        facts = [self.facts(tensor) for tensor in tensors]
        known = [f.axes or axes.plain(tensor.shape) for f, tensor in zip(facts, tensors, strict=True)]
        if op.name == "stack":
            self._store(result, Facts(axes=axes.simplified(axes.stack(known, dim))))
            return
        shadows = channels.concatenate((f.shadows for f in facts), dim, result.shape)
        self._store(result, Facts(shadows, axes.simplified(axes.concatenate(known, dim))))

    def _pointwise(self, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not isinstance(result, Tensor):
            return
        operands: Sequence[Any] = args[1:2] if op.name == "copy" else args
        tensors = [operand for operand in operands if isinstance(operand, Tensor)]
        numbers = [operand for operand in operands if isinstance(operand, int | float | complex)]
        if not tensors:
            return
        facts = [self._facts.get(tensor, _NOTHING) for tensor in tensors]
        forms = [f.as_function() for f in facts]
        form = self._result_form(op, tensors, forms, numbers)
        made = activations.ACTIVATION_OPS.get(op.name, "")
        if op.name == "mul" and len(tensors) == 2:
            made = activations.self_gated(*forms)
        if form is None and not made and all(f is _NOTHING for f in facts):
            if op.mutates:
                self._facts.pop(result, None)
            return
        shadows: Shadows = ()
        if any(f.shadows for f in facts):
            pairs = ((f.shadows, tensor.shape) for f, tensor in zip(facts, tensors, strict=True))
            shadows = channels.broadcast(pairs, result.shape)
        parts: Axes | None = None
        if made or any(f.axes is not None for f in facts):
            gates = [activations.is_gate(f) for f in forms]
            known = [f.axes or axes.plain(tensor.shape) for f, tensor in zip(facts, tensors, strict=True)]

            def tag_of(tags: Sequence[str]) -> str:
                return made or activations.tag_of(op.name, tags, gates, numbers)

            parts = axes.simplified(axes.broadcast(known, result.shape, tag_of))
        self._store(result, Facts(shadows, parts, form=form))

    def _result_form(self, op: Op, tensors: list[Tensor], forms: list[Form | None], numbers: list[Any]) -> Form | None:
        """The form of a pointwise result; a tensor becomes a root where an activation may start."""
        if op.mutates or op.name not in activations.FOLLOWED_OPS:
            return None
        if len(tensors) == 1:
            return activations.form_of(op.name, [forms[0] or Form(self.token(tensors[0]), "root")], numbers)
        known = [form for form in forms if form is not None]
        return activations.form_of(op.name, known, numbers) if len(known) == len(forms) else None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
