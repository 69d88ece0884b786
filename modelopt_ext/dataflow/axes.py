"""Input side: which tensors the channels of a Linear's input come from.

Per dim of a tensor an :class:`Axis` lists the parts that lie along it: their sizes, what produced their values (the
tags of :data:`modelopt_ext.plan.ACTIVATIONS`) and how neighbours were joined:

- ``"cat"``: by ``torch.cat``;
- ``"stack"``: by ``torch.stack`` and a later flatten;
- ``"merge"``: by a view that merges two dims (the heads of an attention), only on request.

``cat`` appends parts, views carry, split and merge them, pointwise ops take the union of the cuts. A tensor whose axes
all have one untagged part needs no record: ``None`` stands for it.

Example: the input of ``proj_out`` in a FLUX single block, ``cat([attention, gelu(mlp)], dim=2)`` of shape (B, S, 5 D),
has the axes ``(B), (S), (D + 4 D:gelu)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

MAX_PARTS = 64
"""Parts that an axis may list; with more it counts as one part."""

_KIND_RANK = {"cat": 2, "stack": 1, "merge": 0}


@dataclass(frozen=True, slots=True)
class Axis:
    """The parts along one dim: ``sizes`` and ``tags`` have one entry per part, ``kinds`` one per boundary."""

    sizes: tuple[int, ...]
    tags: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def size(self) -> int:
        """The size of the dim."""
        return sum(self.sizes)

    @property
    def tag(self) -> str:
        """The tag that all parts share, else ""."""
        return common_tag(self.tags)

    @property
    def is_plain(self) -> bool:
        """Whether there is one part without a tag."""
        return len(self.sizes) == 1 and not self.tags[0]

    def cuts(self) -> dict[int, str]:
        """Position of every boundary, and its kind."""
        return dict(zip(accumulate(self.sizes[:-1]), self.kinds, strict=True))

    def retagged(self, tag_of: Callable[[str], str]) -> Axis:
        """The same parts with other tags."""
        return Axis(self.sizes, tuple(map(tag_of, self.tags)), self.kinds)

    def sliced(self, start: int, stop: int) -> Axis:
        """The parts of channels [start, stop)."""
        return _axis(self, {p - start: k for p, k in self.cuts().items() if start < p < stop}, start, stop)


Axes = tuple[Axis, ...]


def whole(size: int, tag: str = "") -> Axis:
    """An axis of one part."""
    return Axis((size,), (tag,), ())


def plain(shape: Sequence[int]) -> Axes:
    """The axes of a tensor of which nothing is known."""
    return tuple(whole(size) for size in shape)


def common_tag(tags: Iterable[str]) -> str:
    """The one tag that all share, else ""."""
    distinct = set(tags)
    return distinct.pop() if len(distinct) == 1 else ""


def simplified(axes: Axes) -> Axes | None:
    """None if nothing is known; overlong axes become one part."""
    axes = tuple(axis if len(axis.sizes) <= MAX_PARTS else whole(axis.size, axis.tag) for axis in axes)
    return None if all(axis.is_plain for axis in axes) else axes


def _axis(old: Axis, cuts: dict[int, str], start: int, stop: int) -> Axis:
    """Parts of [start, stop) of an axis with the given cuts (relative to start); tags are read off the old parts."""
    ends = [*sorted(cuts), stop - start]
    begins = [0, *ends[:-1]]
    tags = tuple(_tag_between(old, start + begin, start + end) for begin, end in zip(begins, ends, strict=True))
    sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    return Axis(sizes, tags, tuple(cuts[end] for end in ends[:-1]))


def _tag_between(axis: Axis, start: int, stop: int) -> str:
    ends = list(accumulate(axis.sizes))
    return common_tag(
        tag for size, end, tag in zip(axis.sizes, ends, axis.tags, strict=True) if end > start and end - size < stop
    )


# -- ops that join tensors -----------------------------------------------------------------------------------------


def concatenate(operands: Sequence[Axes], dim: int) -> Axes:
    """Axes of ``cat(operands, dim)``. Along the other dims the cuts that all operands have survive."""
    if len(operands) == 1:
        return operands[0]
    result = []
    for d in range(len(operands[0])):
        axes = [operand[d] for operand in operands]
        if d == dim:
            sizes = tuple(size for axis in axes for size in axis.sizes)
            tags = tuple(tag for axis in axes for tag in axis.tags)
            kinds = [kind for axis in axes for kind in (*axis.kinds, "cat")]
            result.append(Axis(sizes, tags, tuple(kinds[:-1])))
        else:
            result.append(intersection(axes))
    return tuple(result)


def stack(operands: Sequence[Axes], dim: int) -> Axes:
    """Axes of ``stack(operands, dim)``: one part of size 1 per operand along the new dim."""
    tags = tuple(common_tag(axis.tag for axis in operand) for operand in operands)
    new = Axis((1,) * len(operands), tags, ("stack",) * (len(operands) - 1))
    others = [intersection([operand[d] for operand in operands]) for d in range(len(operands[0]))]
    return (*others[:dim], new, *others[dim:])


def intersection(axes: Sequence[Axis]) -> Axis:
    """The cuts that all axes of one size have; a part keeps its tag where all agree."""
    if len(set(axes)) == 1:
        return axes[0]
    shared = axes[0].cuts()
    for axis in axes[1:]:
        cuts = axis.cuts()
        shared = {position: kind for position, kind in shared.items() if position in cuts}
    parts = [_axis(axis, shared, 0, axis.size) for axis in axes]
    tags = tuple(common_tag(tags) for tags in zip(*(part.tags for part in parts), strict=True))
    return Axis(parts[0].sizes, tags, parts[0].kinds)


def broadcast(operands: Sequence[Axes], shape: Sequence[int], tag_of: Callable[[Sequence[str]], str]) -> Axes:
    """Axes of a pointwise result: the union of the operands' cuts, tags by ``tag_of(the operands' tags)``.

    Cuts count only in operands of the result's size: a vector that scales or shifts all tokens, as AdaLN's does, may be
    a concatenation itself, but does not make one of what it modulates.
    """
    full = [tuple(axis.size for axis in operand) == tuple(shape) for operand in operands]
    some_full = any(full)
    result = []
    for d, size in enumerate(shape):
        aligned = []
        cuts: dict[int, str] = {}
        for operand, is_full in zip(operands, full, strict=True):
            at = d - len(shape) + len(operand)
            axis = operand[at] if at >= 0 else whole(1)
            # A broadcast axis has one part; an operand lacking the dim is one value for all of it.
            axis = axis if axis.size == size else whole(size, axis.tag if at >= 0 else _overall(operand))
            aligned.append(axis)
            if len(axis.sizes) > 1 and (is_full or not some_full):
                for position, kind in axis.cuts().items():
                    if position not in cuts or _KIND_RANK[kind] > _KIND_RANK[cuts[position]]:
                        cuts[position] = kind
        if not cuts:
            result.append(whole(size, tag_of([axis.tag for axis in aligned])))
            continue
        parts = [_axis(axis, cuts, 0, size) for axis in aligned]
        tags = tuple(tag_of(tags) for tags in zip(*(part.tags for part in parts), strict=True))
        result.append(Axis(parts[0].sizes, tags, parts[0].kinds))
    return tuple(result)


def _overall(axes: Axes) -> str:
    """The tag of the whole tensor."""
    return next((axis.tag for axis in axes if axis.tag), "")


# -- views ---------------------------------------------------------------------------------------------------------


def view(
    name: str, axes: Axes, args: Sequence[Any], kwargs: dict[str, Any], shapes: list[tuple[int, ...]], heads: bool
) -> list[Axes]:
    """Axes of the outputs of a view op, one per output; empty where nothing is known.

    Args:
        name: the op without namespace and overload.
        axes: the axes of its input, which is ``args[0]``.
        args: the op's arguments.
        kwargs: the op's keyword arguments.
        shapes: the shapes of its outputs.
        heads: whether merging two dims into the last one makes a boundary (kind ``"merge"``).
    """
    rule = _VIEWS.get(name)
    if rule is None:
        return [axes for _ in shapes] if name in _IDENTITIES else []
    if rule is _reshape:
        return [reshape(axes, shapes[0], heads)]
    return rule(axes, _Arguments(args, kwargs), shapes)


class _Arguments:
    """Positional or keyword arguments of an op after its tensor."""

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs

    def get(self, position: int, name: str, default: Any = None) -> Any:
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)


def reshape(axes: Axes, shape: Sequence[int], heads: bool = False) -> Axes:
    """Axes after ``view(shape)``: dims are matched in the smallest groups of equal products.

    One dim to many: cuts at multiples of the inner size move to the outer dim. Many to one: cuts of the outermost dim
    are scaled up; cuts of an inner dim would repeat and are dropped. Many to many: dropped. Tags that hold for a whole
    group stay.
    """
    if 0 in shape:
        return plain(shape)
    result: list[Axis] = []
    for olds, news in _groups([axis.size for axis in axes], list(shape)):
        group = [axes[i] for i in olds]
        result.extend(_regroup(group, [shape[i] for i in news], heads and bool(news) and news[-1] == len(shape) - 1))
    return _spread_tag(tuple(result), _overall(axes))


def _groups(old: list[int], new: list[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Dims matched in the smallest groups of equal products; dims of size 1 go with the group before them."""
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news = [], []
        product_old = product_new = 1
        while True:
            if i < len(old) and (product_old <= product_new or j == len(new)):
                olds.append(i)
                product_old *= old[i]
                i += 1
            elif j < len(new):
                news.append(j)
                product_new *= new[j]
                j += 1
            else:
                break
            if product_old == product_new and product_old > 1:
                break
        while i < len(old) and old[i] == 1:
            olds.append(i)
            i += 1
        while j < len(new) and new[j] == 1:
            news.append(j)
            j += 1
        yield olds, news


