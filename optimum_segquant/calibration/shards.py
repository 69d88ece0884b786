"""Recorded calls in a safetensors file.

Tensors lie in the file under numbers, each once even if several calls hold it (a prompt's embedding, at every step).
Everything else of a call, with the places of its tensors, is JSON in the file's header. Arguments may nest:

    {"tensor": "3"}                       a tensor
    {"list": [...]}, {"tuple": [...]}     lists and tuples of these
    {"dict": [["text_embeds", ...]]}      dicts with names, in order
    {"dtype": "bfloat16"}                 a torch.dtype
    {"value": 0.5}                        None, a bool, a number or a string
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..evaluation import DenoiserCall

__all__ = ["read_shard", "write_shard"]

_HEADER = "calls"


def write_shard(path: Path, calls: Sequence[DenoiserCall]) -> None:
    """Write calls to a file.

    Raises:
        ValueError: an argument is of a type that has no place in a file; it is named.
        OSError: the disk is full.
    """
    tensors = _Tensors()
    header = [
        {
            "inputs": _encode(call.inputs, "", tensors),
            "output": _encode(call.output, "output", tensors),
            "timestep": None if math.isnan(call.timestep) else call.timestep,
            "step": call.step,
            "batch": call.batch,
        }
        for call in calls
    ]
    save_file(tensors.by_key, path, metadata={_HEADER: json.dumps(header)})


def read_shard(path: Path) -> Iterator[DenoiserCall]:
    """The calls of a file, one at a time: a tensor is read when the call that holds it is, and not kept."""
    with safe_open(path, "pt", device="cpu") as file:
        for entry in json.loads(file.metadata()[_HEADER]):
            yield DenoiserCall(
                _decode(entry["inputs"], file),
                _decode(entry["output"], file),
                math.nan if entry["timestep"] is None else entry["timestep"],
                entry["step"],
                entry["batch"],
            )


class _Tensors:
    """Numbers for tensors, one for each object."""

    def __init__(self) -> None:
        self.by_key: dict[str, Tensor] = {}
        self._keys: dict[int, str] = {}

    def key(self, tensor: Tensor) -> str:
        if id(tensor) not in self._keys:
            key = str(len(self.by_key))
            self._keys[id(tensor)] = key
            # Tensors that share memory (an expanded timestep) are refused by safetensors.
            self.by_key[key] = tensor.clone(memory_format=torch.contiguous_format)
        return self._keys[id(tensor)]


def _encode(value: Any, where: str, tensors: _Tensors) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {"tensor": tensors.key(value)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, _encode(item, f"{where}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise ValueError(
        f"the argument {where.lstrip('.')} holds a {type(value).__name__}, which can't be written to a file: call the "
        "pipeline without it, or calibrate on sample_trajectories(...), which keeps calls in memory"
    )


def _decode(entry: dict[str, Any], file: Any) -> Any:
    ((kind, content),) = entry.items()
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "dict":
        return {key: _decode(item, file) for key, item in content}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_decode(item, file) for item in content)
    return getattr(torch, content) if kind == "dtype" else content
