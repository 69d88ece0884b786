"""Output side: where the channels of a Linear's output go.

A Linear's output of shape (..., N) gets a shadow, a meta tensor of the same shape whose strides are *channel strides*:

    shadow = empty(N).as_strided(shape, (0, ..., 0, 1))        # element [..., j] lies at storage position j

Every view op that the model applies to the output is replayed on the shadow, so torch's own stride algebra follows the
channels through unflatten, permute, chunk on any dim, and so on. Where an op keeps only some channels, the shadow's
storage offset, sizes and strides say which. They are a *piece* if they are consecutive, [lo, hi); halves of rotary
pairs and the like are strided and no pieces. Pieces become segments if they tile the whole interval (:func:`tile`).

Dims with channel stride 0 (batch, tokens) may be sliced, broadcast and concatenated without any cut of channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

MAX_SHADOWS = 32
"""Shadows of different geometry that one tensor may carry. A residual stream collects a handful; past this, new ones
are not followed."""

_AS_VIEW = {"_unsafe_view", "_reshape_alias", "reshape", "_reshape_copy", "view_copy"}
"""Ops that are ``view(size)`` as far as channels go."""

_SLICING = {"slice", "select", "split", "split_with_sizes", "unbind", "diagonal", "unfold"}
"""View ops that may keep only some channels. Merely splitting or merging dims is no cut."""

_NOT_REPLAYED = {"as_strided", "view_as_real", "view_as_complex", "_conj", "_neg_view"}
"""View ops that read storage positions or reinterpret bytes, which a shadow does not mirror."""


@dataclass(frozen=True, slots=True, eq=False)
class Shadow:
    """Channels behind a tensor: a meta tensor with channel strides, and the Linear calls that it stands for.

    Calls whose outputs meet in a pointwise op with equal geometry share a shadow.
    """

    meta: Tensor
    calls: frozenset[int]

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Equal for shadows that select the same channels in the same layout."""
        return self.meta.storage_offset(), self.meta.shape, self.meta.stride()


Shadows = tuple[Shadow, ...]

Cut = tuple[frozenset[int], "tuple[int, int] | None"]
"""Linear calls whose output was cut, and the piece [lo, hi) of their channels, None if it is strided."""


def shadow_of_output(shape: Sequence[int], call: int) -> Shadow:
    """The shadow of a fresh Linear output of shape (..., N)."""
    strides = (0,) * (len(shape) - 1) + (1,)
    base = torch.empty(shape[-1], device="meta")
    return Shadow(base.as_strided(tuple(shape), strides), frozenset((call,)))


def replay(
    func: Any, name: str, shadows: Shadows, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Shadows], list[Cut]]:
    """Apply a view op to shadows.

    Returns:
        One tuple of shadows per output of the op, and the cuts that it made. Shadows on which the op is not a view
        (channels merged with tokens, say) end here.
    """
    outputs: list[list[Shadow]] = []
    cuts: list[Cut] = []
    if name in _NOT_REPLAYED:
        return [], cuts
    for shadow in shadows:
        try:
            if name in _AS_VIEW:
                result = aten.view.default(shadow.meta, args[1])
            else:
                result = func(shadow.meta, *args[1:], **kwargs)
        except RuntimeError:
            continue
        pieces = [Shadow(meta, shadow.calls) for meta in (result if isinstance(result, list | tuple) else [result])]
        outputs.extend([] for _ in range(len(pieces) - len(outputs)))
        for output, piece in zip(outputs, pieces, strict=True):
            output.append(piece)
        if name in _SLICING:
            channels = count(shadow)
            cuts.extend((piece.calls, interval(piece)) for piece in pieces if 0 < count(piece) < channels)
    return [tuple(output) for output in outputs], cuts


