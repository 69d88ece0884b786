"""Segment plans: which channels of every Linear belong together.

Letters: a Linear maps (..., K) to (..., N), K = ``in_features`` and N = ``out_features``. A plan cuts K and N into
consecutive runs of channels:

    in_segments  = (k_1, ..., k_T),  sum == K    where the input is a concatenation of T tensors
    out_segments = (n_1, ..., n_O),  sum == N    where the output is later cut into O tensors

so that every block (o, t) of the weight can have scales of its own (SegQuant, arXiv 2507.14811, SegLinear):

    y[o] = sum_t Q(x[t]) . Q(W[o, t])^T + b[o]

Any partition is valid: a badly chosen cut costs speed, never correctness. The classes here are values: they know no
tensors, compare by content, and go to and from plain types and JSON. :mod:`modelopt_ext.dataflow` finds a plan by
watching one forward.

>>> adaln = LinearPlan(in_segments=(64,), out_segments=(64,) * 6, activations=("silu",))
>>> adaln.out_slices[1]
slice(64, 128, None)
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate, product
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["ACTIVATIONS", "LinearPlan", "PlanOverride", "PlanRow", "SegmentPlan", "fold_names"]

ACTIVATIONS = ("", "silu", "gelu", "gated")
"""What may have produced an input segment. All but ``""`` are polar: many small negatives, few large positives."""

_FORMAT = "segquant-plan"
_FORMAT_VERSION = 1


READ_OUTSIDE = "its weight is also read outside its forward, where no segments apply"
"""Note on a Linear that something else multiplies with, such as ``functional.multi_head_attention_forward``."""


@dataclass(frozen=True)
class LinearPlan:
    """The cuts of one Linear.

    Args:
        in_segments: sizes of the input segments, in channels; they add up to ``in_features``.
        out_segments: sizes of the output segments, in channels; they add up to ``out_features``.
        activations: one tag per input segment, what produced its values: ``"silu"``, ``"gelu"``, ``"gated"`` (a product
            with one of the former, as in GEGLU or SwiGLU) or ``""``. Left out, no segment has a tag.

    Raises:
        ValueError: a size is not a positive integer, or the tags are unknown or not one per input segment.

    Shape examples: AdaLN of SD3, ``LinearPlan((1536,), (1536,) * 6, ("silu",))``; the ``proj_out`` of a FLUX single
    block, ``LinearPlan((3072, 12288), (3072,), ("", "gelu"))``; a plain Linear, ``LinearPlan((1536,), (1536,))``.
    """

    in_segments: tuple[int, ...]
    out_segments: tuple[int, ...]
    activations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_segments", _sizes("in_segments", self.in_segments))
        object.__setattr__(self, "out_segments", _sizes("out_segments", self.out_segments))
        if isinstance(self.activations, str):
            raise ValueError(f"activations is a tuple with one tag per input segment: write ({self.activations!r},)")
        tags = tuple(self.activations) or ("",) * len(self.in_segments)
        if len(tags) != len(self.in_segments):
            raise ValueError(
                f"activations has {len(tags)} tags for {len(self.in_segments)} input segments: give one tag per input "
                f'segment, "" where none applies'
            )
        for tag in tags:
            if tag not in ACTIVATIONS:
                raise ValueError(f"activations: {tag!r} is unknown; use one of {', '.join(map(repr, ACTIVATIONS))}")
        object.__setattr__(self, "activations", tags)

    @classmethod
    def trivial(cls, in_features: int, out_features: int) -> LinearPlan:
        """The plan of a Linear without cuts or tags."""
        return cls((in_features,), (out_features,))

    @property
    def in_features(self) -> int:
        """K, the number of input channels."""
        return sum(self.in_segments)

    @property
    def out_features(self) -> int:
        """N, the number of output channels."""
        return sum(self.out_segments)

    @property
    def is_trivial(self) -> bool:
        """Whether this is one input segment, one output segment, and no tag."""
        return len(self.in_segments) == 1 and len(self.out_segments) == 1 and not any(self.activations)

    @property
    def in_slices(self) -> tuple[slice, ...]:
        """One slice of the input channels per input segment."""
        return slices(self.in_segments)

    @property
    def out_slices(self) -> tuple[slice, ...]:
        """One slice of the output channels per output segment."""
        return slices(self.out_segments)

    def to_dict(self) -> dict[str, list[int] | list[str]]:
        """Plain types only: dict, list, str, int."""
        return {
            "in_segments": list(self.in_segments),
            "out_segments": list(self.out_segments),
            "activations": list(self.activations),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LinearPlan:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or the values are refused by the constructor.
        """
        _check_keys(data, required=("in_segments", "out_segments"), optional=("activations",), what="a Linear's plan")
        return cls(**{key: _as_tuple(key, value) for key, value in data.items()})

    def __str__(self) -> str:
        return f"{_text(self.in_segments, self.activations)} -> {_text(self.out_segments)}"


