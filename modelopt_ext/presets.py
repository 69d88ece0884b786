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
    "SEGQUANT_FP8_PER_TENSOR_CFG",
    "SEGQUANT_FP8_PER_TOKEN_CFG",
    "SEGQUANT_FP8_SVD_CFG",
    "SEGQUANT_INT8_CFG",
    "SEGQUANT_INT8_DYNAMIC_CFG",
    "SEGQUANT_INT8_PER_TENSOR_CFG",
    "SEGQUANT_INT8_PER_TOKEN_CFG",
    "SEGQUANT_INT8_SVD_CFG",
    "SEGQUANT_NVFP4_CFG",
    "SEGQUANT_W4A4_CFG",
    "SEGQUANT_W4A8_CFG",
    "SEGQUANT_W4A8_FP8_CFG",
    "SEGQUANT_W4A8_GROUP_CFG",
    "SEGQUANT_W4A16_CFG",
    "SEGQUANT_W8A16_CFG",
]

PER_TOKEN: dict[str, Any] = {"block_sizes": {-1: None, "type": "dynamic"}, "type": "dynamic"}

_FP8 = (4, 3)
_NVFP4: dict[str, Any] = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
_INT4_GROUPS: dict[str, Any] = {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
# Costs 1 to 2 % of the multiply-adds of a wide model; the bound is for narrow layers, such as the last projection.
_THIN_BRANCH = {"rank": 32, "max_share": 0.2}
# Beside 4-bit codes the branch is fitted to their error several times over.
_BRANCH = {"rank": 64, "max_share": 0.25, "refits": 4}
# A small share of the time, and of all layers those that 4 bits hurt most.
_OUTER_IN_8_BITS = {"embedders": "eight_bit", "last_layers": "eight_bit"}

SEGQUANT_INT8_CFG = linear_only({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}, embedders="per_token")
"""W8A8: weight scales per output channel, one static activation scale per segment; per token in the embedders."""

SEGQUANT_INT8_SVD_CFG = linear_only(
    {"num_bits": 8, "axis": 0},
    {"num_bits": 8, "axis": None},
    embedders="per_token",
    gptq=True,
    low_rank=_THIN_BRANCH,
)
"""W8A8 as SEGQUANT_INT8_CFG, GPTQ and a thin 16-bit branch on top: the best static INT8, a few percent slower."""

SEGQUANT_INT8_PER_TENSOR_CFG = linear_only(
    {"num_bits": 8, "axis": None}, {"num_bits": 8, "axis": None}, polarity="dual"
)
"""W8A8 as in the SegQuant paper: one weight scale and one static activation scale per block, DualScale."""

SEGQUANT_INT8_PER_TOKEN_CFG = linear_only({"num_bits": 8, "axis": 0}, {"num_bits": 8, **PER_TOKEN}, gptq=True)
"""W8A8 with activation scales per token, found at run time, and weights rounded by GPTQ."""

SEGQUANT_INT8_DYNAMIC_CFG = linear_only({"num_bits": 8, "axis": 0}, {"num_bits": 8, **PER_TOKEN}, alpha=None)
"""W8A8 with activation scales per token, found at run time: works without calibration data."""

SEGQUANT_FP8_CFG = linear_only(
    {"num_bits": _FP8, "axis": 0}, {"num_bits": _FP8, "axis": None}, embedders="per_token", gptq=True
)
"""FP8 E4M3: weight scales per output channel, one static activation scale per segment, weights rounded by GPTQ."""

SEGQUANT_FP8_SVD_CFG = linear_only(
    {"num_bits": _FP8, "axis": 0},
    {"num_bits": _FP8, "axis": None},
    embedders="per_token",
    gptq=True,
    low_rank=_THIN_BRANCH,
)
"""FP8 E4M3 as SEGQUANT_FP8_CFG with a thin 16-bit branch: the best static FP8, a few percent slower."""

SEGQUANT_FP8_PER_TENSOR_CFG = linear_only(
    {"num_bits": _FP8, "axis": None}, {"num_bits": _FP8, "axis": None}, embedders="per_token"
)
"""FP8 E4M3: one weight scale and one static activation scale per block, no GPTQ."""

SEGQUANT_FP8_PER_TOKEN_CFG = linear_only({"num_bits": _FP8, "axis": 0}, {"num_bits": _FP8, **PER_TOKEN}, gptq=True)
"""FP8 E4M3 with activation scales per token, found at run time."""

SEGQUANT_W4A8_CFG = linear_only(
    {"num_bits": 4, "axis": 0},
    {"num_bits": 8, **PER_TOKEN},
    gptq=True,
    low_rank=_BRANCH,
    weight_clip_grid=_CLIPS,
    **_OUTER_IN_8_BITS,
)
"""INT4 weights with one scale per output channel, INT8 activations per token, GPTQ and a low-rank branch.

As in all 4-bit presets the Linears before the first and after the last block have 8-bit weights and activations.
"""

SEGQUANT_W4A8_GROUP_CFG = linear_only(
    _INT4_GROUPS, {"num_bits": 8, **PER_TOKEN}, gptq=True, low_rank=_BRANCH, weight_clip_grid=_CLIPS, **_OUTER_IN_8_BITS
)
"""INT4 weights with one scale per 32 channels, INT8 activations per token, GPTQ and a low-rank branch."""

SEGQUANT_W4A8_FP8_CFG = linear_only(
    _INT4_GROUPS,
    {"num_bits": _FP8, **PER_TOKEN},
    gptq=True,
    low_rank=_BRANCH,
    weight_clip_grid=_CLIPS,
    **_OUTER_IN_8_BITS,
)
"""INT4 weights with one scale per 32 channels, FP8 activations per token, GPTQ and a low-rank branch."""

SEGQUANT_W4A4_CFG = linear_only(
    {"num_bits": 4, "axis": 0},
    {"num_bits": 4, **PER_TOKEN},
    second_product="polar",
    rotate="search",
    gptq=True,
    low_rank=_BRANCH,
    weight_clip_grid=_CLIPS,
    **_OUTER_IN_8_BITS,
)
"""INT4 weights and activations, per output channel and per token: rotated or split by sign, GPTQ, low-rank branch."""

SEGQUANT_W4A16_CFG = linear_only(_INT4_GROUPS, None, gptq=True, weight_clip_grid=_CLIPS, **_OUTER_IN_8_BITS)
"""Weight-only INT4, one scale per 32 channels, GPTQ."""

SEGQUANT_W8A16_CFG = linear_only({"num_bits": 8, "axis": 0}, None, gptq=True)
"""Weight-only INT8, one scale per output channel, GPTQ."""

SEGQUANT_NVFP4_CFG = linear_only(_NVFP4, _NVFP4, low_rank=_BRANCH, **_OUTER_IN_8_BITS)
"""NVFP4 weights and activations with a low-rank branch; needs a GPU."""

SEGQUANT_CFG = SEGQUANT_INT8_CFG

PRESETS: dict[str, dict[str, Any]] = {name: globals()[name] for name in __all__}
