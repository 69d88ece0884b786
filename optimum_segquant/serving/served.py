"""A served model as its clients see it: which tensors a request holds, and in what shapes.

Letters: B rows of a batch. A model with ``max_batch_size`` n takes (B, *dims) with B <= n; one with 0 takes (*dims).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .model_config import DATA_TYPES

__all__ = ["NUMPY_TYPES", "Infer", "RequestError", "ServedModel", "ServedTensor"]

Infer = Callable[[str, Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Runs one request: name of the model and its inputs, as its configuration wants them; gives its outputs by name."""

NUMPY_TYPES: Mapping[str, Any] = {
    "TYPE_BOOL": np.bool_,
    "TYPE_UINT8": np.uint8,
    "TYPE_UINT16": np.uint16,
    "TYPE_UINT32": np.uint32,
    "TYPE_UINT64": np.uint64,
    "TYPE_INT8": np.int8,
    "TYPE_INT16": np.int16,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    "TYPE_STRING": np.object_,
}
"""NumPy's types by Triton's; bfloat16 has none."""

_SIDES = ("inputs", "outputs")
_NAMES = {number: name for name, number in DATA_TYPES.items()}


class RequestError(ValueError):
    """A request that a server refuses, or could not run."""


@dataclass(frozen=True)
class ServedTensor:
    """One input or output of a served model.

    Attributes:
        name: of the tensor.
        data_type: Triton's name of its type.
        dims: sizes without the batch, -1 where any size goes.
        reshape: sizes, without the batch, that the model itself gets or gives; None where they are ``dims``.
        optional: whether a request may leave it out.
    """

    name: str
    data_type: str
    dims: tuple[int, ...]
    reshape: tuple[int, ...] | None = None
    optional: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ServedTensor:
        """From plain data."""
        reshape = data["reshape"]
        sizes = None if reshape is None else tuple(reshape)
        return cls(data["name"], data["data_type"], tuple(data["dims"]), sizes, data["optional"])


@dataclass(frozen=True)
class ServedModel:
    """A model of a repository.

    Attributes:
        name: of the model.
        max_batch_size: rows of one request; 0 for a model without batches.
        inputs: what a request holds.
        outputs: what a response holds.
    """

    name: str
    max_batch_size: int
    inputs: tuple[ServedTensor, ...]
    outputs: tuple[ServedTensor, ...]

    @classmethod
    def from_config(cls, config: Any) -> ServedModel:
        """From a ``ModelConfig`` message."""
        return cls(config.name, config.max_batch_size, _tensors(config.input), _tensors(config.output))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ServedModel:
        """The inverse of :meth:`to_dict`."""
        inputs, outputs = (tuple(ServedTensor.from_dict(tensor) for tensor in data[side]) for side in _SIDES)
        return cls(data["name"], data["max_batch_size"], inputs, outputs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def requests(self, arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Cut a call's arguments into requests that the server takes.

        Args:
            arrays: by input name. What has no batch axis, or one row for all, is repeated for every row.

        Yields:
            Inputs of at most ``max_batch_size`` rows, in the shapes that the configuration says.

        Raises:
            RequestError: an input is missing or does not fit.
        """
        missing = [tensor.name for tensor in self.inputs if tensor.name not in arrays and not tensor.optional]
        if missing:
            raise RequestError(f"{self.name} needs {', '.join(missing)}")
        present = [tensor for tensor in self.inputs if tensor.name in arrays]
        if self.max_batch_size == 0:
            yield {tensor.name: _shaped(arrays[tensor.name], tensor, None) for tensor in present}
            return
        rows = max((arrays[tensor.name].shape[0] for tensor in present if arrays[tensor.name].ndim), default=1)
        whole = {tensor.name: _shaped(arrays[tensor.name], tensor, rows) for tensor in present}
        for start in range(0, rows, self.max_batch_size):
            yield {name: array[start : start + self.max_batch_size] for name, array in whole.items()}

    def response(self, parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Join the outputs of :meth:`requests`, in the shapes that the model itself gives."""
        joined = {}
        for tensor in self.outputs:
            array = parts[0][tensor.name] if len(parts) == 1 else np.concatenate([part[tensor.name] for part in parts])
            if tensor.reshape is not None:
                array = array.reshape((array.shape[0], *tensor.reshape) if self.max_batch_size else tensor.reshape)
            joined[tensor.name] = array
        return joined

    def check_request(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Refuse what Triton refuses: unknown or missing tensors, other types, sizes or batches.

        Raises:
            RequestError: names the tensor and says what it should be.
        """
        known = {tensor.name: tensor for tensor in self.inputs}
        if unknown := sorted(set(inputs) - set(known)):
            raise RequestError(f"{self.name} has no input {', '.join(unknown)}; its inputs are {', '.join(known)}")
        for name, tensor in known.items():
            if name not in inputs:
                if tensor.optional:
                    continue
                raise RequestError(f"{self.name}: the request lacks {name}")
            self._check_tensor(tensor, inputs[name])

    def _check_tensor(self, tensor: ServedTensor, array: np.ndarray) -> None:
        expected = NUMPY_TYPES.get(tensor.data_type)
        if expected is None or array.dtype != np.dtype(expected):
            raise RequestError(
                f"{self.name}: {tensor.name} is {array.dtype}, the configuration says {tensor.data_type}"
            )
        sizes = array.shape[1:] if self.max_batch_size else array.shape
        if self.max_batch_size and not 1 <= (array.shape[0] if array.ndim else 0) <= self.max_batch_size:
            raise RequestError(
                f"{self.name}: {tensor.name} has {array.shape[0] if array.ndim else 0} rows, at most "
                f"{self.max_batch_size} fit in one request"
            )
        if not fits(sizes, tensor.dims):
            raise RequestError(
                f"{self.name}: {tensor.name} is {list(array.shape)}, the configuration says {self._shape(tensor)}"
            )

    def _shape(self, tensor: ServedTensor) -> list[int]:
        return [*([-1] if self.max_batch_size else []), *tensor.dims]


def fits(sizes: Sequence[int], dims: Sequence[int]) -> bool:
    """Whether sizes are those of ``dims``, where -1 stands for any."""
    return len(sizes) == len(dims) and all(dim in (-1, size) for size, dim in zip(sizes, dims, strict=True))


def _shaped(array: np.ndarray, tensor: ServedTensor, rows: int | None) -> np.ndarray:
    array = array.astype(NUMPY_TYPES[tensor.data_type], copy=False)
    if rows is not None and (array.ndim == 0 or array.shape[0] == 1 != rows):
        array = np.broadcast_to(array, (rows, *array.shape[1:]))
    sizes = tensor.dims if tensor.reshape is not None or not array.ndim else array.shape[0 if rows is None else 1 :]
    try:
        return np.ascontiguousarray(array.reshape(sizes if rows is None else (rows, *sizes)))
    except ValueError as error:
        raise RequestError(f"{tensor.name}, {list(array.shape)}, does not fill {list(tensor.dims)}") from error


def _tensors(entries: Any) -> tuple[ServedTensor, ...]:
    return tuple(
        ServedTensor(
            entry.name,
            _NAMES[entry.data_type],
            tuple(entry.dims),
            tuple(entry.reshape.shape) if entry.HasField("reshape") else None,
            bool(getattr(entry, "optional", False)),
        )
        for entry in entries
    )
