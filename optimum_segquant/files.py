"""Directories that appear whole or not at all, and manifests of their files.

:func:`staged_directory` lets a save write beside its target and moves the result into place at the end, so that a full
disk, an error or a kill never leaves half a model under the target's name, and never costs the model that was there.
:func:`write_manifest` lists the size and SHA-256 of every file of a directory; :func:`verify_manifest` checks them
before anything is loaded, and names every file that is missing, truncated or altered.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = [
    "MANIFEST_NAME",
    "MANIFEST_VERSION",
    "DamagedFilesError",
    "check_replaceable",
    "check_spares",
    "check_writable",
    "full_disk_named",
    "replaced_file",
    "sha256_of",
    "staged_directory",
    "verify_manifest",
    "write_manifest",
]

logger = logging.getLogger(__name__)

MANIFEST_NAME = "segquant_manifest.json"
MANIFEST_VERSION = 1

_CHUNK = 1 << 20
"""Bytes hashed at a time."""

_MODEL_FILES = ("config.json", "model_index.json", "model.onnx", MANIFEST_NAME)
"""A directory that holds one of these is a model, and may be replaced by another."""

_KEPT = (".*", "*.md", "LICENSE*", "NOTICE*")
"""Top-level entries of a replaced model that the new one takes over, unless it brings its own: what people add."""


class DamagedFilesError(ValueError):
    """Files of a saved model are missing, truncated or altered; nothing of it was loaded."""


@contextmanager
def staged_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a new, empty directory beside ``target`` that takes its place when the block ends without an error.

    An existing ``target`` stays as it is until then, and for good if the block raises, if the disk is full or if the
    move fails; the directory given is removed in that case. Hidden entries, ``*.md`` and licence files of a model that
    is replaced (``.git``, a model card) are taken over. Files are flushed to the disk before the move, since
    some file systems report a full disk only then.

    Args:
        target: directory to write; its parents are made. A symbolic link is followed.

    Yields:
        Path of the directory to write to, on the same file system.

    Raises:
        NotADirectoryError: ``target`` is a file.
        FileExistsError: ``target`` is a directory with files, none of which says that it is a model.
        OSError: the disk is full, or the move failed; ``target`` is as before.
    """
    final = Path(target).expanduser().resolve()
    check_replaceable(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    staged = final.with_name(f".{final.name}.{token}.partial")
    try:
        with full_disk_named(f"{final} was written, which is as before", "free some, or save to another disk"):
            staged.mkdir()
            yield staged
            check_replaceable(final)
            _take_over(final, staged)
            _flush(staged)
            _replace(final, staged, final.with_name(f".{final.name}.{token}.replaced"))
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


@contextmanager
def full_disk_named(doing: str, remedy: str) -> Iterator[None]:
    """Turn the errors of a full disk, which libraries raise in types of their own, into one with a remedy.

    Args:
        doing: what goes on inside, as in "while ...".
        remedy: what to do.

    Raises:
        OSError: ENOSPC, the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        raise OSError(errno.ENOSPC, f"No space left on device while {doing}: {remedy}") from error


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left on device" in str(error)  # safetensors has its own type, without a number


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a name to write to; when the block ends without an error the file is flushed and takes ``path``'s name."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # several processes may write one folder
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_replaceable(target: Path) -> None:
    """Whether :func:`staged_directory` would take ``target``; raises what that raises."""
    if not target.exists():
        return
    if not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: give the name of a directory to save to")
    entries = [entry.name for entry in target.iterdir()]
    if entries and not any(name in entries for name in _MODEL_FILES) and not _only_kept(target):
        raise FileExistsError(
            f"{target} holds files ({', '.join(sorted(entries)[:3])}) but no model "
            "(config.json, model_index.json or model.onnx) that could be replaced: save to an empty or new directory"
        )


def check_spares(target: Path, *sources: str | os.PathLike[str] | None) -> None:
    """Refuse a directory that can't be replaced without losing what it is made from.

    Args:
        target: directory to write.
        sources: files and directories that are read; names that are none of both, and None, are passed over.

    Raises:
        ValueError: one of them is ``target`` or lies in it.
    """
    target = target.expanduser().resolve()
    for source in sources:
        path = None if source is None else Path(source).expanduser().resolve()
        if path is not None and path.exists() and (path == target or target in path.parents):
            raise ValueError(
                f"{target} would be replaced as a whole, and {path} with it, which is read: give another directory to "
                "save to"
            )


def check_writable(
    path: str | os.PathLike[str], *, example: str, endings: Iterable[str] = (), kind: str = "a file"
) -> Path:
    """Refuse the name of a file that can't be written, before the work that it is to hold.

    Args:
        path: of the file; its folder need not exist.
        example: a good name, for messages.
        endings: that it may have, with their dots, in lower case; by default any.
        kind: what is written, for messages.

    Returns:
        The path, with ``~`` expanded.

    Raises:
        ValueError: another ending.
        IsADirectoryError, NotADirectoryError, PermissionError: there is no such place for a file.
    """
    target = Path(path).expanduser()
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory: give the name of {kind}, such as {target / example}")
    allowed = sorted(endings)
    if allowed and target.suffix.lower() not in allowed:
        raise ValueError(f"{target} must end in {', '.join(allowed)}, such as {target.with_name(example)}")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{target} can't be written, {folder} is a file: give another name")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{target} can't be written, {folder} is not yours to write to: give another name")
    return target


def _kept_entries(target: Path) -> list[Path]:
    return sorted({entry for pattern in _KEPT for entry in target.glob(pattern)})


def _only_kept(target: Path) -> bool:
    return set(_kept_entries(target)) == set(target.iterdir())


def _take_over(old: Path, new: Path) -> None:
    if not old.exists():
        return
    for entry in _kept_entries(old):
        copy = new / entry.name
        if copy.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, copy, symlinks=True)
        else:
            shutil.copy2(entry, copy, follow_symlinks=False)


def _flush(directory: Path) -> None:
    for path in _files(directory):
        if not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _replace(target: Path, staged: Path, aside: Path) -> None:
    """Move ``staged`` to ``target``; what was there waits under ``aside`` until the move is done."""
    replaced = target.exists()
    if replaced:
        target.rename(aside)
    try:
        staged.rename(target)
    except BaseException:
        if replaced:
            aside.rename(target)
        raise
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)
        if aside.exists():
            logger.warning("%s is saved, but the model it replaces could not be removed: it lies in %s", target, aside)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits; reads it in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(directory: str | os.PathLike[str], files: Iterable[str] | None = None) -> Path:
    """Write :data:`MANIFEST_NAME` into ``directory``: size in bytes and SHA-256 of its files.

    Args:
        directory: a saved model, in its final form: call this last, inside :func:`staged_directory`.
        files: paths relative to ``directory`` to list; by default every file in it and below, but for hidden ones,
            ``*.md`` and licence files, which people edit.

    Returns:
        Path of the manifest.
    """
    directory = Path(directory)
    names = list(files) if files is not None else _listed(directory)
    entries = {
        name: {"size": (directory / name).stat().st_size, "sha256": sha256_of(directory / name)}
        for name in sorted(names)
        if name != MANIFEST_NAME
    }
    path = directory / MANIFEST_NAME
    with replaced_file(path) as partial:  # sealing an existing directory must not cost its manifest
        partial.write_text(json.dumps({"manifest_version": MANIFEST_VERSION, "files": entries}, indent=2) + "\n")
    return path


def _listed(directory: Path) -> list[str]:
    kept = set(_kept_entries(directory))
    return [
        path.relative_to(directory).as_posix()
        for path in _files(directory)
        if directory / path.relative_to(directory).parts[0] not in kept
    ]


def verify_manifest(
    directory: str | os.PathLike[str], *, files: Iterable[str] | None = None, required: bool = True
) -> dict[str, str]:
    """Check the files of ``directory`` against its manifest, before anything of them is loaded.

    Args:
        directory: a saved model.
        files: paths relative to ``directory`` that must be listed, present and intact; by default all that are listed.
        required: raise if there is no manifest; otherwise that gives an empty result.

    Returns:
        SHA-256 by relative path of the files checked.

    Raises:
        DamagedFilesError: names every file that is missing, truncated, altered or not listed.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    if not path.is_file():
        if required:
            raise DamagedFilesError(f"{directory} has no {MANIFEST_NAME}: copy or download the whole directory again")
        return {}
    listed = _read_manifest(path)
    wanted = list(listed) if files is None else list(files)
    problems = [problem for name in wanted if (problem := _problem(directory, name, listed.get(name)))]
    if problems:
        raise DamagedFilesError(
            f"{directory} is damaged, nothing of it was loaded: {'; '.join(problems)}. Copy, download or save it again"
        )
    return {name: listed[name]["sha256"] for name in wanted}


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text())
        version, files = content["manifest_version"], content["files"]
        for name, entry in files.items():
            pure = PurePosixPath(name)
            if pure.is_absolute() or ".." in pure.parts:
                raise ValueError(f"{name} points out of the directory")
            if not (isinstance(entry["size"], int) and len(entry["sha256"]) == 64):
                raise ValueError(f"{name} has no valid size and checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFilesError(f"{path} is damaged ({error}): copy, download or save the directory again") from error
    if version != MANIFEST_VERSION:
        raise DamagedFilesError(
            f"{path} has manifest_version {version!r}, this release reads {MANIFEST_VERSION}: update optimum-segquant"
        )
    return files


def _problem(directory: Path, name: str, entry: dict[str, Any] | None) -> str | None:
    if entry is None:
        return f"{name} is not in {MANIFEST_NAME}"
    path = directory / name
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["size"]:
        kind = "truncated" if size < entry["size"] else "altered"
        return f"{name} is {kind} ({size} of {entry['size']} bytes)"
    if sha256_of(path) != entry["sha256"]:
        return f"{name} is altered (its checksum differs)"
    return None
