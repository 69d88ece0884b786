"""From a pipeline and a few prompts to a quantized, saved pipeline and a report of what was done.

    quantizer = SegQuantizer.from_pretrained("stabilityai/stable-diffusion-3.5-medium", torch_dtype=torch.bfloat16)
    result = quantizer.quantize("sd35-w8a8", config="SEGQUANT_CFG", calibration="prompts.txt")
    print(result.report.summary())

or, with a pipeline at hand, ``quantize_pipeline(pipe, "SEGQUANT_CFG", ["a red bicycle", ...])``.

Everything that can be checked is checked before anything is sampled; with a ``cache_dir`` sampled data and solved
layers are kept, so that a run that was killed goes on; and a directory is written as a whole or not at all. Started by
``torchrun`` or ``accelerate launch``, each process samples and calibrates on its share of the prompts.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
from torch import nn

import modelopt_ext
from modelopt_ext.calibrate.checkpoint import fingerprint
from modelopt_ext.distributed import Processes
from modelopt_ext.sensitivity import quantized_layers

from .calibration import CalibrationData, CalibrationSettings, record_calibration
from .calibration.cache import MANIFEST
from .calibration.distributed import join_processes
from .calibration.identity import plain, settings_record
from .calibration.recording import open_cache
from .calibration.sources import Runnable, calibration_source, forward_loop_of, held_out_settings
from .components import choose_components
from .configs import NamedConfig, is_segquant, resolve_config, with_algorithm
from .evaluation import RecordedCalls, velocity_sqnr
from .exports import ExportFormat, check_config, check_export, write_export
from .files import check_spares, sha256_of, staged_directory
from .pretrained import load_pretrained
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

ConfigSource = str | os.PathLike[str] | Mapping[str, Any] | NamedConfig

_MODEL = "model"
"""Name of a model that is quantized without a pipeline."""

_CALIBRATION, _HELD_OUT, _SOLVED = "calibration", "held_out", "solved_layers"
"""Folders in ``cache_dir``."""


@dataclass(frozen=True)
class QuantizationResult:
    """What :meth:`SegQuantizer.quantize` gives.

    Attributes:
        pipeline: the pipeline (or model) that was given, quantized in place: packed if a ``segquant`` directory was
            written, else with simulated quantization.
        report: what was done.
        directory: what was written, None if nothing was. Of several processes the first one writes, and packs.
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
        self._source: str | os.PathLike[str] | None = None
        self._seconds: dict[str, float] = {}
        self._data: Mapping[str, Runnable] | None = None

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
        quantizer._source = model_or_path
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
                takes (a list, a file, a dataset); recorded calls or a ``forward_loop`` for a single component, or one
                for each by name; None for the package's prompts. A model without a pipeline takes recorded calls or a
                loop only, and None where its config needs no data. Of several processes each takes its share of prompts
                by itself; calls and loops have to be the share already (:func:`.calibration.distributed.split`).
            export: what ``save_dir`` is for, see :data:`ExportFormat`.
            cache_dir: where sampled data and solved layers are kept, for a run that is killed or repeated.
            overwrite: sample again if ``cache_dir`` holds data of something else, instead of refusing it.
            held_out: prompts, :class:`CalibrationSettings` or a number of the package's own held-out prompts, to
                measure the SQNR of the components' outputs on; their seeds follow those of the calibration.
            progress: show bars.

        Raises:
            FileNotFoundError: no such prompts or config file.
            ValueError: wrong settings, prompts or config, data in ``cache_dir`` of something else, a ``save_dir`` that
                holds the original, or a model that does not fit the config or what it is exported to.
            FloatingPointError: a model returned NaN or infinity.
            ImportError: what the export needs is not installed.
            OSError: the disk is full; what is in ``save_dir`` and ``cache_dir`` is kept.
        """
        configs = self._configs(config)
        folder = None if cache_dir is None else Path(cache_dir).expanduser()
        self._check(configs, save_dir, export, folder)
        source = calibration_source(calibration, tuple(self.components), has_pipeline=self._has_pipeline)
        unseen = held_out_settings(held_out, _settings_of(source), has_pipeline=self._has_pipeline)
        _, world_size = join_processes()
        # Other algorithms than SegQuant's do not merge what processes saw: then each calibrates on all of the data.
        together = all(is_segquant(named.config) for named in configs.values())
        sampling = _Sampling(self, folder, overwrite, progress)
        with Processes.meeting() as processes:
            progress = progress and processes.is_main
            with _timed(self._seconds, "sample"):
                self._data = sampling.calibration(source, processes, share=together)
            held = None
            if unseen is not None:
                with _timed(self._seconds, "sample held-out"):
                    held = sampling.held_out(unseen, processes)
            data: dict[str, Runnable | None] = {n: self._data[n] if self._data else None for n in self.components}
            counts = {name: _counts(one, processes if together else Processes()) for name, one in data.items()}
        parts = []
        with _timed(self._seconds, "quantize"):
            for name, model in self.components.items():
                changes: dict[str, Any] = {"progress": progress, "distributed_sync": together}
                if folder is not None:
                    changes["layerwise"] = {
                        "enable": True,
                        "checkpoint_dir": str(self._solved(folder, name, configs[name])),
                    }
                try:
                    parts.append(_quantize(name, model, configs[name], changes, data[name], counts[name]))
                except Exception:
                    if done := ", ".join(part.name for part in parts):
                        logger.error("%s had been quantized by then: load the original again to start anew", done)
                    raise
        if held is not None:
            with _timed(self._seconds, "evaluate"):
                parts = [_measured(part, self.components[part.name], held[part.name]) for part in parts]
        self.report = QuantizationReport(
            pipeline=type(self.model).__name__,
            components=tuple(parts),
            calibration=settings_record(self._data.settings) if isinstance(self._data, CalibrationData) else None,
            held_out=None if unseen is None else settings_record(unseen),
            processes=world_size,
            seconds=dict(self._seconds),
            export=None,
            exported_bytes=None,
            versions=versions(),
        )
        directory = None
        if save_dir is not None and export is not None:
            with Processes.meeting() as processes, processes.together():
                if processes.is_main:
                    directory = self.export(save_dir, export, progress=progress)
                    if folder is not None:
                        _remove_solved(folder, configs)
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
        check_spares(Path(save_dir), self._source)
        check_export(self.model, self.components, save_dir, export)
        start = time.perf_counter()
        with staged_directory(save_dir) as staged:
            write_export(self.model, self.components, self._data, staged, export, progress=progress)
            parts = self.report.components
            if export == "segquant":
                # Counted, no longer predicted.
                parts = tuple(replace(part, bytes_after=model_bytes(self.components[part.name])) for part in parts)
            report = replace(
                self.report,
                components=parts,
                export=export,
                exported_bytes=sum(file.stat().st_size for file in staged.rglob("*") if file.is_file()),
                seconds={**self.report.seconds, "export": time.perf_counter() - start},
            )
            (staged / REPORT_NAME).write_text(report.to_json() + "\n", encoding="utf-8")
        self.report = report
        return Path(save_dir).expanduser()

    @property
    def _has_pipeline(self) -> bool:
        return not isinstance(self.model, nn.Module)

    def _solved(self, folder: Path, name: str, named: NamedConfig) -> Path:
        """Where the layers of a component are kept that have been solved for a config, on the present data."""
        stem = _solved_stem(name, named)
        if isinstance(self._data, CalibrationData):
            # Layers solved on data that was replaced since are no start for this run.
            stem += f"-{sha256_of(folder / _CALIBRATION / MANIFEST)[:12]}"
        return folder / _SOLVED / stem

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

    def _check(
        self,
        configs: Mapping[str, NamedConfig],
        save_dir: str | os.PathLike[str] | None,
        export: ExportFormat | None,
        folder: Path | None,
    ) -> None:
        for name, model in self.components.items():
            if quantized_layers(model):
                raise ValueError(
                    f"{name} is quantized already: load the original model again"
                    + (" (export(...) writes the quantized one)" if self.report is not None else "")
                )
        if save_dir is None:
            if export not in (None, "segquant"):
                raise ValueError(f"export={export!r} needs save_dir, the directory to write")
            return
        if export is None:
            raise ValueError("save_dir is given but export is None: say what the directory is for, or leave it out")
        directory = Path(save_dir).expanduser().resolve()
        if folder is not None and (directory == folder.resolve() or directory in folder.resolve().parents):
            raise ValueError(f"cache_dir {folder} is in save_dir, which is replaced as a whole: give another folder")
        check_spares(directory, self._source)
        check_export(self.model, self.components, save_dir, export)
        for name in self.components:
            check_config(name, configs[name], export)


class _Sampling:
    """Samples what a quantizer needs, in one or several processes.

    Args:
        quantizer: with the pipeline and the components to record.
        folder: to keep the data in; None for temporary ones.
        overwrite: replace data of something else there.
        progress: show bars, in the first process.
    """

    def __init__(self, quantizer: SegQuantizer, folder: Path | None, overwrite: bool, progress: bool) -> None:
        self._pipeline = quantizer.model
        self._components = tuple(quantizer.components)
        self._folder = folder
        self._overwrite = overwrite
        self._progress = progress

    def calibration(
        self, source: CalibrationSettings | Mapping[str, Runnable] | None, processes: Processes, *, share: bool
    ) -> Mapping[str, Runnable] | None:
        """What to run for each component; sampled if it has to be.

        Args:
            source: what the caller gave.
            processes: those that sample.
            share: whether each of them samples a share.
        """
        if not isinstance(source, CalibrationSettings):
            return source
        if share and source.world_size == 1:
            source = source.share(processes.rank, processes.size)
        overwrite = self._overwrite
        if self._folder is not None and processes.size > 1:
            with processes.together():  # one of them makes the folder, or replaces what is there
                if processes.is_main:
                    open_cache(self._pipeline, source, self._folder / _CALIBRATION, overwrite=overwrite)
            overwrite = False
        with processes.together():
            return self._record(source, _CALIBRATION, overwrite, self._progress and processes.is_main)

    def held_out(self, settings: CalibrationSettings, processes: Processes) -> CalibrationData | None:
        """Held-out data, in the first process, which alone measures."""
        with processes.together():
            if not processes.is_main:
                return None
            return self._record(settings, _HELD_OUT, self._overwrite, self._progress)

    def _record(self, settings: CalibrationSettings, name: str, overwrite: bool, progress: bool) -> CalibrationData:
        return record_calibration(
            self._pipeline,
            settings,
            components=self._components,
            cache_dir=None if self._folder is None else self._folder / name,
            overwrite=overwrite,
            progress=progress,
        )


def _settings_of(source: Any) -> CalibrationSettings | None:
    """The settings of calibration data, None where nobody knows them."""
    if isinstance(source, CalibrationData):
        return source.settings
    return source if isinstance(source, CalibrationSettings) else None


def _counts(data: Runnable | None, processes: Processes) -> tuple[int, int] | None:
    """Calls and distinct timesteps of all processes; None for a loop or without data."""
    if not isinstance(data, RecordedCalls):
        return None
    shares = processes.gather((len(data), data.timesteps))
    return sum(calls for calls, _ in shares), len({timestep for _, found in shares for timestep in found})


def _solved_stem(name: str, named: NamedConfig) -> str:
    """How folders begin that hold a component's layers, solved for a config."""
    return f"{name}-{fingerprint(plain(named.config))[:12]}"


