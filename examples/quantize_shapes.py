"""The main job: quantize the shipped pipeline with ModelOpt's presets and with SegQuant, and compare.

    python examples/quantize_shapes.py

samples calibration trajectories from ``examples/pipelines/shapes-sd3``, quantizes its transformer with every config of
the table, measures each on trajectories that calibration has not seen, generates the same prompts and seeds with each,
and writes ``out/shapes/comparison.png`` (full precision beside quantized) and ``out/shapes/results.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import score_shapes
import torch
from diffusers import UNet2DConditionModel
from pictures import difference, draw_strips
from PIL import Image
from shapes_sampling import PIPELINE, load_pipeline, matching, sampling

import modelopt_ext
from optimum_segquant.evaluation import (
    Comparison,
    compare,
    denoiser_of,
    embedders,
    generate_images,
    layer_costs,
    sample_trajectories,
    share,
)

# Calibration, measurement and images use prompts and seeds of their own.
CALIBRATION_SEED, UNSEEN_SEED, IMAGE_SEED = 1_000, 2_000, 3_000


def linears_only(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ModelOpt config that keeps its algorithm and its Linears' quantizers and leaves every other layer alone.

    ModelOpt's INT8 presets also quantize the inputs of LayerNorms and the patch embedding's convolution.
    """
    limited = copy.deepcopy(dict(config))
    for entry in limited["quant_cfg"]:
        if "cfg" in entry and "parent_class" not in entry:
            entry["parent_class"] = "nn.Linear"
    return limited


