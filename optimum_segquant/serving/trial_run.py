"""Run every model of a repository once, in ONNX Runtime under the server's rules.

Inputs are random, of the smallest sizes that the deployment names. Where requests may be joined, two rows run together
and each by itself: a graph in which rows are not independent must not share batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .check import check_model_repository
from .deployment import load_deployment
from .local import LocalModels, latest_version
from .model_config import ConfigError
from .served import NUMPY_TYPES, ServedModel
from .signature import ModelSignature, signature_of
from .sizes import AxisRange

__all__ = ["ModelCheck", "serve_check"]

LOWEST_SQNR = 20.0
"""dB. A batch of two rows against each row alone: sums in another order give 40 to 100, rows that mix less than 10."""


@dataclass(frozen=True)
class ModelCheck:
    """One model that ran.

    Attributes:
        model: its name.
        seconds: of one request with one row.
        inputs, outputs: shapes of that request and its response.
        rows: dB, how well rows agree alone and in a batch; None for a model without batches.
    """

    model: str
    seconds: float
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]
    rows: float | None


def serve_check(repository: str | os.PathLike[str], *, threads: int | None = None) -> list[ModelCheck]:
    """Verify checksums, compare configurations with files, run every ONNX model.

    Args:
        repository: that :func:`~optimum_segquant.serving.write_model_repository` wrote.
        threads: of ONNX Runtime.

    Raises:
        DamagedFilesError: a file is missing, truncated or altered.
        ConfigError: a configuration does not fit, a model gives numbers that are none, or its rows are not independent.
        RequestError: a model does not load or run.
    """
    repository = Path(repository)
    deployment = load_deployment(repository)
    check_model_repository(repository, engines=False)
    models = LocalModels(repository, threads)
    return [_check(repository, models, name, deployment.sizes[name]) for name in deployment.backends]


def _check(repository: Path, models: LocalModels, name: str, sizes: Mapping[str, AxisRange]) -> ModelCheck:
    model = models.model(name)
    signature = signature_of(latest_version(repository / name) / "model.onnx")
    inputs = _inputs(model, signature, sizes, rows=1, seed=0)
    start = time.perf_counter()
    outputs = models.infer(name, inputs)
    seconds = time.perf_counter() - start
    if broken := sorted(key for key, value in outputs.items() if not np.isfinite(value.astype(np.float64)).all()):
        raise ConfigError(f"{name} gives numbers that are infinite or none in {', '.join(broken)}")
    return ModelCheck(
        name,
        seconds,
        {key: value.shape for key, value in inputs.items()},
        {key: value.shape for key, value in outputs.items()},
        _rows(models, model, signature, sizes, inputs, outputs) if model.max_batch_size > 1 else None,
    )


def _rows(
    models: LocalModels,
    model: ServedModel,
    signature: ModelSignature,
    sizes: Mapping[str, AxisRange],
    first: Mapping[str, np.ndarray],
    alone: Mapping[str, np.ndarray],
) -> float:
    second = _inputs(model, signature, sizes, rows=1, seed=1)
    apart = models.infer(model.name, second)
    together = models.infer(model.name, {key: np.concatenate([first[key], second[key]]) for key in first})
    worst = float("inf")
    for key, value in together.items():
        expected = np.concatenate([alone[key], apart[key]]).astype(np.float64)
        noise = float(np.square(value - expected).sum())
        if noise:
            worst = min(worst, 10 * float(np.log10(max(float(np.square(expected).sum()), 1e-30) / noise)))
    if worst < LOWEST_SQNR:
        raise ConfigError(
            f"rows of {model.name} are not independent: alone and in a batch they agree to {worst:.1f} dB only; set "
            "max_batch_size to 0 and leave dynamic_batching out"
        )
    return worst


def _inputs(
    model: ServedModel, signature: ModelSignature, sizes: Mapping[str, AxisRange], *, rows: int, seed: int
) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    found = {}
    for tensor, real in zip(model.inputs, _in_order(signature, model), strict=True):
        shape = [size if isinstance(size, int) else sizes[size].smallest for size in real.shape]
        if model.max_batch_size:
            shape = [rows, *shape[1:]]
        kind = NUMPY_TYPES[tensor.data_type]
        # Ids of tokens and positions must exist; 0 and 1 always do.
        values: Any = (
            generator.normal(size=shape) if np.issubdtype(kind, np.floating) else generator.integers(0, 2, shape)
        )
        dims = tensor.dims if tensor.reshape is not None or not shape else shape[1 if model.max_batch_size else 0 :]
        found[tensor.name] = np.asarray(values, kind).reshape([rows, *dims] if model.max_batch_size else dims)
    return found


def _in_order(signature: ModelSignature, model: ServedModel) -> list[Any]:
    by_name = {tensor.name: tensor for tensor in signature.inputs}
    return [by_name[tensor.name] for tensor in model.inputs]