PlanOverride: TypeAlias = "LinearPlan | Mapping[str, Any] | None"
"""A whole plan, some of its fields, or None for a Linear without cuts and tags."""


@dataclass(frozen=True)
class PlanRow:
    """Modules that are planned alike.

    Attributes:
        pattern: their names as one, block numbers as ranges: ``transformer_blocks.{0-18}.norm1.linear``.
        names: all of them.
        plan: a Linear's plan, or the sizes of a convolution's input segments.
    """

    pattern: str
    names: tuple[str, ...]
    plan: LinearPlan | tuple[int, ...]

    @property
    def inputs(self) -> str:
        """Input segments as text, such as ``3072 + 12288:gelu``."""
        if isinstance(self.plan, LinearPlan):
            return _text(self.plan.in_segments, self.plan.activations)
        return _text(self.plan)

    @property
    def outputs(self) -> str:
        """Output segments as text, such as ``6 x 1536``."""
        return _text(self.plan.out_segments) if isinstance(self.plan, LinearPlan) else "(convolution)"


@dataclass(frozen=True)
class SegmentPlan:
    """The cuts of all Linears of a model.

    Args:
        linears: qualified module name to plan, for every Linear that was called, those without cuts included.
        shared_inputs: groups of two or more names that read the very same tensor (q, k and v of an attention); names
            sorted within a group, groups sorted.
        uncalled: Linears that the recorded forward never called: nothing is known about them, they get no segments.
        notes: module name to the reason why something about it could not be placed.
        convs: name of a convolution whose input is a concatenation over channels (the skip connections of a UNet) to
            the sizes of the parts; they add up to ``in_channels``. Convolutions without such an input are left out.

    Raises:
        ValueError: a name is both in ``linears`` and ``uncalled``, or a group names an unknown or a single Linear.
    """

    linears: Mapping[str, LinearPlan]
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    uncalled: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    convs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Plain dicts, not read-only proxies: a proxy can be neither pickled nor deep-copied with its model.
        object.__setattr__(self, "linears", dict(self.linears))
        object.__setattr__(self, "notes", dict(self.notes))
        object.__setattr__(self, "convs", {name: _sizes(f"convs[{name!r}]", v) for name, v in self.convs.items()})
        object.__setattr__(self, "uncalled", tuple(self.uncalled))
        object.__setattr__(self, "shared_inputs", tuple(sorted(tuple(sorted(group)) for group in self.shared_inputs)))
        for name, plan in self.linears.items():
            if not isinstance(plan, LinearPlan):
                raise ValueError(f"linears[{name!r}] is a {type(plan).__name__}: give a LinearPlan")
        for name in self.uncalled:
            if name in self.linears:
                raise ValueError(f"{name!r} is both in linears and in uncalled: keep it in one of them")
        for group in self.shared_inputs:
            if len(group) < 2:
                raise ValueError(f"shared_inputs: group {group} has fewer than two names: leave it out")
            for name in group:
                if name not in self.linears:
                    raise ValueError(f"shared_inputs: {name!r} is not in linears: name only planned Linears")

    @property
    def read_outside(self) -> frozenset[str]:
        """Names of Linears whose weight is read outside their forward, so that codes can't take its place."""
        return frozenset(name for name, note in self.notes.items() if READ_OUTSIDE in note)

    @property
    def segmented(self) -> dict[str, LinearPlan]:
        """The Linears with at least one cut or tag."""
        return {name: plan for name, plan in self.linears.items() if not plan.is_trivial}

    # -- text ---------------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """One line of counts."""
        plans = self.linears.values()
        out_cut = sum(len(plan.out_segments) > 1 for plan in plans)
        in_cut = sum(len(plan.in_segments) > 1 for plan in plans)
        polar = sum(any(plan.activations) for plan in plans)
        text = (
            f"{len(self.linears)} Linears: {out_cut} with output segments, {in_cut} with input segments, "
            f"{polar} with polar inputs, {len(self.shared_inputs)} groups that share an input"
        )
        if self.convs:
            text += f"; {len(self.convs)} convolutions of concatenated channels"
        if self.uncalled:
            text += f"; {len(self.uncalled)} Linears never called"
        return text

    def rows(self, *, trivial: bool = False) -> list[PlanRow]:
        """Modules with equal plans whose names differ in block numbers only, together; in the model's order.

        Args:
            trivial: whether Linears without cuts and tags are listed too.
        """
        alike: dict[LinearPlan | tuple[int, ...], list[str]] = {}
        for name, plan in self.linears.items():
            if trivial or not plan.is_trivial:
                alike.setdefault(plan, []).append(name)
        for name, sizes in self.convs.items():
            alike.setdefault(sizes, []).append(name)
        order = {name: i for i, name in enumerate((*self.linears, *self.convs))}
        found = [
            PlanRow(pattern, tuple(members), cells)
            for cells, names in alike.items()
            for pattern, members in _fold(names)
        ]
        return sorted(found, key=lambda row: order[row.names[0]])

    def table(self, *, trivial: bool = False) -> str:
        """A table: module, how many such modules, input segments with tags, output segments.

        Modules whose names differ in block numbers only and whose plans are equal share a row; the numbers are listed
        as ranges (``transformer_blocks.{0-18}.norm1.linear``). ``6 x 1536`` is six segments of 1536 channels.

        Args:
            trivial: whether Linears without cuts and tags are listed too.
        """
        body = [(row.pattern, str(len(row.names)), row.inputs, row.outputs) for row in self.rows(trivial=trivial)]
        lines = [("module", "count", "in", "out"), *body]
        width = [max(len(line[i]) for line in lines) for i in range(4)]
        text = ["  ".join(cell.ljust(width[i]) for i, cell in enumerate(line)).rstrip() for line in lines]
        text.insert(1, "  ".join("-" * w for w in width))
        text.append(self.summary())
        for reason, names in _group_by_value(self.notes).items():
            text.append(f"note: {fold_names(names)}: {reason}")
        if self.uncalled:
            text.append(f"never called, no segments: {fold_names(self.uncalled)}")
        return "\n".join(text)

    def __str__(self) -> str:
        return self.table()

    # -- plain types, JSON --------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain types only (dict, list, str, int), with a format version."""
        return {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "linears": {name: plan.to_dict() for name, plan in self.linears.items()},
            "shared_inputs": [list(group) for group in self.shared_inputs],
            "uncalled": list(self.uncalled),
            "notes": dict(self.notes),
            "convs": {name: list(sizes) for name, sizes in self.convs.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SegmentPlan:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: not a segment plan, written by a newer version, or an entry does not hold (it is named).
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise ValueError(f'not a segment plan: expected a mapping with "format": "{_FORMAT}" (SegmentPlan.to_dict)')
        if data.get("version") != _FORMAT_VERSION:
            raise ValueError(
                f"segment plan of format version {data.get('version')!r}, this package reads {_FORMAT_VERSION}: "
                f"record the plan again, or use the version of the package that wrote it"
            )
        fields = ("linears", "shared_inputs", "uncalled", "notes", "convs")
        _check_keys(data, required=("format", "version", "linears"), optional=fields, what="a segment plan")
        linears = {}
        for name, entry in data["linears"].items():
            try:
                linears[name] = LinearPlan.from_dict(entry)
            except ValueError as error:
                raise ValueError(f"segment plan, {name!r}: {error}") from None
        return cls(
            linears=linears,
            shared_inputs=tuple(tuple(group) for group in data.get("shared_inputs", ())),
            uncalled=tuple(data.get("uncalled", ())),
            notes=dict(data.get("notes", {})),
            convs={name: tuple(sizes) for name, sizes in data.get("convs", {}).items()},
        )

    def to_json(self, *, indent: int | None = 2) -> str:
        """JSON text of :meth:`to_dict`."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> SegmentPlan:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: not JSON, or refused by :meth:`from_dict`.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a segment plan: {error}; write one with SegmentPlan.to_json") from error
        return cls.from_dict(data)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the JSON text to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SegmentPlan:
        """Read a file written by :meth:`save`.

        Raises:
            ValueError: refused by :meth:`from_json`; the message names the file.
            OSError: the file cannot be read.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    # -- changes and checks -------------------------------------------------------------------------------------------

    def with_overrides(self, overrides: Mapping[str, PlanOverride]) -> SegmentPlan:
        """A new plan with some Linears planned by hand.

        Args:
            overrides: module name, or a shell-style pattern of names (``"*.norm1.linear"``), to one of

                - a :class:`LinearPlan`, or a dict with some of its fields. Fields left out keep their recorded value;
                  a new ``in_segments`` without ``activations`` keeps the tag of every segment that lies inside a
                  recorded one, and clears the others;
                - ``None``: no cuts and no tags.

                They apply in order, so a later entry refines an earlier one. A Linear that the recording never
                called can be planned by its exact name, with both lists of sizes.

        Raises:
            ValueError: a pattern names no Linear, or the sizes do not add up to the features of the Linear.
        """
        linears = dict(self.linears)
        uncalled = list(self.uncalled)
        for pattern, override in overrides.items():
            names = [pattern] if pattern in linears else [name for name in linears if fnmatchcase(name, pattern)]
            if not names and pattern in uncalled:
                linears[pattern] = _plan_uncalled(pattern, override)
                uncalled.remove(pattern)
                continue
            if not names:
                raise ValueError(
                    f"override {pattern!r} names no Linear of the plan; use a qualified module name or a pattern such "
                    f'as "*.norm1.linear" (the plan has {_examples(linears)})'
                )
            for name in names:
                linears[name] = _overridden(name, linears[name], override)
        return dataclasses.replace(self, linears=linears, uncalled=tuple(uncalled))

    def check(self, model: nn.Module) -> None:
        """Make sure that the plan fits a model: every planned name is a Linear with the planned features.

        Raises:
            ValueError: with the names of all modules that do not fit.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        problems = []
        for name, plan in self.linears.items():
            module = modules.get(name)
            if module is None:
                problems.append(f"{name}: no such module")
            elif not isinstance(module, nn.Linear):
                problems.append(f"{name}: a {type(module).__name__}, not a Linear")
            elif (module.in_features, module.out_features) != (plan.in_features, plan.out_features):
                problems.append(
                    f"{name}: {module.in_features} -> {module.out_features} features, "
                    f"planned {plan.in_features} -> {plan.out_features}"
                )
        for name, sizes in self.convs.items():
            module = modules.get(name)
            if module is None:
                problems.append(f"{name}: no such module")
            elif not isinstance(module, _ConvNd):
                problems.append(f"{name}: a {type(module).__name__}, not a convolution")
            elif module.in_channels != sum(sizes):
                problems.append(f"{name}: {module.in_channels} input channels, planned {sum(sizes)}")
        if problems:
            raise ValueError(
                f"the segment plan does not fit this {type(model).__name__}; record it again on this model, or correct "
                f"it with SegmentPlan.with_overrides:\n  " + "\n  ".join(problems)
            )


# -- validation ------------------------------------------------------------------------------------------------------


def _sizes(what: str, sizes: Iterable[int]) -> tuple[int, ...]:
    sizes = _as_tuple(what, sizes)
    if not sizes:
        raise ValueError(f"{what} is empty: without cuts write one segment with all channels, such as (1536,)")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise ValueError(f"{what} has {size!r}: segment sizes are positive integers, in channels")
    return sizes


def _as_tuple(what: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{what} is {value!r}: write a tuple, such as ({value!r},)")
    return tuple(value)


def slices(sizes: tuple[int, ...]) -> tuple[slice, ...]:
    """Consecutive slices of the given sizes: ``(2, 3) -> (slice(0, 2), slice(2, 5))``."""
    ends = list(accumulate(sizes))
    return tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))


def _check_keys(data: Any, *, required: tuple[str, ...], optional: tuple[str, ...], what: str) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} is a mapping, not {data!r}")
    known = dict.fromkeys((*required, *optional))
    unknown = [key for key in data if key not in known]
    missing = [key for key in required if key not in data]
    if unknown or missing:
        problem = f"unknown key {unknown[0]!r}" if unknown else f"missing key {missing[0]!r}"
        raise ValueError(f"{what}: {problem}; the keys are {', '.join(known)}")


# -- overrides -------------------------------------------------------------------------------------------------------


def _overridden(name: str, plan: LinearPlan, override: PlanOverride) -> LinearPlan:
    if override is None:
        return LinearPlan.trivial(plan.in_features, plan.out_features)
    if isinstance(override, LinearPlan):
        new = override
    else:
        fields = _override_fields(name, override)
        if "in_segments" in fields and "activations" not in fields:
            fields["activations"] = _carry_tags(plan, _sizes("in_segments", fields["in_segments"]))
        try:
            new = dataclasses.replace(plan, **fields)
        except ValueError as error:
            raise ValueError(f"override of {name!r}: {error}") from None
    for side, sizes, features in (
        ("in_segments", new.in_segments, plan.in_features),
        ("out_segments", new.out_segments, plan.out_features),
    ):
        if sum(sizes) != features:
            raise ValueError(
                f"override of {name!r}: {side} {sizes} add up to {sum(sizes)}, the Linear has {features}; give sizes "
                f"that add up to {features}"
            )
    return new


def _plan_uncalled(name: str, override: PlanOverride) -> LinearPlan:
    if isinstance(override, LinearPlan):
        return override
    fields = {} if override is None else _override_fields(name, override)
    if "in_segments" not in fields or "out_segments" not in fields:
        raise ValueError(
            f"override of {name!r}: the recording never called this Linear, so its features are unknown; give both "
            f"in_segments and out_segments, or leave it out"
        )
    try:
        return LinearPlan(**fields)
    except ValueError as error:
        raise ValueError(f"override of {name!r}: {error}") from None


def _override_fields(name: str, override: Any) -> dict[str, Any]:
    keys = ("in_segments", "out_segments", "activations")
    _check_keys(override, required=(), optional=keys, what=f"override of {name!r}")
    return {key: _as_tuple(f"override of {name!r}: {key}", value) for key, value in override.items()}


def _carry_tags(plan: LinearPlan, sizes: tuple[int, ...]) -> tuple[str, ...]:
    """The tags for new input segments: that of the recorded segment around each, "" where it spans several."""
    tags = []
    for new in slices(sizes):
        around = [
            tag
            for old, tag in zip(plan.in_slices, plan.activations, strict=True)
            if old.start < new.stop and new.start < old.stop
        ]
        tags.append(around[0] if len(set(around)) == 1 else "")
    return tuple(tags)


def _examples(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    shown = ", ".join(names[:count]) or "none"
    return shown + (", ..." if len(names) > count else "")


# -- text ------------------------------------------------------------------------------------------------------------


def _text(sizes: tuple[int, ...], tags: tuple[str, ...] = ()) -> str:
    """``6 x 64`` for equal neighbours, `` + `` between others, ``:tag`` after a tagged one."""
    parts: list[tuple[str, int]] = []
    for i, size in enumerate(sizes):
        part = f"{size}:{tags[i]}" if tags and tags[i] else str(size)
        if parts and parts[-1][0] == part:
            parts[-1] = (part, parts[-1][1] + 1)
        else:
            parts.append((part, 1))
    return " + ".join(f"{count} x {part}" if count > 1 else part for part, count in parts)


_BLOCK_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A name component that is a number."""


def fold_names(names: Iterable[str]) -> str:
    """Module names as one text, block numbers folded into ranges.

    >>> fold_names(["blocks.0.to_q", "blocks.1.to_q", "blocks.2.to_q", "out"])
    'blocks.{0-2}.to_q, out'
    """
    return ", ".join(pattern for pattern, _ in _fold(list(names)))


def without_numbers(name: str) -> str:
    """A module's name with block numbers as stars: what the same layers of repeated blocks share.

    >>> without_numbers("blocks.0.to_q")
    'blocks.*.to_q'
    """
    return _BLOCK_NUMBER.sub("*", name)


def _fold(names: list[str]) -> list[tuple[str, list[str]]]:
    """Exact patterns that together are the names, each with the names that it stands for."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(without_numbers(name), []).append(name)
    folded = []
    for members in groups.values():
        by_numbers = {tuple(int(number) for number in _BLOCK_NUMBER.findall(name)): name for name in members}
        for columns in _products(list(by_numbers)):
            covered = [by_numbers[numbers] for numbers in product(*columns)]
            folded.append((_with_numbers(members[0], map(_ranges, columns)), covered))
    return folded


def _with_numbers(name: str, numbers: Iterator[str]) -> str:
    return _BLOCK_NUMBER.sub(lambda _: next(numbers), name)


def _products(rows: list[tuple[int, ...]]) -> list[list[list[int]]]:
    """Rows of numbers as products of columns: {(0, 0), (0, 1), (1, 0), (1, 1)} is [[0, 1], [0, 1]]."""
    if not rows or not rows[0]:
        return [[]] if rows else []
    tails: dict[int, list[tuple[int, ...]]] = {}
    for row in rows:
        tails.setdefault(row[0], []).append(row[1:])
    heads: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for head, tail in tails.items():
        heads.setdefault(tuple(sorted(tail)), []).append(head)
    return [[sorted(head), *columns] for tail, head in heads.items() for columns in _products(list(tail))]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"


def _group_by_value(mapping: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, value in mapping.items():
        groups.setdefault(value, []).append(key)
    return groups
