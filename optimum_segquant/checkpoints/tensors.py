"""Packed Linears as a checkpoint holds them, and back: which they are, their skeletons, their tensors.

Two things make the tensors in a file differ from those in memory; a loader fills a skeleton that has the file's form,
and :func:`finish` gives them their own form back, without copies.

- Scales, smoothing and shift are float32 and must stay so, bit for bit, whatever dtype a model is loaded in. Loaders
  cast every floating-point tensor and leave integers alone: a file holds them as int32, the bit patterns.
- A checkpoint opened without this package must fail. Some hosts skip a ``quant_method`` that they don't know, with a
  warning, and would cast int8 codes to weights. No host loads a tensor of another shape: a file holds codes (N, K) as
  (1, N, K).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from safetensors import safe_open
from torch import Tensor, nn

from modelopt_ext import PackedLinear
from modelopt_ext.nn.gelu import lighten_gelu

from .config import CheckpointConfig, CheckpointError, PackedLayer

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SHOWN = 5  # names in a message


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed Linears of a model by name; one that is in several places has several names."""
    return {
        name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, PackedLinear)
    }


def describe(model: nn.Module) -> CheckpointConfig:
    """What a checkpoint of ``model`` has to say.

    Raises:
        ValueError: nothing is packed, or adapters are in the way of the module names.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            "the model carries LoRA adapters, which are saved apart (save_lora_adapter, or the pipeline's "
            "save_lora_weights): remove them first (delete_adapters or unload_lora), and load them on top again"
        )
    layers = packed_layers(model)
    if not layers:
        raise ValueError(
            f"nothing in this {type(model).__name__} is packed: quantize it and call modelopt_ext.compress(model) first"
        )
    return CheckpointConfig(
        architecture=type(model).__name__,
        dtype=_DTYPES[_rest_dtype(model)],
        layers={name: PackedLayer(module.spec, module.bias is not None) for name, module in layers.items()},
    )


def _rest_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most parameters that are not codes."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.dtype in _DTYPES:
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def for_file(state_dict: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
    """A state dict as a file holds it: views of the same memory, by name, so that shards don't depend on history.

    Args:
        state_dict: of the whole model.
        layers: names of the packed Linears.
    """
    packed = set(layers)
    return {
        key: _to_file(key.rpartition(".")[2], tensor) if key.rpartition(".")[0] in packed else tensor
        for key, tensor in sorted(state_dict.items())
    }


def _to_file(field: str, value: Tensor) -> Tensor:
    if field in PackedLinear.FLOAT32:
        return value.contiguous().view(torch.int32)
    return value.unsqueeze(0) if field == "weight" else value


def _from_file(field: str, value: Tensor) -> Tensor:
    """The inverse of :func:`_to_file`; what has its own form already stays."""
    if field in PackedLinear.FLOAT32:
        return value.view(torch.float32) if value.dtype == torch.int32 else value
    return value.squeeze(0) if field == "weight" and value.dim() == 3 else value


def prepare(model: nn.Module, config: CheckpointConfig, dtype: torch.dtype | None) -> None:
    """Put empty packed Linears (meta device) in the places of plain ones, for a loader to fill.

    Args:
        model: the architecture, normally on the meta device.
        config: what the checkpoint says.
        dtype: of the bias; None for torch's default.

    Raises:
        CheckpointError: names or sizes do not fit: a checkpoint of another architecture.
    """
    problems = [problem for name, layer in config.layers.items() if (problem := _misfit(model, name, layer))]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint, of a {config.architecture}, does not fit this {type(model).__name__}: "
            f"{'; '.join(problems[:_SHOWN])}{more}. Load it with the class and config.json that it was saved with"
        )
    for name, layer in config.layers.items():
        packed = PackedLinear(layer.spec, layer.bias, dtype, "meta")
        packed.weight = nn.Parameter(_to_file("weight", packed.weight), requires_grad=False)
        for field in PackedLinear.FLOAT32:
            if (value := getattr(packed, field)) is not None:
                setattr(packed, field, _to_file(field, value))
        packed.train(model.training)
        model.set_submodule(name, packed)
    lighten_gelu(model)


def _misfit(model: nn.Module, name: str, layer: PackedLayer) -> str | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return f"{name}: there is no such module"
    if not isinstance(module, nn.Linear):
        return f"{name}: a {type(module).__name__}, not a Linear"
    layout = layer.spec.layout
    expected, found = (layout.in_features, layout.out_features), (module.in_features, module.out_features)
    return None if expected == found else f"{name}: {expected} channels in and out, the model has {found}"


def check_complete(missing: Iterable[str], config: CheckpointConfig) -> None:
    """Refuse a checkpoint in which tensors of packed Linears are missing.

    Args:
        missing: names of tensors that the model has and the files have not.
        config: what the checkpoint says.

    Raises:
        CheckpointError: names them.
    """
    lost = sorted(name for name in missing if name.rpartition(".")[0] in config.layers)
    if lost:
        raise CheckpointError(
            f"the checkpoint's files lack {len(lost)} tensors of quantized layers ({', '.join(lost[:_SHOWN])}): copy, "
            "download or save it again"
        )


def check_counts(files: Iterable[str | os.PathLike[str]], config: CheckpointConfig) -> None:
    """The same before anything is read, for hosts that fill what is missing with numbers of their own.

    Hosts may know tensors by other names than the files do, so tensors of each kind are counted.

    Args:
        files: all safetensors of the checkpoint.
        config: what it says.

    Raises:
        CheckpointError: tensors of a kind are missing.
    """
    wanted: Counter[str] = Counter()
    for layer in config.layers.values():
        wanted.update(name for name, _ in PackedLinear(layer.spec, layer.bias, None, "meta").named_buffers())
    found: Counter[str] = Counter()
    for path in files:
        with safe_open(path, "pt") as file:
            found.update(key.rpartition(".")[2] for key in file.keys())  # noqa: SIM118 (no dict)
    lost = {field: count - found[field] for field, count in wanted.items() if found[field] < count}
    if lost:
        names = ", ".join(f"{count} {field}" for field, count in lost.items())
        raise CheckpointError(
            f"the checkpoint's files lack tensors of quantized layers ({names}): copy, download or save it again"
        )


def finish(model: nn.Module) -> None:
    """Give the tensors of freshly loaded packed Linears their own form, and check what was loaded.

    Weights that accelerate offloads to the CPU are changed in its store.

    Raises:
        CheckpointError: scales were not loaded, or tensors have a dtype that no segquant checkpoint holds.
    """
    for name, module in packed_layers(model).items():
        _finish_offloaded(module)
        for field in ("weight", *PackedLinear.FLOAT32):
            value = getattr(module, field)
            if value is None:
                continue
            if value.is_meta and (field != "weight" or getattr(module, "_hf_hook", None) is None):
                raise CheckpointError(
                    f"{name}.{field} was not loaded. If it was to be offloaded: scales can't be (offload_buffers, or a "
                    "device_map with 'disk'); use a device_map of devices and 'cpu'"
                )
            changed = _from_file(field, value)
            expected = torch.int8 if field == "weight" else torch.float32
            if changed.dtype != expected:
                raise CheckpointError(f"{name}.{field} came as {value.dtype}: save the checkpoint again")
            if field == "weight":
                module.weight = nn.Parameter(changed, requires_grad=False)
            else:
                setattr(module, field, changed)
        for field in ("low_rank_down", "low_rank_up"):
            value = getattr(module, field)
            if value is not None and value.dtype == torch.float32:
                setattr(module, field, _to_16_bits(value))


def _to_16_bits(value: Tensor) -> Tensor:
    """Undo a loader's cast of a 16-bit tensor to float32, exactly."""
    # What fits bfloat16 came from there, but for tensors so plain that the type makes no difference.
    brief = value.to(torch.bfloat16)
    return brief if torch.equal(brief.float(), value) else value.to(torch.float16)


