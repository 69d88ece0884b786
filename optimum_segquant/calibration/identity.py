"""What recorded data belongs to: pipeline, models, scheduler, settings and versions, as plain types to compare."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..versions import versions
from .settings import CalibrationSettings

__all__ = ["differences", "identity", "plain", "settings_record", "weights_fingerprint"]

_VERSIONED = ("torch", "diffusers", "transformers")
"""Packages whose numbers recorded data depends on."""

_SAMPLED = 64
"""Elements of each tensor that a fingerprint reads."""


def identity(pipeline: Any, settings: CalibrationSettings) -> dict[str, Any]:
    """What has to be equal for recorded data to be that of ``settings`` and ``pipeline``.

    Prompts and call arguments that are no plain values are hashed: nothing private is in it.
    """
    components: dict[str, Any] = pipeline.components
    scheduler = components.get("scheduler")
    return {
        "pipeline": type(pipeline).__name__,
        "models": {name: _model(part) for name, part in components.items() if isinstance(part, nn.Module)},
        "tokenizers": {
            name: f"{type(part).__name__} of {len(part)} tokens"
            for name, part in components.items()
            if name.startswith("tokenizer") and part is not None
        },
        "scheduler": None if scheduler is None else [type(scheduler).__name__, _config(scheduler)],
        **settings_record(settings),
        "versions": {name: version for name, version in versions().items() if name in _VERSIONED},
    }


def settings_record(settings: CalibrationSettings) -> dict[str, Any]:
    """Settings as plain types, with a hash in the place of prompts and of what goes with single prompts."""
    return {
        "settings": {
            "num_inference_steps": settings.num_inference_steps,
            "steps": plain(settings.steps),
            "batch_size": settings.batch_size,
            "seed": settings.seed,
            "max_calls": settings.max_calls,
            "call_kwargs": plain(settings.call_kwargs),
            "per_prompt_kwargs": _hash(plain(settings.per_prompt_kwargs)) if settings.per_prompt_kwargs else None,
        },
        "prompts": {"count": len(settings.prompts), "sha256": _hash(settings.prompts)},
    }


def differences(wanted: Any, found: Any, where: str = "") -> list[str]:
    """Where two nests of plain types differ, as ``settings.seed (0 there, 1 here)``."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        keys = [*wanted, *(key for key in found if key not in wanted)]
        return [
            line for key in keys for line in differences(wanted.get(key), found.get(key), f"{where}.{key}".lstrip("."))
        ]
    if wanted == found:
        return []
    return [f"{where} ({_short(found)} there, {_short(wanted)} here)"]


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes, dtypes and some values of all parameters and buffers; reads a few KiB per tensor.

    Values of weights that accelerate keeps elsewhere are read there; of weights without values (meta device) the rest
    is hashed.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta and tensor.numel():
            digest.update(_sample(tensor))
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        elsewhere = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            name = f"{prefix}.{own}"
            yield name, elsewhere[own] if tensor.is_meta and elsewhere is not None and own in elsewhere else tensor


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, len(flat) - 1, min(_SAMPLED, len(flat)), dtype=torch.float64).long()
    # float8 has no index_select.
    values = torch.stack([flat[i] for i in index.tolist()]) if flat.element_size() == 1 else flat[index.to(flat.device)]
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _model(module: nn.Module) -> dict[str, str]:
    return {
        "class": type(module).__name__,
        "config": _hash(_config(module)),
        "weights": weights_fingerprint(module),
    }


def _config(part: Any) -> Any:
    """A component's config without where it was loaded from and by what version."""
    config: Any = getattr(part, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        return None
    volatile = ("_name_or_path", "_commit_hash", "_diffusers_version", "transformers_version", "_use_default_values")
    return {key: plain(value) for key, value in config.items() if key not in volatile}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Plain types for JSON, with a checksum in the place of tensors, arrays and images."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"tensor {tuple(value.shape)} {value.dtype} {zlib.crc32(data):08x}"
    if hasattr(value, "tobytes"):  # numpy arrays, PIL images
        shape = getattr(value, "shape", None) or getattr(value, "size", None)
        return f"{type(value).__name__} {shape} {zlib.crc32(value.tobytes()):08x}"
    if hasattr(value, "__dataclass_fields__"):
        return {"kind": type(value).__name__, **{name: plain(getattr(value, name)) for name in value.__dict__}}
    return str(value)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
