"""What a packed model carries while a host saves it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..checkpoints.save import replaced
from ..checkpoints.tensors import describe
from .config import SegQuantConfig

_SKIPPED = ("self", "save_directory")


def named_arguments(save: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of ``save_pretrained`` after the directory, by name."""
    names = [name for name in inspect.signature(save).parameters if name not in _SKIPPED]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def adapters_only(model: Any) -> bool:
    """Whether ``save_pretrained`` would save adapters and not the model, as transformers does."""
    return bool(getattr(model, "_hf_peft_config_loaded", False)) and hasattr(model, "get_adapter_state_dict")


@contextmanager
def diffusers_quantizer(model: Any) -> Iterator[None]:
    """A diffusers model with the quantizer that writes its present packed Linears.

    Args:
        model: a ``ModelMixin``.
    """
    from .diffusers_quantizer import SegQuantDiffusersQuantizer

    config = SegQuantConfig.of_checkpoint(describe(model))
    before = model._internal_dict
    with replaced(model, hf_quantizer=SegQuantDiffusersQuantizer(config, pre_quantized=True)):
        try:
            model.register_to_config(quantization_config=config)
            yield
        finally:
            model._internal_dict = before


@contextmanager
def transformers_quantizer(model: Any) -> Iterator[None]:
    """The same for a transformers model.

    Args:
        model: a ``PreTrainedModel``.
    """
    from .transformers_quantizer import SegQuantHfQuantizer

    config = SegQuantConfig.of_checkpoint(describe(model))
    with (
        replaced(model, hf_quantizer=SegQuantHfQuantizer(config, pre_quantized=True)),
        replaced(model.config, quantization_config=config),
    ):
        yield