def _finish_offloaded(module: PackedLinear) -> None:
    """The same for the tensors that accelerate's hooks on ``module`` bring in at each forward."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        weights = getattr(one, "weights_map", None)
        store = getattr(weights, "dataset", weights)
        store = getattr(store, "state_dict", store)
        if not isinstance(store, dict):
            continue
        prefix = getattr(weights, "prefix", "")
        for field in ("weight", *PackedLinear.FLOAT32):
            if (value := store.get(f"{prefix}{field}")) is not None:
                store[f"{prefix}{field}"] = _from_file(field, value)


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace packed Linears by plain ones with the rounded weights, in place.

    For a model that was loaded from a checkpoint call its own ``model.dequantize()``, which does this and more.

    Args:
        model: with packed Linears, on real devices.
        dtype: of the new weights; by default each layer's bias's, or that of most other parameters.

    Returns:
        ``model``.

    Raises:
        ValueError: weights are offloaded by accelerate.
    """
    layers = packed_layers(model)
    rest = dtype or _rest_dtype(model)
    for name, module in layers.items():
        if getattr(module, "_hf_hook", None) is not None or module.weight.is_meta:
            raise ValueError(
                f"{name} is offloaded by accelerate: load the model without device_map, or remove the hooks first "
                "(accelerate.hooks.remove_hook_from_submodules)"
            )
    plain: dict[int, nn.Linear] = {}
    for name, module in layers.items():
        if id(module) not in plain:
            plain[id(module)] = module.dequantize(dtype or (rest if module.bias is None else module.bias.dtype))
            plain[id(module)].train(module.training)
        model.set_submodule(name, plain[id(module)])
    return model
