"""From an exported directory to a model repository of Triton Inference Server.

    export_onnx(pipeline, "onnx")
    write_model_repository("onnx", "repository")     # then: tritonserver --model-repository=repository

Layout, one directory for every model of the pipeline:

    <model>/config.pbtxt            made from the graph, checked against it
    <model>/1/model.onnx            with its external data; for TensorRT what the engine is built from
    <model>/1/model.plan            TensorRT: built by the command in README.md
    pipeline/1/model.py             the whole pipeline, prompts to images, as one more model
    pipeline/1/...                  tokenizers, scheduler and configs, also for clients that run the loop themselves
    deployment.json, README.md, segquant_manifest.json
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto
from onnx.external_data_helper import uses_external_data

from modelopt_ext.export.onnx import TARGETS
from modelopt_ext.export.trtexec import profile_shapes

from ..files import MANIFEST_NAME, check_spares, staged_directory, verify_manifest, write_manifest
from ..provenance import EXPORT_RECORD, read_export_record
from ..quantization_report import REPORT_NAME
from .check import check_model_repository
from .commands import Command, engine_commands, triton_commands
from .deployment import Deployment, load_deployment
from .graph import with_row_timesteps
from .model_config import CONFIG_FILE, format_config
from .pipeline import PipelineModel, write_pipeline_models
from .pipeline_model import MODEL_FILE, MODEL_TEXT, pipeline_config
from .served import ServedModel
from .signature import ModelSignature, load_graph, signature_of
from .sizes import AxisRange, record_sizes, served_ranges
from .triton_config import BACKENDS, Backend, ServingOptions, build_config

__all__ = ["PIPELINE_MODEL", "seal_engines", "write_model_repository"]

logger = logging.getLogger(__name__)

PIPELINE_MODEL = "pipeline"
"""Name of the model that runs the whole pipeline."""

_VERSION = "1"
_NOT_COPIED = ("*.onnx", "*.onnx_data", "*.onnx.data", MANIFEST_NAME, EXPORT_RECORD, REPORT_NAME, ".*")


def write_model_repository(
    export_dir: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    backend: Backend | Mapping[str, Backend] = "onnxruntime",
    components: Sequence[str] | None = None,
    options: ServingOptions | Mapping[str, ServingOptions] | None = None,
    image_sizes: Sequence[tuple[int, int]] = (),
    max_images: int = 1,
    call_arguments: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Mapping[str, tuple[int, int, int]]] | None = None,
    name: str | None = None,
) -> Deployment:
    """Write a model repository for an exported pipeline, or for one exported model.

    Args:
        export_dir: what :func:`~optimum_segquant.export_onnx` wrote: for ``backend="onnxruntime"`` with its default
            target, or with ``target="onnxruntime-vnni"`` if the server's CPU has VNNI or AMX; for ``"tensorrt"`` with
            ``target="tensorrt"``.
        repository: directory to write; a deployment there is replaced when the new one is complete.
        backend: what runs the models: for all of them, or by component.
        components: to serve; by default text encoders, denoiser and VAE decoder.
        options: how they are served: for all of them, or by component (others get the defaults).
        image_sizes: (height, width) in pixels that will be asked for, the usual one first; by default the pipeline's
            own size. Engines take nothing beyond the smallest and the largest.
        max_images: images in one call of the pipeline; largest batches follow from it.
        call_arguments: of the pipeline, as in use, where they change sizes: guidance, ``max_sequence_length``.
        sizes: for a single model: smallest, usual and largest size of each dynamic axis, under ``name``.
        name: of a single model; by default the name of its class in lower case.

    Returns:
        The deployment; its ``commands`` build the engines and start the server.

    Raises:
        DamagedFilesError: files of ``export_dir`` are missing, truncated or altered.
        ValueError: there is no such component, the back end does not take the files, a size does not fit, or
            ``export_dir`` would be replaced; nothing was written.
        ConfigError: what was written does not fit the files, which would be a mistake here; nothing was written.
        OSError: the disk is full; what was in ``repository`` is still there.
    """
    source = Path(export_dir)
    if not source.is_dir():
        raise ValueError(f"{source} is no directory: export the pipeline first, export_onnx(pipeline, directory)")
    check_spares(Path(repository), source)
    verify_manifest(source, required=False)
    plan = _plan(source, components, image_sizes, max_images, dict(call_arguments or {}), sizes, name)
    backends = _by_component(backend, plan, "backend", _backend_of)
    chosen = _by_component(options if options is not None else ServingOptions(), plan, "options", lambda value: value)
    with staged_directory(repository) as staged:
        for component, model in plan.items():
            model.write(staged / component, backends[component], chosen.get(component, ServingOptions()))
        on_cpu = [name for name in plan if chosen.get(name, ServingOptions()).device == "cpu"]
        pipeline = None
        if (source / "model_index.json").is_file():
            _write_pipeline(source, staged / PIPELINE_MODEL, plan, backends)
            pipeline = f"{PIPELINE_MODEL}/{_VERSION}"
        check_model_repository(staged, engines=False)
        deployment = Deployment(
            kind="triton",
            backends=backends,
            sizes={component: model.ranges for component, model in plan.items()},
            pipeline=pipeline,
            source=_source(source),
            commands=_commands(staged, plan, backends, pipeline is not None, on_cpu),
        )
        deployment.write(staged)
    logger.info("%d models written to %s", len(plan), repository)
    return deployment


def seal_engines(repository: str | os.PathLike[str]) -> Deployment:
    """Take engines that have been built into the manifest, after all other files have been found intact.

    Raises:
        DamagedFilesError: another file was changed meanwhile.
        ConfigError: an engine is missing, or a configuration no longer fits.
    """
    deployment = load_deployment(repository)
    check_model_repository(repository)
    write_manifest(repository)
    return deployment


class _Model:
    """One component: its files, what it takes, and what sizes it sees."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.path = folder / "model.onnx"
        self.graph = load_graph(self.path)
        self.exported = signature_of(self.graph)
        self.target = {entry.key: entry.value for entry in self.graph.metadata_props}.get("segquant.target")
        self.changed = self._with_rows()
        self.signature = self.exported if self.changed is None else signature_of(self.changed)
        self.ranges: dict[str, AxisRange] = {}
        self.served: ServedModel | None = None

    def _with_rows(self) -> ModelProto | None:
        try:
            return with_row_timesteps(self.graph)
        except ValueError as error:
            logger.info("%s is served without batches: %s", self.name, error)
            return None

    def set_ranges(self, exported: Mapping[str, AxisRange]) -> None:
        self.ranges = served_ranges(exported, self.signature)

    @property
    def largest_batch(self) -> int:
        return max((self.ranges[axis].largest for axis in self.signature.batch_axes), default=1)

    def write(self, directory: Path, backend: Backend, options: ServingOptions) -> None:
        """Write configuration and graph."""
        self._check_target(backend, options)
        if options.accelerator == "tensorrt":
            options = replace(options, accelerator_parameters=self._accelerator(options))
        config = build_config(self.name, self.signature, backend, self.largest_batch, options)
        version = directory / _VERSION
        version.mkdir(parents=True)
        (directory / CONFIG_FILE).write_text(format_config(config), encoding="utf-8")
        self.served = ServedModel.from_config(config)
        if self.changed is None:
            shutil.copyfile(self.path, version / "model.onnx")
        else:
            onnx.save(self.changed, version / "model.onnx")
        for file in _external_files(self.graph):
            shutil.copyfile(self.folder / file, version / file)

    @property
    def runtime(self) -> str | None:
        """What reads graphs of its target."""
        return TARGETS[self.target].runtime if self.target in TARGETS else self.target

    @property
    def needs_vnni(self) -> bool:
        """Whether it saturates on some CPUs."""
        return self.target in TARGETS and TARGETS[self.target].needs_vnni

    def _check_target(self, backend: Backend, options: ServingOptions) -> None:
        wants = "tensorrt" if backend == "tensorrt" or options.accelerator == "tensorrt" else "onnxruntime"
        if self.target is not None and self.runtime != wants:
            raise ValueError(
                f"{self.name} was exported for {self.target} and can't run in {wants}: export it again with "
                f"export_onnx(..., target={wants!r}), or write backend={self.runtime!r}"
            )

    def _accelerator(self, options: ServingOptions) -> dict[str, str]:
        """TensorRT inside ONNX Runtime: the shapes that its engines are built for, and whether they hold int8."""
        inputs = {tensor.name: tensor.shape for tensor in self.signature.inputs}
        shapes = profile_shapes(inputs, {axis: tuple(size) for axis, size in self.ranges.items()})
        keys = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
        found = dict(zip(keys, shapes, strict=False))
        if self.target == "tensorrt":
            found["precision_mode"] = "INT8"
        return {**found, **options.accelerator_parameters}


