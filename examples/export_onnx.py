"""Export quantized pipelines to ONNX, run them in ONNX Runtime, and compare them with PyTorch.

    python examples/export_onnx.py                                     # SD3, FLUX and SDXL in miniature
    python examples/export_onnx.py --pipelines shapes-sd3 --presets SEGQUANT_CFG --wide

For every pipeline and preset: size of the denoiser's file, time of one call, and three kinds of parity. *Codes* counts
the activation codes that differ when every layer reads the same input. *Velocity SQNR* is measured against full
precision, with simulated quantization in PyTorch, the same in float64, and in ONNX Runtime. *Difference* is what ONNX
Runtime's output differs from simulated quantization, as a share of the output, beside what simulated quantization in
float64 differs: rounding flips codes that lie on a tie, and the flips travel on.

``--wide`` also times transformer blocks of SD3.5's width with random weights, for any CPU and, on one with VNNI, for
such: the small pipelines are too narrow for 8-bit products to matter.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import score_shapes
import torch
import wide_blocks
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionXLPipeline
from optimum.onnxruntime import ORTDiffusionPipeline
from torch import Tensor, nn

import modelopt_ext
from modelopt_ext.export.onnx import TARGETS, file_bytes
from optimum_segquant.evaluation import (
    Trajectories,
    denoiser_of,
    denoiser_replaced,
    sample_trajectories,
    sqnr_db,
    velocity_sqnr,
)
from optimum_segquant.exporters import export_onnx, layer_parity, session
from optimum_segquant.exporters.compare import run
from optimum_segquant.exporters.cpu import is_exact_here
from optimum_segquant.exporters.verify import flat_tensors

PIPELINES = Path(__file__).parent / "pipelines"
NAMES = ("shapes-sd3", "shapes-flux", "shapes-sdxl")
PRESETS = (
    "SEGQUANT_CFG",
    "SEGQUANT_INT8_SVD_CFG",
    "SEGQUANT_INT8_DYNAMIC_CFG",
    "SEGQUANT_FP8_CFG",
    "SEGQUANT_W4A8_CFG",
    "SEGQUANT_W8A16_CFG",
)
SIZE = 64  # pixels
STEPS = 14
CALIBRATION_SEED, UNSEEN_SEED, IMAGE_SEED = 1_000, 2_000, 3_000


@dataclass(frozen=True)
class Row:
    """One line of the table; see the module's docstring."""

    pipeline: str
    preset: str
    megabytes: float
    share_of_float32: float
    milliseconds: float
    float32_milliseconds: float
    codes: int
    codes_differing: int
    sqnr_torch: float
    sqnr_float64: float
    sqnr_onnx: float
    difference: float
    difference_float64: float
    image_psnr: float


def sampling(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """How the pipeline is used."""
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "guidance_scale": 4.0}
    if isinstance(pipeline, FluxPipeline):
        arguments.update(guidance_scale=1.0, true_cfg_scale=4.0, negative_prompt="")
    if not isinstance(pipeline, StableDiffusionXLPipeline):
        arguments.update(max_sequence_length=32)
    return arguments


def component_of(pipeline: DiffusionPipeline) -> str:
    """The denoiser's name in the pipeline."""
    return next(name for name, part in pipeline.components.items() if part is denoiser_of(pipeline))


def export_float32(pipeline: DiffusionPipeline, folder: Path) -> Path:
    """Optimum's own export, the baseline; the denoiser's file."""
    from optimum.exporters.onnx import onnx_export_from_model

    onnx_export_from_model(copy.deepcopy(pipeline), folder, do_validation=False)
    return folder / component_of(pipeline) / "model.onnx"


def milliseconds(paths: Sequence[Path], inputs: Mapping[str, Tensor], threads: int, repeats: int) -> list[float]:
    """The fastest of several calls of each file, in turn, so that a busy machine treats them alike."""
    sessions = [session(path, threads=threads) for path in paths]
    best = [float("inf")] * len(paths)
    for _ in range(repeats):
        for index, runtime in enumerate(sessions):
            start = time.perf_counter()
            run(runtime, inputs)
            best[index] = min(best[index], 1e3 * (time.perf_counter() - start))
    return best


