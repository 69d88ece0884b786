"""Prompts from wherever they are: a list, a text, JSON or CSV file, a ``datasets`` dataset, or the package's own set.

:func:`read_prompts` gives a tuple of strings and checks it once, here, so that nothing is sampled with a wrong column.
"""

from __future__ import annotations

import csv
import importlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["COLUMN_NAMES", "FILE_KINDS", "default_prompts", "held_out_prompts", "read_prompts"]

_OWN_PROMPTS = Path(__file__).with_name("default_prompts.txt")
_FOR_CALIBRATION = 64
"""So many of the package's prompts are for calibration; the others are for measuring what it did."""

COLUMN_NAMES = ("prompt", "text", "caption")
"""Columns that are taken where none is named, compared without case, in this order."""

FILE_KINDS = (".txt", ".json", ".jsonl", ".csv")
"""Endings of prompts files."""

_SHOWN = 8
"""Columns in a message."""


def default_prompts(count: int | None = None) -> tuple[str, ...]:
    """The package's own text-to-image prompts: objects, people, places, text, counting, styles; of different lengths.

    Args:
        count: how many, from the first on; by default all 64.

    Raises:
        ValueError: fewer than one, or more than there are.
    """
    return _first(_own_prompts()[:_FOR_CALIBRATION], count)


def held_out_prompts(count: int | None = None) -> tuple[str, ...]:
    """32 more prompts of the same kind, none of :func:`default_prompts`, to measure a calibrated model on.

    Args:
        count: how many, from the first on; by default all.

    Raises:
        ValueError: fewer than one, or more than there are.
    """
    return _first(_own_prompts()[_FOR_CALIBRATION:], count)


def _own_prompts() -> tuple[str, ...]:
    return tuple(_OWN_PROMPTS.read_text(encoding="utf-8").splitlines())


