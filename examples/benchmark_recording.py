"""Time that recording adds to one forward of a FLUX.1-size transformer on the meta device.

    python examples/benchmark_recording.py

On the meta device a forward computes nothing: what is timed is Python and dispatch, the part that recording adds to.
Plain and recorded forwards alternate, so that a busy machine slows both. Wall-clock and process time are printed (the
latter does not count other processes), medians over the repeats. Exits with 1 if recording adds a second or more of
process time.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from modelopt_ext.dataflow import record

LIMIT_S = 1.0
IMAGE_TOKENS = 4096  # 1024 x 1024 pixels
TEXT_TOKENS = 512
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enable_grad": torch.enable_grad}


def flux() -> tuple[nn.Module, dict[str, Any]]:
    """FLUX.1-dev's transformer (19 + 38 blocks, 3072 channels) and inputs for one image, all on the meta device."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True).eval()
        inputs = {
            "hidden_states": torch.randn(1, IMAGE_TOKENS, 64),
            "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 4096),
            "pooled_projections": torch.randn(1, 768),
            "timestep": torch.rand(1),
            "guidance": torch.rand(1),
            "img_ids": torch.zeros(IMAGE_TOKENS, 3),
            "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        }
    return model, inputs


class CountOps(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the ops of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and count it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and process seconds of a call."""
    wall, process = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - process


def main() -> int:
    """Measure, print a table, and say whether the limit holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="print the plan, too")
    arguments = parser.parse_args()
    logging.getLogger("modelopt_ext").setLevel(logging.ERROR)

    model, inputs = flux()
    with torch.no_grad(), CountOps() as counter:
        model(**inputs)
    plan = record(model, lambda: model(**inputs))
    print(f"FLUX.1-dev size, meta device, {counter.count} ops; {plan.summary()}")
    print(f"{'':15}  {'wall clock':^26}  {'process time':^26}")
    print(f"{'mode':15}" + f"  {'plain':>8} {'recorded':>8} {'adds':>8}" * 2 + f"  {'per op':>8}")
    worst = 0.0
    for name, mode in MODES.items():
        with mode():
            samples = [
                (timed(lambda: model(**inputs)), timed(lambda: record(model, lambda: model(**inputs))))
                for _ in range(arguments.repeats)
            ]
        cells = []
        added = 0.0
        for clock in (0, 1):
            plain = statistics.median(sample[0][clock] for sample in samples)
            recorded = statistics.median(sample[1][clock] for sample in samples)
            added = statistics.median(sample[1][clock] - sample[0][clock] for sample in samples)
            cells.append(f"  {plain:6.2f} s {recorded:6.2f} s {added:6.2f} s")
        print(f"{name:15}{''.join(cells)}  {added / counter.count * 1e3:5.3f} ms")
        worst = max(worst, added)
    if arguments.table:
        print(plan)
    print(f"recording adds {worst:.2f} s of process time at most; limit {LIMIT_S:.0f} s")
    return int(worst >= LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
