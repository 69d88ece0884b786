"""A step of two blocks on a CPU: full precision, simulated quantization and packed codes, side by side.

    OMP_NUM_THREADS=2 python examples/benchmark_cpu.py

The forms take turns, so that whatever else the machine does slows all of them; medians. CPUs without 8-bit dot products
multiply codes as floats: what packing saves there is memory, and the rounding of weights at every call.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence

import modelopt.torch.quantization as mtq
import torch
import wide_blocks
from torch import nn

import modelopt_ext
from modelopt_ext.presets import PRESETS
from optimum_segquant.quantization_report import model_bytes

DEFAULT_PRESETS = ("SEGQUANT_CFG", "SEGQUANT_INT8_DYNAMIC_CFG", "SEGQUANT_FP8_CFG")
# Time does not depend on the quality of the scales: no searches.
FAST = {"alpha": 0.5, "clip_grid": (1.0,), "samples": 256, "progress": False}


@torch.no_grad()
def milliseconds(models: dict[str, nn.Module], calls: int) -> dict[str, float]:
    """Median time of a call of each model."""
    inputs = wide_blocks.inputs()
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(calls + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(**inputs)
            if turn:  # the first call warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(taken) for name, taken in times.items()}


def measure(presets: Sequence[str], calls: int, heads: int) -> str:
    """A row for each preset, Markdown."""
    plain = wide_blocks.build(heads)
    lines = [
        "| preset | float32, ms | simulated, ms | packed, ms | packed against simulated | MB | of float32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for preset in presets:
        config = copy.deepcopy(PRESETS[preset])
        config["algorithm"] = {**config["algorithm"], **FAST}
        simulated = mtq.quantize(copy.deepcopy(plain), config, lambda model: model(**wide_blocks.inputs()))
        packed = modelopt_ext.compress(copy.deepcopy(simulated))
        found = milliseconds({"float32": plain, "simulated": simulated, "packed": packed}, calls)
        size = model_bytes(packed)
        lines.append(
            f"| {preset} | {found['float32']:.0f} | {found['simulated']:.0f} | {found['packed']:.0f} "
            f"| {found['simulated'] / found['packed']:.2f}x | {size / 1e6:.0f} | {size / model_bytes(plain):.2f} |"
        )
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=DEFAULT_PRESETS, choices=list(PRESETS))
    parser.add_argument("--calls", type=int, default=7, help="timed calls of each form")
    parser.add_argument("--heads", type=int, default=24, help="of attention, 64 channels each; fewer to try the script")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse_arguments(arguments)
    print(
        f"{wide_blocks.NAME}, {options.heads} heads, {torch.get_num_threads()} threads, torch {torch.__version__}",
        flush=True,
    )
    print(measure(options.presets, options.calls, options.heads))


if __name__ == "__main__":
    main()
