"""A quantized pipeline, or one model of it, as ONNX files."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from tqdm import tqdm

from modelopt_ext.export.onnx import (
    LARGEST_FILE,
    Target,
    check_layers,
    choose_opset,
    export_module,
    finish_file,
    lowered,
    specs_of,
    target_named,
)
from modelopt_ext.export.tensorrt import assert_tensorrt
from modelopt_ext.nn.packed_spec import PackedSpec

from ..components import modules_of
from ..files import staged_directory, write_manifest
from ..provenance import export_record, write_export_record

logger = logging.getLogger(__name__)

MODEL_FILE = "model.onnx"


def supported_pipelines() -> tuple[str, ...]:
    """Names of the diffusers pipelines that Optimum exports and runs."""
    _require_optimum()
    from optimum.onnxruntime.modeling_diffusion import SUPPORTED_ORT_PIPELINES

    return tuple(sorted({pipeline.auto_model_class.__name__ for pipeline in SUPPORTED_ORT_PIPELINES}))


def export_onnx(
    model: DiffusionPipeline | nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    target: str = "onnxruntime",
    opset: int | None = None,
    verify: bool = True,
    inputs: Mapping[str, Any] | None = None,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    output_names: Sequence[str] | None = None,
    largest_file: int = LARGEST_FILE,
    progress: bool = False,
) -> Path:
    """Write a quantized pipeline as a directory that ``ORTDiffusionPipeline.from_pretrained`` loads, or one model.

    The graphs hold operators of the ONNX standard only and need no session options. With ``target="onnxruntime"`` codes
    are stored as uint8 (int8 codes plus 128), which is exact on every x86 CPU. With ``"onnxruntime-vnni"`` weights are
    int8: for CPUs with VNNI or AMX, where products are several times as fast; on other x86 CPUs they saturate, and
    images can be wrong. With ``"tensorrt"`` all codes are int8, and the graphs are checked against TensorRT's rules.
    Neither the pipeline nor its configs are changed.

    Args:
        model: a pipeline with at least one quantized model (calibrated, compressed or loaded from a checkpoint), or
            such a model by itself, which needs ``inputs``.
        save_directory: replaced as a whole once everything is written; until then what is there stays.
        target: ``"onnxruntime"``, ``"onnxruntime-vnni"`` or ``"tensorrt"``.
        opset: 19 to 21; by default what the layers need.
        verify: run the quantized graphs in ONNX Runtime on two sizes of inputs and compare them with PyTorch; as
            floats where this machine is not one that they are for.
        inputs: for a model: arguments of its forward by name, e.g. ``trajectories[0].inputs``.
        dynamic_axes: for a model: dimensions that may change, by input or output name; default batch and sizes.
        output_names: for a model: names of its outputs.
        largest_file: bytes from which on tensors go to ``model.onnx_data``.
        progress: show a bar that counts the bytes of the models that are traced, finished and verified.

    Returns:
        The directory.

    Raises:
        ValueError: nothing is quantized, Optimum does not know the pipeline or it is in bfloat16, opset, dynamic
            axes or layers that do not fit the target, or a graph that gives other numbers than PyTorch; nothing was
            written.
        ImportError: optimum-onnx or onnxruntime is missing.
    """
    chosen = target_named(target)
    if isinstance(model, DiffusionPipeline):
        if inputs is not None or dynamic_axes is not None or output_names is not None:
            raise ValueError(
                "a pipeline's inputs, axes and output names are Optimum's: leave out inputs, dynamic_axes and "
                "output_names, or export the denoiser by itself"
            )
        return _export_pipeline(model, Path(save_directory), chosen, opset, verify, largest_file, progress)
    if inputs is None:
        raise ValueError(
            f"exporting a {type(model).__name__} by itself needs inputs={{...}}, the arguments of a real call, e.g. "
            "sample_trajectories(pipe, prompts, ...)[0].inputs"
        )
    size = _bytes(model)
    with staged_directory(save_directory) as directory, _bar((2 if verify else 1) * size, progress) as bar:
        with exportable_operators(model):
            path = export_module(
                model,
                directory / MODEL_FILE,
                inputs,
                target=target,
                opset=opset,
                dynamic_axes=dynamic_axes,
                output_names=output_names,
                largest_file=largest_file,
            )
        save_config: Any = getattr(model, "save_config", None)
        if save_config is not None:
            save_config(directory)
        _check_target(path, chosen)
        bar.update(size)
        if verify:
            from .verify import verify_module

            verify_module(path, model, inputs, chosen)
            bar.update(size)
        write_export_record(directory, export_record(model, {"model": model}, target=target))
        write_manifest(directory)
    return Path(save_directory)


def _export_pipeline(
    pipeline: DiffusionPipeline,
    save_directory: Path,
    target: Target,
    opset: int | None,
    verify: bool,
    largest: int,
    progress: bool,
) -> Path:
    name = type(pipeline).__name__
    known = supported_pipelines()
    if name not in known:
        raise ValueError(
            f"Optimum has no ONNX form of {name}, only of {', '.join(known)}: export the denoiser by itself, "
            "export_onnx(pipeline.transformer, directory, inputs=...)"
        )
    check_dtypes(pipeline)
    specs = quantized_components(pipeline)
    layers = {f"{component}.{layer}": spec for component, found in specs.items() for layer, spec in found.items()}
    check_layers(layers, target)
    version = choose_opset(opset, layers, target)

    from optimum.exporters.onnx import onnx_export_from_model

    sizes = {name: _bytes(part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    total = sum(sizes.values()) + (2 if verify else 1) * sum(sizes[component] for component in specs)
    with staged_directory(save_directory) as directory, _bar(total, progress) as bar:
        with ExitStack() as stack:
            stack.enter_context(unchanged_configs(pipeline))
            stack.enter_context(_counted_exports(sizes, bar))
            for component in specs:
                stack.enter_context(lowered(getattr(pipeline, component), target))
            with warnings.catch_warnings():
                # The tracer's notices about sizes that diffusers reads as numbers: verify finds those that matter.
                warnings.simplefilter("ignore")
                onnx_export_from_model(
                    pipeline, directory, opset=version, do_validation=False, device=str(pipeline.device)
                )
            for component, found in specs.items():
                path = directory / component / MODEL_FILE
                finish_file(path, target, len(found), largest)
                _check_target(path, target)
                bar.update(sizes[component])
            if verify:
                from .verify import verify_pipeline

                verify_pipeline(directory, pipeline, specs, target, done=lambda name: bar.update(sizes[name]))
        record = export_record(pipeline, {name: getattr(pipeline, name) for name in specs}, target=target.name)
        write_export_record(directory, {**record, "opset": version})
        write_manifest(directory)
    logger.info("%s with %d quantized layers written to %s, opset %d", name, len(layers), save_directory, version)
    return save_directory


def _bar(total: int, progress: bool) -> tqdm[NoReturn]:
    return tqdm(total=total, desc="ONNX", unit="B", unit_scale=True, unit_divisor=1024, disable=not progress)


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@contextmanager
def _counted_exports(sizes: Mapping[str, int], bar: tqdm[NoReturn]) -> Iterator[None]:
    """Move the bar on for every model that Optimum has traced; of the VAE it makes two halves."""
    from optimum.exporters.onnx import convert

    export = convert.export

    def counted(*args: Any, output: Path, **kwargs: Any) -> Any:
        result = export(*args, output=output, **kwargs)
        name = Path(output).parent.name
        half = name.startswith("vae_")
        bar.update(sizes.get("vae", 0) // 2 if half else sizes.get(name, 0))
        return result

    with mock.patch.object(convert, "export", counted):
        yield


def quantized_components(pipeline: DiffusionPipeline) -> dict[str, dict[str, PackedSpec]]:
    """The formats of all quantized layers, by component and layer.

    Raises:
        ValueError: nothing is quantized, or the VAE is, which Optimum splits in two.
    """
    found = {
        name: layers
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and (layers := specs_of(component))
    }
    if not found:
        raise ValueError(
            "no Linear of the pipeline is quantized: call mtq.quantize on its denoiser first, or use Optimum's own "
            "export"
        )
    if "vae" in found:
        raise ValueError(
            "the VAE is quantized, and Optimum exports its halves by themselves: leave it in full precision"
        )
    return found


def _check_target(path: Path, target: Target) -> None:
    if target.runtime == "tensorrt":
        assert_tensorrt(path)


@contextmanager
def exportable_operators(model: nn.Module) -> Iterator[None]:
    """Optimum's replacements of operators that PyTorch's exporter does not know, for a model without its patcher."""
    _require_optimum()
    from optimum.exporters.onnx.model_patcher import UNSUPPORTED_OPS_PATCHING_SPEC, patched_apply_rotary_emb

    with ExitStack() as stack:
        for spec in UNSUPPORTED_OPS_PATCHING_SPEC:
            stack.enter_context(mock.patch.object(spec.o, spec.name, spec.custom_op))
        module = sys.modules[type(model).__module__]
        if getattr(module, "apply_rotary_emb", None) is apply_rotary_emb:
            stack.enter_context(mock.patch.object(module, "apply_rotary_emb", patched_apply_rotary_emb))
        yield


@contextmanager
def unchanged_configs(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Undo what Optimum writes into the models' configs while it exports."""
    configs = {
        id(module.config): module.config
        for component in pipeline.components.values()
        if isinstance(component, nn.Module)
        for module in component.modules()
        if hasattr(module, "config") and hasattr(module.config, "__dict__")
    }
    saved = {key: dict(vars(config)) for key, config in configs.items()}
    try:
        yield
    finally:
        for key, config in configs.items():
            vars(config).clear()
            vars(config).update(saved[key])


def _require_optimum() -> None:
    missing = [
        package
        for package, module in (("optimum-onnx", "optimum.exporters.onnx"), ("onnxruntime", "onnxruntime"))
        if not _is_installed(module)
    ]
    if missing:
        raise ImportError(f"{' and '.join(missing)} missing: pip install 'optimum-segquant[onnx]'")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def check_dtypes(pipeline: DiffusionPipeline) -> None:
    """Refuse bfloat16, which neither torch's exporter nor ONNX Runtime has for all operators of a pipeline.

    Raises:
        ValueError: names the components.
    """
    wrong = [
        name for name, part in modules_of(pipeline).items() if any(p.dtype is torch.bfloat16 for p in part.parameters())
    ]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} of the pipeline can't be exported to ONNX in bfloat16: load it with "
            "torch_dtype=torch.float16 or float32 (--dtype float16), the codes of a packed one stay as they are"
        )


def component_dtype(pipeline: DiffusionPipeline) -> str:
    """The float type of a pipeline by Optimum's short names."""
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(pipeline.dtype, "fp32")
