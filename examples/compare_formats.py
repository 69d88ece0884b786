"""One table over number formats and methods on several trained pipelines.

    python examples/compare_formats.py --quick                                   # minutes on two CPU cores
    python examples/compare_formats.py --device cuda --workers 9                 # everything
    python examples/compare_formats.py --rows 'paper*' 'SEGQUANT_W4*' --pipelines examples/pipelines/shapes-sd3

Every row quantizes a copy of a pipeline's denoiser, once for each pipeline and seed; a seed has its own prompts and
noise, for calibration, for measuring, and for pictures. All rows of a seed see the same data. Rows:

* ModelOpt's presets, limited to Linears (their INT8 and FP8 defaults also round LayerNorm inputs and lose by it), and
  ModelOpt's SVDQuant;
* plain: every Linear rounded to nearest, largest values as scales, nothing else;
* paper: the setting of the SegQuant paper (arXiv 2507.14811), without what this project adds. 8 bits: one weight scale
  and one static activation scale a segment, smoothing with alpha searched, DualScale. 4 bits: per-channel weights,
  per-token activations, segments, DualScale, low-rank branch of rank 64 or a quarter of the layer's smaller side, GPTQ,
  and for each measurement the better of alpha 0.5 and alpha searched, as judged by the very data it is measured on;
* the presets of ``modelopt_ext``.

Each measurement is appended to ``--json`` as one line when it is there; ``--resume`` goes on from such a file, and
``--print`` only prints its table. With ``--workers`` the pipelines and seeds are shared out among processes; seconds
are then those of a shared machine.

``--per-layer`` asks another question: for how many Linears is the output on unseen inputs better with GPTQ, with the
low-rank branch, and with the search than without?
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import score_shapes
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from quantize_shapes import linears_only
from shapes_sampling import PIPELINES, check_pipeline, load_pipeline, matching, sampling
from torch import nn

from modelopt_ext.presets import PER_TOKEN, PRESETS, linear_only
from modelopt_ext.sensitivity import measure, quantized_copy
from optimum_segquant.evaluation import (
    Comparison,
    Trajectories,
    compare,
    denoiser_of,
    embedders,
    generate_images,
    layer_costs,
    sample_trajectories,
    share,
)

CALIBRATION_SEED, UNSEEN_SEED, IMAGE_SEED = 30_000, 40_000, 50_000  # plus the seed's number

ERROR_LENGTH = 300  # characters of an error's message that are kept

MODELOPT, PLAIN, PAPER, OURS = "ModelOpt", "plain", "paper", "ours"

Config = Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: as printed, and as ``--rows`` matches it.
        method: who it stands for: "ModelOpt", "plain", "paper" or "ours".
        configs: ModelOpt configs; of several the one with the highest velocity SQNR counts.
    """

    name: str
    method: str
    configs: tuple[Config, ...]

    @property
    def format(self) -> str:
        """Widths of weights and activations, see :func:`format_of`."""
        return format_of(self.configs[0])

    @property
    def needs_gpu(self) -> bool:
        """Whether ModelOpt rounds to this format on a GPU only."""
        return any(bits == (2, 1) for config in self.configs for bits in _attributes(config, "num_bits"))


def _entries(config: Config, side: str) -> list[Mapping[str, Any]]:
    """The quantizer attributes that a config sets for the weights or inputs of any Linear."""
    found: list[Mapping[str, Any]] = []
    for entry in config["quant_cfg"]:
        cfg = entry.get("cfg")
        if cfg is not None and fnmatch(f"any.{side}_quantizer", entry["quantizer_name"]):
            found += cfg if isinstance(cfg, list) else [cfg]
    return found


def _attributes(config: Config, name: str) -> list[Any]:
    values = [cfg.get(name) for side in ("weight", "input") for cfg in _entries(config, side)]
    return [tuple(value) if isinstance(value, list) else value for value in values]


def _width(cfg: Mapping[str, Any]) -> int:
    bits = cfg["num_bits"]
    return int(bits) if isinstance(bits, int) else 1 + sum(bits)


