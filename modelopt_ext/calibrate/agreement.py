"""Whether several processes are about to calibrate the same model in the same way.

Each changes its own copy by what others have found for theirs. So differences are found before any work is done, not in
the images of the one process that holds another model.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.utils.distributed import is_dtensor_sharded, is_fsdp2_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..config import SegQuantCalibConfig
from ..distributed import Processes
from ..plan import SegmentPlan
from .checkpoint import fingerprint, parameters_fingerprint

# Numbers of each parameter that are compared.
COMPARED = 256


@dataclass(frozen=True)
class Agreement:
    """What has to be equal in all processes.

    Attributes:
        facts: plain values by what they are of.
        weights: checksums of parameters by name, of those in memory; others may hold the same ones offloaded.
    """

    facts: dict[str, Any]
    weights: dict[str, int]

    @classmethod
    def of(
        cls, model: nn.Module, config: SegQuantCalibConfig, synthetic: bool, previous_plan: SegmentPlan | None
    ) -> Agreement:
        """Of this process.

        Args:
            model: the model, with its quantizers configured.
            config: settings of the algorithm.
            synthetic: whether there is no forward_loop.
            previous_plan: the plan that the model is segmented with already.

        Raises:
            ValueError: the model is spread over the processes.
        """
        _check_whole(model)
        # Values as text: their own dicts may have keys of several types. The order of the attributes is that of a set.
        quantizers = {
            name: {key: str(value) for key, value in module.get_modelopt_state(properties_only=True).items()}
            for name, module in model.named_modules()
            if hasattr(module, "get_modelopt_state")
        }
        facts = {
            "algorithm": fingerprint(config.model_dump(exclude={"progress", "device", "layerwise"})),
            "layerwise": (config.by_blocks, config.is_sequential, config.layerwise.checkpoint_dir is None),
            "quant_cfg": fingerprint(quantizers),
            "model": parameters_fingerprint(model),
            "plan": None if previous_plan is None else fingerprint(previous_plan.to_dict()),
            "forward_loop (None in one, not in the other; one that does nothing is fine)": synthetic,
        }
        return cls(facts, {name: _checksum(p) for name, p in model.named_parameters() if not p.is_meta})

    def check(self, processes: Processes) -> None:
        """Compare with all other processes.

        Raises:
            ValueError: something is different; the same in all processes.
        """
        first, *others = processes.gather(self)
        for rank, other in enumerate(others, start=1):
            different = [name for name in first.facts if first.facts[name] != other.facts[name]]
            if not different:
                common = first.weights.keys() & other.weights.keys()
                unlike = [
                    name for name in first.weights if name in common and first.weights[name] != other.weights[name]
                ]
                different = [f"the weights, e.g. {unlike[0]}"] if unlike else []
            if different:
                raise ValueError(
                    f"ranks 0 and {rank} differ in {', '.join(different)}: load the same model and give the same "
                    "config in every process, or set distributed_sync=False in the algorithm's config to calibrate in "
                    "each on its own"
                )


def _check_whole(model: nn.Module) -> None:
    sharded = is_dtensor_sharded(model) or is_fsdp2_model(model)
    if sharded or any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        raise ValueError(
            "the model's weights are sharded over the processes (FSDP or tensor parallel): load the whole model in "
            "every process; device_map and CPU offload spread one that is too large over a process's own devices"
        )


def _checksum(parameter: nn.Parameter) -> int:
    """Of numbers spread over a parameter: other weights show in nearly any of them."""
    values = parameter.detach().flatten()
    values = values[:: max(1, len(values) // COMPARED)][:COMPARED].cpu().contiguous()
    return zlib.crc32(values.view(torch.uint8).numpy().data)
