"""Run a model repository's ONNX files in this process, as Triton's ONNX Runtime back end would.

Requests are checked against ``config.pbtxt`` with the server's rules and reshaped as it says; sessions get the options
that the back end would set. What runs here runs there, but for the device: this is ONNX Runtime on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from modelopt_ext.export.onnx import TARGETS

from ..exporters.cpu import is_exact_here
from .model_config import CONFIG_FILE, read_config
from .served import RequestError, ServedModel, ServedTensor

__all__ = ["LocalModels"]

_ERRORS_ONLY = 3  # ONNX Runtime's log level
_LEVELS = {
    0: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
"""By ``optimization.graph.level``, as the back end reads it."""


class LocalModels:
    """Models of a repository. Its :meth:`infer` is an :data:`~optimum_segquant.serving.served.Infer`.

    Args:
        repository: directory of the model repository.
        threads: to compute with; by default as the configuration says.
    """

    def __init__(self, repository: str | os.PathLike[str], threads: int | None = None) -> None:
        self.repository = Path(repository)
        self.threads = threads
        self._models: dict[str, tuple[ServedModel, onnxruntime.InferenceSession]] = {}

    def infer(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one request.

        Raises:
            RequestError: the request is not what the configuration says, or ONNX Runtime fails on it.
            ConfigError: the model has no valid configuration.
        """
        model, session = self._load(name)
        model.check_request(inputs)
        ranks = {value.name: len(value.shape) for value in session.get_inputs()}
        arrays = {tensor.name: _taken(model, tensor, inputs[tensor.name], ranks) for tensor in model.inputs}
        try:
            results = session.run([tensor.name for tensor in model.outputs], arrays)
        except Exception as error:
            raise RequestError(f"{name}: ONNX Runtime fails on this request: {str(error).splitlines()[0]}") from error
        return {
            tensor.name: _given(model, tensor, np.asarray(array))
            for tensor, array in zip(model.outputs, results, strict=True)
        }

    def model(self, name: str) -> ServedModel:
        """What the configuration says of a model."""
        return self._load(name)[0]

    def _load(self, name: str) -> tuple[ServedModel, onnxruntime.InferenceSession]:
        if name not in self._models:
            config = read_config(self.repository / name / CONFIG_FILE)
            self._models[name] = ServedModel.from_config(config), self._session(name, config)
        return self._models[name]

    def _session(self, name: str, config: Any) -> onnxruntime.InferenceSession:
        path = latest_version(self.repository / name) / "model.onnx"
        if not path.is_file():
            raise RequestError(f"{path} is missing: without it {name} runs in its own back end only")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.graph_optimization_level = _optimization(config)
        configured = config.parameters.get("intra_op_thread_count")
        threads = self.threads or int(configured.string_value if configured is not None else 0)
        if threads:
            options.intra_op_num_threads = threads
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise RequestError(f"{name}: ONNX Runtime does not load {path}: {str(error).splitlines()[0]}") from error
        target = TARGETS.get(session.get_modelmeta().custom_metadata_map.get("segquant.target", ""))
        if target is not None and not is_exact_here(target):
            raise RequestError(
                f"{name} was exported for CPUs with VNNI or AMX, and this one has neither: its sums would saturate. "
                'Export it again with target="onnxruntime", or run it on another CPU'
            )
        return session


def _optimization(config: Any) -> onnxruntime.GraphOptimizationLevel:
    """As configured; graphs made for TensorRT as written, or float8 codes move where operators do not take them."""
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    if config.backend == "tensorrt" or any(accelerator.name == "tensorrt" for accelerator in accelerators):
        return onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _LEVELS.get(config.optimization.graph.level, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)


def _taken(model: ServedModel, tensor: ServedTensor, array: np.ndarray, ranks: Mapping[str, int]) -> np.ndarray:
    """A request's array as the graph takes it."""
    if tensor.name not in ranks:
        raise RequestError(f"{model.name}: the file has no input {tensor.name}, which its configuration names")
    if tensor.reshape is not None:
        array = array.reshape((array.shape[0], *tensor.reshape) if model.max_batch_size else tensor.reshape)
    return array if ranks[tensor.name] else array.reshape(())


def _given(model: ServedModel, tensor: ServedTensor, array: np.ndarray) -> np.ndarray:
    """The graph's array as a response holds it."""
    if tensor.reshape is None and array.ndim:
        return array
    return array.reshape((array.shape[0], *tensor.dims) if model.max_batch_size else tensor.dims)


def latest_version(directory: Path) -> Path:
    """The highest-numbered version of a model, which Triton serves by default.

    Raises:
        RequestError: there is none.
    """
    versions = [entry for entry in directory.glob("*") if entry.is_dir() and entry.name.isdigit() and int(entry.name)]
    if not versions:
        raise RequestError(f"{directory} has no version, a directory with a number as its name")
    return max(versions, key=lambda entry: int(entry.name))
