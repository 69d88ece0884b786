"""Record one forward of a model and make its segment plan.

    with DataflowRecorder(model) as recorder:
        model(**inputs)
    plan = recorder.plan()

Hooks around every ``nn.Linear`` read the parts of its input and start to follow its output; inside a Linear nothing is
followed, so quantized and segmented Linears, LoRA bases and offloaded weights look like plain ones. The forward itself
runs unchanged, in the caller's grad, inference and autocast modes. Source of the method: SegQuant, arXiv 2507.14811,
section on semantics-aware segments, done there on a traced graph; watching a forward needs no graph.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from modelopt_ext.dataflow import axes, channels
from modelopt_ext.dataflow.axes import Axis
from modelopt_ext.dataflow.tracker import ChannelTracker
from modelopt_ext.plan import READ_OUTSIDE, LinearPlan, SegmentPlan, fold_names

logger = logging.getLogger(__name__)

__all__ = ["DataflowRecorder", "RecordFirstForward", "record"]

_PASS_THROUGH_CLASS = "TensorQuantizer"
"""Modules whose effect is pointwise, whatever ops they run: ModelOpt's fake quantizers."""

MAX_OUT_SEGMENTS = 64
"""Output segments that one Linear may have; an output cut finer than that stays whole, with a note."""

_STRIDED = "the output is cut into strided channels (as by a rotary embedding), which are no segments"


@dataclass
class _LinearCall:
    """What one call of a Linear showed."""

    name: str
    token: int
    axis: Axis
    pieces: set[tuple[int, int]] = field(default_factory=set)
    strided: bool = False