def _source(directory: Path) -> dict[str, Any] | None:
    """The export's record, with the quantizer's report where there is one."""
    record = read_export_record(directory)
    report = directory / REPORT_NAME
    if not report.is_file():
        return record
    return {**(record or {}), "report": json.loads(report.read_text(encoding="utf-8"))}


def _plan(
    source: Path,
    components: Sequence[str] | None,
    image_sizes: Sequence[tuple[int, int]],
    max_images: int,
    arguments: dict[str, Any],
    sizes: Mapping[str, Mapping[str, tuple[int, int, int]]] | None,
    name: str | None,
) -> dict[str, _Model]:
    if (source / "model.onnx").is_file():
        return _single(source, sizes, name)
    if sizes is not None or name is not None:
        raise ValueError(f"{source} is a pipeline: its models have names and sizes; leave out name and sizes")
    if max_images < 1:
        raise ValueError(f"max_images is {max_images}: at least one image is made")
    present = {path.parent.name: path.parent for path in sorted(source.glob("*/model.onnx"))}
    if not present or not (source / "model_index.json").is_file():
        raise ValueError(f"{source} holds no exported pipeline (model_index.json, <component>/model.onnx)")
    wanted = [component for component in present if component != "vae_encoder"] if components is None else components
    if unknown := sorted(set(wanted) - set(present)):
        raise ValueError(f"{source} has no {', '.join(unknown)}: it holds {', '.join(present)}")
    models = {component: _Model(present[component], component) for component in wanted}
    needed = [component for component in present if component != "vae_encoder"]
    ranges = record_sizes(
        source,
        {component: signature_of(present[component] / "model.onnx") for component in needed},
        image_sizes,
        max_images,
        arguments,
    )
    if "vae_encoder" in models:
        ranges["vae_encoder"] = _encoder_ranges(source, models["vae_encoder"].exported, ranges["vae_decoder"])
    for component, model in models.items():
        model.set_ranges(ranges[component])
    return models


