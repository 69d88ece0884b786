"""Speed and memory on a GPU: single kernels, and one denoising step of real-size models, beside the peers.

    python examples/benchmark_gpu.py --json out/benchmark_gpu.json --plot out/benchmark_gpu.png
    python examples/benchmark_gpu.py --models flux --ways bf16 int8 fp8 --compile whole
    python examples/benchmark_gpu.py --tiny --device cpu --ways bf16 int8       # try the script

Models have random weights, which give true time and memory, not true quality. Ours are calibrated without a search,
which changes no shape: segments, polarity and scales are there. The time of a step is the median of a few steps in a
row, as a pipeline runs them, and the same in a CUDA graph, where Python costs nothing; all ways of a model run in one
process, one after the other.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import modelopt
import modelopt.torch.quantization as mtq
import torch
from gpu_models import DENOISERS, Call
from gpu_products import SHAPES, TINY_SHAPES, products, rounding
from gpu_timing import STEPS_AT_ONCE, breakdown, compile_seconds, milliseconds, release
from torch import nn

import modelopt_ext
from modelopt_ext.presets import PER_TOKEN, linear_only

GIB = 2**30
INT8, FP8 = {"num_bits": 8, "axis": 0}, {"num_bits": (4, 3), "axis": 0}
NO_SEARCH: dict[str, Any] = {"alpha": None, "clip_grid": [1.0], "progress": False}
STATIC: dict[str, Any] = {"num_bits": 8, "axis": None}
CONFIGS: dict[str, dict[str, Any]] = {
    "int8": linear_only(INT8, STATIC, **NO_SEARCH),
    "int8-no-polarity": linear_only(INT8, STATIC, polarity="none", **NO_SEARCH),
    "int8-dual8": linear_only(INT8, STATIC, polarity="dual8", **NO_SEARCH),
    "int8-per-token": linear_only(INT8, {"num_bits": 8, **PER_TOKEN}, **NO_SEARCH),
    "fp8": linear_only(FP8, {"num_bits": (4, 3), "axis": None}, **NO_SEARCH),
    "fp8-per-token": linear_only(FP8, {"num_bits": (4, 3), **PER_TOKEN}, **NO_SEARCH),
    "w4a8": linear_only({"num_bits": 4, "axis": 0}, {"num_bits": 8, **PER_TOKEN}, **NO_SEARCH),
}
PEERS = ("torchao-int8", "torchao-fp8", "modelopt-fp8")
INT_MM_ROWS = 16  # that torch._int_mm refuses
# In full precision as others compile it, and with the options that ours are compiled with.
WAYS = ("bf16", "bf16-options", *CONFIGS, *PEERS)


def loop_over(data: Sequence[Call]) -> Callable[[nn.Module], None]:
    """A forward loop over recorded calls."""

    @torch.no_grad()
    def loop(module: nn.Module) -> None:
        for call in data:
            module(**call)

    return loop


def prepare(way: str, model: nn.Module, data: Sequence[Call]) -> nn.Module:
    """Make a model what ``way`` says, in place.

    Raises:
        ImportError: torchao is missing.
    """
    if way in CONFIGS:
        return modelopt_ext.compress(mtq.quantize(model, copy.deepcopy(CONFIGS[way]), loop_over(data)))
    if way == "modelopt-fp8":
        from modelopt.torch.quantization.backends.gemm_registry import enable_real_quant_gemm

        config = {"quant_cfg": CONFIGS["fp8"]["quant_cfg"], "algorithm": "max"}
        config["quant_cfg"] = copy.deepcopy(config["quant_cfg"])
        config["quant_cfg"][1]["cfg"]["axis"] = None  # its fast product takes one scale a tensor
        mtq.quantize(model, config, loop_over(data))
        mtq.compress(model)
        enable_real_quant_gemm(model)
    elif way.startswith("torchao"):
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )

        if way == "torchao-int8":
            many = linears_of_many_rows(model, data[0])
            quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in many)
        else:
            quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return model


@torch.no_grad()
def linears_of_many_rows(model: nn.Module, call: Call) -> set[str]:
    """Those whose inputs ``torch._int_mm`` takes: not AdaLN's, for example."""
    found = set()

    def look(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel() // inputs[0].shape[-1] > INT_MM_ROWS:
            found.add(name)

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_pre_hook(partial(look, name)) for name, module in linears.items()]
    model(**call)
    for handle in handles:
        handle.remove()
    return found


