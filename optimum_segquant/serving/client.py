"""A client of Triton Inference Server: the open inference protocol over HTTP, with tensors as bytes.

NVIDIA's own client can't be installed beside this package's hosts (it wants an older ml-dtypes), and the protocol is a
JSON header followed by the tensors: Triton documentation, "Binary Tensor Data Extension".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import requests

from .served import NUMPY_TYPES, RequestError

__all__ = ["TritonClient"]

_NAMES = {np.dtype(kind): name.removeprefix("TYPE_") for name, kind in NUMPY_TYPES.items() if kind is not np.object_}
_TYPES = {name: kind for kind, name in _NAMES.items()}
_READY = 10.0
"""Seconds to wait for a server to say that it is ready, which takes it none."""
_HEADER_LENGTH = "Inference-Header-Content-Length"


class TritonClient:
    """Sends requests to a server. Its :meth:`infer` is an :data:`~optimum_segquant.serving.served.Infer`.

        images = TritonClient("http://localhost:8000").infer("pipeline", {"prompt": np.array(["a red circle"], object)})
        pipeline = load_pipeline("repository/pipeline/1", TritonClient(url).infer)    # the loop in this process

    Args:
        url: of the server.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, url: str, timeout: float = 600.0) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._session = requests.Session()

    def ready(self) -> bool:
        """Whether the server and all its models are ready; False also where there is no server."""
        try:
            return (
                self._session.get(f"{self.url}/v2/health/ready", timeout=min(self.timeout, _READY)).status_code == 200
            )
        except requests.RequestException:
            return False

    def infer(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one request.

        Args:
            name: of the model.
            inputs: arrays in the shapes and types of its configuration; texts as arrays of ``str`` or ``bytes``.

        Returns:
            All outputs by name.

        Raises:
            RequestError: the server refused or failed, in its own words, or can't be reached.
        """
        body, header = _encode(inputs)
        try:
            response = self._session.post(
                f"{self.url}/v2/models/{name}/infer",
                data=body,
                headers={_HEADER_LENGTH: str(header), "Content-Type": "application/octet-stream"},
                timeout=self.timeout,
            )
        except requests.RequestException as error:
            raise RequestError(f"no answer from {self.url}: {error}; is the server running?") from error
        if response.status_code != 200:
            raise RequestError(f"{name}: the server says: {_message(response)}")
        return _decode(response.content, int(response.headers.get(_HEADER_LENGTH, len(response.content))))


def _message(response: Any) -> str:
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"


def _encode(inputs: Mapping[str, np.ndarray]) -> tuple[bytes, int]:
    """The body of a request and the length of its header."""
    tensors, blobs = [], []
    for name, array in inputs.items():
        text = array.dtype.kind in "OSU"
        blob = _text_bytes(array) if text else np.ascontiguousarray(array).tobytes()
        tensors.append(
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": "BYTES" if text else _NAMES[array.dtype],
                "parameters": {"binary_data_size": len(blob)},
            }
        )
        blobs.append(blob)
    header = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
    return b"".join([header, *blobs]), len(header)


def _text_bytes(array: np.ndarray) -> bytes:
    """Every text as its length, four bytes, and its UTF-8."""
    parts = []
    for value in array.reshape(-1):
        encoded = value if isinstance(value, bytes) else str(value).encode()
        parts += [struct.pack("<I", len(encoded)), encoded]
    return b"".join(parts)


def _decode(content: bytes, header: int) -> dict[str, np.ndarray]:
    found, start = {}, header
    for tensor in json.loads(content[:header])["outputs"]:
        kind, shape = _TYPES[tensor["datatype"]], tensor["shape"]
        size = tensor.get("parameters", {}).get("binary_data_size")
        if size is None:
            found[tensor["name"]] = np.array(tensor["data"], kind).reshape(shape)
            continue
        if size != np.dtype(kind).itemsize * np.prod(shape, dtype=int):
            raise RequestError(f"the server sent {size} bytes for {tensor['name']}, {shape} of {tensor['datatype']}")
        found[tensor["name"]] = np.frombuffer(content[start : start + size], kind).reshape(shape)
        start += size
    return found
