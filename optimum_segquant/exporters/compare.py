"""Run an exported file in ONNX Runtime and compare it with PyTorch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from ..evaluation import sqnr_db

_ERRORS_ONLY = 3  # ONNX Runtime's log level


@dataclass(frozen=True)
class Agreement:
    """How close two outputs are.

    Attributes:
        sqnr: of the second against the first, dB.
        largest: difference of one number, absolute.
    """

    sqnr: float
    largest: float


def session(
    path: str | os.PathLike[str],
    threads: int | None = None,
    optimized: str | os.PathLike[str] | None = None,
    optimize: bool = True,
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU with default options.

    Args:
        path: of the ONNX file.
        threads: to compute with; by default ONNX Runtime's choice.
        optimized: where to write the graph as ONNX Runtime runs it.
        optimize: False runs the graph operator by operator, as written. For graphs made for TensorRT: ONNX Runtime
            moves their float8 codes into operators that do not take them.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(Path(path)), options, providers=["CPUExecutionProvider"])


def run(runtime: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a session by name.

    Args:
        runtime: the session.
        inputs: tensors by name; those that the graph does not read are left out, others are cast to its types.
    """
    kinds = {value.name: _NUMPY[value.type] for value in runtime.get_inputs()}
    arrays: dict[str, np.ndarray] = {
        name: inputs[name].detach().cpu().numpy().astype(kind, copy=False) for name, kind in kinds.items()
    }
    names = [value.name for value in runtime.get_outputs()]
    return {
        name: torch.from_numpy(np.asarray(value)) for name, value in zip(names, runtime.run(names, arrays), strict=True)
    }


_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def agreement(reference: Tensor, other: Tensor) -> Agreement:
    """Compare two outputs of one shape.

    Raises:
        ValueError: their shapes differ.
    """
    if reference.shape != other.shape:
        raise ValueError(f"shapes differ: {tuple(reference.shape)} and {tuple(other.shape)}")
    first, second = reference.detach().double().cpu(), other.detach().double().cpu()
    noise = first - second
    return Agreement(sqnr_db(float(first.square().sum()), float(noise.square().sum())), float(noise.abs().max()))
