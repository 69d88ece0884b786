"""Exact versions of what a result was made with."""

from __future__ import annotations

import importlib.metadata
import platform

DISTRIBUTIONS = (
    "optimum-segquant",
    "torch",
    "nvidia-modelopt",
    "diffusers",
    "transformers",
    "accelerate",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "triton",
    "torchmetrics",
    "safetensors",
    "numpy",
)
"""What is looked up, by the names of the package index."""


def versions() -> dict[str, str]:
    """Versions of Python and of every one of :data:`DISTRIBUTIONS` that is installed."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def installed_versions() -> dict[str, str]:
    """Versions of Python and of every distribution that is installed, by normalized name."""
    found = {
        name.lower().replace("_", "-"): distribution.version
        for distribution in importlib.metadata.distributions()
        if (name := distribution.metadata["Name"])
    }
    return {"python": platform.python_version(), **dict(sorted(found.items()))}