def format_of(config: Config) -> str:
    """Name the number format of a config: ``W8A8 static``, ``FP8``, ``W4A8``, ``W4A16``, ``NVFP4`` and so on.

    Raises:
        ValueError: the config quantizes no weights.
    """
    weights, inputs = _entries(config, "weight"), _entries(config, "input")
    if not weights:
        raise ValueError("the config quantizes no weights of Linears, so it has no place in the table")
    weight, activation = weights[0], inputs[0] if inputs else None
    if activation is None:
        return f"W{_width(weight)}A16"
    if isinstance(activation["num_bits"], int) or _width(weight) != _width(activation):
        name = f"W{_width(weight)}A{_width(activation)}"
        if name != "W8A8":
            return name
        blocks = activation.get("block_sizes") or {}
        return f"{name} per-token" if "dynamic" in (activation.get("type"), blocks.get("type")) else f"{name} static"
    return "FP8" if _width(weight) == 8 else "NVFP4"


FORMATS = ("W8A8 static", "W8A8 per-token", "FP8", "W8A16", "W4A16", "W4A8", "W4A4", "NVFP4")
"""Sections of the table, in order; formats that are not named follow."""

INT8_CHANNEL: dict[str, Any] = {"num_bits": 8, "axis": 0}
INT8_TENSOR: dict[str, Any] = {"num_bits": 8, "axis": None}
INT8_TOKEN: dict[str, Any] = {"num_bits": 8, **PER_TOKEN}
FP8_CHANNEL: dict[str, Any] = {"num_bits": (4, 3), "axis": 0}
FP8_TENSOR: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
FP8_TOKEN: dict[str, Any] = {"num_bits": (4, 3), **PER_TOKEN}
INT4_CHANNEL: dict[str, Any] = {"num_bits": 4, "axis": 0}
INT4_GROUP: dict[str, Any] = {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}
INT4_TOKEN: dict[str, Any] = {"num_bits": 4, **PER_TOKEN}

MODELOPT_PRESETS = (
    "INT8_DEFAULT_CFG",
    "INT8_SMOOTHQUANT_CFG",
    "INT8_WEIGHT_ONLY_CFG",
    "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT4_AWQ_CFG",
    "W4A8_AWQ_BETA_CFG",
    "W4A8_NVFP4_FP8_CFG",
    "W4A16_NVFP4_CFG",
    "NVFP4_DEFAULT_CFG",
    "NVFP4_AWQ_LITE_CFG",
    "NVFP4_SVDQUANT_DEFAULT_CFG",
)

PLAIN_FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "W8A8 static, per-tensor weights": (INT8_TENSOR, INT8_TENSOR),
    "W8A8 static": (INT8_CHANNEL, INT8_TENSOR),
    "W8A8 per-token": (INT8_CHANNEL, INT8_TOKEN),
    "FP8, per-tensor": (FP8_TENSOR, FP8_TENSOR),
    "FP8, per-channel and per-token": (FP8_CHANNEL, FP8_TOKEN),
    "W8A16": (INT8_CHANNEL, None),
    "W4A16": (INT4_CHANNEL, None),
    "W4A16, groups of 32": (INT4_GROUP, None),
    "W4A8": (INT4_CHANNEL, INT8_TOKEN),
    "W4A8, groups of 32": (INT4_GROUP, INT8_TOKEN),
    "W4A8, FP8 activations": (INT4_CHANNEL, FP8_TOKEN),
    "W4A4": (INT4_CHANNEL, INT4_TOKEN),
}

NOTHING: dict[str, Any] = {"segments": False, "polarity": "none", "alpha": None, "clip_grid": (1.0,)}
PAPER_8: dict[str, Any] = {"polarity": "dual", "alpha": "search", "clip_grid": (1.0,)}
PAPER_4: dict[str, Any] = {
    "polarity": "dual",
    "clip_grid": (1.0,),
    "low_rank": {"rank": 64, "max_share": 0.25, "refits": 0},
    "gptq": True,
}


def _ours(weight: dict[str, Any], activation: dict[str, Any] | None, **algorithm: Any) -> Config:
    return linear_only(weight, activation, progress=False, **algorithm)


def _svdquant(weight: dict[str, Any], activation: dict[str, Any]) -> Config:
    """ModelOpt's SVDQuant, Linears only."""
    config = copy.deepcopy(dict(linear_only(weight, activation)))
    config["algorithm"] = {"method": "svdquant", "lowrank": 32}
    return config


def _quiet(config: Config) -> Config:
    algorithm = config["algorithm"]
    return {**config, "algorithm": {**algorithm, "progress": False}}


