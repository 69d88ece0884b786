"""A forward on generated inputs, for settings that need no calibration data but do need one look at the dataflow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from modelopt.torch.export.diffusers_utils import generate_diffusion_dummy_inputs
from torch import nn


def generated_forward_loop(model: nn.Module) -> Callable[[nn.Module], object]:
    """A forward loop of one call on the inputs that ModelOpt generates for the diffusers classes it knows.

    Raises:
        ValueError: ModelOpt has no inputs for this class.
    """
    parameter = next(model.parameters())
    try:
        # The generator draws random inputs; the caller's random state is not its business.
        with torch.random.fork_rng(devices=[]):
            inputs = generate_diffusion_dummy_inputs(model, parameter.device, parameter.dtype)
    except Exception as error:
        raise ValueError(f"{_remedy(model)} (ModelOpt's generator raised {error!r})") from error
    if inputs is None:
        raise ValueError(_remedy(model))

    def forward_loop(module: nn.Module) -> None:
        with torch.no_grad():
            module(**inputs)

    return forward_loop


def _remedy(model: nn.Module) -> str:
    return (
        f"the segments are found in a forward, and ModelOpt can't generate inputs for {type(model).__name__}: pass "
        "forward_loop with one call of the model, or a plan in the algorithm's config"
    )