def _regroup(group: list[Axis], sizes: list[int], heads: bool) -> list[Axis]:
    tag = next((axis.tag for axis in group if axis.tag), "")
    big = [axis for axis in group if axis.size > 1]
    places = [i for i, size in enumerate(sizes) if size > 1]
    result = [whole(size, tag) for size in sizes]
    if not big or not places:
        return result
    if len(big) == 1 and len(places) == 1:
        result[places[0]] = big[0]
    elif len(big) == 1:
        outer = places[0]
        inner = big[0].size // sizes[outer]
        cuts = big[0].cuts()
        if all(position % inner == 0 for position in cuts):
            outer_sizes = tuple(size // inner for size in big[0].sizes)
            result[outer] = Axis(outer_sizes, big[0].tags, big[0].kinds)
    elif len(places) == 1:
        inner = prod(axis.size for axis in big[1:])
        if len(big[0].sizes) > 1:
            result[places[0]] = Axis(tuple(size * inner for size in big[0].sizes), big[0].tags, big[0].kinds)
        elif heads and len(big) == 2 and big[0].size <= MAX_PARTS:
            parts = big[0].size
            result[places[0]] = Axis((inner,) * parts, (tag,) * parts, ("merge",) * (parts - 1))
    return result


def _spread_tag(axes: Axes, tag: str) -> Axes:
    """Where the whole tensor has a tag, every part has it."""
    return tuple(axis.retagged(lambda old: old or tag) for axis in axes) if tag else axes


def _narrowed(axes: Axes, dim: int, axis: Axis) -> Axes:
    """Axes with one replaced by some of its parts, whose common tag then holds for the whole tensor."""
    return _spread_tag((*axes[:dim], axis, *axes[dim + 1 :]), axis.tag)


def _slice(axes: Axes, a: _Arguments, shapes: list[tuple[int, ...]]) -> list[Axes]:
    dim = a.get(1, "dim", 0) % len(axes)
    start, stop, step = a.get(2, "start"), a.get(3, "end"), a.get(4, "step", 1)
    begin, end, _ = slice(start, stop).indices(axes[dim].size)
    size = shapes[0][dim]
    part = axes[dim].sliced(begin, end) if end > begin and step == 1 else whole(size, axes[dim].tag)
    return [_narrowed(axes, dim, part)]


def _select(axes: Axes, a: _Arguments, shapes: list[tuple[int, ...]]) -> list[Axes]:
    dim = a.get(1, "dim") % len(axes)
    index = a.get(2, "index") % axes[dim].size
    narrowed = _narrowed(axes, dim, axes[dim].sliced(index, index + 1))
    return [(*narrowed[:dim], *narrowed[dim + 1 :])]


def _split(axes: Axes, a: _Arguments, shapes: list[tuple[int, ...]]) -> list[Axes]:
    dim = a.get(2, "dim", 0) % len(axes)
    ends = accumulate(shape[dim] for shape in shapes)
    parts = [(end - shape[dim], end) for shape, end in zip(shapes, ends, strict=True)]
    return [
        _narrowed(axes, dim, axes[dim].sliced(*part)) if part[1] > part[0] else plain(shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def _unbind(axes: Axes, a: _Arguments, shapes: list[tuple[int, ...]]) -> list[Axes]:
    dim = a.get(1, "dim", 0) % len(axes)
    results = []
    for index in range(axes[dim].size):
        narrowed = _narrowed(axes, dim, axes[dim].sliced(index, index + 1))
        results.append((*narrowed[:dim], *narrowed[dim + 1 :]))
    return results


def _permute(axes: Axes, a: _Arguments, shapes: list[tuple[int, ...]]) -> list[Axes]:
    return [tuple(axes[dim] for dim in a.get(1, "dims"))]


def _transpose(axes: Axes, a: _Arguments, shapes: list[tuple[int, ...]]) -> list[Axes]:
    first, second = a.get(1, "dim0"), a.get(2, "dim1")
    result = list(axes)
    result[first], result[second] = result[second], result[first]
    return [tuple(result)]


def _t(axes: Axes, a: _Arguments, shapes: list[tuple[int, ...]]) -> list[Axes]:
    return [axes[::-1]]


def _unsqueeze(axes: Axes, a: _Arguments, shapes: list[tuple[int, ...]]) -> list[Axes]:
    dim = a.get(1, "dim") % (len(axes) + 1)
    return [(*axes[:dim], whole(1, _overall(axes)), *axes[dim:])]


def _expand(axes: Axes, a: _Arguments, shapes: list[tuple[int, ...]]) -> list[Axes]:
    return [broadcast([axes], shapes[0], lambda tags: tags[0])]


def _repeat(axes: Axes, a: _Arguments, shapes: list[tuple[int, ...]]) -> list[Axes]:
    return _expand(axes, a, shapes)  # a dim that grows becomes one part


def _reshape(axes: Axes, a: _Arguments, shapes: list[tuple[int, ...]]) -> list[Axes]:
    return [reshape(axes, shapes[0])]


_IDENTITIES = {"alias", "detach", "lift_fresh"}

_VIEWS: dict[str, Callable[[Axes, _Arguments, list[tuple[int, ...]]], list[Axes]]] = {
    "view": _reshape,
    "_unsafe_view": _reshape,
    "_reshape_alias": _reshape,
    "reshape": _reshape,
    "squeeze": _reshape,
    "slice": _slice,
    "select": _select,
    "split": _split,
    "split_with_sizes": _split,
    "unbind": _unbind,
    "permute": _permute,
    "transpose": _transpose,
    "t": _t,
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "repeat": _repeat,
}
