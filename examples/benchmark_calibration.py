"""Time and peak memory of calibrating the shipped pipeline's transformer with SEGQUANT_CFG, alpha search included.

    OMP_NUM_THREADS=2 python examples/benchmark_calibration.py

Memory is the peak resident set during the work, above what the process held just before (model, calibration data, one
warm-up call). Each number comes from a new process, so that no earlier peak hides it: the forward passes of calibration
alone, in full precision, and ``mtq.quantize``. Each is measured with malloc as it is, and with malloc told to give
freed blocks back at once (glibc): only that shows how much is really in use, and it costs time. What calibration itself
needs, the row samples and one layer's workspace, is the difference between the two jobs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import modelopt.torch.quantization as mtq
import psutil
import score_shapes
import torch
from diffusers import SD3Transformer2DModel
from shapes_sampling import PIPELINE, load_pipeline, sampling
from torch import nn

import modelopt_ext
from optimum_segquant.evaluation import DenoiserCall, Trajectories, sample_trajectories

MIB = 2**20
ALLOCATORS = {
    "as it is": {},
    "gives back at once": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"},
}
"""Environment of a measured process, by what its malloc does."""
SAMPLING_INTERVAL = 0.002  # seconds between two looks at the resident set


class PeakMemory:
    """A context manager that watches this process's resident set from a thread; ``growth`` is in bytes."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed pages back, or they would hide the growth
        self._process = psutil.Process()
        self._before = self._peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLING_INTERVAL):
            self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def growth(self) -> int:
        """Peak minus start."""
        return self._peak - self._before


def measure(job: str, transformer_folder: Path, data: Path) -> dict[str, float]:
    """Run one job in this process and return its seconds and MiB; ``job`` is ``forward`` or ``calibrate``."""
    transformer = SD3Transformer2DModel.from_pretrained(transformer_folder).eval()
    trajectories = Trajectories(tuple(DenoiserCall(**call) for call in torch.load(data, weights_only=True)))
    Trajectories(trajectories.calls[:1]).forward_loop(transformer)
    with PeakMemory() as memory:
        start = time.perf_counter()
        if job == "forward":
            trajectories.forward_loop(transformer)
        else:
            mtq.quantize(transformer, modelopt_ext.SEGQUANT_CFG, trajectories.forward_loop)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": memory.growth / MIB}


def row_samples_mib(transformer: nn.Module, samples: int) -> float:
    """Return the most that ``samples`` rows of every Linear's input take, 16 bits a value."""
    widths = [module.in_features for module in transformer.modules() if isinstance(module, nn.Linear)]
    return 2 * samples * sum(widths) / MIB


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="folder of a shapes pipeline")
    parser.add_argument("--prompts", type=int, default=16, help="calibration prompts")
    parser.add_argument("--steps", type=int, default=24, help="denoising steps")
    parser.add_argument("--calibration-steps", type=int, default=8, help="how many of the steps calibration sees")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run both jobs, print and return their numbers."""
    options = parse_arguments(arguments)
    pipeline = load_pipeline(options.pipeline)
    trajectories = sample_trajectories(
        pipeline,
        score_shapes.unseen_prompts(options.prompts, seed=1_000),
        steps=options.calibration_steps,
        **sampling(pipeline, options.steps),
    )
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "calls.pt"
        torch.save([vars(call) for call in trajectories], data)
        for job in ("forward", "calibrate"):
            for allocator, environment in ALLOCATORS.items():
                os.environ.update(environment)
                try:
                    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                        future = pool.submit(measure, job, options.pipeline / "transformer", data)
                        results[f"{job}, malloc {allocator}"] = future.result()
                finally:
                    for name in environment:
                        del os.environ[name]

    samples = modelopt_ext.SegQuantCalibConfig().rows_to_keep
    weights = sum(parameter.nbytes for parameter in pipeline.transformer.parameters()) / MIB
    print(f"{len(trajectories)} calls of batch {len(trajectories[0].output)}, weights {weights:.1f} MiB")
    print("| | seconds | peak above the model, MiB |\n|---|---|---|")
    for label, result in results.items():
        print(f"| {label} | {result['seconds']:.1f} | {result['peak_mib']:.0f} |")
    print(f"Row samples, {samples} of each Linear: {row_samples_mib(pipeline.transformer, samples):.1f} MiB.")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
