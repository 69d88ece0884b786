"""Loading a pipeline or a model by directory or hub name, with errors of one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints.config import CheckpointError
from .files import DamagedFilesError, full_disk_named

__all__ = ["load_pretrained"]

_PIPELINE, _MODEL = "model_index.json", "config.json"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LONGEST = 240  # characters of another library's message
_HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "force_download", "proxies")


def load_pretrained(source: str | os.PathLike[str], **load_kwargs: Any) -> Any:
    """Load a diffusers pipeline, or a model of diffusers or transformers.

    Args:
        source: directory of a saved pipeline (``model_index.json``) or model (``config.json``), or its name on the
            Hugging Face Hub, ``organisation/name``.
        load_kwargs: for ``from_pretrained``: ``torch_dtype``, ``device_map``, ``revision``, ...; ``subfolder`` takes
            one model of a pipeline.

    Returns:
        The pipeline, of the class its ``model_index.json`` names, or the model, in eval mode. Components that were
        saved as empty (Stable Diffusion 3 without T5) need no argument.

    Raises:
        FileNotFoundError: there is no such directory, and the name is none of the hub's either.
        ValueError: the directory holds no pipeline or model, or a file of it is missing or damaged.
        OSError: the hub can't be reached, knows no such model, or the download broke off; or the disk is full.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        with _local_errors(path):
            _refuse_onnx(path)
            return _load(str(path), _local_file(path), load_kwargs)
    if path.exists():
        raise ValueError(
            f"{path} is a file: give the directory of a saved pipeline; a single-file checkpoint is loaded by its "
            "pipeline class's from_single_file, and the pipeline object given here"
        )
    name = os.fspath(source)
    if isinstance(source, os.PathLike) or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(
            f"there is no directory {path} (relative to {Path.cwd()}); names on the hub are organisation/name"
        )
    with _hub_errors(name):
        options = {key: value for key, value in load_kwargs.items() if key in _HUB_OPTIONS}
        return _load(name, _hub_file(name, options), load_kwargs)


def _load(source: str, read: Callable[[str], dict[str, Any] | None], load_kwargs: dict[str, Any]) -> Any:
    """Load what ``source`` is.

    Args:
        source: directory or hub name.
        read: gives the content of a JSON file of it, None if there is none.
        load_kwargs: of the caller.
    """
    folder = load_kwargs.get("subfolder")
    index = None if folder else read(_PIPELINE)
    if index is not None:
        from diffusers import DiffusionPipeline

        empty = {name: None for name, entry in index.items() if entry == [None, None]}
        _check_folders(Path(source), {*_components(index)} - {*load_kwargs})
        return DiffusionPipeline.from_pretrained(source, **{**empty, **load_kwargs})
    config = read(f"{folder}/{_MODEL}" if folder else _MODEL)
    if config is None:
        where = f"{source}/{folder}" if folder else source
        raise ValueError(
            f"{where} holds neither {_PIPELINE} (a pipeline) nor {_MODEL} (a model): give the directory that "
            "save_pretrained wrote"
        )
    return _model_class(source, config).from_pretrained(source, **load_kwargs).eval()


def _refuse_onnx(path: Path) -> None:
    if (path / "deployment.json").is_file() or any(path.glob("*/model.onnx")) or (path / "model.onnx").is_file():
        raise ValueError(
            f"{path} holds ONNX files, which are run and served as they are: give the directory of the pipeline that "
            "they were made from"
        )


def _components(index: dict[str, Any]) -> Iterator[str]:
    """Names of a pipeline's parts that have a folder: ``"vae": ["diffusers", "AutoencoderKL"]``."""
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
            yield name


def _check_folders(path: Path, names: Iterable[str]) -> None:
    missing = [name for name in sorted(names) if path.is_dir() and not (path / name).is_dir()]
    if missing:
        raise ValueError(
            f"{path} has no folder {', '.join(missing)}, which its {_PIPELINE} names: copy or download it again, or "
            f"give the part yourself ({missing[0]}=...)"
        )


def _model_class(source: str, config: dict[str, Any]) -> Any:
    import diffusers
    import transformers

    for library, name in (
        (diffusers, config.get("_class_name")),
        (transformers, next(iter(config.get("architectures") or ()), None)),
    ):
        found = getattr(library, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise ValueError(
        f"{source}: its {_MODEL} names no model class of the installed diffusers or transformers "
        f"({config.get('_class_name') or config.get('architectures')}): update them, or load the model and give the "
        "object"
    )


def _local_file(path: Path) -> Callable[[str], dict[str, Any] | None]:
    def read(name: str) -> dict[str, Any] | None:
        file = path / name
        return _json(file) if file.is_file() else None

    return read


def _hub_file(name: str, options: dict[str, Any]) -> Callable[[str], dict[str, Any] | None]:
    """Reads files of a repository; where the hub can't be reached, those in the cache."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unreachable: Exception | None = None
    if not options.get("local_files_only"):
        try:
            # Fails at once where hf_hub_download tries again for half a minute.
            HfApi(token=options.get("token")).model_info(name, revision=options.get("revision"))
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception as error:  # of requests or httpx, by the hub's version, or its offline mode
            unreachable = error
            options = {**options, "local_files_only": True}

    def read(filename: str) -> dict[str, Any] | None:
        try:
            return _json(Path(hf_hub_download(name, filename, **options)))
        except LocalEntryNotFoundError as error:
            # Not in the cache; a model has no index there, the config is the last file that is looked for.
            if options.get("local_files_only") and not filename.endswith(_MODEL):
                return None
            raise (unreachable or error) from None
        except EntryNotFoundError:
            return None

    return read


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object: copy or download it again")
    return content


@contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (DamagedFilesError, CheckpointError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise  # has its remedy
        raise ValueError(
            f"{path} can't be loaded: {_reason(error)}; a file is missing, damaged or of another version: copy, "
            "download or save it again"
        ) from error


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    with full_disk_named(f"{name} was downloaded", "free some, or set HF_HOME to a folder on another disk"):
        try:
            yield
        except (DamagedFilesError, CheckpointError, ImportError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if isinstance(error, ValueError) and str(error).startswith(name):
                raise  # has its remedy
            raise OSError(
                f"{name} is no local directory and could not be loaded from the hub: {_reason(error)}; check the name, "
                "the network and, for gated models, your login (hf auth login), then start again: files that are "
                "complete are kept"
            ) from error


def _reason(error: BaseException) -> str:
    """One line of what went wrong, as near to its cause as can be told."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return f"{type(error).__name__}: {text}"