def compiled(model: Any, how: str, way: str) -> Any:
    """The model compiled ``"whole"``, or block by block (``"blocks"``): one compilation for all blocks of a kind."""
    options = modelopt_ext.compile_options() if way in CONFIGS or way == "bf16-options" else None
    if how == "whole":
        return torch.compile(model, fullgraph=True, dynamic=False, options=options)
    # As diffusers' compile_repeated_blocks() does, for classes that do not name their repeated blocks, too.
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    names = getattr(model, "_repeated_blocks", None) or {type(block).__name__ for blocks in lists for block in blocks}
    for module in model.modules():
        if type(module).__name__ in names:
            module.compile(fullgraph=True, dynamic=False, options=options)
    return model


# What diffusers' fused projections stand for; it keeps both.
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def fuse_qkv(model: Any) -> None:
    """One Linear for q, k and v, which reads its input once and cuts its output in three; in place."""
    model.fuse_qkv_projections()
    for module in model.modules():
        for fused, parts in FUSED.items():
            if isinstance(getattr(module, fused, None), nn.Linear):
                for part in parts:
                    if isinstance(getattr(module, part, None), nn.Linear):
                        delattr(module, part)


def model_step(run: Any, call: Call, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step, seconds of the first call and of compiling in it, peak GiB."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start, before = time.perf_counter(), compile_seconds()
    with torch.no_grad():
        run(**call)
        if cuda:
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        stages = {stage: seconds - before[stage] for stage, seconds in compile_seconds().items()}
        step = milliseconds(lambda _: run(**call), device, at_once=STEPS_AT_ONCE)
        alone = milliseconds(lambda _: run(**call), device)
    peak = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
    numbers: dict[str, Any] = {"step ms": step, "waited for, ms": alone, "first call s": first, "peak GiB": peak}
    return numbers | ({"compiling, s": stages} if any(stages.values()) else {})


@torch.no_grad()
def graph_step(run: Any, call: Call, device: torch.device) -> float:
    """Milliseconds of a step as a CUDA graph: what the GPU needs, without the time that Python takes to ask for it."""
    for _ in range(2):
        run(**call)
    torch.cuda.synchronize()
    graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.clone_state()
    try:
        with torch.cuda.graph(graph):
            run(**call)
    except RuntimeError:
        # A capture that failed keeps the generator.
        generator.graphsafe_set_state(state)
        raise
    return milliseconds(lambda _: graph.replay(), device, at_once=STEPS_AT_ONCE)


def first_line(error: Exception) -> str:
    """Kind and reason; CUDA's errors go on with advice."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def measure_way(
    kind: str, way: str, options: argparse.Namespace, device: torch.device, report: Callable[[str, Any], None]
) -> None:
    """Build, prepare and measure one model in one way: eager and compiled, at every batch size."""
    denoiser = DENOISERS[kind]
    model: Any = denoiser.build(device, options.tiny)
    data = [denoiser.call(model, 1, options.tiny, seed) for seed in (0, 1)]
    if options.fuse_qkv:
        fuse_qkv(model)
    start = time.perf_counter()
    model = prepare(way, model, data)
    seconds = time.perf_counter() - start
    release(device)
    size = sum(value.nbytes for value in (*model.parameters(), *model.buffers())) / GIB
    report(f"{kind}, {way}", {"prepared in s": seconds, "weights GiB": size})
    eager = model
    for how in ("eager", *options.compile):
        if how == "eager" and options.skip_eager:
            continue
        torch._dynamo.reset()
        run = eager if how == "eager" else compiled(model, how, way)
        for batch in options.batches:
            call = denoiser.call(model, batch, options.tiny, 2)
            numbers = model_step(run, call, device)
            if device.type == "cuda" and how != "eager":
                try:
                    numbers["graph ms"] = graph_step(run, call, device)
                except RuntimeError as error:
                    # Some peers ask the GPU for numbers in the middle of a step; ours do not.
                    if way not in PEERS:
                        raise
                    report(f"{kind}, {way}, {how}, batch {batch}, no graph", first_line(error))
            if device.type == "cuda" and how != "eager" and batch == options.batches[0]:
                with torch.no_grad():
                    numbers["by kind, ms"], slowest = breakdown(partial(run, **call))
                numbers["slowest kernels"] = [f"{t:.2f} ms, {n} x {name[:90]}" for name, t, n in slowest]
            report(f"{kind}, {way}, {how}, batch {batch}", numbers)


def _colour(way: str) -> str:
    return "#9aa0a6" if way.startswith("bf16") else "#f29900" if way in PEERS else "#1a73e8"


def plot(results: dict[str, Any], path: Path) -> None:
    """Steps of the compiled models as bars, a row of panels for each batch size.

    Raises:
        ValueError: no step was measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps: dict[tuple[str, str], dict[str, float]] = {}
    for label, numbers in results.items():
        parts = label.split(", ")
        if len(parts) == 4 and parts[2] != "eager" and isinstance(numbers, dict) and "step ms" in numbers:
            kind, way, _, batch = parts
            best = min(numbers["step ms"], numbers.get("graph ms", numbers["step ms"]))
            steps.setdefault((batch, kind), {})[way] = best
    if not steps:
        raise ValueError("no compiled step was measured: name --models, --ways and what to --compile")
    batches, kinds = (list(dict.fromkeys(names)) for names in zip(*steps, strict=True))
    size = 1.2 + 3.2 * len(kinds), 0.8 + 2.2 * len(batches)
    figure, grid = pyplot.subplots(len(batches), len(kinds), figsize=size, layout="constrained", squeeze=False)
    for row, batch in zip(grid, batches, strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            bars = steps.get((batch, kind))
            if bars is None:
                axis.set_axis_off()
                continue
            drawn = axis.barh(list(bars), list(bars.values()), color=[_colour(way) for way in bars])
            base = bars.get("bf16")
            labels = [f"{ms:.0f}" + (f" ({base / ms:.2f}x)" if base else "") for ms in bars.values()]
            axis.bar_label(drawn, labels, padding=3)
            axis.invert_yaxis()
            axis.set_title(f"{DENOISERS[kind].name}, {batch}", fontsize=10)
            axis.set_xlabel("ms a step")
            axis.margins(x=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Compiled denoising step at 1024 x 1024, {results['device']}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where to work")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--models", nargs="*", default=list(DENOISERS), choices=list(DENOISERS))
    parser.add_argument("--ways", nargs="+", default=["bf16", "int8", "int8-no-polarity", "fp8", *PEERS], choices=WAYS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4], help="batch sizes")
    parser.add_argument(
        "--compile", nargs="*", default=["blocks"], choices=["blocks", "whole"], help="what to compile at a time"
    )
    parser.add_argument("--fuse-qkv", action="store_true", help="diffusers' fuse_qkv_projections() first, for all ways")
    parser.add_argument("--skip-eager", action="store_true", help="compiled models only")
    parser.add_argument("--skip-products", action="store_true", help="no single kernels")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--plot", type=Path, help="draw the steps into this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and return."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "modelopt": modelopt.__version__}
    print(f"{name}; " + ", ".join(f"{key} {value}" for key, value in versions.items()), flush=True)
    results: dict[str, Any] = {"device": name, "versions": versions}

    def save() -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(results, indent=2) + "\n")

    def report(label: str, numbers: Any) -> None:
        results[label] = numbers
        if isinstance(numbers, dict):
            listed = numbers.pop("slowest kernels", [])
            flat = dict(numbers)
            for part in [name for name, value in numbers.items() if isinstance(value, dict)]:
                flat.update(flat.pop(part))
            print(f"{label}: " + ", ".join(f"{key} {value:.2f}" for key, value in flat.items()), flush=True)
            for line in listed:
                print(f"    {line}", flush=True)
        else:
            print(f"{label}: {numbers}", flush=True)
        save()

    def say(line: str) -> None:
        print(line, flush=True)

    if not options.skip_products:
        results["products"] = products(device, TINY_SHAPES if options.tiny else SHAPES, say)
        results["rounding"] = rounding(device, options.tiny, say)
        save()
    for kind in options.models:
        for way in options.ways:
            try:
                measure_way(kind, way, options, device, report)
            except (ImportError, RuntimeError, AssertionError, ValueError, TypeError) as error:
                # A peer that does not run here is a result, too; ours has to.
                if way not in PEERS:
                    raise
                report(f"{kind}, {way}, failed", first_line(error))
            release(device)
    if options.plot:
        plot(results, options.plot)
    return results


if __name__ == "__main__":
    main()
