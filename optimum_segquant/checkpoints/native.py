"""Checkpoints in the keys that inference engines know: ``export_native(model_or_pipeline, directory)``.

The directory is the one that ModelOpt's ``export_hf_checkpoint`` writes for diffusers: ``config.json`` with a
``quantization_config``, ``diffusion_pytorch_model.safetensors`` with ``weight``, ``weight_scale`` and ``input_scale``
of each quantized Linear, all else as diffusers saves it. It is written here and not by ModelOpt's exporter, since that
one works on the model in place, rewrites smoothing, does not know packed Linears and takes segmented ones for
unquantized; for models that it can export, the result is the same. Which layers fit is decided in
:mod:`modelopt_ext.export.native`.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from modelopt.torch.opt.dynamic import DynamicModule
from modelopt.torch.quantization.nn import TensorQuantizer
from safetensors.torch import save_file
from torch import Tensor, nn

from modelopt_ext import PackedLinear
from modelopt_ext.export.native import kept_by_engines, native_layers, native_tensors, quantization_config

from ..files import staged_directory

__all__ = ["export_native"]

logger = logging.getLogger(__name__)

_SHOWN = 5
"""Names in a message."""


def export_native(
    model: ModelMixin | DiffusionPipeline, save_dir: str | os.PathLike[str], *, max_shard_size: int | str = "10GB"
) -> Path:
    """Write a quantized diffusers model, or a pipeline with such models, for vLLM-Omni, SGLang or TensorRT-LLM.

    Args:
        model: calibrated by ``mtq.quantize(model, native_config(...), forward_loop)``, or compressed, or loaded from a
            ``segquant`` checkpoint; it is not changed. Of a pipeline every component with quantized Linears is written
            in stock keys, the others by their own ``save_pretrained``.
        save_dir: directory to write; what was there is replaced when the new files are complete, and kept if
            anything fails.
        max_shard_size: weights are split into files no larger than this, e.g. ``"2GB"``.

    Returns:
        ``save_dir``.

    Raises:
        modelopt_ext.export.native.NotRepresentableError: a layer has what stock keys can't say (segments, smoothing,
            a shift, ...): it is named, with the config that would do.
        ValueError: nothing is quantized, or the model's tensors are not those of its class.
        TypeError: ``model`` is no diffusers model or pipeline, or a component of another library is quantized.
        OSError: the disk is full; what was in ``save_dir`` is still there.
    """
    if isinstance(model, DiffusionPipeline):
        return _export_pipeline(model, Path(save_dir), max_shard_size)
    if not isinstance(model, ModelMixin):
        raise TypeError(
            f"export_native takes a diffusers model or pipeline, not a {type(model).__name__}; for models of "
            "transformers use modelopt.torch.export.export_hf_checkpoint"
        )
    prepared = _Prepared(model)
    with staged_directory(save_dir) as staged:
        prepared.write(staged, max_shard_size)
    return Path(save_dir)


def _export_pipeline(pipeline: DiffusionPipeline, save_dir: Path, max_shard_size: int | str) -> Path:
    components = {name: part for name, part in pipeline.components.items() if part is not None}
    quantized = [name for name, part in components.items() if isinstance(part, nn.Module) and _is_quantized(part)]
    if not quantized:
        raise ValueError(f"no component of this {type(pipeline).__name__} is quantized; call mtq.quantize on one first")
    for name in quantized:
        if not isinstance(components[name], ModelMixin):
            raise TypeError(
                f"{name}, a {type(components[name]).__name__}, is quantized, and only diffusers models have native "
                "checkpoints; save it by itself with modelopt.torch.export.export_hf_checkpoint, and leave it in full "
                "precision here"
            )
    prepared = {name: _Prepared(components[name]) for name in quantized}
    with staged_directory(save_dir) as staged:
        for name, part in components.items():
            folder = staged / name
            if name in prepared:
                folder.mkdir()
                prepared[name].write(folder, max_shard_size)
            elif hasattr(part, "save_pretrained"):
                part.save_pretrained(folder)
        pipeline.save_config(staged)
        _update(staged / pipeline.config_name, None)
    return save_dir


class _Prepared:
    """A model whose layers are all known to fit, so that nothing is written before that is sure."""

    def __init__(self, model: ModelMixin) -> None:
        self.model = model
        if hasattr(model, "peft_config"):
            raise ValueError(
                "the model carries LoRA adapters; fuse them before quantization (fuse_lora, unload_lora), or remove "
                "them (delete_adapters) and load them on top in the engine"
            )
        self.format, self.layers = native_layers(model)
        self.config = quantization_config(self.format, self.layers, _plain_layers(model, self.layers))
        _check_names(model, self.state_dict())
        _warn_of_engines(model, self.layers)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's tensors under stock keys, still where they are."""
        quantizers = [name for name, module in self.model.named_modules() if isinstance(module, TensorQuantizer)]
        dropped = (*(f"{name}." for name in self.layers), *(f"{name}." for name in quantizers))
        tensors = {key: value for key, value in self.model.state_dict().items() if not key.startswith(dropped)}
        for name, layer in self.layers.items():
            tensors |= {f"{name}.{key}": value for key, value in native_tensors(layer, self.format).items()}
        return tensors

    def write(self, directory: Path, max_shard_size: int | str) -> None:
        """Write ``config.json`` and the weights."""
        self.model.save_config(directory)
        _update(directory / self.model.config_name, self.config)
        _write_shards(self.state_dict(), directory, max_shard_size)
        logger.info("%d Linears written to %s in the %s layout", len(self.layers), directory, self.format)


