"""A packed FLUX.1-dev-size transformer on several GPUs of one host, by the hosts' own tools.

    torchrun --nproc_per_node 2 examples/multi_gpu.py --compile       # a step by several: context parallelism
    python examples/multi_gpu.py --device-map                         # a model in the memory of two: accelerate

Context parallelism is diffusers': every GPU holds the model and works on a share of the tokens, and attention exchanges
heads (Ulysses). Scales are per token or static, so a share of the tokens gives the numbers that all give; what
differs is the order of attention's sums. Without ``--compile``, Python takes longer than the GPUs. With
``--device-map`` blocks are spread over the GPUs and run one after the other. Weights are random: time and memory are
true, quality is not looked at.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Sequence
from typing import Any

import accelerate
import modelopt.torch.quantization as mtq
import torch
import torch.distributed as dist
from benchmark_gpu import CONFIGS, GIB, loop_over
from gpu_models import DENOISERS, Call
from gpu_timing import STEPS_AT_ONCE, milliseconds
from torch import Tensor, nn

import modelopt_ext

START = time.perf_counter()
NO_SPLIT = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]


def packed(device: torch.device, tiny: bool, way: str) -> tuple[Any, Call]:
    """The model, quantized without a search and packed, and a call that calibration has not seen."""
    denoiser = DENOISERS["flux"]
    model = denoiser.build(device, tiny)
    data = [denoiser.call(model, 1, tiny, seed) for seed in (0, 1)]
    model = modelopt_ext.compress(mtq.quantize(model, copy.deepcopy(CONFIGS[way]), loop_over(data)))
    return model, denoiser.call(model, 1, tiny, 2)


@torch.no_grad()
def step(model: nn.Module, call: Call, device: torch.device) -> tuple[Tensor, float]:
    """The output, and milliseconds of a step."""
    call = {**call, "return_dict": False}  # what diffusers' context parallelism can gather
    output = model(**call)[0]
    return output, milliseconds(lambda _: model(**call), device, repeats=3, at_once=STEPS_AT_ONCE)


def say(what: str) -> None:
    """Print how far the script is: a large model takes minutes until the first number."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{time.perf_counter() - START:5.0f} s: {what}", flush=True)


def compare(one: Tensor, several: Tensor) -> float:
    """The relative difference of two outputs."""
    return float((several.to(one.device).float() - one.float()).norm() / one.float().norm())


def context_parallel(options: argparse.Namespace) -> None:
    """One process a GPU; every one keeps the whole model."""
    from diffusers import ContextParallelConfig

    rank, count, cuda = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), options.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device(options.device)
    if cuda:
        torch.cuda.set_device(device)
    model, call = packed(device, options.tiny, options.way)
    model.set_attention_backend("_native_cudnn" if cuda else "native")
    say("packed")
    if options.compile:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False, options=modelopt_ext.compile_options())
    alone, alone_ms = step(model, call, device)
    say(f"one process takes {alone_ms:.1f} ms a step")
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count))
    together, together_ms = step(model, call, device)
    if rank == 0:
        print(
            f"{torch.cuda.get_device_name() if cuda else 'CPU'}, {options.way}, "
            f"{'compiled' if options.compile else 'eager'}: one process {alone_ms:.1f} ms, "
            f"{count} processes {together_ms:.1f} ms a step, outputs differ by {compare(alone, together):.2%}",
            flush=True,
        )
    dist.destroy_process_group()


def device_map(options: argparse.Namespace) -> None:
    """One process; blocks lie on different GPUs."""
    device = torch.device(options.device)
    model, call = packed(device, options.tiny, options.way)
    say("packed")
    expected, alone_ms = step(model, call, device)
    say(f"one device takes {alone_ms:.1f} ms a step")
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    model = model.to("cpu")
    count = max(torch.cuda.device_count(), 1)
    memory: dict[int | str, int] = {index: int(1.2 * size / count) for index in range(torch.cuda.device_count())}
    places = accelerate.infer_auto_device_map(model, {**memory, "cpu": 2 * size}, no_split_module_classes=NO_SPLIT)
    model = accelerate.dispatch_model(model, places, force_hooks=True)
    say("dispatched")
    output, ms = step(model, call, device)
    used = sorted({str(place) for place in places.values()})
    print(
        f"{options.way}: {size / GIB:.2f} GiB of weights over {', '.join(used)}; {ms:.1f} ms a step, "
        f"outputs differ by {compare(expected, output):.2%}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device-map", action="store_true", help="spread the blocks instead of the tokens")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--way", default="int8", choices=list(CONFIGS), help="the format")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    options = parser.parse_args(arguments)
    if options.device_map and options.compile:
        parser.error("--compile is for context parallelism: accelerate's hooks are not compiled")
    if options.device_map:
        device_map(options)
    elif "RANK" in os.environ:
        context_parallel(options)
    else:
        parser.error("start it by torchrun --nproc_per_node N, or with --device-map")


if __name__ == "__main__":
    main()
