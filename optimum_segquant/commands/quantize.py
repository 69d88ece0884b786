"""``optimum-cli segquant quantize``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from .base import Result, SegQuantSubcommand
from .models import CALL, LOADING, PROMPTS, call_of, load, preset
from .options import Option

__all__ = ["QuantizeCommand"]


class QuantizeCommand(SegQuantSubcommand):
    """From a model's name and a few prompts to a quantized directory and a report."""

    DESCRIPTION = (
        "Sample calibration data with a pipeline, quantize its denoiser (or other components), and write the result."
    )
    OPTIONS = (
        Option("model", "the directory of a pipeline, or its name on the hub", positional=True, required=True),
        Option("output", "the directory to write", required=True, metavar="DIR"),
        Option(
            "preset",
            "name of a preset or YAML file with a quantization config; a,b with name=preset for each component",
            default="SEGQUANT_CFG",
            check=preset,
        ),
        Option("components", "models to quantize: denoiser, text_encoders, controlnet or names", kind="list"),
        Option(
            "export",
            "what to write: packed for PyTorch, stock keys for engines, or ONNX",
            default="segquant",
            choices=("segquant", "native", "onnx", "onnx-vnni", "tensorrt"),
        ),
        *PROMPTS,
        *CALL,
        Option("kept_steps", "denoising steps of each trajectory to calibrate on, spread evenly", "integer", 8),
        Option("max_calls", "calls of each component to keep at most", kind="integer", default=1024),
        Option("cache_dir", "keeps sampled data and solved layers; a run that was killed goes on", metavar="DIR"),
        Option("overwrite", "sample again if cache_dir holds data of something else", kind="flag"),
        Option("held_out", "so many unseen prompts of the package's own to measure the SQNR on", kind="integer"),
        Option("report", "write an HTML page about it", metavar="FILE"),
        *LOADING,
    )
    EXAMPLES = (
        "quantize stabilityai/stable-diffusion-3.5-medium --dtype bfloat16 --output sd35-w8a8",
        "quantize MODEL --preset SEGQUANT_W4A8_CFG --prompts prompts.txt --cache-dir cache --output w4a8",
        "quantize MODEL --components transformer text_encoder \\\n"
        "      --preset transformer=SEGQUANT_W4A8_CFG,text_encoder=SEGQUANT_INT8_DYNAMIC_CFG --output mixed",
        "quantize MODEL --export tensorrt --call height=1024 width=1024 guidance_scale=4.5 --output engine",
        "quantize --config job.yaml",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options."""
        QuantizeCommand.add_to(parser)

    @staticmethod
    def work(values: Namespace) -> Result:
        """Quantize and write."""
        from optimum_segquant.calibration import CalibrationSettings
        from optimum_segquant.configs import resolve_config
        from optimum_segquant.files import check_replaceable, check_spares, check_writable
        from optimum_segquant.quantizer import SegQuantizer

        # Whatever can be wrong is looked at before a model is loaded.
        check_replaceable(Path(values.output).expanduser().resolve())
        check_spares(Path(values.output), values.model, values.prompts, values.config)
        if values.report is not None:
            check_writable(values.report, example="report.html")
        for name in values.preset.values() if isinstance(values.preset, dict) else [values.preset]:
            resolve_config(name)
        settings = CalibrationSettings.read(
            values.prompts,
            column=values.column,
            limit=values.num_prompts,
            num_inference_steps=values.steps,
            steps=values.kept_steps,
            batch_size=values.batch_size,
            seed=values.seed,
            max_calls=values.max_calls,
            call_kwargs=call_of(values),
        )
        model = load(values.model, values)
        result = SegQuantizer(model, components=values.components).quantize(
            values.output,
            values.preset,
            # A model by itself has no use for the package's prompts; those of the user are refused.
            calibration=settings if hasattr(model, "components") or values.prompts is not None else None,
            export=values.export,
            cache_dir=values.cache_dir,
            overwrite=values.overwrite,
            held_out=values.held_out,
            progress=values.progress,
        )
        text = f"{result.report.summary()}\n{values.output} is ready"
        if values.report is not None:
            text += f"\nreport: {_write_report(values.report, result.report)}"
        return Result({"directory": str(values.output), "report": result.report.to_dict()}, text)


def _write_report(path: str, report: Any) -> Path:
    from optimum_segquant.report import write_report

    return write_report(path, quantization=report)