def _remove_solved(folder: Path, configs: Mapping[str, NamedConfig]) -> None:
    """Remove the solved layers of a finished run; other configs' may be those of a run that goes on beside this one."""
    for name, named in configs.items():
        for solved in (folder / _SOLVED).glob(f"{_solved_stem(name, named)}*"):
            shutil.rmtree(solved, ignore_errors=True)
    with suppress(OSError):  # not empty, or there is none
        (folder / _SOLVED).rmdir()


def _quantize(
    name: str,
    model: nn.Module,
    named: NamedConfig,
    changes: Mapping[str, Any],
    data: Runnable | None,
    counts: tuple[int, int] | None,
) -> ComponentReport:
    """Quantize one model in place.

    Args:
        name: of the component.
        model: its model.
        named: its config.
        changes: to the algorithm, where that is SegQuant's; what the config itself says goes first.
        data: what to calibrate on.
        counts: its calls and timesteps.
    """
    config = named.config
    if is_segquant(config):
        config = with_algorithm(config, **{**changes, **config["algorithm"]})
    before, parameters = model_bytes(model), sum(parameter.numel() for parameter in model.parameters())
    start = time.perf_counter()
    mtq.quantize(model, copy.deepcopy(config), forward_loop_of(data))
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
        calls=None if counts is None else counts[0],
        timesteps=None if counts is None else counts[1],
        seconds=seconds,
    )


def _measured(part: ComponentReport, model: nn.Module, held_out: RecordedCalls) -> ComponentReport:
    found = velocity_sqnr(model, held_out)
    return replace(part, sqnr=found.overall, sqnr_by_timestep=dict(found.per_timestep))


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
    logger.info("%s: %.1f s", stage, seconds[stage])


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