@cache
def table_rows() -> dict[str, Row]:
    """All rows by name, in the order of ``FORMATS``, within a format ModelOpt, plain, paper, ours."""
    rows = [
        Row(f"ModelOpt {name}", MODELOPT, (linears_only(getattr(mtq, name)),))
        for name in MODELOPT_PRESETS
        if hasattr(mtq, name)
    ]
    for bits in (8, 4):
        for what, weight in (("", INT4_CHANNEL), (", groups of 32", INT4_GROUP)):
            # One static activation scale a layer. With a scale a token its calibration fails ("Axis and block_sizes are
            # both set"), and with one dynamic scale it leaves the quantizer with a scale a channel, as no GEMM has it.
            config = _svdquant(weight, {"num_bits": bits, "axis": None})
            rows.append(Row(f"ModelOpt SVDQuant W4A{bits}{what}", MODELOPT, (config,)))
    for name, (weight, inputs) in PLAIN_FORMATS.items():
        rows.append(Row(f"plain {name}", PLAIN, (_ours(weight, inputs, **NOTHING),)))
    rows.append(Row("paper W8A8", PAPER, (_ours(INT8_TENSOR, INT8_TENSOR, **PAPER_8),)))
    rows.append(Row("paper FP8", PAPER, (_ours(FP8_TENSOR, FP8_TENSOR, **PAPER_8),)))
    for name, activation in (("W4A8", INT8_TOKEN), ("W4A4", INT4_TOKEN)):
        both = tuple(_ours(INT4_CHANNEL, activation, alpha=alpha, **PAPER_4) for alpha in (0.5, "search"))
        rows.append(Row(f"paper {name}", PAPER, both))
    named: list[Config] = []
    for name in sorted(PRESETS, key=lambda name: name == "SEGQUANT_CFG"):  # last, as it may be another's second name
        if PRESETS[name] not in named:
            named.append(PRESETS[name])
            rows.append(Row(name, OURS, (_quiet(PRESETS[name]),)))
    order = {name: i for i, name in enumerate(FORMATS)}
    methods = (MODELOPT, PLAIN, PAPER, OURS)
    rows.sort(key=lambda row: (order.get(row.format, len(order)), methods.index(row.method)))
    return {row.name: row for row in rows}


QUICK_ROWS = (
    "ModelOpt INT8_DEFAULT_CFG",
    "ModelOpt INT8_SMOOTHQUANT_CFG",
    "plain W8A8 static",
    "plain W8A16",
    "plain W4A4",
    "paper W8A8",
    "SEGQUANT_INT8_CFG",
)


# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class Data:
    """What all rows of one pipeline and seed share.

    Attributes:
        pipeline: in full precision.
        calibration, unseen: recorded with prompts and noise of their own.
        prompts: P captions for pictures.
        reference: (P, 3, H, W) float32 in [0, 1]: the full-precision pictures.
        image_seed: seed of the first picture.
        options: of the pictures' calls.
    """

    pipeline: Any
    calibration: Trajectories
    unseen: Trajectories
    prompts: Sequence[str]
    reference: torch.Tensor
    image_seed: int
    options: Mapping[str, Any]