def _is_quantized(model: nn.Module) -> bool:
    return any(
        isinstance(module, PackedLinear) or (isinstance(module, TensorQuantizer) and module.is_enabled)
        for module in model.modules()
    )


def _plain_layers(model: nn.Module, quantized: Container[str]) -> list[str]:
    """Linears and convolutions that stay in full precision."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and name not in quantized]


def _check_names(model: ModelMixin, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that an engine which builds the model from its config would not expect.

    Raises:
        ValueError: names them.
    """
    scales = (".weight_scale", ".input_scale")
    names = {key for key in tensors if not key.endswith(scales)}
    expected = _skeleton_names(model)
    if extra := sorted(names - expected):
        raise ValueError(
            f"{type(model).__name__} has no {', '.join(extra[:_SHOWN])}: the model was changed after it was made from "
            "its config, or a bias was added (bias_correction on a Linear without one); export the model as it was"
        )
    if missing := sorted(expected - names):
        raise ValueError(f"the model lacks {', '.join(missing[:_SHOWN])} of its class {type(model).__name__}")


def _skeleton_names(model: ModelMixin) -> set[str]:
    """Names in the state dict of a model that is made from ``model``'s config."""
    # Quantization may have put a class of its own in front of the model's.
    made = next(cls for cls in type(model).__mro__ if not issubclass(cls, DynamicModule))
    known = inspect.signature(made).parameters
    arguments = {name: value for name, value in model.config.items() if name in known}
    with torch.device("meta"):
        return set(made(**arguments).state_dict())


def _warn_of_engines(model: ModelMixin, layers: Mapping[str, PackedLinear]) -> None:
    kept = kept_by_engines(model, layers)
    if kept:
        logger.warning(
            "%d of %d quantized Linears are embedders, modulation or the last projection (%s, ...), which vLLM-Omni "
            "and SGLang have in full precision only: they can't load this checkpoint. native_config(...) leaves those "
            "layers out (every_linear=False)",
            len(kept),
            len(layers),
            ", ".join(kept[:2]),
        )


def _update(path: Path, quantization: Mapping[str, Any] | None) -> None:
    """Set (or remove) ``quantization_config`` in a saved config, and leave out where the model was loaded from."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content.pop("_name_or_path", None)
    content.pop("quantization_config", None)
    if quantization is not None:
        content["quantization_config"] = dict(quantization)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_shards(tensors: Mapping[str, Tensor], directory: Path, max_shard_size: int | str) -> None:
    """Write safetensors under diffusers' names, with an index if there are several."""
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(_unshared(shard), directory / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory, which safetensors refuses (a module in two places)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result
