"""transformers' quantizer: ``from_pretrained`` and ``save_pretrained`` of text encoders with packed Linears.

Written for the interfaces of transformers 4.57 and 5; methods that one of them does not call are marked.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from .config import SegQuantConfig
from .loading import PackedLoading, verify_files


class SegQuantHfQuantizer(PackedLoading, HfQuantizer):
    """See :class:`transformers.quantizers.HfQuantizer` for when each method is called."""

    requires_parameters_quantization = True

    def __init__(self, quantization_config: SegQuantConfig, **kwargs: Any) -> None:
        # A copy: the caller's object may serve several models.
        HfQuantizer.__init__(self, copy.copy(quantization_config), **kwargs)
        # Whether the files hold codes, the config knows best (diffusers says yes of every single file).
        self.pre_quantized = self.pre_quantized and quantization_config.checkpoint is not None

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """A checkpoint is loaded in the dtype it was saved in, unless another is asked for."""
        return self._default_dtype(dtype)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse files that lack tensors of packed Linears (transformers 4)."""
        self._check_missing(missing_keys)
        return missing_keys

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether an arriving weight is to be quantized."""
        return not self.pre_quantized and self._at_load.wants(param_name)

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Quantize an arriving weight (transformers 4)."""
        self._at_load.arrive(model, param_name, param_value.to(target_device))

    def get_quantize_ops(self) -> Any:
        """What quantizes an arriving weight (transformers 5)."""
        from transformers.core_model_loading import ConversionOps

        at_load = self._at_load

        class QuantizeWeight(ConversionOps):
            """Puts a packed Linear into the model in the place of a plain one."""

            def convert(
                self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
            ) -> dict[str, Any]:
                (value,) = input_dict.values()
                at_load.arrive(model, full_layer_name, value[0] if isinstance(value, list) else value)
                missing = kwargs.get("missing_keys")
                if missing is not None:
                    missing.discard(full_layer_name)
                return {}

        return QuantizeWeight()

    def get_state_dict_and_metadata(
        self, model: nn.Module, safe_serialization: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors as a file holds them."""
        from ..checkpoints.tensors import for_file

        return for_file(model.state_dict(), self._checkpoint.layers), {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            files = kwargs.get("checkpoint_files")
            if files is None:  # transformers 4 tells the place only
                place = getattr(getattr(model, "config", None), "name_or_path", "")
                files = [os.path.join(place, "config.json")] if place and os.path.isdir(place) else []
            verify_files(files)
            self._check_counts(kwargs.get("checkpoint_files") or ())
        self._prepare(model)
        if self.pre_quantized:
            _mark_initialized(model, self._checkpoint.layers)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._finish(model)
        return model

    def _set_config(self, model: Any, config: SegQuantConfig) -> None:
        model.config.quantization_config = config

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return self._plain(model, dtype)

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Always, as safetensors."""
        if safe_serialization is False:
            raise ValueError("segquant checkpoints are safetensors, never pickle: leave out safe_serialization=False")
        return True


def _mark_initialized(model: nn.Module, layers: Iterable[str]) -> None:
    """Keep transformers 4 from drawing random numbers into codes: some models initialize their children's weights."""
    for name in layers:
        parts = name.split(".")
        for length in range(len(parts) + 1):
            model.get_submodule(".".join(parts[:length]))._is_hf_initialized = True  # type: ignore[assignment]
