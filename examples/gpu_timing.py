"""Timing on a GPU: medians by events, single kernels in CUDA graphs, where a step's time goes, and a compilation's."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch._dynamo.utils import compilation_time_metrics
from torch.profiler import ProfilerActivity, profile

STEPS_AT_ONCE = 4  # denoising steps that a pipeline sends off before anything waits for the GPU
# Of single kernels: how many are in a CUDA graph, milliseconds that it is replayed for, and how often.
IN_A_GRAPH, SUSTAINED, ROUNDS = 8, 30.0, 9

# A kernel belongs to the first kind of which a part of its name says so.
KINDS = {
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "products of codes": ("_tiles", "_few_rows", "qqtst", "e4m3", "s8", "imma", "igemm", "_scaled_mm", "int8"),
    "other products": ("nvjet", "gemm", "cutlass", "cublas", "splitk", "gemv"),
    "convolutions": ("conv", "nchwto", "nhwcto", "fprop"),
    "rounding by itself": ("_quantize",),
    "fused elementwise": ("triton_",),
}


def milliseconds(work: Callable[[int], object], device: torch.device, repeats: int = 10, at_once: int = 1) -> float:
    """Median time of ``work(i)``, ``at_once`` of them sent off at a time; ``i`` lets it rotate its inputs."""
    for index in range(4):
        work(index)
    times = []
    for index in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for turn in range(at_once):
                work(index + turn)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / at_once)
        else:
            begin = time.perf_counter()
            work(index)
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def product_milliseconds(work: Callable[[int], object], device: torch.device) -> float:
    """The same of one kernel, without the time that Python takes to launch it: by a CUDA graph of several."""
    return in_turns({"": work}, device)[""]


def in_turns(ways: Mapping[str, Callable[[int], object]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of several ways to do one thing, measured by turns and for long enough.

    A GPU lowers its clock under load: what is measured first, or for a moment, seems faster than what follows, and each
    way finds the clock that the one before it has left. Turns are shuffled, so that this is another one in each round.
    """
    if device.type != "cuda":
        return {name: milliseconds(work, device) for name, work in ways.items()}
    replays = {name: _replay(work) for name, work in ways.items()}
    at_once = {}
    for name, replay in replays.items():
        once = milliseconds(lambda _, run=replay: run(), device, repeats=3)  # type: ignore[misc]
        at_once[name] = max(1, round(SUSTAINED / once))
    times: dict[str, list[float]] = {name: [] for name in ways}
    shuffled = random.Random(0)
    for _ in range(ROUNDS):
        for name in shuffled.sample(list(replays), len(replays)):
            replay = replays[name]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            replay()
            start.record()
            for _ in range(at_once[name]):
                replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / at_once[name] / IN_A_GRAPH)
    return {name: statistics.median(values) for name, values in times.items()}


def _replay(work: Callable[[int], object]) -> Callable[[], None]:
    """Runs a CUDA graph of some ``work``."""
    for index in range(4):  # chooses tiles, which a graph can't hold
        work(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(IN_A_GRAPH):
            work(index)
    return graph.replay


def breakdown(work: Callable[[], object], steps: int = 2) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """Milliseconds of a step by kind of kernel, and the kernels that take longest: (name, milliseconds, launches)."""
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        for _ in range(steps):
            work()
        torch.cuda.synchronize()
    kernels: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in run.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] += event.device_time / 1e3 / steps
            launches[event.name] += 1
    kinds: Counter[str] = Counter()
    for name, time_taken in kernels.items():
        lower = name.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "other kernels")
        # Inductor names a fused kernel after all that it holds, also what it only feeds.
        kinds["fused elementwise" if lower.startswith("triton_") else kind] += time_taken
    return dict(kinds.most_common()), [(name, t, launches[name] // steps) for name, t in kernels.most_common(12)]


def compile_seconds() -> dict[str, float]:
    """Seconds that compilations of this process have taken so far, by stage: those of ``kernels`` are waited for."""
    taken = Counter({name: sum(seconds) for name, seconds in compilation_time_metrics.items()})
    kernels = taken["async_compile.wait"] + taken["async_compile.precompile"]
    return {
        "Dynamo": taken["bytecode_tracing"],
        "AOTAutograd": taken["create_aot_dispatcher_function"] - taken["compile_fx_inner"],
        "Inductor": taken["compile_fx_inner"] - kernels,
        "kernels": kernels,
    }


def release(device: torch.device) -> None:
    """Give freed memory back, so that peaks are the next model's own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