def broadcast(operands: Iterable[tuple[Shadows, torch.Size]], shape: torch.Size) -> Shadows:
    """The shadows of a pointwise result of the given shape: those of all operands, with equal geometries joined."""
    joined: dict[tuple[Any, ...], Shadow] = {}
    for shadows, operand_shape in operands:
        for shadow in shadows:
            if operand_shape != shape:
                shadow = Shadow(shadow.meta.expand(shape), shadow.calls)
            _join(joined, shadow)
    return tuple(joined.values())


def concatenate(operands: Iterable[Shadows], dim: int, shape: torch.Size) -> Shadows:
    """The shadows of ``cat(operands, dim)``: those whose channels do not lie along ``dim`` (tokens concatenated)."""
    joined: dict[tuple[Any, ...], Shadow] = {}
    for shadows in operands:
        for shadow in shadows:
            meta = shadow.meta
            strides = list(meta.stride())
            if meta.shape[dim] > 1 and strides[dim] != 0:
                continue
            strides[dim] = 0
            _join(joined, Shadow(meta.as_strided(tuple(shape), strides, meta.storage_offset()), shadow.calls))
    return tuple(joined.values())


def repeat(shadows: Shadows, shape: torch.Size) -> Shadows:
    """The shadows of ``x.repeat(...)`` with the given result shape: those whose channels are not repeated."""
    result = []
    for shadow in shadows:
        sizes = (1,) * (len(shape) - shadow.meta.dim()) + tuple(shadow.meta.shape)
        strides = [0] * (len(shape) - shadow.meta.dim()) + list(shadow.meta.stride())
        grown = [dim for dim, size in enumerate(sizes) if size != shape[dim]]
        if any(sizes[dim] > 1 and strides[dim] != 0 for dim in grown):
            continue
        for dim in grown:
            strides[dim] = 0
        result.append(Shadow(shadow.meta.as_strided(shape, strides, shadow.meta.storage_offset()), shadow.calls))
    return tuple(result)


def _join(joined: dict[tuple[Any, ...], Shadow], shadow: Shadow) -> None:
    key = shadow.geometry
    known = joined.get(key)
    if known is not None:
        if not shadow.calls <= known.calls:
            joined[key] = Shadow(known.meta, known.calls | shadow.calls)
    elif len(joined) < MAX_SHADOWS:
        joined[key] = shadow


def count(shadow: Shadow) -> int:
    """How many channels the tensor behind the shadow holds."""
    return prod(
        size for size, stride in zip(shadow.meta.shape, shadow.meta.stride(), strict=True) if stride != 0 and size != 1
    )


def interval(shadow: Shadow) -> tuple[int, int] | None:
    """The channels [lo, hi) if they are consecutive, else None."""
    dims = sorted(
        (stride, size)
        for size, stride in zip(shadow.meta.shape, shadow.meta.stride(), strict=True)
        if stride != 0 and size != 1
    )
    length = 1
    for stride, size in dims:
        if stride != length:
            return None
        length *= int(size)
    lo = int(shadow.meta.storage_offset())
    return lo, lo + length


def tile(pieces: Iterable[tuple[int, int]], lo: int, hi: int) -> tuple[int, ...]:
    """Sizes of the finest segments of [lo, hi) that the pieces make.

    The largest pieces inside the interval must tile it exactly, without gap or overlap; then each is tiled by the
    pieces inside it in turn. An interval that is not tiled stays whole.

    >>> tile([(0, 4), (4, 8), (4, 5), (5, 8)], 0, 8)
    (4, 1, 3)
    >>> tile([(0, 3)], 0, 8)
    (8,)
    """
    inside = sorted({p for p in pieces if lo <= p[0] and p[1] <= hi and p != (lo, hi)}, key=lambda p: (p[0], -p[1]))
    sizes: list[int] = []
    end = lo
    for start, stop in inside:
        if stop <= end:
            continue  # inside the piece before: the recursion below looks at it
        if start != end:
            return (hi - lo,)
        sizes.extend(tile(inside, start, stop))
        end = stop
    return tuple(sizes) if end == hi and sizes else (hi - lo,)