class DataflowRecorder:
    """Context manager that records the forwards of a model run inside it.

    Args:
        model: any module; its Linears and convolutions are recorded by qualified name.
        merge_heads: whether a view that merges two dims into the channels, as after attention, cuts the input at the
            merged parts (one input segment per head).

    The model is left without hooks and torch without modes on exit, whether or not the forward raised. Entering again
    starts a new recording.
    """

    def __init__(self, model: nn.Module, merge_heads: bool = False) -> None:
        self._model = model
        self._linears: dict[str, nn.Linear] = {}
        self._convs: dict[str, _ConvNd] = {}
        self._weights = WeakTensorKeyDictionary()
        self._handles: list[RemovableHandle] = []
        self._tracker = ChannelTracker(merge_heads=merge_heads, on_cut=self._on_cut, on_weight=self._on_weight)
        self._active = False
        self._clear()

    def _clear(self) -> None:
        self._calls: list[_LinearCall] = []
        self._last_call: dict[str, int] = {}
        self._conv_axes: dict[str, list[Axis]] = defaultdict(list)
        self._weights_read_outside: dict[str, None] = {}
        self._running: list[tuple[nn.Module, bool]] = []  # modules whose insides are not followed; is it the outermost?

    def __enter__(self) -> DataflowRecorder:
        try:
            self._install()
            self._start()
        except BaseException:
            self._remove_hooks()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._remove_hooks()

    def _start(self) -> None:
        self._clear()
        self._tracker.reset()
        self._tracker.__enter__()
        self._active = True

    def _stop(self) -> None:
        if self._active:
            self._active = False
            self._tracker.__exit__(None, None, None)
            self._tracker.reset()
            self._running.clear()

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        inside_linear: set[int] = set()
        for name, module in self._model.named_modules():
            if isinstance(module, nn.Linear):
                if not (module.in_features and module.out_features):
                    continue  # nothing to plan in a Linear without channels
                self._linears[name] = module
                if isinstance(weight := getattr(module, "weight", None), Tensor):
                    self._weights[weight] = name
                inside_linear.update(id(child) for child in module.modules() if child is not module)
                self._hook(name, module, self._before_linear, self._after_linear)
            elif isinstance(module, _ConvNd):
                self._convs[name] = module
                self._hook(name, module, self._before_conv, None)
            elif _is_pass_through(module) and id(module) not in inside_linear:
                self._hook(name, module, None, self._after_quantizer)

    def _hook(
        self,
        name: str,
        module: nn.Module,
        before: Callable[[str, Any], None] | None,
        after: Callable[[str, Any, Tensor], None] | None,
    ) -> None:
        def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._active:
                return
            self._running.append((module, not self._tracker.paused))
            self._tracker.paused += 1
            if before is not None:
                self._guarded(name, before, name, _first_input(args, kwargs))

        def post_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # Also called when the module raised (always_call), perhaps in a hook before ours.
            if not self._running or self._running[-1][0] is not module:
                return
            if after is not None and self._running[-1][1] and isinstance(output, Tensor):
                self._guarded(name, after, name, _first_input(args, kwargs), output)
            self._running.pop()
            self._tracker.paused -= 1

        self._handles.append(module.register_forward_pre_hook(pre_hook, with_kwargs=True))
        self._handles.append(module.register_forward_hook(post_hook, with_kwargs=True, always_call=True))

    @staticmethod
    def _guarded(name: str, function: Callable[..., None], *arguments: Any) -> None:
        """Recording never breaks a forward: what fails here is only not recorded."""
        try:
            function(*arguments)
        except Exception:
            logger.debug("%s: a call is not recorded", name, exc_info=True)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_linear(self, name: str, value: Any) -> None:
        features = self._linears[name].in_features
        call = _LinearCall(name, 0, axes.whole(features))
        self._last_call[name] = len(self._calls)
        self._calls.append(call)
        # A Linear inside another one is part of that one's arithmetic: nothing is known about its input.
        if isinstance(value, Tensor) and self._running[-1][1]:
            call.token = self._tracker.token(value)
            facts = self._tracker.facts(value)
            if facts.axes and facts.axes[-1].size == features:
                call.axis = facts.axes[-1]

    def _after_linear(self, name: str, value: Any, output: Tensor) -> None:
        if output.dim() and output.shape[-1] == self._linears[name].out_features:
            self._tracker.set_output(output, self._last_call[name])

    def _before_conv(self, name: str, value: Any) -> None:
        module = self._convs[name]
        axis = axes.whole(module.in_channels)
        if isinstance(value, Tensor):
            facts = self._tracker.facts(value)
            dim = value.dim() - 1 - len(module.kernel_size)
            if facts.axes and 0 <= dim < len(facts.axes) and facts.axes[dim].size == module.in_channels:
                axis = facts.axes[dim]
        self._conv_axes[name].append(axis)

    def _after_quantizer(self, name: str, value: Any, output: Tensor) -> None:
        if isinstance(value, Tensor):
            self._tracker.copy_facts(value, output)

    # -- what the tracker reports -------------------------------------------------------------------------------------

    def _on_cut(self, calls: frozenset[int], piece: tuple[int, int] | None) -> None:
        for call in calls:
            if piece is None:
                self._calls[call].strided = True
            else:
                self._calls[call].pieces.add(piece)

    def _on_weight(self, parameter: nn.Parameter) -> None:
        name = self._weights.get(parameter)
        if name is not None:
            self._weights_read_outside[name] = None

    # -- the plan -----------------------------------------------------------------------------------------------------

    def plan(self) -> SegmentPlan:
        """The plan of what was recorded so far.

        Output cuts of a Linear called several times are the union over its calls, input cuts those in every call. Names
        of Linears that were never called, and of cuts that could not be placed, are logged as warnings.
        """
        calls: dict[str, list[_LinearCall]] = defaultdict(list)
        for call in self._calls:
            calls[call.name].append(call)
        notes: dict[str, list[str]] = defaultdict(list)
        linears = {
            name: _linear_plan(module, calls[name], notes[name])
            for name, module in self._linears.items()
            if name in calls
        }
        for name in self._weights_read_outside:
            notes[name].append(READ_OUTSIDE)
        shared: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name in linears:
            shared[tuple(call.token for call in calls[name])].append(name)
        conv_plans = {name: axes.intersection(parts).sizes for name, parts in self._conv_axes.items()}
        plan = SegmentPlan(
            linears=linears,
            shared_inputs=tuple(tuple(names) for tokens, names in shared.items() if len(names) > 1 and all(tokens)),
            uncalled=tuple(name for name in self._linears if name not in calls),
            notes={name: "; ".join(reasons) for name, reasons in notes.items() if reasons},
            convs={name: sizes for name, sizes in conv_plans.items() if len(sizes) > 1},
        )
        _log(plan)
        return plan


