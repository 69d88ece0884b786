"""SegQuant for NVIDIA ModelOpt (arXiv 2507.14811).

Importing this package registers the calibration algorithm ``segquant`` and its presets with ModelOpt:

    import modelopt.torch.quantization as mtq
    import modelopt_ext

    mtq.quantize(model, modelopt_ext.SEGQUANT_CFG, forward_loop)

The presets are also attributes of ``mtq``, so that scripts which pick a config by name find them.
"""

import modelopt.torch.quantization as mtq
import modelopt.torch.quantization.config as mtq_config

from . import presets
from .calibrate.convolutions import with_convolutions
from .config import SegQuantCalibConfig
from .mode import plan_of
from .nn import SegConv2d, SegLinear
from .plan import LinearPlan, SegmentPlan
from .presets import (
    SEGQUANT_CFG,
    SEGQUANT_FP8_CFG,
    SEGQUANT_INT8_CFG,
    SEGQUANT_INT8_DYNAMIC_CFG,
    SEGQUANT_INT8_PER_TENSOR_CFG,
)

for _name, _preset in presets.PRESETS.items():
    setattr(mtq, _name, _preset)
    mtq_config.choices.add(_name)

__all__ = [
    "SEGQUANT_CFG",
    "SEGQUANT_FP8_CFG",
    "SEGQUANT_INT8_CFG",
    "SEGQUANT_INT8_DYNAMIC_CFG",
    "SEGQUANT_INT8_PER_TENSOR_CFG",
    "LinearPlan",
    "SegConv2d",
    "SegLinear",
    "SegQuantCalibConfig",
    "SegmentPlan",
    "plan_of",
    "with_convolutions",
]
