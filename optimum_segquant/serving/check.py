"""Does a model repository say what its files say?

:func:`check_model_repository` reads every ``config.pbtxt`` and compares it with the ONNX graph: Triton refuses most of
these mistakes when it starts, some only at the first request, and one, a type of the wrong width, not at all.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .local import latest_version
from .model_config import CONFIG_FILE, DATA_TYPES, ConfigError, read_config
from .served import RequestError
from .signature import ModelSignature, TensorSignature, signature_of
from .triton_config import FILES, PLATFORMS

__all__ = ["check_model_repository"]

_NAMES = {number: name for name, number in DATA_TYPES.items()}


def check_model_repository(path: str | os.PathLike[str], *, engines: bool = True) -> dict[str, Any]:
    """Compare every configuration of a repository with its model's files.

    Args:
        path: of the repository.
        engines: whether TensorRT engines must have been built.

    Returns:
        The ``ModelConfig`` messages by model.

    Raises:
        ConfigError: lists everything that is wrong, with the model's name.
    """
    repository = Path(path)
    directories = sorted(entry for entry in repository.glob("*") if entry.is_dir() and not entry.name.startswith("."))
    if not directories:
        raise ConfigError(f"{repository} holds no models: give the directory that write_model_repository wrote")
    configs, problems = {}, []
    for directory in directories:
        try:
            configs[directory.name] = read_config(directory / CONFIG_FILE)
            problems += [
                f"{directory.name}: {problem}" for problem in _problems(directory, configs[directory.name], engines)
            ]
        except (ConfigError, RequestError, ValueError, FileNotFoundError) as error:
            problems.append(f"{directory.name}: {error}")
    if problems:
        raise ConfigError(f"{repository} is not in order: " + "; ".join(problems))
    return configs


def _problems(directory: Path, config: Any, engines: bool) -> Iterator[str]:
    if config.name != directory.name:
        yield f"the configuration names the model {config.name!r}, its directory must have that name"
    yield from _general(config)
    version = latest_version(directory)
    if config.backend == "python":
        if not (version / "model.py").is_file():
            yield f"{version.name}/model.py is missing"
        return
    if config.backend not in PLATFORMS:
        yield f"backend {config.backend!r} is none of {', '.join(PLATFORMS)}"
        return
    if config.platform and config.platform != PLATFORMS[config.backend]:
        yield f"platform {config.platform!r} does not go with backend {config.backend!r}: {PLATFORMS[config.backend]!r}"
    file = version / (config.default_model_filename or FILES[config.backend])
    if not file.is_file() and (engines or config.backend != "tensorrt"):
        remedy = "build it with the trtexec command of README.md" if config.backend == "tensorrt" else "write it again"
        yield f"{version.name}/{file.name} is missing: {remedy}"
    graph = version / "model.onnx"
    if graph.is_file():
        yield from _compare(config, signature_of(graph))
    elif config.backend == "tensorrt":
        yield f"{version.name}/model.onnx, which the engine is compared with, is missing"


def _general(config: Any) -> Iterator[str]:
    """What Triton's core refuses in any configuration."""
    if config.max_batch_size < 0:
        yield f"max_batch_size is {config.max_batch_size}, it must not be negative"
    if config.HasField("dynamic_batching"):
        if config.max_batch_size < 2:
            yield "dynamic_batching without a max_batch_size above 1 does nothing"
        for size in config.dynamic_batching.preferred_batch_size:
            if not 1 <= size <= config.max_batch_size:
                yield f"preferred_batch_size {size} is not between 1 and max_batch_size {config.max_batch_size}"
    for group in config.instance_group:
        kind = group.DESCRIPTOR.fields_by_name["kind"].enum_type.values_by_number[group.kind].name
        if group.gpus and kind in ("KIND_CPU", "KIND_MODEL"):
            yield f"an instance group of {kind} names GPUs"
        if config.backend == "tensorrt" and kind == "KIND_CPU":
            yield "TensorRT has no instances on the CPU"
    for side in ("input", "output"):
        entries = getattr(config, side)
        if not entries:
            yield f"it has no {side}"
        for name, count in Counter(entry.name for entry in entries).items():
            if count > 1:
                yield f"{side} {name!r} is there {count} times"
        for entry in entries:
            yield from _entry_problems(side, entry, config.max_batch_size)


def _entry_problems(side: str, entry: Any, max_batch_size: int) -> Iterator[str]:
    label = f"{side} {entry.name!r}"
    if not entry.name:
        yield f"an {side} has no name"
    if entry.data_type == DATA_TYPES["TYPE_INVALID"]:
        yield f"{label} has no data_type"
    if not entry.dims:
        yield f"{label} has no dims: at least one is needed, [1] with an empty reshape for nothing but the batch"
    for sizes in (entry.dims, entry.reshape.shape):
        for size in sizes:
            if size < 1 and size != -1:
                yield f"{label} has the size {size}: write a size of 1 or more, or -1 for any"
    if entry.HasField("reshape"):
        if not entry.reshape.shape and max_batch_size == 0:
            yield f"{label} has an empty reshape, which needs a batch"
        elif _elements(entry.dims) != _elements(entry.reshape.shape):
            elements, reshaped = _elements(entry.dims), _elements(entry.reshape.shape)
            yield f"{label} has {elements} elements in dims and {reshaped} in reshape"


def _elements(sizes: Any) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _compare(config: Any, signature: ModelSignature) -> Iterator[str]:
    if config.max_batch_size > 0 and not signature.batch_axes:
        yield (
            f"max_batch_size is {config.max_batch_size}, but not every tensor of the graph has the batch as its first "
            "axis: write 0"
        )
        return
    for side, tensors in (("input", signature.inputs), ("output", signature.outputs)):
        entries = {entry.name: entry for entry in getattr(config, side)}
        known = {tensor.name: tensor for tensor in tensors}
        for name in entries:
            if name not in known:
                yield f"the graph has no {side} {name!r}; it has {', '.join(known)}"
        for name, tensor in known.items():
            if name in entries:
                yield from _compare_tensor(side, entries[name], tensor, config)
            elif side == "input":
                yield f"the configuration lacks the input {name!r} of the graph"


def _compare_tensor(side: str, entry: Any, tensor: TensorSignature, config: Any) -> Iterator[str]:
    label = f"{side} {entry.name!r}"
    if _NAMES[entry.data_type] != tensor.data_type:
        yield f"{label} is {_NAMES[entry.data_type]}, the graph has {tensor.data_type}"
    sizes = tuple(entry.reshape.shape if entry.HasField("reshape") else entry.dims)
    if not tensor.shape and config.max_batch_size == 0:
        if config.backend == "tensorrt":
            yield f"{label} has no axes in the graph, which TensorRT's back end does not take"
        elif any(size != 1 for size in sizes):
            yield f"{label} has no axes in the graph: its dims must be [1], not {list(sizes)}"
        return
    shape = tensor.dims[1:] if config.max_batch_size else tensor.dims
    if len(sizes) != len(shape):
        yield (
            f"{label} has {len(sizes)} dims {list(sizes)}, the graph {len(shape)} {list(shape)}"
            + (" beside the batch" if config.max_batch_size else "")
        )
        return
    for index, (size, real) in enumerate(zip(sizes, shape, strict=True)):
        if real != -1 and size != real:
            yield f"{label} has {size} as dim {index}, the graph {real}"
