"""Quantizing a model while it is loaded: each weight as it comes out of the file."""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch import Tensor, nn

from .config import SegQuantConfig
from .denoiser_inputs import forward_once

logger = logging.getLogger(__name__)


class QuantizeAtLoad:
    """Replaces the Linears of a model that is being loaded by packed ones.

    Args:
        model: as built, before any weight has come.
        request: preset or config, exclusions and plan.

    Raises:
        ValueError: the format needs calibration data, or the plan can't be found.
    """

    def __init__(self, model: nn.Module, request: SegQuantConfig) -> None:
        from modelopt_ext import SegmentPlan
        from modelopt_ext.calibrate.without_data import Observation, WithoutData, observe

        config, left_out = resolve(request)
        if request.plan is not None:
            config["algorithm"]["plan"] = SegmentPlan.load(request.plan)
        skeleton = copy.deepcopy(model).to(device="meta").eval()
        try:
            seen = observe(skeleton, forward_once(skeleton), bool(config["algorithm"].get("merge_heads")))
        except Exception as error:
            if config["algorithm"].get("plan") is None:
                raise ValueError(
                    f"no inputs are known for a forward of {type(model).__name__} on the meta device ({error}), which "
                    "would find its segments: pass SegQuantConfig(plan=...), a file that SegmentPlan.save wrote; "
                    "modelopt_ext.dataflow.record(model, forward) makes the plan from a forward of yours"
                ) from error
            seen = Observation()
            logger.info("segquant: %s is not run on the meta device (%s)", type(model).__name__, error)
        self._packer = WithoutData(skeleton, config, seen)
        self._left = set(self._packer.names)
        if left_out:
            logger.warning(
                "segquant: quantizing at load rounds weights to nearest: %s of %s would be fitted to the inputs of "
                "each layer, which only a running model has. For that calibrate with mtq.quantize, compress and save",
                ", ".join(left_out),
                request.preset,
            )

    def wants(self, parameter: str) -> bool:
        """Whether an arriving parameter is the weight of a Linear to quantize."""
        name, _, field = parameter.rpartition(".")
        return field == "weight" and name in self._left

    def arrive(self, model: nn.Module, parameter: str, weight: Tensor) -> None:
        """Put a packed Linear into the model.

        Args:
            model: the model that is being loaded.
            parameter: name of the weight.
            weight: (N, K), on the device where it is to be.
        """
        name = parameter.rpartition(".")[0]
        plain = model.get_submodule(name)
        packed = self._packer.pack(name, weight, plain._parameters["bias"])
        packed.train(plain.training)
        # transformers draws random numbers into what does not say that it has values.
        parts: list[Any] = [packed, packed.weight, *packed.buffers()]
        for part in parts:
            part._is_hf_initialized = True
        model.set_submodule(name, packed)
        self._left.discard(name)

    def finish(self, model: nn.Module) -> None:
        """Called when all weights have come.

        Raises:
            ValueError: some never did.
        """
        if self._left:
            raise ValueError(
                f"the checkpoint has no weight for {len(self._left)} Linears to quantize "
                f"({', '.join(sorted(self._left)[:3])}): load it with its own class, or exclude them"
            )


def resolve(request: SegQuantConfig) -> tuple[dict[str, Any], list[str]]:
    """The ModelOpt config of a request, without what needs calibration data.

    Returns:
        The config, and the settings of a preset that were left out.

    Raises:
        ValueError: an unknown preset, another algorithm, or a config of the user's own that asks for something that
            needs data.
    """
    from modelopt_ext import presets
    from modelopt_ext.calibrate.without_data import FITTED_TO_DATA, without_fitting

    if isinstance(request.preset, str):
        if request.preset not in presets.PRESETS:
            raise ValueError(f"there is no preset {request.preset!r}; presets are {', '.join(presets.PRESETS)}")
        config = copy.deepcopy(presets.PRESETS[request.preset])
    else:
        config = copy.deepcopy(request.preset)
    algorithm = config.get("algorithm")
    if "quant_cfg" not in config or not isinstance(algorithm, dict) or algorithm.get("method") != "segquant":
        raise ValueError(
            "preset is the name of one, or a ModelOpt config {'quant_cfg': ..., 'algorithm': {'method': 'segquant', "
            "...}}, as modelopt_ext.presets.linear_only makes it"
        )
    plain, changed = without_fitting(algorithm)
    if not isinstance(request.preset, str):
        asked = [name for name in changed if name in algorithm or name not in FITTED_TO_DATA]
        if asked:
            raise ValueError(
                f"{', '.join(asked)}: fitted to the inputs of each layer, which only a running model has; leave that "
                "out to quantize at load, or calibrate the loaded model with mtq.quantize, compress and save it"
            )
    plain["exclude"] = [*plain.get("exclude", ()), *request.exclude]
    return {**config, "algorithm": plain}, changed
