"""Calibration data from prompts: no forward loop to write.

    settings = CalibrationSettings.read("prompts.txt", num_inference_steps=28, call_kwargs={"guidance_scale": 7.0})
    data = record_calibration(pipe, settings, cache_dir="calibration")
    mtq.quantize(pipe.transformer, modelopt_ext.SEGQUANT_CFG, data["transformer"].forward_loop)

1. :func:`read_prompts` takes prompts from a list, a file or a dataset, or the package's own set.
2. :class:`CalibrationSettings` says what is sampled and which denoising steps are kept.
3. :func:`record_calibration` runs the pipeline as it is used and keeps what its models read on disk, resumable after a
   kill; :class:`CachedCalls` gives it back call by call.
"""

from .cache import CachedCalls, CalibrationMismatchError
from .prompts import default_prompts, held_out_prompts, read_prompts
from .recording import CalibrationData, record_calibration
from .settings import CalibrationBatch, CalibrationSettings, NormalSteps, StepChoice, WeightedSteps

__all__ = [
    "CachedCalls",
    "CalibrationBatch",
    "CalibrationData",
    "CalibrationMismatchError",
    "CalibrationSettings",
    "NormalSteps",
    "StepChoice",
    "WeightedSteps",
    "default_prompts",
    "held_out_prompts",
    "read_prompts",
    "record_calibration",
]
