"""The command ``segquant`` of Optimum's tool."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .base import one_line_errors
from .benchmark import BenchmarkCommand
from .evaluate import EvaluateCommand
from .export import ExportCommand
from .inspect import InspectCommand
from .quantize import QuantizeCommand
from .serve import ServeCommand

__all__ = ["SegQuantCommand"]


class SegQuantCommand(BaseOptimumCLICommand):
    """``optimum-cli segquant``."""

    COMMAND = CommandInfo(name="segquant", help="Quantize diffusion models with SegQuant.")
    SUBCOMMANDS = (
        CommandInfo("quantize", "Quantize a pipeline and write it.", QuantizeCommand),
        CommandInfo("export", "Convert a saved quantized pipeline for an engine.", ExportCommand),
        CommandInfo("evaluate", "Compare a quantized pipeline with its original.", EvaluateCommand),
        CommandInfo("inspect", "Show the segments of a model.", InspectCommand),
        CommandInfo("benchmark", "Measure step time and memory on this device.", BenchmarkCommand),
        CommandInfo("serve", "Make, check and run a deployment.", ServeCommand),
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Set what ``--help`` shows."""
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description = "Quantize diffusion pipelines with SegQuant, and deploy them."
        parser.epilog = (
            "examples:\n"
            "  optimum-cli segquant inspect MODEL --plot plan.png\n"
            "  optimum-cli segquant quantize MODEL --preset SEGQUANT_CFG --output quantized\n"
            "  optimum-cli segquant evaluate MODEL quantized --output report.html\n"
            "  optimum-cli segquant export quantized --to onnx --output onnx\n"
            "  optimum-cli segquant serve onnx --output repository"
        )
        one_line_errors(parser, [])
