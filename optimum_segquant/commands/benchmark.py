"""``optimum-cli segquant benchmark``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .base import Result, SegQuantSubcommand
from .models import CALL, LOADING, call_of, load
from .options import Option

__all__ = ["BenchmarkCommand"]


class BenchmarkCommand(SegQuantSubcommand):
    """Step time and memory of a denoiser in its three forms."""

    DESCRIPTION = (
        "Measure on the present device how long a denoising step takes and how much memory it needs: in full "
        "precision, with simulated quantization, and packed. Calibrated on one call: only speed and size mean anything."
    )
    OPTIONS = (
        Option("model", "the directory of a pipeline, or its name on the hub", positional=True, required=True),
        Option("preset", "name of a preset or YAML file with a quantization config", default="SEGQUANT_CFG"),
        Option("repeats", "timed steps; the median counts", kind="integer", default=10),
        Option("forms", "to measure; by default all", kind="list", choices=("full", "simulated", "packed")),
        Option("compile", "compile the packed denoiser with torch.compile before it is timed", kind="flag"),
        *(option for option in CALL if option.name != "steps"),
        *LOADING,
    )
    EXAMPLES = (
        "benchmark MODEL --dtype bfloat16 --device cuda --call height=1024 width=1024",
        "benchmark MODEL --preset SEGQUANT_FP8_CFG --batch-size 1 --repeats 20 --compile --json",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options."""
        BenchmarkCommand.add_to(parser)

    @staticmethod
    def work(values: Namespace) -> Result:
        """Measure."""
        from optimum_segquant.benchmark import FORMS, benchmark_forms
        from optimum_segquant.configs import is_segquant, resolve_config, with_algorithm

        config = resolve_config(values.preset)
        quantization = config.config
        if is_segquant(quantization):
            quantization = with_algorithm(quantization, progress=values.progress)
        pipeline = load(values.model, values)
        found = benchmark_forms(
            pipeline,
            quantization,
            forms=tuple(values.forms or FORMS),
            repeats=values.repeats,
            batch_size=values.batch_size,
            seed=values.seed,
            compiled=values.compile,
            **call_of(values, pipeline),
        )
        return Result({"preset": config.name, **found.to_dict()}, f"{config.name}\n{found.table()}")