def sample(pipeline: Any, seed: int, options: argparse.Namespace) -> Data:
    """Record trajectories and draw reference pictures for one seed."""

    def trajectories(base: int, steps: int) -> Trajectories:
        return sample_trajectories(
            pipeline,
            score_shapes.unseen_prompts(options.prompts, seed=base + seed),
            seeds=100 * (base + seed),
            steps=steps,
            **sampling(pipeline, options.steps, batch_size=options.prompts),
        )

    arguments = sampling(pipeline, options.steps, batch_size=options.images)
    prompts = score_shapes.unseen_prompts(options.images, seed=IMAGE_SEED + seed)
    image_seed = 100 * (IMAGE_SEED + seed)
    return Data(
        pipeline,
        trajectories(CALIBRATION_SEED, options.calibration_steps),
        trajectories(UNSEEN_SEED, options.unseen_steps),
        prompts,
        generate_images(pipeline, prompts, seeds=image_seed, **arguments),
        image_seed,
        arguments,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@dataclass(frozen=True)
class Measurement:
    """A row on one pipeline with one seed. Fields after ``error`` are None where the row did not run.

    Attributes:
        row, pipeline, seed: what was measured.
        error: why it did not run.
        sqnr: velocity SQNR in dB on unseen trajectories.
        psnr, ssim: of pictures against full precision; PSNR in dB.
        seconds: of ``mtq.quantize``.
        memory: MiB in use at most during ``mtq.quantize``: of the process on a CPU, allocated by PyTorch on a GPU.
        memory_rise: the same, minus what was in use before.
        kept: share of the Linears' multiply-adds whose weights or activations stay in 16 bits.
        dynamic: share of the Linears' multiply-adds whose activation scales are found at run time.
        choice: which of the row's configs it is.
    """

    row: str
    pipeline: str
    seed: int
    error: str | None = None
    sqnr: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    seconds: float | None = None
    memory: float | None = None
    memory_rise: float | None = None
    kept: float | None = None
    dynamic: float | None = None
    choice: int = 0


def linear_shares(data: Data, quantized: nn.Module, weight_only: bool) -> tuple[float, float]:
    """Shares of the Linears' multiply-adds in 16 bits and with dynamic activation scales, 0..1, as they really are.

    A Linear counts as kept in 16 bits if its weights are, or its activations although the format rounds them.
    """
    original = denoiser_of(data.pipeline)
    costs = {
        name: cost
        for name, cost in layer_costs(original, data.calibration).items()
        if isinstance(original.get_submodule(name), nn.Linear)
    }

    def enabled(name: str, side: str) -> list[TensorQuantizer]:
        quantizer = getattr(quantized.get_submodule(name), f"{side}_quantizer")
        return [q for q in quantizer.modules() if isinstance(q, TensorQuantizer) and q.is_enabled]

    kept = [n for n in costs if not enabled(n, "weight") or not (weight_only or enabled(n, "input"))]
    dynamic = [n for n in costs if any(q._dynamic for q in enabled(n, "input"))]
    return share(costs, kept).multiply_adds, share(costs, dynamic).multiply_adds


def measure_row(row: Row, data: Data, pipeline: str, seed: int) -> Measurement:
    """Quantize and measure every config of a row; the best one counts. ModelOpt's refusals become ``error``."""
    found: list[Measurement] = []
    for choice, config in enumerate(row.configs):
        try:
            result: Comparison = compare(
                data.pipeline,
                config,
                calibration=data.calibration,
                unseen=data.unseen,
                prompts=data.prompts,
                reference=data.reference,
                seeds=data.image_seed,
                **data.options,
            )
        except Exception as error:  # any failure of a row belongs in the table, not at the end of it
            message = " ".join(str(error).split())[:ERROR_LENGTH]
            return Measurement(row.name, pipeline, seed, error=f"{type(error).__name__}: {message}")
        assert result.metrics is not None
        kept, dynamic = linear_shares(data, result.denoiser, weight_only=row.format.endswith("A16"))
        memory = result.memory
        found.append(
            Measurement(
                row=row.name,
                pipeline=pipeline,
                seed=seed,
                sqnr=result.sqnr.overall,
                psnr=result.metrics.psnr,
                ssim=result.metrics.ssim,
                seconds=result.seconds,
                memory=memory.peak / 2**20,
                memory_rise=(memory.peak - memory.before) / 2**20,
                kept=kept,
                dynamic=dynamic,
                choice=choice,
            )
        )
    return max(found, key=lambda measurement: measurement.sqnr or -math.inf)


def embedder_line(data: Data, name: str) -> dict[str, Any]:
    """The embedders' share of a pipeline's weights and multiply-adds, for the table's foot."""
    denoiser = denoiser_of(data.pipeline)
    costs = layer_costs(denoiser, data.calibration)
    part = share(costs, embedders(denoiser, costs))
    linears = share(costs, [n for n in costs if isinstance(denoiser.get_submodule(n), nn.Linear)])
    return {
        "embedders_of": name,
        "weights": part.weights,
        "multiply_adds": part.multiply_adds,
        "linear_multiply_adds": linears.multiply_adds,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The journal: one JSON object a line, first the settings


SETTINGS = ("prompts", "steps", "calibration_steps", "unseen_steps", "images", "device")
"""Options that measurements of one file must share."""


class Journal:
    """A file of measurements that processes append to; whoever is killed leaves whole lines behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Write the settings, or check them against those of the file to go on with.

        Raises:
            SystemExit: there is a file with other settings, or one although ``resume`` was not asked for.
        """
        if self.path.exists() and self.path.stat().st_size:
            if not resume:
                raise SystemExit(f"{self.path} exists: add --resume to go on with it, or name another with --json")
            if self.settings() != dict(settings):
                raise SystemExit(f"{self.path} was measured with {self.settings()}, not {dict(settings)}")
            if not self.path.read_bytes().endswith(b"\n"):  # the last line was cut off
                self.path.write_bytes(self.path.read_bytes().rpartition(b"\n")[0] + b"\n")
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.append({"settings": dict(settings)})

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line, at once and in one piece."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _records(self) -> Iterator[dict[str, Any]]:
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off

    def settings(self) -> dict[str, Any]:
        """What the file was measured with."""
        return next((dict(r["settings"]) for r in self._records() if "settings" in r), {})

    def measurements(self) -> list[Measurement]:
        """All measurements, failed ones included; of one measured twice the last."""
        found = (Measurement(**record) for record in self._records() if "row" in record)
        return list({(m.row, m.pipeline, m.seed): m for m in found}.values())

    def embedders(self) -> dict[str, dict[str, Any]]:
        """The embedders' shares by pipeline."""
        return {r["embedders_of"]: r for r in self._records() if "embedders_of" in r}


# ---------------------------------------------------------------------------------------------------------------------
# Running


Pair = tuple[Path, int]
"""A pipeline's folder and a seed."""


def work(pairs: Sequence[Pair], options: argparse.Namespace) -> None:
    """Measure what is missing for some pairs, row after row, so that whole rows are done first."""
    torch.set_num_threads(options.threads)
    journal, rows = Journal(options.json), chosen_rows(options)
    done = {(m.row, m.pipeline, m.seed) for m in journal.measurements() if m.error is None}
    noted = journal.embedders()
    data: dict[Pair, Data] = {}
    for row in rows:
        for folder, seed in pairs:
            if (row.name, folder.name, seed) in done:
                continue
            if row.needs_gpu and not options.device.startswith("cuda"):
                journal.append(
                    dataclasses.asdict(Measurement(row.name, folder.name, seed, error="needs a GPU: use --device cuda"))
                )
                continue
            if (folder, seed) not in data:
                data[folder, seed] = sample(load_pipeline(folder, options.device), seed, options)
            if seed == 0 and folder.name not in noted:
                noted[folder.name] = embedder_line(data[folder, seed], folder.name)
                journal.append(noted[folder.name])
            result = measure_row(row, data[folder, seed], folder.name, seed)
            journal.append(dataclasses.asdict(result))
            outcome = result.error or f"{result.sqnr:.2f} dB, {result.seconds:.1f} s"
            print(f"{folder.name}, seed {seed}, {row.name}: {outcome}", flush=True)


def run(options: argparse.Namespace) -> None:
    """Measure all rows on all pipelines and seeds, in ``--workers`` processes."""
    pairs = [(folder, seed) for seed in range(options.seeds) for folder in options.pipelines]
    count = min(options.workers, len(pairs))
    if count == 1:
        work(pairs, options)
        return
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(pairs[i::count], options)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        raise SystemExit(f"{len(failed)} of {count} workers failed (exit codes {failed}); --resume goes on")


# ---------------------------------------------------------------------------------------------------------------------
# The table


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, NaN of nothing."""
    return statistics.fmean(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation, NaN below two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


class Results:
    """Measurements of some rows, grouped as the table wants them; those of other rows are left out."""

    def __init__(self, measurements: Sequence[Measurement], rows: Sequence[Row]) -> None:
        names = {row.name for row in rows}
        self.all = [m for m in measurements if m.row in names]
        self.rows = [row for row in rows if any(m.row == row.name for m in self.all)]
        self.pipelines = list(dict.fromkeys(m.pipeline for m in self.all))
        self.seeds = len({m.seed for m in self.all})

    def values(self, row: Row, field: str, pipeline: str | None = None) -> list[float]:
        """A field's values of a row over seeds and, unless one is named, pipelines."""
        return [
            getattr(m, field)
            for m in self.all
            if m.row == row.name and m.error is None and pipeline in (None, m.pipeline)
        ]

    def sqnr(self, row: Row) -> float:
        """Velocity SQNR in dB, mean over the pipelines of the mean over seeds; NaN unless it ran on all of them."""
        return statistics.fmean([mean(self.values(row, "sqnr", pipeline)) for pipeline in self.pipelines])

    def best(self, format_name: str, method: str, pattern: str = "*") -> tuple[float, str]:
        """Highest SQNR of a format's rows of one method whose name matches, and that row's name."""
        found = [
            (value, row.name)
            for row in self.rows
            if row.format == format_name and row.method == method and fnmatch(row.name, pattern)
            if not math.isnan(value := self.sqnr(row))
        ]
        return max(found, default=(math.nan, ""))


def format_table(results: Results) -> str:
    """The results as a Markdown table; SQNR as mean ± standard deviation over the seeds."""
    names = results.pipelines
    head = [
        *("format", "method"),
        *(f"{name}, dB" for name in names),
        *("mean, dB", "PSNR, dB", "SSIM", "seconds", "memory, MiB (rise)", "16 bit, %", "per token, %"),
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    section = ""
    for row in results.rows:
        cells = [row.format if row.format != section else "", row.name]
        section = row.format
        for name in names:
            values = results.values(row, "sqnr", name)
            cells.append(f"{mean(values):.2f} ± {spread(values):.2f}" if values else "—")
        cells += [f"{results.sqnr(row):.2f}", f"{mean(results.values(row, 'psnr')):.1f}"]
        cells += [f"{mean(results.values(row, 'ssim')):.3f}", f"{mean(results.values(row, 'seconds')):.1f}"]
        memory, rise = mean(results.values(row, "memory")), mean(results.values(row, "memory_rise"))
        cells.append(f"{memory:.0f} (+{rise:.0f})")
        cells += [f"{100 * mean(results.values(row, field)):.1f}" for field in ("kept", "dynamic")]
        lines.append("| " + " | ".join(cell.replace("nan", "—") for cell in cells) + " |")
    return "\n".join(lines)


def notes(results: Results, embedder_shares: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands below the table: failures, embedders, choices."""
    lines = []
    for name, part in embedder_shares.items():
        lines.append(
            f"- {name}: the embedders, per token in SEGQUANT_INT8_CFG, hold {100 * part['weights']:.1f} % of all "
            f"layers' weights and do {100 * part['multiply_adds']:.1f} % of their multiply-adds; Linears do "
            f"{100 * part['linear_multiply_adds']:.1f} %."
        )
    for row in results.rows:
        chosen = [m.choice for m in results.all if m.row == row.name and m.error is None]
        if len(row.configs) > 1 and chosen:
            lines.append(f"- {row.name}: alpha searched was better in {sum(chosen)} of {len(chosen)} cases.")
    errors: dict[tuple[str, str], list[str]] = {}
    for m in results.all:
        if m.error:
            errors.setdefault((m.row, m.error), []).append(f"{m.pipeline} {m.seed}")
    for (name, error), where in errors.items():
        lines.append(f"- {name} did not run on {len(where)} ({where[0]}, ...): {error}")
    return "\n".join(lines)


def verdicts(results: Results) -> str:
    """The project's targets against the table, mean over the pipelines."""
    lines = []

    def gain(what: str, ours: tuple[float, str], other: tuple[float, str], target: float) -> None:
        if math.isnan(ours[0]) or math.isnan(other[0]):
            return
        difference = ours[0] - other[0]
        verdict = "reached" if difference >= target else "missed"
        lines.append(f"- {what}: {ours[1]} against {other[1]} {difference:+.2f} dB (target {target:+g}: {verdict})")

    default, best = results.best("W8A8 static", OURS, "SEGQUANT_INT8_CFG"), results.best("W8A8 static", OURS)
    for eight in dict.fromkeys((default, best)):
        gain("W8A8 static", eight, results.best("W8A8 static", MODELOPT), 3)
        gain("W8A8 static", eight, results.best("W8A8 static", PAPER), 0)
    per_token = results.best("W8A8 per-token", OURS)
    gain("W8A8 per-token", per_token, results.best("W8A16", PLAIN), -4)
    gain("FP8", results.best("FP8", OURS), results.best("FP8", MODELOPT), 1.5)
    gain("W4A8", results.best("W4A8", OURS), results.best("W4A8", PAPER), 2)
    gain("W4A4", results.best("W4A4", OURS), results.best("W4A4", PAPER), 3)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Layer by layer


# By default more rows are kept where weights are fitted to them, and the search would choose by other rows.
SAME_ROWS = {"samples": 4096}

STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "search": ({}, {"alpha": None, "polarity": "none", "clip_grid": (1.0,)}),
    "low rank": ({"low_rank": {"rank": 32, "max_share": 0.25}, **SAME_ROWS}, SAME_ROWS),
    "GPTQ": ({"gptq": True, **SAME_ROWS}, SAME_ROWS),
}
"""What is compared layer by layer: fields of the algorithm with it, and without. The defaults search."""

TARGET_SHARE = 0.95  # of the Linears that an algorithm should not make worse

PER_LAYER_FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "W8A8 static": (INT8_CHANNEL, INT8_TENSOR),
    "W4A8": (INT4_CHANNEL, INT8_TOKEN),
    "W4A4": (INT4_CHANNEL, INT4_TOKEN),
}


class LayerErrors:
    """Output SQNR in dB of every Linear alone, on unseen inputs, for one format and any fields of the algorithm."""

    def __init__(self, data: Data, fmt: str) -> None:
        self.data, self.fmt = data, fmt
        self._known: dict[str, dict[str, float]] = {}

    def __call__(self, fields: Mapping[str, Any]) -> dict[str, float]:
        """SQNR by the Linear's name, from its full-precision inputs."""
        key = json.dumps(fields, sort_keys=True)
        if key not in self._known:
            original, (weight, activation) = denoiser_of(self.data.pipeline), PER_LAYER_FORMATS[self.fmt]
            quantized = quantized_copy(
                original, _ours(weight, activation, **fields), self.data.calibration.forward_loop
            )
            unseen = self.data.unseen
            table = measure(original, quantized, unseen.forward_loop, batches=len(unseen), local_only=True)
            self._known[key] = {layer.name: layer.local_sqnr for layer in table.layers}
        return self._known[key]


@dataclass(frozen=True)
class LayerCount:
    """For how many Linears an algorithm is at least as good as doing without it, by their output on unseen inputs.

    Attributes:
        step, format, pipeline, seed: what was measured.
        layers: how many Linears were measured.
        worse: the exceptions, with the loss in dB, largest first.
        gain: mean over the Linears of the gain in dB.
    """

    step: str
    format: str
    pipeline: str
    seed: int
    layers: int
    worse: tuple[tuple[str, float], ...]
    gain: float


def count_layers(errors: LayerErrors, step: str, pipeline: str, seed: int) -> LayerCount:
    """Compare every Linear's own output error with and without one step."""
    with_it, without = (errors(fields) for fields in STEPS[step])
    gains = {name: value - without[name] for name, value in with_it.items()}
    worse = sorted(((name, -gain) for name, gain in gains.items() if gain < 0), key=lambda item: -item[1])
    # Where neither makes an error both are infinite: no gain, no loss, and no number.
    finite = [gain for gain in gains.values() if math.isfinite(gain)]
    return LayerCount(step, errors.fmt, pipeline, seed, len(gains), tuple(worse), mean(finite))


def count_pairs(pairs: Sequence[Pair], options: argparse.Namespace) -> list[LayerCount]:
    """All formats and steps for some pipelines and seeds."""
    torch.set_num_threads(options.threads)
    counts = []
    for folder, seed in pairs:
        data = sample(load_pipeline(folder, options.device), seed, options)
        for fmt in options.formats:
            errors = LayerErrors(data, fmt)
            for step in STEPS:
                counts.append(count_layers(errors, step, folder.name, seed))
                print(layer_lines([counts[-1]], f"{step}, {fmt}, {folder.name}, seed {seed}"), flush=True)
    return counts


def layer_lines(counts: Sequence[LayerCount], what: str) -> str:
    """One line with the share of Linears that are not worse, then the exceptions."""
    layers, worse = sum(c.layers for c in counts), [item for c in counts for item in c.worse]
    part = 1 - len(worse) / layers
    lines = [
        f"{what}: not worse in {layers - len(worse)} of {layers} Linears, {100 * part:.1f} % "
        f"(target {100 * TARGET_SHARE:g} %: {'reached' if part >= TARGET_SHARE else 'missed'}), "
        f"mean gain {mean([c.gain for c in counts]):+.2f} dB"
    ]
    losses: dict[str, list[float]] = {}
    for count in counts:
        for name, loss in count.worse:
            losses.setdefault(name if len(counts) == 1 else f"{count.pipeline} {name}", []).append(loss)
    for name, values in sorted(losses.items(), key=lambda item: -max(item[1])):
        times = f", {len(values)} times" if len(counts) > 1 else ""
        lines.append(f"    {name}: {-max(values):+.2f} dB{times}")
    return "\n".join(lines)


def per_layer(options: argparse.Namespace) -> list[LayerCount]:
    """Count for all pipelines and seeds, in ``--workers`` processes, and print a summary by format and step."""
    pairs = [(folder, seed) for seed in range(options.seeds) for folder in options.pipelines]
    workers = min(options.workers, len(pairs))
    if workers == 1:
        counts = count_pairs(pairs, options)
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            parts = list(pool.map(count_pairs, [pairs[i::workers] for i in range(workers)], [options] * workers))
        counts = [count for part in parts for count in part]
    print()
    for fmt in options.formats:
        for step in STEPS:
            print(layer_lines([c for c in counts if (c.format, c.step) == (fmt, step)], f"{step}, {fmt}"))
    return counts


# ---------------------------------------------------------------------------------------------------------------------


def chosen_rows(options: argparse.Namespace) -> list[Row]:
    """The rows that ``--rows`` matches.

    Raises:
        SystemExit: it matches none.
    """
    return [table_rows()[name] for name in matching(table_rows(), options.rows)]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", type=Path, nargs="+", help="folders of shapes pipelines; all shipped ones")
    parser.add_argument("--rows", nargs="+", default=["*"], help="only rows whose name matches one of these patterns")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8, help="trajectories for calibration, and again unseen")
    parser.add_argument("--steps", type=int, default=14, help="denoising steps of every trajectory and picture")
    parser.add_argument("--calibration-steps", type=int, default=7, help="how many of them calibration sees")
    parser.add_argument("--unseen-steps", type=int, default=7, help="how many of them are measured")
    parser.add_argument("--images", type=int, default=8, help="pictures for each measurement")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--threads", type=int, help="threads a process; all cores, shared out, by default")
    parser.add_argument("--json", type=Path, default=Path("out/compare_formats.jsonl"), help="measurements, one a line")
    parser.add_argument("--resume", action="store_true", help="go on with the file of an earlier run")
    parser.add_argument("--print", action="store_true", help="print the table of that file, measure nothing")
    parser.add_argument("--list", action="store_true", help="list the rows and their formats")
    parser.add_argument("--quick", action="store_true", help="seven rows, little data")
    parser.add_argument("--per-layer", action="store_true", help="count Linears that GPTQ, low rank and search help")
    parser.add_argument("--formats", nargs="+", choices=list(PER_LAYER_FORMATS), default=list(PER_LAYER_FORMATS))
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows = list(QUICK_ROWS) if options.rows == ["*"] else options.rows
        options.prompts, options.steps, options.images = 4, 8, 2
        options.calibration_steps, options.unseen_steps = 4, 3
    options.threads = options.threads or max(1, torch.get_num_threads() // options.workers)
    options.pipelines = options.pipelines or sorted(path.parent for path in PIPELINES.glob("*/model_index.json"))
    for folder in options.pipelines:
        check_pipeline(folder)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    start = time.perf_counter()
    options = parse_arguments(arguments)
    rows = chosen_rows(options)
    if options.list:
        for row in rows:
            print(f"{row.format:16} {row.method:10} {row.name}{' (GPU)' if row.needs_gpu else ''}")
        return
    if options.per_layer:
        per_layer(options)
        return
    journal = Journal(options.json)
    if not options.print:
        journal.start({name: getattr(options, name) for name in SETTINGS}, resume=options.resume)
        run(options)
    elif not options.json.is_file():
        raise SystemExit(f"--print: there is no {options.json}")
    results = Results(journal.measurements(), rows)
    print()
    print(format_table(results))
    print()
    print(notes(results, journal.embedders()))
    print(verdicts(results))
    print(
        f"\nMean ± standard deviation over {results.seeds} seeds; PSNR, SSIM, seconds and memory are means over "
        f"pipelines and seeds; 16 bit and per token: shares of the Linears' multiply-adds. {journal.settings()}; "
        f"{time.perf_counter() - start:.0f} s in all."
    )
    broken = [
        m for m in results.all if m.error and table_rows()[m.row].method != MODELOPT and "needs a GPU" not in m.error
    ]
    if broken:
        raise SystemExit(f"{len(broken)} measurements of rows that are not ModelOpt's failed, see above")


if __name__ == "__main__":
    main()
