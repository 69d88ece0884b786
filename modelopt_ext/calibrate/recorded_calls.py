"""The calls of a model during calibration, kept to be made again with part of the model quantized.

The arguments are kept, on the CPU, not the forward loop: a loop may be a whole pipeline, whose later calls would change
with the model's outputs, and then no row would have a counterpart in full precision any more.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..positions import CallPositions

logger = logging.getLogger(__name__)


class _Enough(Exception):  # noqa: N818  nothing went wrong
    """Ends a forward whose rest is not needed."""


@dataclass
class _Kept:
    """A tensor of an argument, on the CPU, and the device it came from."""

    tensor: Tensor
    device: torch.device

    def restored(self) -> Tensor:
        # A copy in any case: models may write to their arguments.
        return self.tensor.to(self.device, copy=True)


@dataclass
class _Call:
    """One call of the model."""

    args: tuple[Any, ...]  # trees with _Kept in the place of tensors
    kwargs: dict[str, Any]
    autocast: Callable[[], AbstractContextManager[Any]]
    position: int
    counts: Counter[str] = field(default_factory=Counter)  # calls of each layer

    def __call__(self, model: Callable[..., object]) -> object:
        args, kwargs = restored((self.args, self.kwargs))
        with self.autocast():
            return model(*args, **kwargs)


def restored(tree: Any) -> Any:
    """Kept tensors as copies where they came from; everything else of ``tree`` as it is."""
    return tree_map(lambda leaf: leaf.restored() if isinstance(leaf, _Kept) else leaf, tree)


class _Keeper:
    """Copies tensors to the CPU, one that comes again unchanged (a prompt's embedding, at every step) only once."""

    def __init__(self) -> None:
        self.bytes = 0
        self._known: dict[int, tuple[weakref.ref[Tensor], _Kept]] = {}

    def __call__(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        with torch.no_grad(), torch.inference_mode(False):
            copy = leaf.detach().to("cpu", copy=True)
            known = self._known.get(id(leaf))
            if known is not None and known[0]() is leaf and _same(known[1].tensor, copy):
                return known[1]
        kept = _Kept(copy, leaf.device)
        self._known[id(leaf)] = weakref.ref(leaf), kept
        self.bytes += copy.nbytes
        return kept


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _autocast_now(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts that autocast as the surroundings do now."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext
    return partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind))


class RecordedCalls:
    """What the model was called with, and how often each of its layers ran in each call.

    Args:
        model: the model that is called.
        layers: the layers that are going to be solved, by name.
        positions: numbers the calls; it gives the same numbers when they are made again.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], positions: CallPositions | None = None
    ) -> None:
        self.positions = positions or CallPositions()
        self._model = model
        self._layers = layers
        self._calls: list[_Call] = []
        self._keep = _Keeper()

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def bytes(self) -> int:
        """Size of the kept arguments on the CPU."""
        return self._keep.bytes

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, calls of the model are recorded."""

        def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
            device = tensors[0].device if tensors else torch.device("cpu")
            kept = tree_map(self._keep, args), tree_map(self._keep, kwargs)
            self._calls.append(_Call(*kept, _autocast_now(device), self.positions(len(self._calls))))

        def count(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._calls:
                self._calls[-1].counts[name] += 1

        with ExitStack() as hooks:
            hooks.callback(self._model.register_forward_pre_hook(start, with_kwargs=True).remove)
            for name, layer in self._layers.items():
                hooks.callback(layer.register_forward_pre_hook(partial(count, name)).remove)
            yield
        self._keep._known.clear()
        logger.info("segquant: %d calls of the model kept, %.1f MiB", len(self), self.bytes / 2**20)

    def replay(self, layers: Iterable[str]) -> None:
        """Call the model again with all that was recorded, each time until ``layers`` have read their last input."""
        layers = tuple(layers)
        for call in self._calls:
            remaining = Counter({name: call.counts[name] for name in layers if call.counts[name]})
            if remaining:
                self._replay_call(call, remaining)

    def _replay_call(self, call: _Call, remaining: Counter[str]) -> None:
        left = remaining.total()

        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise _Enough

        with ExitStack() as hooks, torch.no_grad():
            # Hooks run in the order they were made in: whoever collects has seen the input when the call ends.
            for name in remaining:
                hooks.callback(self._layers[name].register_forward_pre_hook(count).remove)
            with suppress(_Enough), self.positions.pinned(call.position):
                call(self._model)
