"""SegQuant for NVIDIA ModelOpt (arXiv 2507.14811).

Importing this package registers the calibration algorithm ``segquant``, its presets and products of int8 codes for
``mtq.compress`` with ModelOpt:

    import modelopt.torch.quantization as mtq
    import modelopt_ext

    mtq.quantize(model, modelopt_ext.SEGQUANT_CFG, forward_loop)

The presets are also attributes of ``mtq``, so that scripts which pick a config by name find them.
"""

import modelopt.torch.quantization as mtq
import modelopt.torch.quantization.config as mtq_config

from . import presets
from .calibrate.convolutions import with_convolutions
from .compilation import compile_options
from .compress import compress
from .config import SegQuantCalibConfig
from .kernels.modelopt_gemm import register as _register_int8_products
from .mode import plan_of
from .nn import PackedLinear, PackedSpec, SegConv2d, SegLinear
from .plan import LinearPlan, SegmentPlan
from .presets import *  # noqa: F403 (its __all__ is the list of presets)

for _name, _preset in presets.PRESETS.items():
    setattr(mtq, _name, _preset)
    mtq_config.choices.add(_name)
_register_int8_products()

__all__ = [
    *presets.__all__,
    "LinearPlan",
    "PackedLinear",
    "PackedSpec",
    "SegConv2d",
    "SegLinear",
    "SegQuantCalibConfig",
    "SegmentPlan",
    "compile_options",
    "compress",
    "plan_of",
    "with_convolutions",
]
