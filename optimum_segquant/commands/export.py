"""``optimum-cli segquant export``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .base import Result, SegQuantSubcommand
from .models import LOADING, load
from .options import Option

__all__ = ["ExportCommand"]


class ExportCommand(SegQuantSubcommand):
    """From a saved quantized pipeline to the files of an engine."""

    DESCRIPTION = (
        "Convert a saved quantized pipeline: to ONNX for ONNX Runtime or TensorRT, or to the keys of inference engines."
    )
    OPTIONS = (
        Option("source", "the directory of a quantized pipeline", positional=True, required=True),
        Option("output", "the directory to write", required=True, metavar="DIR"),
        Option("to", "whom it is for", required=True, choices=("onnx", "onnx-vnni", "tensorrt", "native")),
        Option("opset", "of the ONNX files, 19 to 21; by default what the layers need", kind="integer"),
        Option("no_verify", "do not run the graphs and compare them with PyTorch", kind="flag"),
        Option("max_shard_size", "native: weights are split into files of this size", default="10GB"),
        *LOADING,
    )
    EXAMPLES = (
        "export quantized --to onnx --output onnx",
        "export quantized --to onnx-vnni --output onnx",
        "export quantized --to tensorrt --output tensorrt",
        "export quantized --to native --output checkpoint",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options."""
        ExportCommand.add_to(parser)

    @staticmethod
    def work(values: Namespace) -> Result:
        """Load and write."""
        from optimum_segquant import export_native, export_onnx
        from optimum_segquant.exports import ONNX_TARGETS, expected_bytes
        from optimum_segquant.files import check_replaceable, check_spares
        from optimum_segquant.progress import written_bytes

        output = Path(values.output).expanduser()
        check_replaceable(output.resolve())
        check_spares(output, values.source, values.config)
        pipeline = load(values.source, values)
        if values.to == "native":
            with written_bytes(output, expected_bytes(pipeline), progress=values.progress):
                export_native(pipeline, output, max_shard_size=values.max_shard_size)
        else:
            export_onnx(
                pipeline,
                output,
                target=ONNX_TARGETS[values.to],
                opset=values.opset,
                verify=not values.no_verify,
                progress=values.progress,
            )
        files = {
            file.relative_to(output).as_posix(): file.stat().st_size for file in output.rglob("*") if file.is_file()
        }
        size = sum(files.values())
        data = {"directory": str(values.output), "format": values.to, "bytes": size, "files": files}
        return Result(data, f"{values.output} is ready for {values.to}: {len(files)} files, {size / 2**20:.1f} MiB")
