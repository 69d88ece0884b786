"""What each part of SegQuant brings, alone and with the others: W8A8 with static activation scales.

    python examples/ablation.py

Every row is quantized with per-channel and with per-tensor weights, once per seed; a seed has its own calibration and
evaluation prompts and noise. All rows of one seed see the same data, so gains are compared pairwise within seeds. The
embedders run per token in every row but the last: left static, their error hides everything else.

``--quick`` runs two rows on two seeds, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import score_shapes
from shapes_sampling import PIPELINE, load_pipeline, sampling

from modelopt_ext import SegQuantCalibConfig
from modelopt_ext.presets import linear_only
from optimum_segquant.evaluation import compare, sample_trajectories

CLIP_GRID = SegQuantCalibConfig().clip_grid
PLAIN: dict[str, Any] = {
    "segments": False,
    "polarity": "none",
    "alpha": None,
    "clip_grid": (1.0,),
    "embedders": "per_token",
}
ALL: dict[str, Any] = {"embedders": "per_token"}  # everything else as the algorithm has it by default

ROWS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "+ smoothing, alpha 0.5": {**PLAIN, "alpha": 0.5},
    "+ smoothing, searched": {**PLAIN, "alpha": "search"},
    "+ segments": {**PLAIN, "segments": True},
    "+ dual": {**PLAIN, "polarity": "dual"},
    "+ dual8": {**PLAIN, "polarity": "dual8"},
    "+ shift": {**PLAIN, "polarity": "shift"},
    "+ auto": {**PLAIN, "polarity": "auto"},
    "+ clipping": {**PLAIN, "clip_grid": CLIP_GRID},
    "all": ALL,
    "all, dual for auto": {**ALL, "polarity": "dual"},
    "all, dual8 for auto": {**ALL, "polarity": "dual8"},
    "all, shift for auto": {**ALL, "polarity": "shift"},
    "all but polarity": {**ALL, "polarity": "none"},
    "all but smoothing": {**ALL, "alpha": None},
    "all but segments": {**ALL, "segments": False},
    "all but clipping": {**ALL, "clip_grid": (1.0,)},
    "all, embedders static": {**ALL, "embedders": "as_configured"},
}
"""Fields of the ``segquant`` algorithm, by the name of the row."""

QUICK_ROWS = ("plain", "all")

WEIGHTS: dict[str, dict[str, Any]] = {
    "per-channel": {"num_bits": 8, "axis": 0},
    "per-tensor": {"num_bits": 8, "axis": None},
}
ACTIVATIONS: dict[str, Any] = {"num_bits": 8, "axis": None}

Results = dict[str, dict[str, list[float]]]
"""Velocity SQNR in dB by weight granularity, row and seed."""


def run(pipeline: Any, rows: Mapping[str, Mapping[str, Any]], seeds: int, options: argparse.Namespace) -> Results:
    """Quantize and measure every row on every seed."""
    results: Results = {weights: {row: [] for row in rows} for weights in options.weights}
    for seed in range(seeds):
        # Prompts and noise of calibration and evaluation, of all seeds and of quantize_shapes.py, are distinct.
        calibration, unseen = (
            sample_trajectories(
                pipeline,
                score_shapes.unseen_prompts(options.prompts, seed=base + seed),
                seeds=1000 * (base + seed),
                steps=kept,
                **sampling(pipeline, options.steps),
            )
            for base, kept in ((10_000, options.calibration_steps), (20_000, options.unseen_steps))
        )
        for weights in options.weights:
            for name, algorithm in rows.items():
                config = linear_only(WEIGHTS[weights], ACTIVATIONS, progress=False, **algorithm)
                row = compare(pipeline, config, calibration=calibration, unseen=unseen)
                results[weights][name].append(row.sqnr.overall)
                print(f"seed {seed}, {weights}, {name}: {row.sqnr.overall:.2f} dB, {row.seconds:.0f} s", flush=True)
    return results


def spread(values: Sequence[float]) -> float:
    """Return the sample standard deviation; NaN for a single value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def verdict(gains: Sequence[float]) -> str:
    """Say whether gains, paired by seed, differ from zero by more than twice their standard error."""
    if len(gains) < 2:
        return "one seed"
    mean, error = statistics.mean(gains), spread(gains) / math.sqrt(len(gains))
    if abs(mean) <= 2 * error:
        return "no difference"
    return "helps" if mean > 0 else "harms"


def format_table(results: Results) -> str:
    """Return the results as a Markdown table: mean +- standard deviation over the seeds."""
    header = "| row |" + "".join(f" {weights} weights, dB | gain over plain, dB | |" for weights in results)
    lines = [header, "|---|" + "---|---|---|" * len(results)]
    for name in next(iter(results.values())):
        line = f"| {name} |"
        for rows in results.values():
            gains = [value - plain for value, plain in zip(rows[name], rows["plain"], strict=True)]
            line += f" {statistics.mean(rows[name]):.2f} ± {spread(rows[name]):.2f} |"
            line += (
                " | |"
                if name == "plain"
                else f" {statistics.mean(gains):+.2f} ± {spread(gains):.2f} | {verdict(gains)} |"
            )
        lines.append(line)
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="folder of a shapes pipeline")
    parser.add_argument("--json", type=Path, default=Path("out/ablation.json"), help="where to write every value")
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24, help="denoising steps of every trajectory")
    parser.add_argument(
        "--prompts", type=int, default=8, help="trajectories per seed, for calibration and again unseen"
    )
    parser.add_argument("--calibration-steps", type=int, default=6, help="how many of the steps calibration sees")
    parser.add_argument("--unseen-steps", type=int, default=6, help="how many of the steps are measured")
    parser.add_argument("--quick", action="store_true", help="two rows, two seeds, little data")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.prompts, options.steps, options.calibration_steps, options.unseen_steps = 2, 8, 12, 6, 3
    return options


def main(arguments: Sequence[str] | None = None) -> Results:
    """Run the ablation, print its table and write its JSON."""
    start = time.perf_counter()
    options = parse_arguments(arguments)
    pipeline = load_pipeline(options.pipeline)
    rows = {name: ROWS[name] for name in QUICK_ROWS} if options.quick else ROWS
    results = run(pipeline, rows, options.seeds, options)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"velocity_sqnr_db": results}, indent=2) + "\n")
    print()
    print(format_table(results))
    print(f"\n{options.seeds} seeds; mean ± standard deviation; {time.perf_counter() - start:.0f} s in all.")
    return results


if __name__ == "__main__":
    main()
