"""From an exported directory to a served model.

    export_onnx(pipeline, "onnx")
    write_model_repository("onnx", "repository")       # for NVIDIA Triton Inference Server
    serve_check("repository")                          # checksums, configurations, every model run once
    served_pipeline("repository")("a red circle")      # here, in ONNX Runtime, under the server's rules
    served_pipeline("repository", "http://localhost:8000")("a red circle")      # there

Everything that is written is listed with its checksum in the directory's manifest, which is verified before anything is
used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import check_model_repository
    from .client import TritonClient
    from .commands import Command
    from .deployment import Deployment, load_deployment
    from .load import served_pipeline
    from .local import LocalModels
    from .model_config import ConfigError, format_config, parse_config, read_config
    from .native import describe_native
    from .repository import seal_engines, write_model_repository
    from .served import RequestError
    from .sizes import AxisRange
    from .trial_run import ModelCheck, serve_check
    from .triton_config import ServingOptions

__all__ = [
    "AxisRange",
    "Command",
    "ConfigError",
    "Deployment",
    "LocalModels",
    "ModelCheck",
    "RequestError",
    "ServingOptions",
    "TritonClient",
    "check_model_repository",
    "describe_native",
    "format_config",
    "load_deployment",
    "parse_config",
    "read_config",
    "seal_engines",
    "serve_check",
    "served_pipeline",
    "write_model_repository",
]

# Lazy, since a server that runs a pipeline imports this package without ModelOpt.
_LAZY = {
    "AxisRange": ".sizes",
    "Command": ".commands",
    "ConfigError": ".model_config",
    "Deployment": ".deployment",
    "LocalModels": ".local",
    "ModelCheck": ".trial_run",
    "RequestError": ".served",
    "ServingOptions": ".triton_config",
    "TritonClient": ".client",
    "check_model_repository": ".check",
    "describe_native": ".native",
    "format_config": ".model_config",
    "load_deployment": ".deployment",
    "parse_config": ".model_config",
    "read_config": ".model_config",
    "seal_engines": ".repository",
    "serve_check": ".trial_run",
    "served_pipeline": ".load",
    "write_model_repository": ".repository",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
