"""What diffusers' and transformers' quantizers have in common: building, filling and undoing packed models."""

from __future__ import annotations

import importlib.util
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.config import CheckpointConfig, CheckpointError
from ..files import MANIFEST_NAME, verify_manifest
from .config import SegQuantConfig

logger = logging.getLogger(__name__)


class PackedLoading(ABC):
    """Mixin of both quantizer classes. The hosts call it; nobody else should.

    Attributes:
        quantization_config: the request or the checkpoint's description.
        pre_quantized: whether the files hold packed Linears already.
    """

    quantization_config: SegQuantConfig
    pre_quantized: bool
    # Norms and embeddings that a host keeps in float32 stay so beside packed Linears.
    use_keep_in_fp32_modules = True

    _dtype: torch.dtype | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what can't work before anything is read."""
        if importlib.util.find_spec("accelerate") is None:
            raise ImportError("loading packed models needs accelerate: pip install accelerate")
        if kwargs.get("from_flax") or kwargs.get("from_tf"):
            raise ValueError("packed models are loaded from safetensors: leave out from_flax and from_tf")
        device_map = kwargs.get("device_map")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ValueError(
                "device_map puts modules on the disk, where scales would lose precision: use devices and 'cpu' only"
            )

    def _default_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype asked for, or else the one a checkpoint was saved in."""
        # From here until the model is built, hosts ask for the config only to put it into HTTP headers.
        self.quantization_config.abridged = True
        checkpoint = self.quantization_config.checkpoint
        if dtype is None and self.pre_quantized and checkpoint is not None:
            dtype = getattr(torch, checkpoint.dtype)
            logger.info("segquant: loading in %s, as saved; torch_dtype changes that", dtype)
        self._dtype = dtype
        return dtype

    @property
    def _checkpoint(self) -> CheckpointConfig:
        checkpoint = self.quantization_config.checkpoint
        if checkpoint is None:
            raise CheckpointError("the config describes no packed model: it has no quantization_config of segquant")
        return checkpoint

    def _prepare(self, model: nn.Module) -> None:
        """Put the places of packed tensors into the skeleton, or plan what happens to arriving weights."""
        from ..checkpoints.tensors import prepare

        self.quantization_config.abridged = False
        if self.pre_quantized:
            prepare(model, self._checkpoint, self._dtype)
        else:
            from .at_load import QuantizeAtLoad

            self._at_load = QuantizeAtLoad(model, self.quantization_config)

    def _finish(self, model: nn.Module) -> None:
        from ..checkpoints.tensors import describe, finish

        if self.pre_quantized:
            finish(model)
            return
        self._at_load.finish(model)
        del self._at_load
        self.quantization_config.checkpoint = describe(model)
        self._set_config(model, self.quantization_config)

    @abstractmethod
    def _set_config(self, model: nn.Module, config: SegQuantConfig) -> None:
        """Put the description of a packed model in the place of the request that it was made by."""

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top, codes can't."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Products of codes are custom operators, the rest is plain torch."""
        return True

    def _check_missing(self, missing: Iterable[str]) -> None:
        from ..checkpoints.tensors import check_complete

        if self.pre_quantized:
            check_complete(missing, self._checkpoint)

    def _check_counts(self, files: Iterable[str | os.PathLike[str]]) -> None:
        from ..checkpoints.tensors import check_counts

        if files:
            check_counts(files, self._checkpoint)

    def _plain(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        from ..checkpoints.tensors import dequantize

        # transformers' configs have names of dtypes in them after a save.
        dequantize(model, getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype)
        return model


def verify_files(files: Iterable[str | os.PathLike[str]]) -> None:
    """Check the manifest of the directory that holds the files of a checkpoint, if it has one.

    A model fetched from a hub file by file comes without; the hub checks those files itself.

    Raises:
        DamagedFilesError: names what is missing, truncated or altered.
    """
    for directory in sorted({Path(file).parent for file in files}):
        if (directory / MANIFEST_NAME).is_file():
            verify_manifest(directory)
        else:
            logger.info("segquant: %s has no %s, its files are not checked", directory, MANIFEST_NAME)
