"""diffusers' quantizer: ``from_pretrained`` and ``save_pretrained`` of denoisers with packed Linears."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from .config import SegQuantConfig
from .loading import PackedLoading, verify_files


class SegQuantDiffusersQuantizer(PackedLoading, DiffusersQuantizer):
    """See :class:`diffusers.DiffusersQuantizer` for when each method is called."""

    def __init__(self, quantization_config: SegQuantConfig, **kwargs: Any) -> None:
        # A copy: the caller's object may serve several models.
        DiffusersQuantizer.__init__(self, copy.copy(quantization_config), **kwargs)
        # Whether the files hold codes, the config knows best (diffusers says yes of every single file).
        self.pre_quantized = self.pre_quantized and quantization_config.checkpoint is not None

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """A checkpoint is loaded in the dtype it was saved in, unless another is asked for."""
        return self._default_dtype(torch_dtype)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Check the files; called before the model is filled."""
        if self.pre_quantized:
            verify_files(checkpoint_files)
        return loaded_keys

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse files that lack tensors of packed Linears."""
        self._check_missing(missing_keys)
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether an arriving weight is to be quantized."""
        return not self.pre_quantized and self._at_load.wants(param_name)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Quantize an arriving weight."""
        self._at_load.arrive(model, param_name, param_value.to(target_device))

    @property
    def supports_parallel_loading(self) -> bool:
        """Packed files are only copied; quantizing at load goes one layer at a time, for its memory."""
        return self.pre_quantized

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors as a file holds them."""
        from ..checkpoints.tensors import for_file

        if not safe_serialization:
            raise ValueError("segquant checkpoints are safetensors, never pickle: leave out safe_serialization=False")
        return for_file(state_dict, self._checkpoint.layers), {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._prepare(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._finish(model)
        return model

    def _set_config(self, model: Any, config: SegQuantConfig) -> None:
        model.register_to_config(quantization_config=config)

    def _dequantize(self, model: Any) -> nn.Module:
        self._plain(model)
        # diffusers leaves this in the config, which the plain model would be saved with.
        kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = FrozenDict(kept)
        return model

    @property
    def is_serializable(self) -> bool:
        """Always."""
        return True