def _encoder_ranges(source: Path, signature: ModelSignature, decoder: Mapping[str, AxisRange]) -> dict[str, AxisRange]:
    """The encoder takes the images that the decoder gives."""
    outputs = signature_of(source / "vae_decoder" / "model.onnx").outputs
    factor = next(int(str(size).split(" * ")[1]) for size in outputs[0].shape if " * " in str(size))
    sizes = {axis.removeprefix("latent_"): size for axis, size in decoder.items()}
    found = {}
    for axis in signature.axes:
        size = sizes[axis.removeprefix("sample_")]
        scale = factor if axis.startswith("sample_") else 1
        found[axis] = AxisRange(*(value * scale for value in size))
    return found


def _single(
    source: Path, sizes: Mapping[str, Mapping[str, tuple[int, int, int]]] | None, name: str | None
) -> dict[str, _Model]:
    record = read_export_record(source) or {}
    name = name or str(record.get("class", "denoiser")).lower()
    model = _Model(source, name)
    given = dict((sizes or {}).get(name, {}))
    if missing := [axis for axis in model.exported.axes if axis not in given]:
        raise ValueError(
            f"{source} is one model with dynamic axes: give sizes={{{name!r}: {{{missing[0]!r}: (min, opt, max), "
            f"...}}}} for {', '.join(missing)}"
        )
    if unknown := sorted(set(given) - set(model.exported.axes)):
        raise ValueError(f"{name} has no axes {', '.join(unknown)}; its axes are {', '.join(model.exported.axes)}")
    for axis, size in given.items():
        if len(size) != 3 or not 1 <= size[0] <= size[1] <= size[2]:
            raise ValueError(f"sizes of {axis} must be 1 <= min <= opt <= max, got {size}")
    model.set_ranges({axis: AxisRange(*size) for axis, size in given.items()})
    return {name: model}


def _by_component(value: Any, plan: Mapping[str, Any], what: str, check: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {component: check(value) for component in plan}
    if unknown := sorted(set(value) - set(plan)):
        raise ValueError(f"{what} names {', '.join(unknown)}: the components are {', '.join(plan)}")
    found = {component: check(item) for component, item in value.items()}
    if what == "backend" and (missing := [component for component in plan if component not in found]):
        raise ValueError(f"backend says nothing for {', '.join(missing)}")
    return found


def _backend_of(value: Any) -> Backend:
    if value not in BACKENDS:
        raise ValueError(f"backend is {value!r}: write one of {', '.join(BACKENDS)}")
    return value


def _external_files(graph: ModelProto) -> list[str]:
    """Names of the files that hold a graph's weights, beside it."""
    found = {
        entry.value
        for tensor in graph.graph.initializer
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sorted(found)


def _write_pipeline(source: Path, directory: Path, plan: Mapping[str, _Model], backends: Mapping[str, str]) -> None:
    """The model that runs the whole pipeline, with all that is not a served model."""
    version = directory / _VERSION
    shutil.copytree(source, version, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    for entry in [entry for entry in version.iterdir() if entry.is_dir() and not any(entry.iterdir())]:
        entry.rmdir()
    models = {
        component: PipelineModel(model.exported, model.served)
        for component, model in plan.items()
        if model.served is not None
    }
    write_pipeline_models(version, models)
    (version / MODEL_FILE).write_text(MODEL_TEXT, encoding="utf-8")
    (directory / CONFIG_FILE).write_text(format_config(pipeline_config(PIPELINE_MODEL)), encoding="utf-8")


def _commands(
    repository: Path, plan: Mapping[str, _Model], backends: Mapping[str, str], python: bool, on_cpu: Collection[str]
) -> tuple[Command, ...]:
    engines = {name: repository / name / _VERSION for name, backend in backends.items() if backend == "tensorrt"}
    built = engine_commands(repository, engines, {name: plan[name].ranges for name in engines})
    if built:
        seal = "takes the engines into the manifest, after a check of all other files"
        built = (*built, Command("seal", seal, "optimum-cli segquant serve . --seal"))
    vnni = any(plan[name].needs_vnni for name in on_cpu)
    return (*built, *triton_commands(gpu=len(on_cpu) < len(plan), python=python, vnni=vnni))
