"""What the affine correction of a quantized denoiser's output brings, with and without, at 8 and at 4 bits.

    python examples/affine_correction.py [--quick]

Fits corrections on trajectories that calibration has not seen and measures, on a third set of prompts, the velocity
SQNR of the denoiser's output, that of the guided output (which the scheduler reads), and the error of final latents.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import score_shapes
import torch
from shapes_sampling import GUIDANCE, PIPELINE, load_pipeline, sampling

import modelopt_ext
from modelopt_ext.presets import PER_TOKEN, linear_only
from optimum_segquant.correction import confirm, correct_denoiser, final_latents, fit_affine_correction
from optimum_segquant.evaluation import Trajectories, denoiser_replaced, sample_trajectories, sqnr_db, velocity_sqnr

CALIBRATION_SEED, FIT_SEED, UNSEEN_SEED, IMAGE_SEED = 1_000, 5_000, 2_000, 3_000

CONFIGS: dict[str, dict[str, Any]] = {
    "W8A8, SEGQUANT_INT8_CFG": modelopt_ext.SEGQUANT_INT8_CFG,
    "W4A8, per channel and per token": linear_only({"num_bits": 4, "axis": 0}, {"num_bits": 8, **PER_TOKEN}),
}

FITS: dict[str, dict[str, Any]] = {
    "unbiased, guided": {"guidance_scale": GUIDANCE},
    "unbiased": {},
    "least squares": {"estimator": "least_squares"},
}


def guided_sqnr(denoiser: torch.nn.Module, trajectories: Trajectories, scale: float) -> float:
    """Return the SQNR in dB of ``u + scale (c - u)`` over recorded calls that hold both halves."""
    signal = noise = 0.0
    for call, output in trajectories.replay(denoiser):
        (u, c), (fu, fc) = output.cpu().double().chunk(2), call.output.double().chunk(2)
        reference = fu + scale * (fc - fu)
        signal += float(reference.square().sum())
        noise += float((reference - u - scale * (c - u)).square().sum())
    return sqnr_db(signal, noise)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 prompts and 8 steps: a look, no measurement")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    calibrating, fitting, measuring, images = (8, 8, 8, 8) if options.quick else (16, 32, 16, 32)
    kept, seen = (4, 8) if options.quick else (8, 12)  # denoising steps that calibration and measurement see
    pipeline = load_pipeline(PIPELINE, options.device)
    call = sampling(pipeline, steps=8 if options.quick else 24)

    def record(count: int, seed: int, steps: int) -> Trajectories:
        prompts = score_shapes.unseen_prompts(count, seed=seed)
        return sample_trajectories(pipeline, prompts, seeds=seed, steps=steps, **call)

    calibration, fit = record(calibrating, CALIBRATION_SEED, kept), record(fitting, FIT_SEED, kept)
    unseen = record(measuring, UNSEEN_SEED, seen)
    prompts = score_shapes.unseen_prompts(images, seed=IMAGE_SEED)
    reference = final_latents(pipeline, prompts, seeds=IMAGE_SEED, **call)
    print("| config | correction | chosen | velocity SQNR, dB | guided SQNR, dB | final latents gain, dB |")
    print("|---|---|---|---|---|---|")
    for name, config in CONFIGS.items():
        denoiser = mtq.quantize(copy.deepcopy(pipeline.transformer), copy.deepcopy(config), calibration.forward_loop)
        plain = velocity_sqnr(denoiser, unseen).overall, guided_sqnr(denoiser, unseen, GUIDANCE)
        print(f"| {name} | none | | {plain[0]:.2f} | {plain[1]:.2f} | |", flush=True)
        for label, arguments_of_fit in FITS.items():
            correction = fit_affine_correction(denoiser, fit, scheduler=pipeline.scheduler, **arguments_of_fit)
            with correct_denoiser(denoiser, correction):
                corrected = velocity_sqnr(denoiser, unseen).overall, guided_sqnr(denoiser, unseen, GUIDANCE)
            with denoiser_replaced(pipeline, denoiser):
                gain = confirm(pipeline, correction, reference, prompts, seeds=IMAGE_SEED, **call)
            print(
                f"| {name} | {label} | {correction.method} | {corrected[0]:.2f} | {corrected[1]:.2f} "
                f"| {gain.gain_db:+.2f} ± {gain.se_db:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