def _linear_plan(module: nn.Linear, calls: list[_LinearCall], notes: list[str]) -> LinearPlan:
    """The plan of one Linear from all its calls; reasons for what was not placed are appended to ``notes``."""
    features = module.out_features
    cuts: set[int] = set()
    for call in calls:
        cuts.update(accumulate(channels.tile(call.pieces, 0, features)))
    ends = sorted(cuts)
    out_segments = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
    if len(out_segments) > MAX_OUT_SEGMENTS:
        notes.append(f"the output is cut into {len(out_segments)} pieces, more than {MAX_OUT_SEGMENTS}")
        out_segments = (features,)
    elif len(out_segments) == 1:
        pieces = sorted({piece for call in calls for piece in call.pieces})
        if pieces:
            shown = ", ".join(f"{lo}:{hi}" for lo, hi in pieces[:4]) + (", ..." if len(pieces) > 4 else "")
            notes.append(f"the output is cut at channels {shown}, which do not tile all {features}")
        elif any(call.strided for call in calls):
            notes.append(_STRIDED)
    axis = axes.intersection([call.axis for call in calls])
    if any(len(call.axis.sizes) > len(axis.sizes) for call in calls):
        notes.append(f"the input is joined differently in its {len(calls)} calls; only cuts in all of them are kept")
    return LinearPlan(axis.sizes, out_segments, axis.tags)


def _log(plan: SegmentPlan) -> None:
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in plan.notes.items():
        reasons[reason].append(name)
    for reason, names in reasons.items():
        # Rotary embeddings are expected: nothing was lost.
        level = logging.INFO if reason == _STRIDED else logging.WARNING
        logger.log(level, "%s: %s", fold_names(names), reason)
    if plan.uncalled:
        logger.warning(
            "never called in the recorded forward, so without segments: %s; run a forward that reaches them, or plan "
            "them with SegmentPlan.with_overrides",
            fold_names(plan.uncalled),
        )


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input of a Linear, convolution or quantizer, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _is_pass_through(module: nn.Module) -> bool:
    return any(base.__name__ == _PASS_THROUGH_CLASS for base in type(module).__mro__)


class RecordFirstForward:
    """Context manager that records the first forward of ``model`` itself, whatever else runs inside.

        with RecordFirstForward(model) as recording:
            forward_loop(model)
        plan = recording.plan       # None if the model was never called

    The hooks leave with the end of that forward: later forwards run at full speed. A forward that raises is not
    recorded; the next one is tried.

    Args:
        model: the module whose own ``__call__`` is waited for.
        merge_heads: see :class:`DataflowRecorder`.
    """

    def __init__(self, model: nn.Module, merge_heads: bool = False) -> None:
        self.plan: SegmentPlan | None = None
        self._model = model
        self._recorder = DataflowRecorder(model, merge_heads)
        self._handles: list[RemovableHandle] = []
        self._depth = 0
        self._handled: BaseException | None = None

    def __enter__(self) -> RecordFirstForward:
        try:
            self._recorder._install()
            # First before and last after everything else: hooks removed while torch still runs later ones confuse it.
            self._handles = [
                self._model.register_forward_pre_hook(self._before, prepend=True),
                self._model.register_forward_hook(self._after, always_call=True),
            ]
        except BaseException:
            self._remove_hooks()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder._stop()  # running still only if something that is no Exception (an interrupt) left the forward
        self._remove_hooks()

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._depth += 1
        if self._depth == 1:
            self._handled = sys.exc_info()[1]
            self._recorder._start()

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._recorder._stop()
        raised = sys.exc_info()[1] is not self._handled  # torch calls this while handling what the forward raised
        self._handled = None
        if not raised:
            self._remove_hooks()
            self.plan = self._recorder.plan()

    def _remove_hooks(self) -> None:
        self._recorder._remove_hooks()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def record(
    model: nn.Module, forward: Callable[[], object] | Callable[[nn.Module], object], *, merge_heads: bool = False
) -> SegmentPlan:
    """Run a forward or a calibration loop and return the plan of the model's first forward in it.

    Args:
        model: the module to plan.
        forward: called as ``forward()``, or as ``forward(model)`` if it takes an argument, as ModelOpt's forward loops
            do.
        merge_heads: see :class:`DataflowRecorder`.

    Raises:
        ValueError: ``forward`` never called the model.
    """
    with RecordFirstForward(model, merge_heads) as recording:
        if _takes_argument(forward):
            forward(model)  # type: ignore[call-arg]
        else:
            forward()  # type: ignore[call-arg]
    if recording.plan is None:
        raise ValueError(
            f"the forward loop never called the {type(model).__name__} that is to be planned; call the model itself "
            f"in it, as model(...)"
        )
    return recording.plan


def _takes_argument(forward: Callable[..., object]) -> bool:
    try:
        inspect.signature(forward).bind(None)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True
