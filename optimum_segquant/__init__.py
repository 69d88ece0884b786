"""SegQuant for Hugging Face diffusers and Optimum, on top of :mod:`modelopt_ext`.

Importing this package makes diffusers and transformers load and save ``segquant`` checkpoints; it imports neither of
them, nor torch, by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .quantizers.registration import register

if TYPE_CHECKING:
    from .calibration import CalibrationSettings, record_calibration
    from .checkpoints.native import export_native
    from .checkpoints.save import save_segquant
    from .checkpoints.tensors import dequantize
    from .evaluation import Evaluation, evaluate
    from .exporters import export_onnx
    from .quantizer import QuantizationResult, SegQuantizer, quantize_pipeline
    from .quantizers.config import SegQuantConfig
    from .report import draw_plan, write_report

__all__ = [
    "CalibrationSettings",
    "Evaluation",
    "QuantizationResult",
    "SegQuantConfig",
    "SegQuantizer",
    "dequantize",
    "draw_plan",
    "evaluate",
    "export_native",
    "export_onnx",
    "quantize_pipeline",
    "record_calibration",
    "save_segquant",
    "write_report",
]

_LAZY = {
    "CalibrationSettings": ".calibration",
    "Evaluation": ".evaluation",
    "QuantizationResult": ".quantizer",
    "SegQuantizer": ".quantizer",
    "quantize_pipeline": ".quantizer",
    "record_calibration": ".calibration",
    "SegQuantConfig": ".quantizers.config",
    "dequantize": ".checkpoints.tensors",
    "draw_plan": ".report",
    "evaluate": ".evaluation",
    "export_native": ".checkpoints.native",
    "export_onnx": ".exporters",
    "save_segquant": ".checkpoints.save",
    "write_report": ".report",
}

register()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
