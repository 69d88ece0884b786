"""Export of quantized pipelines through Optimum."""

from .compare import Agreement, agreement, session
from .onnx import check_dtypes, export_onnx, supported_pipelines
from .parity import LayerParity, layer_parity

__all__ = [
    "Agreement",
    "LayerParity",
    "agreement",
    "check_dtypes",
    "export_onnx",
    "layer_parity",
    "session",
    "supported_pipelines",
]
