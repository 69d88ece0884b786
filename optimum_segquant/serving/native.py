"""A deployment of a pipeline in stock keys, for vLLM-Omni: the checkpoint's own directory, described and sealed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import MANIFEST_NAME, verify_manifest
from ..provenance import read_export_record
from .commands import vllm_omni_commands
from .deployment import Deployment

__all__ = ["describe_native"]

_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4")
_METHODS = ("modelopt", "modelopt_fp4", "int8")


def describe_native(directory: str | os.PathLike[str]) -> Deployment:
    """Add record, README and manifest to what ``export_native(pipeline, directory)`` wrote.

    Args:
        directory: of a whole pipeline; vLLM-Omni takes no single model.

    Raises:
        ValueError: there is no pipeline, or no component with a format that vLLM-Omni reads.
        DamagedFilesError: the directory has a manifest already, and a file differs from it.
    """
    directory = Path(directory)
    if not (directory / "model_index.json").is_file():
        raise ValueError(f"{directory} holds no pipeline: export_native(pipeline, directory) writes one")
    if (directory / MANIFEST_NAME).is_file():
        verify_manifest(directory)
    formats = {
        path.parent.name: method
        for path in sorted(directory.glob("*/config.json"))
        if (method := _method(json.loads(path.read_text(encoding="utf-8")).get("quantization_config")))
    }
    if not formats:
        raise ValueError(
            f"no component of {directory} has a format that vLLM-Omni reads ({', '.join(_METHODS)}): write it with "
            "export_native"
        )
    deployment = Deployment(
        kind="vllm-omni",
        backends={component: f"vLLM-Omni ({method})" for component, method in formats.items()},
        sizes={},
        pipeline=".",
        source=read_export_record(directory),
        commands=vllm_omni_commands(),
    )
    deployment.write(directory)
    return deployment


def _method(config: Any) -> str | None:
    if not isinstance(config, Mapping) or config.get("quant_method", config.get("method")) not in _METHODS:
        return None
    return str(config.get("quant_algo") or config.get("quant_method"))