@torch.no_grad()
def share_of_output(first: Sequence[Tensor], second: Sequence[Tensor], unseen: Trajectories) -> float:
    """Root of the energy of a difference over that of the full-precision output."""
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(first, second, strict=True))
    return (noise / sum(float(call.output.double().square().sum()) for call in unseen)) ** 0.5


def sqnr_of(outputs: Sequence[Tensor], unseen: Trajectories) -> float:
    """Velocity SQNR of a denoiser's outputs, dB."""
    return sqnr_db(1.0, share_of_output([call.output for call in unseen], outputs, unseen) ** 2)


def replay_float64(denoiser: nn.Module, unseen: Trajectories) -> list[Tensor]:
    """The outputs of simulated quantization in double precision."""

    def double(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: double(item) for name, item in value.items()}
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    wide = copy.deepcopy(denoiser).double()
    with torch.no_grad():
        return [wide(**double(call.inputs))[0] for call in unseen]


def psnr(first: Any, second: Any) -> float:
    """PSNR in dB of images in [0, 1]."""
    error = float((torch.from_numpy(first) - torch.from_numpy(second)).square().mean())
    return float("inf") if error == 0 else sqnr_db(1.0, error)


def measure(
    name: str,
    preset: str,
    pipeline: DiffusionPipeline,
    float32: Path,
    calibration: Trajectories,
    unseen: Trajectories,
    out: Path,
    options: argparse.Namespace,
) -> Row:
    """Quantize a copy of the denoiser, export the pipeline, and compare."""
    denoiser = copy.deepcopy(denoiser_of(pipeline))
    mtq.quantize(denoiser, getattr(modelopt_ext, preset), calibration.forward_loop)
    simulated = [output for _, output in unseen.replay(denoiser)]
    with denoiser_replaced(pipeline, denoiser):
        directory = export_onnx(pipeline, out, target=options.target)
        generator = torch.Generator().manual_seed(IMAGE_SEED)
        prompt = score_shapes.unseen_prompts(1, seed=IMAGE_SEED)[0]
        torch_image = pipeline(prompt, generator=generator, output_type="np", **sampling(pipeline)).images
    loaded = ORTDiffusionPipeline.from_pretrained(directory)
    loaded.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(IMAGE_SEED)
    onnx_image = loaded(prompt, generator=generator, output_type="np", **sampling(pipeline)).images

    path = directory / component_of(pipeline) / "model.onnx"
    runtime = session(path)
    exported = [next(iter(run(runtime, flat_tensors(call.inputs)).values())) for call in unseen]
    wide = replay_float64(denoiser, unseen)
    parity = layer_parity(denoiser, lambda: denoiser(**unseen[0].inputs), options.target).values()
    baseline, quantized = milliseconds((float32, path), flat_tensors(unseen[0].inputs), options.threads, 9)
    return Row(
        name,
        preset,
        file_bytes(path) / 1e6,
        file_bytes(path) / file_bytes(float32),
        quantized,
        baseline,
        sum(layer.codes for layer in parity),
        sum(layer.differing for layer in parity),
        velocity_sqnr(denoiser, unseen).overall,
        sqnr_of(wide, unseen),
        sqnr_of(exported, unseen),
        share_of_output(simulated, exported, unseen),
        share_of_output(simulated, wide, unseen),
        psnr(torch_image, onnx_image),
    )


