"""``optimum-cli segquant evaluate``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .base import Result, SegQuantSubcommand
from .models import CALL, LOADING, PROMPTS, call_of, load, load_any
from .options import Option

__all__ = ["EvaluateCommand"]

NUM_PROMPTS = 16


class EvaluateCommand(SegQuantSubcommand):
    """A quantized pipeline against its original, with a page of images, errors and sizes."""

    DESCRIPTION = (
        "Make the images of equal prompts and seeds with a pipeline and its quantized form, measure the differences of "
        "images, latents, denoiser and layers, and write a page with all of it."
    )
    OPTIONS = (
        Option("reference", "the full-precision pipeline, a directory or hub name", positional=True, required=True),
        Option(
            "quantized",
            "the quantized pipeline: packed, exported to ONNX, or a model repository",
            positional=True,
            required=True,
        ),
        Option("output", "the HTML page to write", metavar="FILE"),
        *PROMPTS,
        *CALL,
        Option("metrics", "of images, among psnr ssim lpips fid clip_score; by default all", kind="list"),
        Option("weights", "directory with the networks that lpips, fid and clip_score need", metavar="DIR"),
        *LOADING,
    )
    EXAMPLES = (
        "evaluate MODEL quantized --output report.html",
        "evaluate MODEL onnx --prompts prompts.txt --steps 28 --metrics psnr ssim --json",
        "evaluate MODEL quantized --weights networks --call guidance_scale=4.5 --output report.html",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options."""
        EvaluateCommand.add_to(parser)

    @staticmethod
    def work(values: Namespace) -> Result:
        """Evaluate and write the page."""
        from optimum_segquant.calibration import held_out_prompts, read_prompts
        from optimum_segquant.evaluation import evaluate
        from optimum_segquant.evaluation.perceptual import METRICS, check_metrics

        metrics = check_metrics(values.metrics or METRICS)
        if values.output is not None:
            from optimum_segquant.files import check_writable
            from optimum_segquant.report import write_report  # raises if what it draws with is missing

            check_writable(values.output, example="report.html")
        if values.prompts is None:
            prompts = held_out_prompts(NUM_PROMPTS if values.num_prompts is None else values.num_prompts)
        else:
            prompts = read_prompts(values.prompts, column=values.column, limit=values.num_prompts)
        call_of(values)
        reference, quantized = load(values.reference, values), load_any(values.quantized, values)
        steps = {} if values.steps is None else {"num_inference_steps": values.steps}
        result = evaluate(
            reference,
            quantized,
            prompts,
            seeds=values.seed,
            batch_size=values.batch_size,
            metrics=metrics,
            weights=values.weights,
            progress=values.progress,
            **steps,
            **call_of(values, reference),
        )
        text = result.summary()
        if values.output is not None:
            text += f"\nreport: {write_report(Path(values.output), result)}"
        return Result(result.to_dict(), text)
