"""Time and memory of calibrating a FLUX.1-dev-size transformer (12 B parameters, random weights) on one GPU.

    python examples/benchmark_calibration_flux.py                    # needs about 40 GB of GPU memory
    python examples/benchmark_calibration_flux.py --tiny --device cpu

Random weights and random latents give true time and memory, not true quality. Two things are measured: the whole model
in W8A8 with SEGQUANT_CFG, alpha search included, and W4A8 with GPTQ, with and without the low-rank branch, on one block
of either kind, extrapolated to the model by the number of blocks (embedders and the last projection are left out of the
extrapolation: under 1 % of the weights).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import modelopt
import modelopt.torch.quantization as mtq
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import modelopt_ext

GIB = 2**30
TINY = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 64}
BLOCKS = ("transformer_blocks", "single_transformer_blocks")


def build(device: torch.device, tiny: bool, **sizes: int) -> FluxTransformer2DModel:
    """The transformer, random weights in bfloat16, made on ``device``; ``sizes`` change its configuration."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return (
                FluxTransformer2DModel(guidance_embeds=True, **(TINY if tiny else sizes)).eval().requires_grad_(False)
            )
    finally:
        torch.set_default_dtype(default)


def calls(model: FluxTransformer2DModel, count: int, side: int, text: int) -> list[dict[str, Any]]:
    """Inputs of ``count`` denoising steps at batch 1: ``side`` x ``side`` latent tokens, ``text`` text tokens."""
    device, dtype = model.device, model.dtype
    generator = torch.Generator(device=device).manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(device, dtype)
    return [
        {
            "hidden_states": noise(1, side * side, model.config.in_channels),
            "encoder_hidden_states": noise(1, text, model.config.joint_attention_dim),
            "pooled_projections": noise(1, model.config.pooled_projection_dim),
            "timestep": torch.tensor([1 - step / count], device=device, dtype=dtype),
            "guidance": torch.full((1,), 3.5, device=device, dtype=torch.float32),
            "img_ids": image_ids,
            "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
        }
        for step in range(count)
    ]


def measured(device: torch.device, work: Callable[[], object]) -> tuple[float, float]:
    """Seconds and peak GiB of GPU memory (0 on a CPU) of ``work``."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
    return time.perf_counter() - start, peak


def only(config: dict[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """``config`` for the layers that match one of ``patterns``."""
    entries = [
        {**entry, "quantizer_name": f"{pattern}.{entry['quantizer_name'].lstrip('*')}"}
        for entry in config["quant_cfg"][1:]
        for pattern in patterns
    ]
    return {**config, "quant_cfg": [config["quant_cfg"][0], *entries]}


def one_block_each(
    model: FluxTransformer2DModel, config: dict[str, Any], loop: Callable[[nn.Module], None], device: torch.device
) -> dict[str, float]:
    """Seconds to calibrate the first block of either kind, and extrapolated to all of them."""
    results: dict[str, float] = {}
    model_seconds = 0.0
    for kind in BLOCKS:
        quantizers = only(config, [f"{kind}.0.*"])
        seconds, peak = measured(device, partial(mtq.quantize, model, quantizers, loop))
        results[f"{kind}.0, seconds"], results[f"{kind}.0, peak GiB"] = seconds, peak
        model_seconds += seconds * len(getattr(model, kind))
    results["model extrapolated, minutes"] = model_seconds / 60
    return results


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where to work")
    parser.add_argument("--tiny", action="store_true", help="a tiny model of the same class, to try the script")
    parser.add_argument("--calls", type=int, default=16, help="denoising steps to calibrate on")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--jobs", nargs="+", default=["w8a8", "gptq", "svd"], help="of w8a8, gptq, svd, nvfp4")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the jobs, print and return their numbers."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}; torch {torch.__version__}, modelopt {modelopt.__version__}, diffusers {diffusers.__version__}")

    def fresh() -> tuple[FluxTransformer2DModel, Callable[[nn.Module], None], float]:
        model = build(device, options.tiny)
        data = calls(model, options.calls, side=8 if options.tiny else 64, text=16 if options.tiny else 512)

        @torch.no_grad()
        def loop(module: nn.Module) -> None:
            for call in data:
                module(**call)

        return model, loop, sum(parameter.nbytes for parameter in model.parameters()) / GIB

    results: dict[str, dict[str, float]] = {}

    def report(label: str, numbers: dict[str, float]) -> None:
        results[label] = numbers
        print(f"{label}: " + ", ".join(f"{key} {value:.2f}" for key, value in numbers.items()), flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(results, indent=2) + "\n")

    model, loop, size = fresh()
    forward, forward_peak = measured(device, lambda: loop(model))
    report("forward passes", {"seconds": forward, "peak GiB": forward_peak, "weights GiB": size})
    if "w8a8" in options.jobs:
        seconds, peak = measured(device, lambda: mtq.quantize(model, modelopt_ext.SEGQUANT_CFG, loop))
        numbers = {"seconds": seconds, "peak GiB": peak, "peak / weights": peak / size}
        report("W8A8, alpha search, whole model", numbers)
    weights, activations = modelopt_ext.SEGQUANT_W4A8_CFG["quant_cfg"][1:]
    gptq = modelopt_ext.presets.linear_only(weights["cfg"], activations["cfg"], gptq=True)
    jobs = {
        "gptq": ("W4A8, GPTQ", gptq),
        "svd": ("SEGQUANT_W4A8_CFG", modelopt_ext.SEGQUANT_W4A8_CFG),
        "nvfp4": ("SEGQUANT_NVFP4_CFG", modelopt_ext.SEGQUANT_NVFP4_CFG),
    }
    for job, (label, config) in jobs.items():
        if job in options.jobs:
            del model, loop
            model, loop, size = fresh()
            report(label, one_block_each(model, config, loop, device))
    return results


if __name__ == "__main__":
    main()
