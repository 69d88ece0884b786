"""Speed of packed Linears on a GPU: single matrix products, and one denoising step of a FLUX.1-dev-size transformer.

    python examples/benchmark_gpu.py --json out/benchmark_gpu.json
    python examples/benchmark_gpu.py --tiny --device cpu            # try the script

Products are those of FLUX.1 at 1024 x 1024 (4096 image and 512 text tokens): medians of CUDA graphs over rotating
inputs; ours are compared with the reference first. The model has random weights, which give true time and memory, not
true quality. Calibration searches nothing here, which changes no shape: segments, polarity and scales are there.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import modelopt.torch.quantization as mtq
import torch
from benchmark_calibration_flux import GIB, build, calls
from torch import Tensor, nn

import modelopt_ext
from modelopt_ext.kernels import scaled_mm
from modelopt_ext.kernels.scaled_mm import reference
from modelopt_ext.presets import PER_TOKEN, linear_only

# (name, rows, channels, outputs)
SHAPES = (
    ("QKV, 4608 tokens", 4608, 3072, 3072),
    ("ff.net.0", 4608, 3072, 12288),
    ("ff.net.2", 4608, 12288, 3072),
    ("AdaLN, batch 1", 1, 3072, 18432),
)
INT8, FP8 = {"num_bits": 8, "axis": 0}, {"num_bits": (4, 3), "axis": 0}
NO_SEARCH: dict[str, Any] = {"alpha": None, "clip_grid": [1.0], "shift_granularity": "channel"}
CONFIGS: dict[str, dict[str, Any]] = {
    "INT8 static": linear_only(INT8, {"num_bits": 8, "axis": None}, **NO_SEARCH),
    "INT8 static, no polarity": linear_only(INT8, {"num_bits": 8, "axis": None}, polarity="none", **NO_SEARCH),
    "INT8 per token": linear_only(INT8, {"num_bits": 8, **PER_TOKEN}, **NO_SEARCH),
    "FP8 static": linear_only(FP8, {"num_bits": (4, 3), "axis": None}, **NO_SEARCH),
}


def milliseconds(work: Callable[[int], object], device: torch.device, repeats: int = 10) -> float:
    """Median time of ``work(i)``; ``i`` lets it rotate its inputs."""
    for index in range(4):
        work(index)
    times = []
    for index in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work(index)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            work(index)
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def product_milliseconds(work: Callable[[int], object], device: torch.device) -> float:
    """The same of one product, without the time that Python takes to launch it: by a CUDA graph of several."""
    if device.type != "cuda":
        return milliseconds(work, device)
    for index in range(4):  # chooses tiles, which a graph can't hold
        work(index)
    torch.cuda.synchronize()
    graph, turns = torch.cuda.CUDAGraph(), 8
    with torch.cuda.graph(graph):
        for index in range(turns):
            work(index)
    return milliseconds(lambda _: graph.replay(), device, repeats=20) / turns


def ways(m: int, k: int, n: int, device: torch.device) -> dict[str, Callable[[int], Tensor]]:
    """Ways to multiply (m, k) activations by an (n, k) weight; the argument rotates among four sets of inputs."""
    copies, half = 4, torch.bfloat16

    def eight(rows: int, columns: int) -> list[Tensor]:
        return [torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device) for _ in range(copies)]

    a, b = eight(m, k), eight(n, k)
    x = [torch.randn(m, k, device=device, dtype=half) for _ in range(copies)]
    w = [torch.randn(n, k, device=device, dtype=half) for _ in range(copies)]
    xf, wf = ([value.to(torch.float8_e4m3fn) for value in values] for values in (x, w))
    one, scalar = torch.ones(1, 1, device=device), torch.ones((), device=device)
    rows, scale, bias = torch.rand(m, 1, device=device), torch.rand(n, device=device), x[0].new_ones(n)
    sums = [codes.sum(dim=1, dtype=torch.int32) for codes in b]

    def dual8(i: int) -> Tensor:
        i, other = i % copies, (i + 1) % copies
        return scaled_mm(a[i], b[i], one, scale, bias, -128, sums[i], a[other], one, -1, out_dtype=half)

    def fp8(i: int, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None) -> Tensor:
        i %= copies
        return torch._scaled_mm(xf[i], wf[i].t(), scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=half)

    return {
        "bf16": lambda i: torch.nn.functional.linear(x[i % copies], w[i % copies], bias),
        "torch._int_mm": lambda i: torch._int_mm(a[i % copies], b[i % copies].t()),
        "int8 static": lambda i: scaled_mm(a[i % copies], b[i % copies], one, scale, bias, out_dtype=half),
        "int8 per token": lambda i: scaled_mm(a[i % copies], b[i % copies], rows, scale, bias, out_dtype=half),
        "int8 dual8": dual8,
        "torch._scaled_mm": lambda i: fp8(i, scalar, scalar),
        "torch._scaled_mm, row-wise": lambda i: fp8(i, rows, scale.reshape(1, -1), bias),
        "fp8 static": lambda i: scaled_mm(xf[i % copies], wf[i % copies], one, scale, bias, out_dtype=half),
    }


def check(m: int, k: int, n: int, device: torch.device) -> None:
    """Compare our products with the reference.

    Raises:
        AssertionError: they differ by more than the output's rounding.
    """
    a, a2 = (torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device) for _ in range(2))
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    one, scale = torch.ones(1, 1, device=device), torch.rand(n, device=device)
    sums = b.sum(dim=1, dtype=torch.int32)
    for arguments in ((a, b, one, scale), (a, b, one, scale, scale, -128, sums, a2, one, -1)):
        torch.testing.assert_close(scaled_mm(*arguments), reference(*arguments), rtol=1e-6, atol=1e-3)


def products(device: torch.device, shapes: Sequence[tuple[str, int, int, int]]) -> dict[str, dict[str, float]]:
    """Milliseconds of every product and way."""
    results: dict[str, dict[str, float]] = {}
    for name, m, k, n in shapes:
        check(m, k, n, device)
        row = results[name] = {}
        for way, work in ways(m, k, n, device).items():
            try:
                row[way] = product_milliseconds(work, device)
            except (RuntimeError, ValueError) as error:
                print(f"{name}, {way}: not possible here ({str(error).splitlines()[0][:100]})")
        # Few rows: what counts is how fast the weight is read.
        rates = {
            way: f"{n * k / ms / 1e9:.2f} TB/s" if m < 64 else f"{2 * m * k * n / ms / 1e9:.0f} TFLOP/s"
            for way, ms in row.items()
        }
        print(f"{name}: " + ", ".join(f"{way} {ms * 1e3:.0f} us ({rates[way]})" for way, ms in row.items()), flush=True)
    return results


def model_step(model: nn.Module, call: dict[str, Any], device: torch.device, compiled: bool) -> dict[str, float]:
    """Milliseconds of one step, seconds to compile, peak GiB."""
    run: Callable[..., Any] = torch.compile(model, fullgraph=True) if compiled else model
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with torch.no_grad():
        run(**call)
        if device.type == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        step = milliseconds(lambda _: run(**call), device)
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
    return {"step ms": step, "first call s": first, "peak GiB": peak}


def loop_over(data: Sequence[dict[str, Any]]) -> Callable[[nn.Module], None]:
    """A forward loop over recorded calls."""

    @torch.no_grad()
    def loop(module: nn.Module) -> None:
        for call in data:
            module(**call)

    return loop


def release(device: torch.device) -> None:
    """Give freed memory back, so that peaks are the next model's own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where to work")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--configs", nargs="*", default=["INT8 static", "FP8 static"], choices=sorted(CONFIGS))
    parser.add_argument("--skip", nargs="*", default=[], choices=["products", "bf16", "eager", "compiled"])
    parser.add_argument(
        "--blocks", nargs=2, type=int, default=[19, 38], help="double and single blocks; fewer compile faster"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure, print and return."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}; torch {torch.__version__}, diffusers {diffusers.__version__}", flush=True)
    results: dict[str, dict[str, float]] = {}
    if "products" not in options.skip:
        results.update(products(device, [("tiny", 32, 64, 48)] if options.tiny else SHAPES))

    def measure(label: str, model: nn.Module, call: dict[str, Any]) -> None:
        for way in ("eager", "compiled"):
            if way not in options.skip:
                results[f"{label}, {way}"] = step = model_step(model, call, device, way == "compiled")
                print(f"{label}, {way}: " + ", ".join(f"{k} {v:.1f}" for k, v in step.items()), flush=True)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(results, indent=2) + "\n")
        torch._dynamo.reset()

    for label in ["bf16", *options.configs]:
        if label in options.skip:
            continue
        double, single = options.blocks
        model = build(device, options.tiny, num_layers=double, num_single_layers=single)
        data = calls(model, 2, side=8 if options.tiny else 64, text=16 if options.tiny else 512)
        if label != "bf16":
            start = time.perf_counter()
            modelopt_ext.compress(mtq.quantize(model, copy.deepcopy(CONFIGS[label]), loop_over(data)))
            size = sum(value.nbytes for value in model.state_dict().values()) / GIB
            print(f"{label}: quantized and packed in {time.perf_counter() - start:.0f} s, {size:.2f} GiB", flush=True)
        release(device)
        measure(label, model, data[0])
        del model
        release(device)
    return results


if __name__ == "__main__":
    main()
