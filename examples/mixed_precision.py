"""Which layers of the shipped pipeline are sensitive, and what a format for each layer buys under a budget.

    python examples/mixed_precision.py

prints the sensitivity of every Linear, then one table: uniform formats, and mixes within 5 % of the time of static INT8
or within 4.5 bits a weight, with the velocity SQNR that adding the layers' errors predicts and the one measured on
trajectories that neither calibration nor the choice has seen. ``--quick`` measures one candidate and scales the others
by the noise at the layers' own outputs. ``out/mixed_precision.json`` gets every number.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import score_shapes
from shapes_sampling import PIPELINE, load_pipeline, sampling

import modelopt_ext
from modelopt_ext.mixed_precision import (
    DEFAULT_CANDIDATES,
    Allocation,
    Candidate,
    CandidateScores,
    score_candidates,
)
from modelopt_ext.presets import PER_TOKEN
from modelopt_ext.sensitivity import layer_sensitivity
from optimum_segquant.evaluation import compare, denoiser_of, sample_trajectories

# Prompts and noise of calibration, choice and measurement are distinct.
CALIBRATION_SEED, CHOICE_SEED, UNSEEN_SEED = 30_000, 31_000, 32_000

GROUPS = {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}
CANDIDATES = (
    *DEFAULT_CANDIDATES,
    Candidate("w4 groups a8 token", GROUPS, {"num_bits": 8, **PER_TOKEN}, {"gptq": True}),
    Candidate("w4 groups a16", GROUPS, None, {"gptq": True}),
)
"""The usual ones, and INT4 in groups of 32 channels: 4.5 bits a weight everywhere, the rival of a mix of that size."""


@dataclass
class Row:
    """One line of the table."""

    name: str
    mix: Allocation
    measured: float  # dB

    def cells(self) -> list[str]:
        """As text."""
        mix, reference = self.mix, self.mix.scores.candidates[0].name
        return [
            self.name,
            f"{mix.bits:.2f}",
            f"{mix.time_relative_to(reference):.3f}",
            f"{mix.predicted_sqnr:.1f}",
            f"{self.measured:.1f}",
        ]


def mixes(scores: CandidateScores, times: Sequence[float], bits: Sequence[float]) -> dict[str, Allocation]:
    """The uniform formats, then the mixes."""
    wanted = {f"{c.name} everywhere": scores.uniform(c.name) for c in scores.candidates if not c.is_full_precision}
    names = [candidate.name for candidate in scores.candidates]
    wide = [name for name in names if not name.startswith("w4")]
    eight = [c.name for c in scores.candidates if c.activation_bits == 8]
    for budget in times:
        wanted[f"mix, time x {budget:g}"] = scores.allocate(time=budget, only=wide)
        wanted[f"mix, time x {budget:g}, shared inputs alike"] = scores.allocate(
            time=budget, only=wide, tie_shared_inputs=True
        )
    for budget in bits:
        wanted[f"mix, {budget:g} bits"] = scores.allocate(bits=budget)
        wanted[f"mix, {budget:g} bits, 8-bit activations"] = scores.allocate(bits=budget, only=eight)
    return wanted


def format_table(rows: Sequence[Row], reference: str) -> str:
    """Return the rows as a Markdown table."""
    head = ["format", "bits a weight", f"time, x {reference}", "predicted, dB", "measured, dB"]
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *(row.cells() for row in rows))
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="folder of a shapes pipeline")
    parser.add_argument(
        "--json", type=Path, default=Path("out/mixed_precision.json"), help="where to write every value"
    )
    parser.add_argument("--steps", type=int, default=24, help="denoising steps of every trajectory")
    parser.add_argument("--calibration-prompts", type=int, default=16)
    parser.add_argument("--calibration-steps", type=int, default=8, help="how many of the steps calibration sees")
    parser.add_argument("--choice-prompts", type=int, default=4, help="trajectories that candidates are measured on")
    parser.add_argument("--batches", type=int, default=4, help="how many of their steps are measured")
    parser.add_argument("--unseen-prompts", type=int, default=16, help="trajectories that the table is measured on")
    parser.add_argument("--unseen-steps", type=int, default=8, help="how many of their steps are measured")
    parser.add_argument("--times", type=float, nargs="*", default=[1.05], help="time budgets, x static INT8's")
    parser.add_argument("--bits", type=float, nargs="*", default=[4.5], help="budgets of bits a weight")
    parser.add_argument(
        "--algorithm", type=json.loads, default={}, help='fields of the algorithm as JSON; {"alpha": 0.5} is fast'
    )
    parser.add_argument("--layers", type=int, default=15, help="lines of the sensitivity table to print")
    parser.add_argument("--quick", action="store_true", help="little data, one candidate measured, others scaled")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.batches, options.choice_prompts = 12, 2, 2
        options.calibration_prompts = options.unseen_prompts = 8
        options.calibration_steps = options.unseen_steps = 4
    return options


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Print both tables and write the JSON."""
    start = time.perf_counter()
    options = parse_arguments(arguments)
    pipeline = load_pipeline(options.pipeline)
    denoiser = denoiser_of(pipeline)

    def sample(prompts: int, seed: int, kept: int) -> Any:
        return sample_trajectories(
            pipeline,
            score_shapes.unseen_prompts(prompts, seed=seed),
            seeds=seed,
            steps=kept,
            **sampling(pipeline, options.steps),
        )

    calibration = sample(options.calibration_prompts, CALIBRATION_SEED, options.calibration_steps)
    choice = sample(options.choice_prompts, CHOICE_SEED, options.batches)
    unseen = sample(options.unseen_prompts, UNSEEN_SEED, options.unseen_steps)

    config = {**modelopt_ext.SEGQUANT_CFG, "algorithm": {**modelopt_ext.SEGQUANT_CFG["algorithm"], "progress": False}}
    table = layer_sensitivity(
        denoiser, config, calibration.forward_loop, score_loop=choice.forward_loop, batches=options.batches
    )
    print(f"SEGQUANT_CFG, one layer at a time ({time.perf_counter() - start:.0f} s)\n")
    print(table.table(options.layers))

    scores = score_candidates(
        denoiser,
        calibration.forward_loop,
        candidates=CANDIDATES,
        algorithm=options.algorithm,
        score_loop=choice.forward_loop,
        scores="local" if options.quick else "measured",
        batches=options.batches,
    )
    print(f"\nmeasured {len(scores.candidates)} candidates ({time.perf_counter() - start:.0f} s)", flush=True)
    reference = scores.candidates[0].name
    rows: list[Row] = []
    for name, mix in mixes(scores, options.times, options.bits).items():
        if name.startswith("mix"):
            print(f"\n{name}\n{mix}", flush=True)
        mixed = mix.config()
        mixed["algorithm"]["progress"] = False
        row = compare(pipeline, mixed, calibration=calibration, unseen=unseen)
        rows.append(Row(name, mix, row.sqnr.overall))
        print(f"{name}: {rows[-1].measured:.2f} dB", flush=True)
    print("\n" + format_table(rows, reference))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    results = {row.name: {**row.mix.to_dict(), "measured_sqnr_db": row.measured} for row in rows}
    options.json.write_text(json.dumps({"sensitivity": table.to_dict(), "rows": results}, indent=2) + "\n")
    print(f"\n{time.perf_counter() - start:.0f} s in all.")
    return rows


if __name__ == "__main__":
    main()
