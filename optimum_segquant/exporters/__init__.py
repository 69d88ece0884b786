"""Export of quantized pipelines through Optimum."""

from .compare import Agreement, agreement, session
from .onnx import export_onnx, supported_pipelines

__all__ = ["Agreement", "agreement", "export_onnx", "session", "supported_pipelines"]