def format_table(rows: Sequence[Row]) -> str:
    """The results in Markdown."""
    lines = [
        "| pipeline | preset | file, MB | of float32 | call, ms | float32, ms | codes that differ | velocity SQNR: "
        "PyTorch, in float64, ONNX, dB | difference, of float64 | image PSNR, dB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.pipeline} | {row.preset} | {row.megabytes:.1f} | {row.share_of_float32:.2f} | {row.milliseconds:.0f} "
        f"| {row.float32_milliseconds:.0f} | {row.codes_differing} of {row.codes} "
        f"| {row.sqnr_torch:.2f}, {row.sqnr_float64:.2f}, {row.sqnr_onnx:.2f} | {100 * row.difference:.2f} %, "
        f"{100 * row.difference_float64:.2f} % | {row.image_psnr:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def measure_wide(out: Path, threads: int) -> str:
    """Size and time of :mod:`wide_blocks`, float32 and INT8 in ONNX Runtime, by the targets that this CPU is one of."""
    model, inputs = wide_blocks.build(), wide_blocks.inputs()
    plain = out / "float32.onnx"
    torch.onnx.export(
        model, (), str(plain), kwargs=dict(inputs), input_names=list(inputs), opset_version=20, dynamo=False
    )
    # Time does not depend on the quality of the scales: no searches.
    fast = {"alpha": 0.5, "clip_grid": (1.0,), "polarity": "shift"}
    lines = [f"{wide_blocks.NAME}, {threads} threads"]
    targets = [target.name for target in TARGETS.values() if target.runtime == "onnxruntime" and is_exact_here(target)]
    for preset in ("SEGQUANT_CFG", "SEGQUANT_INT8_DYNAMIC_CFG"):
        config = copy.deepcopy(modelopt_ext.presets.PRESETS[preset])
        config["algorithm"] = {**config["algorithm"], **fast}
        own = mtq.quantize(copy.deepcopy(model), config, lambda denoiser: denoiser(**inputs))
        files = [
            export_onnx(own, out / preset / target, target=target, inputs=inputs, verify=False) / "model.onnx"
            for target in targets
        ]
        baseline, *ours = milliseconds((plain, *files), inputs, threads, 5)
        lines.append(f"{preset}: float32 {baseline:.0f} ms and {file_bytes(plain) / 1e6:.0f} MB")
        lines += [
            f"    {target}: {ms:.0f} ms ({baseline / ms:.2f} times as fast) and {file_bytes(file) / 1e6:.0f} MB "
            f"({file_bytes(file) / file_bytes(plain):.2f})"
            for target, file, ms in zip(targets, files, ours, strict=True)
        ]
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", nargs="*", default=list(NAMES), help=f"folders in {PIPELINES}")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="names of SegQuant presets")
    parser.add_argument("--target", default="onnxruntime", choices=list(TARGETS))
    parser.add_argument("--prompts", type=int, default=8, help="for calibration; half as many for measuring")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime, for timing")
    parser.add_argument("--wide", action="store_true", help="time a block of real width, too")
    parser.add_argument("--out", type=Path, default=Path("out/onnx"), help="folder for the exported pipelines")
    options = parser.parse_args(arguments)
    unknown = [preset for preset in options.presets if preset not in modelopt_ext.presets.PRESETS]
    if unknown:
        parser.error(f"no presets {', '.join(unknown)}; there are {', '.join(modelopt_ext.presets.PRESETS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, compare, print."""
    options = parse_arguments(arguments)
    logging.getLogger("optimum").setLevel(logging.ERROR)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.pipelines:
            pipeline = DiffusionPipeline.from_pretrained(PIPELINES / name)
            pipeline.set_progress_bar_config(disable=True)
            use = {**sampling(pipeline), "batch_size": 8}
            calibration = sample_trajectories(
                pipeline,
                score_shapes.unseen_prompts(options.prompts, seed=CALIBRATION_SEED),
                seeds=CALIBRATION_SEED,
                steps=7,
                **use,
            )
            unseen = sample_trajectories(
                pipeline,
                score_shapes.unseen_prompts(max(1, options.prompts // 2), seed=UNSEEN_SEED),
                seeds=UNSEEN_SEED,
                steps=7,
                **use,
            )
            float32 = export_float32(pipeline, Path(scratch) / name)
            for preset in options.presets:
                print(f"{name}: {preset}", flush=True)
                out = options.out / f"{name}-{preset}-{options.target}"
                rows.append(measure(name, preset, pipeline, float32, calibration, unseen, out, options))
                print(format_table(rows[-1:]).splitlines()[-1], flush=True)
        if options.wide:
            print(measure_wide(Path(scratch), options.threads), flush=True)
    if rows:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        print(f"\n{format_table(rows)}")


if __name__ == "__main__":
    main()
