"""Writing ``segquant`` checkpoints through the hosts' own ``save_pretrained``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..files import staged_directory, write_manifest
from .tensors import describe, packed_layers

logger = logging.getLogger(__name__)


def save_segquant(model: Any, directory: str | os.PathLike[str], **kwargs: Any) -> Path:
    """Save a model or a whole pipeline with packed Linears.

    For a model this is ``model.save_pretrained(directory)``; a pipeline appears whole or not at all, too.

    Args:
        model: a diffusers or transformers model after ``modelopt_ext.compress``, or a diffusers pipeline with at least
            one such component.
        directory: where to; an existing checkpoint there is replaced when the new one is complete, and kept if
            anything fails.
        kwargs: for ``save_pretrained``, e.g. ``max_shard_size="2GB"``.

    Returns:
        ``directory``.

    Raises:
        TypeError: ``model`` is neither.
        ValueError: nothing in it is packed, or it can't be saved as asked.
        OSError: the disk is full; what was in ``directory`` is still there.
    """
    components = getattr(model, "components", None)
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"{type(model).__name__} has no save_pretrained: segquant checkpoints are for diffusers and transformers "
            "models and diffusers pipelines; save the state_dict of other modules yourself"
        )
    if isinstance(model, nn.Module):
        describe(model)
        cast(Any, model).save_pretrained(directory, **kwargs)
        return Path(directory)
    if not isinstance(components, dict):
        raise TypeError(f"{type(model).__name__} is neither a model nor a pipeline with components")
    if not any(isinstance(part, nn.Module) and packed_layers(part) for part in components.values()):
        raise ValueError(
            f"no component of this {type(model).__name__} is packed: quantize one and call modelopt_ext.compress on it"
        )
    with staged_directory(directory) as staged:
        model.save_pretrained(staged, **kwargs)
    return Path(directory)


def save_staged(
    save: Callable[..., object],
    attached: Callable[[], Any],
    directory: str | os.PathLike[str],
    kwargs: dict[str, Any],
) -> None:
    """Run a host's ``save_pretrained`` so that its directory appears whole, with a manifest.

    Args:
        save: the host's method, bound to the model.
        attached: gives a context in which the model carries the quantizer that writes the format.
        directory: where to.
        kwargs: of ``save_pretrained``.

    Raises:
        ValueError: pickle, or an upload in the same call, is asked for.
    """
    if kwargs.get("safe_serialization") is False:
        raise ValueError("segquant checkpoints are safetensors, never pickle: leave out safe_serialization=False")
    if kwargs.get("use_flashpack"):
        raise ValueError("segquant checkpoints are safetensors: leave out use_flashpack")
    if kwargs.get("push_to_hub"):
        raise ValueError(
            "save first, then upload the directory with all its files (huggingface_hub.upload_folder): leave out "
            "push_to_hub=True"
        )
    if not kwargs.get("is_main_process", True):
        return  # one process writes
    with staged_directory(directory) as staged, attached():
        save(staged, **kwargs)
        _drop_origin(staged / "config.json")
        write_manifest(staged)


def _drop_origin(config: Path) -> None:
    """Leave out where the model was loaded from: the same model gives the same files, and paths stay private."""
    content = json.loads(config.read_text(encoding="utf-8"))
    if content.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def replaced(holder: Any, **values: Any) -> Iterator[None]:
    """Set attributes of an object for the time of a block; attributes that were not there are removed again."""
    before = {name: vars(holder)[name] for name in values if name in vars(holder)}
    try:
        for name, value in values.items():
            setattr(holder, name, value)
        yield
    finally:
        for name in values:
            if name in before:
                setattr(holder, name, before[name])
            else:
                delattr(holder, name)
