"""From a pipeline and a few prompts to a quantized, saved pipeline and a report of what was done.

    quantizer = SegQuantizer.from_pretrained("stabilityai/stable-diffusion-3.5-medium", torch_dtype=torch.bfloat16)
    result = quantizer.quantize("sd35-w8a8", config="SEGQUANT_CFG", calibration="prompts.txt")
    print(result.report.summary())

or, with a pipeline at hand, ``quantize_pipeline(pipe, "SEGQUANT_CFG", ["a red bicycle", ...])``.

Everything that can be checked is checked before anything is sampled; with a ``cache_dir`` sampled data and solved
layers are kept, so that a run that was killed goes on; and a directory is written as a whole or not at all.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import modelopt.torch.quantization as mtq
from torch import nn

import modelopt_ext
from modelopt_ext import PackedLinear
from modelopt_ext.calibrate.checkpoint import fingerprint
from modelopt_ext.sensitivity import quantized_layers

from .calibration import CalibrationData, CalibrationSettings, held_out_prompts, read_prompts, record_calibration
from .calibration.identity import plain, settings_record
from .checkpoints.native import export_native
from .checkpoints.save import save_segquant
from .components import choose_components, modules_of
from .configs import NamedConfig, is_segquant, resolve_config, with_algorithm
from .evaluation import RecordedCalls, VelocitySQNR, velocity_sqnr
from .exporters import export_onnx, supported_pipelines
from .files import check_replaceable, staged_directory
from .pretrained import load_pretrained
from .progress import written_bytes
from .quantization_report import (
    REPORT_NAME,
    ComponentReport,
    LayerCounts,
    QuantizationReport,
    model_bytes,
    model_class,
    packed_bytes,
)
from .versions import versions

try:
    from optimum.quantization_base import OptimumQuantizer
except ImportError as error:
    raise ImportError("SegQuantizer is a quantizer of Optimum's: pip install 'optimum-segquant[diffusers]'") from error

__all__ = ["ExportFormat", "QuantizationResult", "SegQuantizer", "quantize_pipeline"]

logger = logging.getLogger(__name__)

ExportFormat = Literal["segquant", "native", "onnx", "tensorrt"]
"""What a directory is written for: PyTorch (packed), inference engines (stock keys), ONNX Runtime, TensorRT."""

_MODEL = "model"
"""Name of a model that is quantized without a pipeline."""

_SOLVED = "solved_layers"
"""Folder in ``cache_dir``."""

ConfigSource = str | os.PathLike[str] | Mapping[str, Any] | NamedConfig
ForwardLoop = Callable[[nn.Module], object]


@dataclasses.dataclass(frozen=True)
class QuantizationResult:
    """What :meth:`SegQuantizer.quantize` gives.

    Attributes:
        pipeline: the pipeline (or model) that was given, quantized in place: packed if a ``segquant`` directory was
            written, else with simulated quantization.
        report: what was done.
        directory: what was written, None if nothing was.
    """

    pipeline: Any
    report: QuantizationReport
    directory: Path | None


class SegQuantizer(OptimumQuantizer):
    """Quantizes the models of a diffusers pipeline, or one model.

    Args:
        model: a pipeline, or a single model.
        components: which models of a pipeline: names of components, or ``denoiser`` (the default), ``text_encoders``,
            ``controlnet``.

    Raises:
        ValueError: the pipeline has no such component, or one is quantized already.
        TypeError: neither a pipeline nor a model.
    """

    def __init__(self, model: Any, *, components: str | Sequence[str] | None = None) -> None:
        self.model = model
        if isinstance(model, nn.Module):
            if components is not None:
                raise ValueError(
                    f"a {type(model).__name__} has no components: leave them out, or give the pipeline that it is of"
                )
            self.components = {_MODEL: model}
        elif isinstance(getattr(model, "components", None), dict):
            self.components = choose_components(model, components)
        else:
            raise TypeError(f"expected a diffusers pipeline or a torch.nn.Module, got a {type(model).__name__}")
        self.report: QuantizationReport | None = None
        self._seconds: dict[str, float] = {}
        self._calls: Mapping[str, Any] | None = None

    @classmethod
    def from_pretrained(
        cls, model_or_path: Any, *, components: str | Sequence[str] | None = None, **load_kwargs: Any
    ) -> SegQuantizer:
        """Load what is to be quantized.

        Args:
            model_or_path: a pipeline or model, its directory, or its name on the hub.
            components: see the class.
            load_kwargs: for ``from_pretrained``, see :func:`optimum_segquant.pretrained.load_pretrained`.

        Raises:
            FileNotFoundError, ValueError, OSError: see there.
        """
        if not isinstance(model_or_path, (str, os.PathLike)):
            if load_kwargs:
                raise ValueError(
                    f"{', '.join(load_kwargs)}: arguments for loading go with a directory or name, not an object"
                )
            return cls(model_or_path, components=components)
        start = time.perf_counter()
        quantizer = cls(load_pretrained(model_or_path, **load_kwargs), components=components)
        quantizer._seconds["load"] = time.perf_counter() - start
        return quantizer

    def quantize(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        config: ConfigSource | Mapping[str, ConfigSource] = "SEGQUANT_CFG",
        *,
        calibration: Any = None,
        export: ExportFormat | None = "segquant",
        cache_dir: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        held_out: Any = None,
        progress: bool = True,
    ) -> QuantizationResult:
        """Sample, calibrate, report, write.

        Args:
            save_dir: directory to write, replaced as a whole once everything is there; None writes nothing and leaves
                simulated quantization.
            config: name of a preset, a YAML file or a ModelOpt config, see :mod:`.configs`; or one for each component,
                ``{"transformer": "SEGQUANT_W4A8_CFG", "text_encoder": "SEGQUANT_INT8_DYNAMIC_CFG"}``.
            calibration: what to calibrate on: :class:`CalibrationSettings`; prompts in any form that ``read_prompts``
                takes (a list, a file, a dataset); recorded calls, for several components by name; a ``forward_loop``
                for a single component; or None for the package's prompts. A model without a pipeline takes recorded
                calls or a loop only, and None where its config needs no data.
            export: what ``save_dir`` is for.
            cache_dir: where sampled data and solved layers are kept, for a run that is killed or repeated.
            overwrite: sample again if ``cache_dir`` holds data of something else, instead of refusing it.
            held_out: prompts, :class:`CalibrationSettings` or a number of the package's own prompts, to measure the
                SQNR of the components' outputs on; their seeds follow those of the calibration.
            progress: show bars.

        Raises:
            FileNotFoundError: no such prompts or config file.
            ValueError: wrong settings, prompts or config, data in ``cache_dir`` of something else, or a model that does
                not fit the config or what it is exported to.
            FloatingPointError: a model returned NaN or infinity.
            ImportError: what the export needs is not installed.
            OSError: the disk is full; what is in ``save_dir`` and ``cache_dir`` is kept.
        """
        configs = self._configs(config)
        self._check(save_dir, export)
        source = self._calibration_source(calibration)
        held_out_settings = self._held_out_settings(held_out, source)
        folder = None if cache_dir is None else Path(cache_dir).expanduser()
        seconds = self._seconds

        def record(settings: CalibrationSettings, name: str) -> CalibrationData:
            return record_calibration(
                self.model,
                settings,
                components=tuple(self.components),
                cache_dir=None if folder is None else folder / name,
                overwrite=overwrite,
                progress=progress,
            )

        data = source
        if isinstance(source, CalibrationSettings):
            with _timed(seconds, "sample"):
                data = record(source, "calibration")
        unseen = None
        if held_out_settings is not None:
            with _timed(seconds, "sample held-out"):
                unseen = record(held_out_settings, "held_out")
        parts = []
        with _timed(seconds, "quantize"):
            for name, part in self.components.items():
                loop = data[name] if data is not None else None
                parts.append(_quantize(name, part, configs[name], loop, folder, progress))
        if unseen is not None:
            with _timed(seconds, "evaluate"):
                measured = {name: velocity_sqnr(part, unseen[name]) for name, part in self.components.items()}
                parts = [_with_sqnr(part, measured[part.name]) for part in parts]
        self._calls = data
        self.report = QuantizationReport(
            pipeline=type(self.model).__name__,
            components=tuple(parts),
            calibration=settings_record(data.settings) if isinstance(data, CalibrationData) else None,
            held_out=None if unseen is None else settings_record(unseen.settings),
            seconds=dict(seconds),
            export=None,
            exported_bytes=None,
            versions=versions(),
        )
        directory = None
        if save_dir is not None and export is not None:
            directory = self.export(save_dir, export, progress=progress)
            if folder is not None:
                shutil.rmtree(folder / _SOLVED, ignore_errors=True)
        return QuantizationResult(self.model, self.report, directory)

    def export(
        self, save_dir: str | os.PathLike[str], export: ExportFormat = "segquant", *, progress: bool = True
    ) -> Path:
        """Write what :meth:`quantize` made, once more or elsewhere, e.g. after a full disk.

        Args:
            save_dir: directory to write, replaced as a whole once everything is there.
            export: what it is for; ``segquant`` packs the models in place.
            progress: show a bar.

        Returns:
            ``save_dir``.

        Raises:
            ValueError: nothing is quantized yet, or a model does not fit what it is exported to.
            ImportError: what the export needs is not installed.
            OSError: the disk is full; what was in ``save_dir`` is still there.
        """
        if self.report is None:
            raise ValueError("nothing is quantized yet: call quantize first")
        self._check_target(save_dir, export)
        start = time.perf_counter()
        with staged_directory(save_dir) as staged:
            self._write(staged, export, progress)
            report = dataclasses.replace(
                self.report,
                export=export,
                exported_bytes=sum(file.stat().st_size for file in staged.rglob("*") if file.is_file()),
                seconds={**self.report.seconds, "export": time.perf_counter() - start},
            )
            (staged / REPORT_NAME).write_text(report.to_json() + "\n", encoding="utf-8")
        self.report = report
        return Path(save_dir)

    def _write(self, staged: Path, export: ExportFormat, progress: bool) -> None:
        if export in ("onnx", "tensorrt"):
            self._write_onnx(staged, "tensorrt" if export == "tensorrt" else "onnxruntime", progress)
            return
        if export == "segquant":
            for part in self.components.values():
                if not any(isinstance(module, PackedLinear) for module in part.modules()):
                    modelopt_ext.compress(part, progress=progress)
        with written_bytes(staged, self._expected_bytes(), progress=progress):
            if export == "native":
                export_native(self.model, staged)
            else:
                save_segquant(self.model, staged)

    def _expected_bytes(self) -> int:
        """Of all models, quantized ones as they are packed."""
        parts = self.components if isinstance(self.model, nn.Module) else modules_of(self.model)
        return sum(packed_bytes(part) or model_bytes(part) for part in parts.values())

    def _write_onnx(self, staged: Path, target: str, progress: bool) -> None:
        if not isinstance(self.model, nn.Module) and type(self.model).__name__ in supported_pipelines():
            export_onnx(self.model, staged, target=target)
            return
        for name, part in self.components.items():
            calls = None if self._calls is None else self._calls[name]
            if not isinstance(calls, RecordedCalls):
                raise ValueError(
                    f"exporting {name} by itself needs a recorded call: calibrate on prompts or recorded calls, or use "
                    "export_onnx(model, directory, inputs=...)"
                )
            inputs = next(iter(calls)).inputs
            export_onnx(
                part, staged if isinstance(self.model, nn.Module) else staged / name, target=target, inputs=inputs
            )

    # -- checks before any work ---------------------------------------------------------------------------------------

    def _configs(self, config: ConfigSource | Mapping[str, ConfigSource]) -> dict[str, NamedConfig]:
        """A config for each component."""
        if not isinstance(config, Mapping) or {"quant_cfg", "preset", "algorithm"} & set(config):
            return dict.fromkeys(self.components, resolve_config(config))
        for name in config:
            if name not in self.components:
                raise ValueError(
                    f"config has an entry for {name!r}, which is not among the components to quantize "
                    f"({', '.join(self.components)}): name it in components"
                )
        if missing := [name for name in self.components if name not in config]:
            raise ValueError(f"config has no entry for {', '.join(missing)}: give one for every component")
        return {name: resolve_config(config[name]) for name in self.components}

    def _check(self, save_dir: str | os.PathLike[str] | None, export: ExportFormat | None) -> None:
        for name, part in self.components.items():
            if quantized_layers(part):
                raise ValueError(
                    f"{name} is quantized already: load the original model again (export(...) writes the quantized one)"
                )
        if save_dir is None:
            if export not in (None, "segquant"):
                raise ValueError(f"export={export!r} needs save_dir, the directory to write")
            return
        if export is None:
            raise ValueError("save_dir is given but export is None: say what the directory is for, or leave it out")
        self._check_target(save_dir, export)

    def _check_target(self, save_dir: str | os.PathLike[str], export: str) -> None:
        if export not in get_args(ExportFormat):
            raise ValueError(f"export must be one of {', '.join(get_args(ExportFormat))}, got {export!r}")
        if export in ("segquant", "native") and not hasattr(self.model, "save_pretrained"):
            raise ValueError(
                f"a {type(self.model).__name__} has no save_pretrained, so no {export!r} directory can be written: "
                "export to 'onnx' or 'tensorrt', or leave save_dir out and save the state_dict"
            )
        if export in ("onnx", "tensorrt"):
            supported_pipelines()  # raises if optimum-onnx or onnxruntime is missing
        target = Path(save_dir).expanduser().resolve()
        check_replaceable(target)

    def _calibration_source(self, calibration: Any) -> Any:
        """Settings to sample with; or what is run for each component, a loop or recorded calls; None for no data."""
        if _is_runnable(calibration):
            if len(self.components) > 1:
                raise ValueError(
                    f"give calls or loops for each of {', '.join(self.components)}, by name, or prompts for all"
                )
            return {next(iter(self.components)): calibration}
        if isinstance(calibration, Mapping) and calibration and all(map(_is_runnable, calibration.values())):
            if missing := [name for name in self.components if name not in calibration]:
                raise ValueError(f"there is no calibration data for {', '.join(missing)}: record it, or give prompts")
            return calibration
        if isinstance(self.model, nn.Module):
            if calibration is None:
                return None
            raise ValueError(
                f"prompts need a pipeline to run, this is a {type(self.model).__name__}: give the pipeline that it is "
                "of, or recorded calls or a forward_loop"
            )
        return _settings(calibration)

    def _held_out_settings(self, held_out: Any, source: Any) -> CalibrationSettings | None:
        if held_out is None:
            return None
        if isinstance(self.model, nn.Module):
            raise ValueError("held_out prompts need a pipeline to run: give the pipeline, or measure velocity_sqnr")
        if isinstance(held_out, CalibrationSettings):
            return held_out
        prompts = held_out_prompts(held_out) if isinstance(held_out, int) else read_prompts(held_out)
        like = source if isinstance(source, CalibrationSettings) else CalibrationSettings()
        if like.per_prompt_kwargs:
            raise ValueError(
                f"{', '.join(like.per_prompt_kwargs)} has one value a prompt: give held_out as CalibrationSettings, "
                "with values of its own"
            )
        return dataclasses.replace(like, prompts=prompts, seed=like.seed + len(like.prompts))


def _settings(prompts: Any) -> CalibrationSettings:
    if isinstance(prompts, CalibrationSettings):
        return prompts
    return CalibrationSettings() if prompts is None else CalibrationSettings.read(prompts)


def _is_runnable(source: Any) -> bool:
    return isinstance(source, RecordedCalls) or (callable(source) and not isinstance(source, type))


def _quantize(
    name: str,
    model: nn.Module,
    named: NamedConfig,
    data: RecordedCalls | ForwardLoop | None,
    folder: Path | None,
    progress: bool,
) -> ComponentReport:
    """Quantize one model in place."""
    config = named.config
    if is_segquant(config):
        config = with_algorithm(config, progress=progress)
        if folder is not None and not config["algorithm"].get("layerwise"):
            solved = folder / _SOLVED / f"{name}-{fingerprint(plain(named.config))[:12]}"
            config = with_algorithm(config, layerwise={"enable": True, "checkpoint_dir": str(solved)})
    before, parameters = model_bytes(model), sum(parameter.numel() for parameter in model.parameters())
    start = time.perf_counter()
    mtq.quantize(model, copy.deepcopy(config), data.forward_loop if isinstance(data, RecordedCalls) else data)
    seconds = time.perf_counter() - start
    plan = modelopt_ext.plan_of(model)
    return ComponentReport(
        name=name,
        model=model_class(model),
        config_name=named.name,
        config=plain(named.config),
        parameters=parameters,
        bytes_before=before,
        bytes_after=packed_bytes(model),
        layers=LayerCounts.of(model),
        plan_summary=None if plan is None else plan.summary(),
        plan=None if plan is None else plan.to_dict(),
        calls=len(data) if isinstance(data, RecordedCalls) else None,
        timesteps=len(data.timesteps) if isinstance(data, RecordedCalls) else None,
        seconds=seconds,
    )


def _with_sqnr(part: ComponentReport, measured: VelocitySQNR) -> ComponentReport:
    return dataclasses.replace(part, sqnr=measured.overall, sqnr_by_timestep=dict(measured.per_timestep))


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
    logger.info("%s took %.1f s", stage, seconds[stage])


def quantize_pipeline(
    pipeline: Any,
    config: ConfigSource | Mapping[str, ConfigSource] = "SEGQUANT_CFG",
    prompts: Any = None,
    *,
    save_dir: str | os.PathLike[str] | None = None,
    components: str | Sequence[str] | None = None,
    **options: Any,
) -> QuantizationResult:
    """Quantize a pipeline in one call.

    Args:
        pipeline: a pipeline object, quantized in place; or its directory or hub name.
        config: see :meth:`SegQuantizer.quantize`.
        prompts: prompts in any form, or :class:`CalibrationSettings`; by default the package's own.
        save_dir: directory to write.
        components: models to quantize, by default the denoiser.
        options: further arguments of :meth:`SegQuantizer.quantize`.
    """
    quantizer = SegQuantizer.from_pretrained(pipeline, components=components)
    return quantizer.quantize(save_dir, config, calibration=prompts, **options)
