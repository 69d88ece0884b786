"""Writing a weight to where it is kept, in the module or, for offloaded modules, with accelerate."""

from __future__ import annotations

from typing import Any

import torch
from modelopt.torch.quantization.utils import enable_weight_access_and_writeback
from torch import Tensor, nn


@torch.no_grad()
def write_weight(module: nn.Module, weight: Tensor, model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Replace the values of ``module.weight``.

    Args:
        module: a layer of ``model``.
        weight: the new values, in the weight's shape, any device.
        model: the root.
        modules: all of its modules by name.
    """
    store = _plain_store(module)
    if store is not None:
        # ModelOpt's writeback knows accelerate's loader of checkpoints, not the dict that cpu_offload makes.
        tensors, key = store
        tensors[key] = weight.detach().to(tensors[key].device, tensors[key].dtype, copy=True)
        return
    with enable_weight_access_and_writeback(module, model, modules, writeback=True):
        stored = module._parameters["weight"]
        assert stored is not None
        stored.data.copy_(weight)


def _plain_store(module: nn.Module) -> tuple[dict[str, Tensor], str] | None:
    """The dict that holds an offloaded module's weight, and its key there; None if it is not kept that way."""
    weight = module._parameters["weight"]
    if weight is None or not weight.is_meta:
        return None
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        weights = getattr(part, "weights_map", None)
        tensors = getattr(weights, "dataset", None)
        key = f"{getattr(weights, 'prefix', '')}weight"
        if isinstance(tensors, dict) and key in tensors:
            return tensors, key
    return None
