"""What a ``segquant`` checkpoint says about itself: the ``quantization_config`` in its ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import names
from .schema import schema, violations

if TYPE_CHECKING:
    from modelopt_ext import PackedSpec

QUANT_METHOD = "segquant"
FORMAT_VERSION = 2

_SHOWN = 5  # violations in a message


class CheckpointError(ValueError):
    """A checkpoint that this release can't read, or that does not fit the model it is loaded into."""


@dataclass(frozen=True)
class PackedLayer:
    """One packed Linear of a checkpoint: how to read its tensors, and whether it has a bias."""

    spec: PackedSpec
    bias: bool


@dataclass(frozen=True)
class CheckpointConfig:
    """The packed Linears of a model.

    Attributes:
        architecture: name of the model's class.
        dtype: "float32", "bfloat16" or "float16": of bias and of what is not quantized.
        layers: by module name.
    """

    architecture: str
    dtype: str
    layers: Mapping[str, PackedLayer]

    def to_dict(self) -> dict[str, Any]:
        """JSON types that fit the schema; layers with the same spec are listed together, their names folded."""
        groups: dict[str, tuple[PackedLayer, list[str]]] = {}
        for name, layer in sorted(self.layers.items()):
            key = json.dumps([layer.bias, layer.spec.to_dict()], sort_keys=True)
            groups.setdefault(key, (layer, []))[1].append(name)
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "architecture": self.architecture,
            "dtype": self.dtype,
            "layers": [
                {"modules": names.fold(members), "bias": layer.bias, "spec": _jsonable(layer.spec.to_dict())}
                for layer, members in groups.values()
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CheckpointConfig:
        """Read and check a ``quantization_config``.

        Raises:
            CheckpointError: another format version, or content that is not as the schema says.
        """
        check(data)
        from modelopt_ext import PackedSpec

        layers: dict[str, PackedLayer] = {}
        try:
            for entry in data["layers"]:
                layer = PackedLayer(PackedSpec.from_dict(entry["spec"]), entry["bias"])
                for name in names.unfold(entry["modules"]):
                    if name in layers:
                        raise ValueError(f"the module {name} is listed twice")
                    layers[name] = layer
        except ValueError as error:
            raise CheckpointError(f"the quantization_config is damaged ({error}): copy or save it again") from error
        return cls(data["architecture"], data["dtype"], layers)


def check(data: Mapping[str, Any]) -> None:
    """Check a ``quantization_config`` against version and schema, without ModelOpt.

    Raises:
        CheckpointError: it says what is wrong and what to do.
    """
    version = data.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"the checkpoint has segquant format_version {version!r}, this release of optimum-segquant reads version "
            f"{FORMAT_VERSION}: update optimum-segquant, or save the model again with this release"
        )
    found = violations(dict(data), schema())
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise CheckpointError(
            f"the quantization_config of the checkpoint is damaged: {'; '.join(found[:_SHOWN])}{more}. Copy, download "
            "or save the checkpoint again"
        )


def _jsonable(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value
