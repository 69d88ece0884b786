"""ONNX of quantized models, in operators of the standard only."""

from .export import export_module, finish_file
from .graph import LARGEST_FILE, file_bytes
from .linear import OnnxActivation, OnnxLinear
from .lowering import check_layers, lowered, specs_of
from .target import TARGETS, Target, choose_opset, target_named

__all__ = [
    "LARGEST_FILE",
    "TARGETS",
    "OnnxActivation",
    "OnnxLinear",
    "Target",
    "check_layers",
    "choose_opset",
    "export_module",
    "file_bytes",
    "finish_file",
    "lowered",
    "specs_of",
    "target_named",
]
