"""Calibration by several processes: how much faster than by one, and whether the result is the same.

    torchrun --standalone --nproc_per_node 2 examples/distributed_calibration.py
    accelerate launch --num_processes 2 examples/distributed_calibration.py       # one a GPU
    accelerate launch --multi_gpu --num_processes 2 examples/distributed_calibration.py   # also where there is none

Every process loads the pipeline, samples its share of the prompts and calibrates on it. ``mtq.quantize`` merges what
they saw, deals the layers out to them and gives all the same model. Then the first process does all of it alone, and
compares. Give each process as many threads as it has cores: OMP_NUM_THREADS, 1 by default under torchrun.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import score_shapes
import torch
from shapes_sampling import GUIDANCE, PIPELINE, TEXT_TOKENS, load_pipeline
from torch import nn

import modelopt_ext
from modelopt_ext.distributed import Processes
from optimum_segquant.calibration import CalibrationSettings, record_calibration
from optimum_segquant.calibration.distributed import join_processes, own_share

CALIBRATION_SEED = 1_000


@dataclass(frozen=True)
class Run:
    """One way of doing it.

    Attributes:
        denoiser: quantized.
        calls: that this process ran.
        sampling, calibration: seconds until the last process had finished.
        busiest: CPU seconds of the process that had the most to do: the time that this takes on an idle machine.
    """

    denoiser: nn.Module
    calls: int
    sampling: float
    calibration: float
    busiest: float


def run(pipeline: Any, settings: CalibrationSettings, config: dict[str, Any], processes: Processes) -> Run:
    """Sample and calibrate; every process of ``processes`` does it, with its share in ``settings``."""
    denoiser = copy.deepcopy(pipeline.transformer)
    processes.gather(None)  # all start at once
    start, cpu = time.perf_counter(), time.process_time()
    data = record_calibration(pipeline, settings, progress=False)["transformer"]
    processes.gather(None)
    sampled = time.perf_counter()
    mtq.quantize(denoiser, config, data.forward_loop)
    busiest = max(processes.gather(time.process_time() - cpu))
    return Run(denoiser, len(data), sampled - start, time.perf_counter() - sampled, busiest)


def checksum(model: nn.Module) -> int:
    """CRC-32 of all tensors of a model."""
    total = 0
    for name, tensor in model.state_dict().items():
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    """What is known of the tensors that two quantized models differ in."""
    first, second = one.state_dict(), other.state_dict()
    if first.keys() != second.keys():
        return [f"only in one of them: {name}" for name in sorted(first.keys() ^ second.keys())]
    return [
        f"{name}: by {float((first[name].double() - second[name].double()).abs().max()):.2g}"
        for name in first
        if not torch.equal(first[name], second[name])
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="folder of a shapes pipeline")
    parser.add_argument("--config", default="SEGQUANT_CFG", help="name of a preset")
    parser.add_argument("--prompts", type=int, default=16, help="calibration prompts")
    parser.add_argument("--batch-size", type=int, default=4, help="prompts a call; whole batches are dealt out")
    parser.add_argument("--steps", type=int, default=24, help="denoising steps")
    parser.add_argument("--calibration-steps", type=int, default=8, help="how many of the steps calibration sees")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do it together, then alone, and print both.

    Raises:
        SystemExit: it runs in a single process, or the models differ from process to process.
    """
    options = parse_arguments(arguments)
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", message="Distributed training is initialized")
    rank, size = join_processes()
    if size == 1:
        raise SystemExit(
            "this is a single process: start several with torchrun --nproc_per_node 2. (Without GPUs accelerate launch "
            "--num_processes 2 starts one, and two with --multi_gpu.)"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the one that accelerate gave this process
    pipeline = load_pipeline(options.pipeline, device)
    settings = CalibrationSettings(
        prompts=tuple(score_shapes.unseen_prompts(options.prompts, seed=CALIBRATION_SEED)),
        num_inference_steps=options.steps,
        steps=options.calibration_steps,
        batch_size=options.batch_size,
        seed=CALIBRATION_SEED,
        call_kwargs={"guidance_scale": GUIDANCE, "max_sequence_length": TEXT_TOKENS},
    )
    config = copy.deepcopy(getattr(modelopt_ext, options.config))
    config["algorithm"]["progress"] = False
    with Processes.meeting() as processes:
        together = run(pipeline, own_share(settings), config, processes)
        checksums = processes.gather(checksum(together.denoiser))
        calls = processes.gather(together.calls)
        if processes.is_main:
            config["algorithm"]["distributed_sync"] = False
            alone = run(pipeline, settings, config, Processes())
            print(f"{options.config}, {len(settings.prompts)} prompts, {torch.get_num_threads()} thread(s) a process")
            print(
                "| processes | calls of each | sampling, s | calibration, s | in all, s | CPU time of the busiest, s |"
            )
            print("|---|---|---|---|---|---|")
            for count, of_each, done in ((1, [alone.calls], alone), (size, calls, together)):
                seconds = done.sampling + done.calibration
                shares = ", ".join(map(str, of_each))
                print(
                    f"| {count} | {shares} | {done.sampling:.1f} | {done.calibration:.1f} | {seconds:.1f} "
                    f"| {done.busiest:.1f} |"
                )
            different = differences(alone.denoiser, together.denoiser)
            total = len(alone.denoiser.state_dict())
            print(f"{len(set(checksums))} different model(s) in {size} process(es).")
            print(f"{len(different)} of {total} tensors differ from those of one process.")
            print(*different[:5], sep="\n", end="\n" if different else "")
        processes.gather(None)  # the others wait for the comparison
    if len(set(checksums)) > 1:
        raise SystemExit(f"process {rank}: the models differ")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
