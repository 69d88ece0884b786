"""SegQuantConfig: one ``quantization_config`` class for diffusers and transformers."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from ..checkpoints.config import QUANT_METHOD, CheckpointConfig

try:
    from transformers.utils.quantization_config import QuantizationConfigMixin as _Base
except ImportError:  # diffusers alone asks for no base class
    _Base = object

_REQUEST = ("preset", "exclude", "plan")


class SegQuantMethod(str, Enum):
    """The name under which hosts know this method; they ask for an enumeration."""

    SEGQUANT = QUANT_METHOD


class SegQuantConfig(_Base):
    """Quantize a model while it is loaded, or describe one that was loaded packed.

        SD3Transformer2DModel.from_pretrained(path, quantization_config=SegQuantConfig("SEGQUANT_W8A16_CFG"))

    It is diffusers' and transformers' class at once, so one object serves denoisers and text encoders, and
    ``PipelineQuantizationConfig(quant_backend="segquant", quant_kwargs={"preset": ...})`` works.

    Only formats that need no calibration data can be made at load: weight-only ones and those with dynamic activation
    scales. What a preset would fit to data (GPTQ, low-rank branch, smoothing, clipping) is left out there, with a
    warning: those need inputs of the running model. For them calibrate with ``mtq.quantize``, ``compress``, and save.

    Args:
        preset: name of a preset of :mod:`modelopt_ext.presets`, or a ModelOpt config with ``"method": "segquant"``.
        exclude: patterns of Linears to leave in full precision.
        plan: path of a ``SegmentPlan`` as JSON; None finds the plan by a forward on the meta device.

    Attributes:
        checkpoint: what a loaded checkpoint says; None for a request to quantize.
        abridged: whether :meth:`to_dict` leaves the layers out.
    """

    def __init__(
        self,
        preset: str | Mapping[str, Any] = "SEGQUANT_INT8_DYNAMIC_CFG",
        exclude: Sequence[str] | None = None,
        plan: str | os.PathLike[str] | None = None,
    ) -> None:
        self.quant_method = SegQuantMethod.SEGQUANT
        self.preset = preset if isinstance(preset, str) else copy.deepcopy(dict(preset))
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude or ())
        self.plan = None if plan is None else os.fspath(plan)
        self.checkpoint: CheckpointConfig | None = None
        self.abridged = False

    @classmethod
    def of_checkpoint(cls, checkpoint: CheckpointConfig) -> SegQuantConfig:
        """The config of a packed model."""
        config = cls()
        config.checkpoint = checkpoint
        return config

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the ``quantization_config`` of a checkpoint, or a request as :meth:`to_dict` gives it.

        Args:
            config_dict: JSON types.
            return_unused_kwargs: also give back ``kwargs`` that name no field.
            kwargs: replace fields of a request.

        Raises:
            CheckpointError: a checkpoint of another format version, or a damaged one.
        """
        if "format_version" not in config_dict and any(key in config_dict for key in _REQUEST):
            fields = {key: kwargs.pop(key, config_dict.get(key)) for key in _REQUEST}
            config = cls(**{key: value for key, value in fields.items() if value is not None})
        else:
            config = cls.of_checkpoint(CheckpointConfig.from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON types: what goes into ``config.json``."""
        if self.abridged:
            return {"quant_method": self.quant_method.value}
        if self.checkpoint is not None:
            return self.checkpoint.to_dict()
        return {
            "quant_method": self.quant_method.value,
            "preset": copy.deepcopy(self.preset),
            "exclude": list(self.exclude),
            "plan": self.plan,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_dict`: there are no defaults to leave out."""
        return self.to_dict()

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Change fields of a request; gives back what names no field."""
        for key in _REQUEST:
            if key in kwargs:
                setattr(self, key, kwargs.pop(key))
        return kwargs

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json_string` to a file."""
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")

    def to_json_string(self, use_diff: bool = True) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        if self.checkpoint is not None:
            return f"SegQuantConfig({len(self.checkpoint.layers)} packed Linears of a {self.checkpoint.architecture})"
        return f"SegQuantConfig(preset={self.preset!r}, exclude={self.exclude}, plan={self.plan!r})"

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SegQuantConfig) and self.to_dict() == other.to_dict()
