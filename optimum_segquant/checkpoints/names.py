"""Module names folded into patterns and back: ``blocks.{0-23}.attn.to_q`` stands for 24 names.

A checkpoint's ``config.json`` lists every packed module. Hosts send that config along in HTTP headers when they
download files, which have room for some kilobytes; a FLUX-size model has 500 names but a few dozen patterns. Unlike the
folding in messages (:func:`modelopt_ext.plan.fold_names`) this one is exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import product

_RANGE = re.compile(r"\{(\d+)-(\d+)\}")
_NUMBER = re.compile(r"0|[1-9]\d*")

MAX_NAMES = 100_000
"""Names that one checkpoint may list; more is a damaged or malicious file."""


def fold(names: Iterable[str]) -> list[str]:
    """The patterns of a set of module names, sorted.

    >>> fold(["blocks.0.to_q", "blocks.1.to_q", "blocks.0.to_k", "blocks.1.to_k", "out"])
    ['blocks.{0-1}.to_k', 'blocks.{0-1}.to_q', 'out']

    Raises:
        ValueError: a name with braces, which would be read as a range.
    """
    paths = {tuple(name.split(".")) for name in names}
    if any("{" in part or "}" in part for path in paths for part in path):
        raise ValueError("module names with braces can't be written to a checkpoint; rename those modules")
    for position in range(max((len(path) for path in paths), default=0)):
        paths = _fold_at(paths, position)
    return sorted(".".join(path) for path in paths)


def _fold_at(paths: set[tuple[str, ...]], position: int) -> set[tuple[str, ...]]:
    """Merge the paths that differ only in consecutive numbers at ``position``."""
    folded: set[tuple[str, ...]] = set()
    numbers: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for path in paths:
        if position < len(path) and _NUMBER.fullmatch(path[position]):
            numbers.setdefault((path[:position], path[position + 1 :]), []).append(int(path[position]))
        else:
            folded.add(path)
    for (before, after), values in numbers.items():
        folded.update((*before, text, *after) for text in _ranges(sorted(values)))
    return folded


def _ranges(values: list[int]) -> list[str]:
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return [str(first) if first == last else f"{{{first}-{last}}}" for first, last in runs]


def unfold(patterns: Iterable[str]) -> list[str]:
    """The names of patterns, sorted; the inverse of :func:`fold`.

    >>> unfold(["blocks.{0-1}.to_q", "out"])
    ['blocks.0.to_q', 'blocks.1.to_q', 'out']

    Raises:
        ValueError: a broken pattern, a name that comes twice, or more than :data:`MAX_NAMES` names.
    """
    names: list[str] = []
    for pattern in patterns:
        choices = [_choices(part, pattern) for part in pattern.split(".")]
        count = 1
        for choice in choices:
            count *= len(choice)
        if len(names) + count > MAX_NAMES:
            raise ValueError(f"the pattern {pattern!r} stands for {count} modules, which no model has")
        names += [".".join(parts) for parts in product(*choices)]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the module {twice} is listed twice")
    return sorted(names)


def _choices(part: str, pattern: str) -> list[str]:
    match = _RANGE.fullmatch(part)
    if match is None:
        if "{" in part or "}" in part:
            raise ValueError(f"the pattern {pattern!r} has a broken range {part!r}; ranges look like {{0-23}}")
        return [part]
    first, last = int(match[1]), int(match[2])
    if last < first or last - first > MAX_NAMES:
        raise ValueError(f"the pattern {pattern!r} has a broken range {part!r}; ranges look like {{0-23}}")
    return [str(number) for number in range(first, last + 1)]