def _first(prompts: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    if count is not None and not 1 <= count <= len(prompts):
        raise ValueError(
            f"the package has {len(prompts)} such prompts, {count} were asked for: give a list or file of your own"
        )
    return prompts[:count]


def read_prompts(
    source: str | os.PathLike[str] | Iterable[Any] | None = None,
    *,
    column: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> tuple[str, ...]:
    """Read prompts.

    Args:
        source: where they are:

            - ``None``: :func:`default_prompts`;
            - a list of strings, or of mappings with a column;
            - a file: ``.txt`` with a prompt a line, ``.json`` (a list of strings or of objects, or an object of lists),
              ``.jsonl`` (a string or an object a line) or ``.csv`` with a header;
            - a ``datasets`` dataset, a directory written by its ``save_to_disk``, or the name of one on the hub, for
              which the package ``datasets`` has to be installed.
        column: of a file or dataset; by default ``prompt``, ``text`` or ``caption``, or the only one there is.
        split: of a dataset given by name or directory.
        limit: how many prompts to take at most, from the first on.

    Returns:
        At least one prompt, in the source's order, without surrounding blanks; empty ones are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file can't be read as what its ending says, no such column, something that is no text, or no
            prompt at all.
        ImportError: a dataset's name is given and ``datasets`` is not installed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if source is None:
        return default_prompts()[:limit]
    if isinstance(source, (str, os.PathLike)):
        where, rows = _named(source, split)
    else:
        where, rows = _where(source), _rows_of(source)
    prompts = tuple(itertools.islice(_texts(_one_column(rows, column, where), column, where), limit))
    if not prompts:
        raise ValueError(f"{where} has no prompts: write at least one")
    return prompts


def _named(source: str | os.PathLike[str], split: str) -> tuple[str, Iterable[Any]]:
    """What a file, a directory or the name of a dataset holds."""
    path = Path(source).expanduser()
    read = _READERS.get(path.suffix.lower())
    if path.is_dir():
        return str(path), _rows_of(_load_dataset(str(path), split, on_disk=True))
    if path.is_file():
        if read is None:
            raise ValueError(f"{path}: name prompts files by what they hold, {', '.join(FILE_KINDS)}")
        return str(path), _read_file(path, read)
    name = os.fspath(source)
    if read is not None or isinstance(source, os.PathLike) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"there is no prompts file {path}: check the path (it is relative to {Path.cwd()})")
    return f"dataset {name}", _rows_of(_load_dataset(name, split, on_disk=False))


def _where(source: Any) -> str:
    return "the list of prompts" if isinstance(source, Sequence) else f"the {type(source).__name__}"


def _rows_of(source: Any) -> Iterable[Any]:
    """The rows of a list, a dataset or anything else that can be iterated over."""
    if isinstance(source, Mapping):
        # What load_dataset gives without a split.
        raise ValueError(f"choose one of the dataset's splits: dataset[{next(iter(source), 'train')!r}]")
    if not isinstance(source, Iterable):
        raise ValueError(f"prompts must be a list of strings, a file or a dataset, not a {type(source).__name__}")
    return source


def _one_column(rows: Iterable[Any], column: str | None, where: str) -> Iterable[Any]:
    """Of a dataset only the column that is needed: others may be images, which are decoded when a row is read."""
    names, select = getattr(rows, "column_names", None), getattr(rows, "select_columns", None)
    return select([_column(dict.fromkeys(names), column, where)]) if names and select is not None else rows


def _load_dataset(name: str, split: str, *, on_disk: bool) -> Any:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no prompts file; to read it as a dataset, pip install datasets, or give a file that ends in "
            f"{', '.join(FILE_KINDS)}"
        ) from error
    try:
        if on_disk and any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(name)
            return saved[split] if isinstance(saved, Mapping) else saved
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # of datasets, fsspec, pyarrow, the network
        reason = " ".join(str(error).split())
        raise ValueError(
            f"dataset {name!r}, split {split!r}, can't be read ({type(error).__name__}: {reason}): check its name and "
            "split, or give a prompts file"
        ) from error


def _read_file(path: Path, read: Callable[[str], Iterable[Any]]) -> Iterable[Any]:
    try:
        return list(read(path.read_text(encoding="utf-8-sig")))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no valid {path.suffix[1:].upper()} ({error}): correct it, or use .txt") from error


def _read_json(text: str) -> Iterable[Any]:
    content = json.loads(text)
    if isinstance(content, list):
        return content
    columns = list(content.values()) if isinstance(content, dict) else []
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]
    raise ValueError("expected a list of strings, a list of objects or an object of equally long lists")


def _read_jsonl(text: str) -> Iterator[Any]:
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _read_csv(text: str) -> Iterator[Any]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    for row in reader:
        if None in row:  # what is behind the last column, as after a comma in a prompt without quotes
            raise ValueError(
                f"line {reader.line_num} has more fields than the header: write texts with commas in quotes"
            )
        yield row


def _lines(text: str) -> list[str]:
    """The lines of a text; ``splitlines`` would also cut at the line breaks of Unicode, which a prompt may hold."""
    return text.split("\n")


_READERS: dict[str, Callable[[str], Iterable[Any]]] = {
    ".txt": _lines,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}


def _texts(rows: Iterable[Any], column: str | None, where: str) -> Iterator[str]:
    """The text of each row that has one."""
    chosen: str | None = None
    for number, row in enumerate(rows, start=1):
        value = row
        if isinstance(row, Mapping):
            chosen = chosen or _column(row, column, where)
            if chosen not in row:
                raise ValueError(f"{where}, row {number} has no column {chosen!r}; it has {', '.join(map(str, row))}")
            value = row[chosen]
        elif column is not None and not isinstance(row, Mapping):
            raise ValueError(f"{where} has no columns, so {column!r} can't be taken: leave the column out")
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(
                f"{where}, row {number}: a prompt must be text, not a {type(value).__name__}"
                + (f"; is {chosen!r} the right column?" if chosen else "")
            )
        if text := value.strip():
            yield text


def _column(row: Mapping[Any, Any], column: str | None, where: str) -> str:
    names = [name for name in row if isinstance(name, str)]
    listed = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    if column is not None:
        if column not in names:
            raise ValueError(f"{where} has no column {column!r}; it has {listed or 'none'}")
        return column
    by_lower = {name.lower(): name for name in reversed(names)}
    found = next((by_lower[known] for known in COLUMN_NAMES if known in by_lower), None)
    if found is None and len(names) == 1:
        found = names[0]
    if found is None:
        raise ValueError(f"{where} has the columns {listed}: say which one holds the prompts (column=...)")
    return found
