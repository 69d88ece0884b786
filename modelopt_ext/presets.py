"""Ready-made ModelOpt configs, in ModelOpt's own form: ``mtq.quantize(model, SEGQUANT_CFG, forward_loop)``.

All quantize Linears only. Quantizing LayerNorm inputs and the patch-embedding convolution, as ModelOpt's INT8 and FP8
defaults do, costs diffusion transformers many decibels and saves nothing.
"""

from __future__ import annotations

from typing import Any


def linear_only(weight: dict[str, Any], activation: dict[str, Any] | None, **algorithm: Any) -> dict[str, Any]:
    """A config that quantizes the Linears of a model with SegQuant.

    Args:
        weight: ModelOpt quantizer attributes of the weights, e.g. ``{"num_bits": 8, "axis": 0}``.
        activation: the same for the inputs; None leaves them in full precision.
        algorithm: fields of :class:`modelopt_ext.SegQuantCalibConfig`.
    """
    entries: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "parent_class": "nn.Linear", "cfg": weight},
    ]
    if activation is not None:
        entries.append({"quantizer_name": "*input_quantizer", "parent_class": "nn.Linear", "cfg": activation})
    return {"quant_cfg": entries, "algorithm": {"method": "segquant", **algorithm}}


__all__ = [
    "SEGQUANT_CFG",
    "SEGQUANT_FP8_CFG",
    "SEGQUANT_INT8_CFG",
    "SEGQUANT_INT8_DYNAMIC_CFG",
    "SEGQUANT_INT8_PER_TENSOR_CFG",
]

PER_TOKEN = {"block_sizes": {-1: None, "type": "dynamic"}, "type": "dynamic"}

SEGQUANT_INT8_CFG = linear_only({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}, embedders="per_token")
"""W8A8: weight scales per output channel, one static activation scale per segment; per token in the embedders."""

SEGQUANT_INT8_PER_TENSOR_CFG = linear_only(
    {"num_bits": 8, "axis": None}, {"num_bits": 8, "axis": None}, polarity="dual"
)
"""W8A8 as in the SegQuant paper: one weight scale and one static activation scale per block, DualScale."""

SEGQUANT_INT8_DYNAMIC_CFG = linear_only({"num_bits": 8, "axis": 0}, {"num_bits": 8, **PER_TOKEN}, alpha=None)
"""W8A8 with activation scales per token, found at run time: works without calibration data."""

SEGQUANT_FP8_CFG = linear_only(
    {"num_bits": (4, 3), "axis": None}, {"num_bits": (4, 3), "axis": None}, embedders="per_token"
)
"""FP8 E4M3: one weight scale and one static activation scale per block; per token in the embedders."""

SEGQUANT_CFG = SEGQUANT_INT8_CFG

PRESETS: dict[str, dict[str, Any]] = {name: globals()[name] for name in __all__}