def with_algorithm(config: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """Return a SegQuant config with some fields of its algorithm replaced."""
    changed = copy.deepcopy(dict(config))
    changed["algorithm"] = {**changed["algorithm"], **fields}
    return changed


def table_rows(unet: bool = False) -> dict[str, dict[str, Any]]:
    """Return the configs to compare, by the name they have in the table; a UNet's convolutions get one, too."""
    rows = {
        "ModelOpt INT8_DEFAULT_CFG": mtq.INT8_DEFAULT_CFG,
        "ModelOpt INT8_SMOOTHQUANT_CFG": mtq.INT8_SMOOTHQUANT_CFG,
        "INT8_DEFAULT_CFG, Linears only": linears_only(mtq.INT8_DEFAULT_CFG),
        "INT8_SMOOTHQUANT_CFG, Linears only": linears_only(mtq.INT8_SMOOTHQUANT_CFG),
        "SEGQUANT_CFG": modelopt_ext.SEGQUANT_CFG,
        "SEGQUANT_CFG, all layers static": with_algorithm(modelopt_ext.SEGQUANT_CFG, embedders="as_configured"),
        "SEGQUANT_INT8_PER_TENSOR_CFG": modelopt_ext.SEGQUANT_INT8_PER_TENSOR_CFG,
        "SEGQUANT_INT8_DYNAMIC_CFG": modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG,
    }
    if unet:
        rows["SEGQUANT_CFG, convolutions too"] = modelopt_ext.with_convolutions(modelopt_ext.SEGQUANT_CFG)
    return rows


PICTURED = (
    "ModelOpt INT8_SMOOTHQUANT_CFG",
    "INT8_SMOOTHQUANT_CFG, Linears only",
    "SEGQUANT_CFG",
    "SEGQUANT_CFG, convolutions too",
)
"""The rows that the picture shows beside full precision."""


def draw_comparison(
    reference: torch.Tensor, rows: Mapping[str, Comparison], prompts: Sequence[str], zoom: int = 2, gain: float = 4.0
) -> Image.Image:
    """Draw full-precision images above quantized ones, each followed by its difference.

    Args:
        reference: (P, 3, H, W) float in [0, 1].
        rows: by label, with images of the same shape.
        prompts: P captions.
        zoom: pixels of the picture per pixel of an image.
        gain: what absolute differences are multiplied by, so that they can be seen.
    """
    strips = [("full precision", reference)]
    for name, row in rows.items():
        assert row.images is not None
        strips.append((f"{name}\n{row.sqnr.overall:.1f} dB", row.images))
        strips.append(difference(row.images, reference, gain))
    return draw_strips(strips, prompts, zoom)


def format_table(full_precision: score_shapes.Score, rows: Mapping[str, tuple[Comparison, score_shapes.Score]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| config | velocity SQNR, dB | PSNR, dB | SSIM | prompts followed | calibration, s |",
        "|---|---|---|---|---|---|",
        f"| full precision | | | | {100 * full_precision.rate:.0f} % | |",
    ]
    for name, (row, followed) in rows.items():
        assert row.metrics is not None
        lines.append(
            f"| {name} | {row.sqnr.overall:.1f} | {row.metrics.psnr:.1f} | {row.metrics.ssim:.3f} "
            f"| {100 * followed.rate:.0f} % | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="folder of a shapes pipeline")
    parser.add_argument("--out", type=Path, default=Path("out/shapes"), help="folder for the picture and results.json")
    parser.add_argument("--steps", type=int, default=24, help="denoising steps of every trajectory and image")
    parser.add_argument("--calibration-prompts", type=int, default=16)
    parser.add_argument("--calibration-steps", type=int, default=8, help="how many of the steps calibration sees")
    parser.add_argument("--unseen-prompts", type=int, default=16, help="trajectories for the velocity SQNR")
    parser.add_argument("--unseen-steps", type=int, default=12, help="how many of their steps are measured")
    parser.add_argument("--images", type=int, default=32, help="images per config")
    parser.add_argument("--columns", type=int, default=8, help="images per config in the picture")
    parser.add_argument(
        "--rows", nargs="+", default=["*"], help="only configs whose name matches one of these patterns"
    )
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison and write its results."""
    start = time.perf_counter()
    options = parse_arguments(arguments)
    pipeline = load_pipeline(options.pipeline, options.device)
    rows = table_rows(unet=isinstance(denoiser_of(pipeline), UNet2DConditionModel))
    configs = {name: rows[name] for name in matching(rows, options.rows)}
    call = sampling(pipeline, options.steps)

    print("sampling full-precision trajectories and images", flush=True)
    calibration = sample_trajectories(
        pipeline,
        score_shapes.unseen_prompts(options.calibration_prompts, seed=CALIBRATION_SEED),
        seeds=CALIBRATION_SEED,
        steps=options.calibration_steps,
        **call,
    )
    unseen = sample_trajectories(
        pipeline,
        score_shapes.unseen_prompts(options.unseen_prompts, seed=UNSEEN_SEED),
        seeds=UNSEEN_SEED,
        steps=options.unseen_steps,
        **call,
    )
    prompts = score_shapes.unseen_prompts(options.images, seed=IMAGE_SEED)
    reference = generate_images(pipeline, prompts, seeds=IMAGE_SEED, **call)

    results: dict[str, tuple[Comparison, score_shapes.Score]] = {}
    for name, config in configs.items():
        print(f"quantizing with {name}", flush=True)
        row = compare(
            pipeline,
            config,
            calibration=calibration,
            unseen=unseen,
            prompts=prompts,
            reference=reference,
            seeds=IMAGE_SEED,
            **call,
        )
        assert row.images is not None
        results[name] = row, score_shapes.score(prompts, row.images)

    full_precision = score_shapes.score(prompts, reference)
    costs = layer_costs(denoiser_of(pipeline), calibration)
    embedding = share(costs, embedders(denoiser_of(pipeline), costs))
    options.out.mkdir(parents=True, exist_ok=True)
    shown = {name: results[name][0] for name in PICTURED if name in results}
    picture = options.out / "comparison.png"
    draw_comparison(reference, shown, prompts[: options.columns]).save(picture, optimize=True)
    write_json(options.out / "results.json", full_precision, results)

    print()
    print(format_table(full_precision, results))
    print()
    print(
        f"{len(prompts)} images of {options.steps} steps; the time, text and patch embedders hold "
        f"{100 * embedding.weights:.1f} % of the layers' weights and do {100 * embedding.multiply_adds:.1f} % of their "
        f"multiply-adds."
    )
    print(f"{picture} and results.json written; {time.perf_counter() - start:.0f} s in all.")


def write_json(
    path: Path, full_precision: score_shapes.Score, results: Mapping[str, tuple[Comparison, score_shapes.Score]]
) -> None:
    """Write the table's numbers, and the SQNR of each timestep, as JSON; a bit-equal output's ``inf`` becomes null."""
    rows = {}
    for name, (row, followed) in results.items():
        assert row.metrics is not None
        rows[name] = {
            "velocity_sqnr_db": finite(row.sqnr.overall),
            "velocity_sqnr_db_by_timestep": {f"{t:g}": finite(value) for t, value in row.sqnr.per_timestep.items()},
            "psnr_db": finite(row.metrics.psnr),
            "ssim": row.metrics.ssim,
            "prompts_followed": followed.rate,
            "calibration_seconds": row.seconds,
        }
    document = {"full_precision": {"prompts_followed": full_precision.rate}, "quantized": rows}
    path.write_text(json.dumps(document, indent=2) + "\n")


def finite(value: float) -> float | None:
    """Return ``value``, or None if JSON cannot hold it."""
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
