"""The model that runs a whole pipeline inside Triton: prompts in, images out.

``pipeline/1/model.py`` imports :class:`TritonPythonModel` from here. It runs Optimum's pipeline in the server's Python
back end; every call of a text encoder, the denoiser or the VAE decoder becomes a request to that model of the same
server (Triton's "business logic scripting"), where requests of several users share batches.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .model_config import DATA_TYPES, new_config
from .pipeline import load_pipeline, read_pipeline_models
from .served import RequestError

__all__ = ["MODEL_FILE", "MODEL_TEXT", "TritonPythonModel", "generate", "pipeline_config"]

logger = logging.getLogger(__name__)

MODEL_FILE = "model.py"
MODEL_TEXT = '''"""Runs the whole pipeline in Triton's Python back end."""

from optimum_segquant.serving.pipeline_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

_OPTIONAL: Mapping[str, tuple[str, int]] = {
    # input: its type and how many numbers
    "negative_prompt": ("TYPE_STRING", 1),
    "height": ("TYPE_INT32", 1),
    "width": ("TYPE_INT32", 1),
    "num_inference_steps": ("TYPE_INT32", 1),
    "guidance_scale": ("TYPE_FP32", 1),
    "seed": ("TYPE_INT64", 1),
    "arguments": ("TYPE_STRING", 1),
}


def pipeline_config(name: str) -> Any:
    """The configuration of the model.

    Inputs: ``prompt``, one text for each image; optional ``negative_prompt``, ``height``, ``width``,
    ``num_inference_steps``, ``guidance_scale``, ``seed`` (image i gets ``seed + i``) and ``arguments``, a JSON object
    with further arguments of the pipeline. Output: ``images``, uint8 (images, height, width, 3).
    """
    config = new_config(name=name, backend="python", max_batch_size=0)
    config.input.add(name="prompt", data_type=DATA_TYPES["TYPE_STRING"], dims=[-1])
    for field, (data_type, count) in _OPTIONAL.items():
        config.input.add(name=field, data_type=DATA_TYPES[data_type], dims=[count], optional=True)
    config.output.add(name="images", data_type=DATA_TYPES["TYPE_UINT8"], dims=[-1, -1, -1, 3])
    config.instance_group.add(count=1, kind=2)  # on the CPU: the models that it calls have their own devices
    return config


def generate(pipeline: Any, request: Mapping[str, np.ndarray]) -> np.ndarray:
    """Run the pipeline on one request.

    Args:
        pipeline: a diffusers pipeline.
        request: arrays by the names of :func:`pipeline_config`.

    Returns:
        uint8 (images, height, width, 3).

    Raises:
        RequestError: the pipeline has no such argument, one is set here, or ``arguments`` is no JSON object.
    """
    import torch

    prompts = [_text(value) for value in request["prompt"].reshape(-1)]
    arguments: dict[str, Any] = {}
    for name in ("height", "width", "num_inference_steps"):
        if name in request:
            arguments[name] = int(request[name].reshape(-1)[0])
    if "guidance_scale" in request:
        arguments["guidance_scale"] = float(request["guidance_scale"].reshape(-1)[0])
    if "negative_prompt" in request:
        arguments["negative_prompt"] = [_text(request["negative_prompt"].reshape(-1)[0])] * len(prompts)
    if "seed" in request:
        seed = int(request["seed"].reshape(-1)[0])
        arguments["generator"] = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    if "arguments" in request:
        arguments |= _json_object(_text(request["arguments"].reshape(-1)[0]))
    if given := sorted({"prompt", "output_type", "return_dict"} & set(arguments)):
        raise RequestError(f"{', '.join(given)} can't be among the arguments: leave it out")
    known = inspect.signature(type(pipeline).__call__).parameters
    if unknown := sorted(set(arguments) - set(known)):
        raise RequestError(
            f"{type(pipeline).__name__} has no {', '.join(unknown)}; it takes {', '.join(list(known)[1:])}"
        )
    images = pipeline(prompts, output_type="np", **arguments).images
    return (np.asarray(images) * 255).round().astype(np.uint8)


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"arguments is no JSON object: {error}") from error
    if not isinstance(found, dict):
        raise RequestError('arguments is no JSON object: write {"name": value}')
    return found


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


class TritonPythonModel:
    """What Triton's Python back end looks for in a ``model.py``.

    Numbers pass between the back end and Python by DLPack: the arrays of back ends that were built for NumPy 1 are
    empty under NumPy 2, and those on a GPU are no NumPy arrays at all.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load tokenizers, scheduler and configs; the models run elsewhere.

        Args:
            args: from the server: where this model is.
        """
        import triton_python_backend_utils as triton

        self.triton: Any = triton
        folder = Path(args["model_repository"]) / args["model_version"]
        self.outputs = {
            model.served.name: [tensor.name for tensor in model.served.outputs]
            for model in read_pipeline_models(folder).values()
        }
        self.pipeline = load_pipeline(folder, self._infer)
        self.pipeline.set_progress_bar_config(disable=True)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests one after the other; one that fails says why and harms no other."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            images = generate(self.pipeline, self._arguments(request))
        except Exception as error:
            # Whatever goes wrong is this request's: the server and its other requests go on.
            logger.warning("request failed", exc_info=True)
            return self.triton.InferenceResponse(output_tensors=[], error=self.triton.TritonError(str(error)))
        return self.triton.InferenceResponse(output_tensors=[self._tensor("images", images)])

    def _arguments(self, request: Any) -> dict[str, np.ndarray]:
        found = {}
        for name, data_type in [("prompt", "TYPE_STRING"), *((name, kind) for name, (kind, _) in _OPTIONAL.items())]:
            tensor = self.triton.get_input_tensor_by_name(request, name)
            if tensor is not None:
                found[name] = tensor.as_numpy() if data_type == "TYPE_STRING" else self._array(tensor)
        return found

    def _infer(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Send a request to another model of this server."""
        request = self.triton.InferenceRequest(
            model_name=name,
            requested_output_names=self.outputs[name],
            inputs=[self._tensor(tensor, array) for tensor, array in inputs.items()],
        )
        response = request.exec()
        if response.has_error():
            raise RequestError(f"{name}: {response.error().message()}")
        return {
            tensor: self._array(self.triton.get_output_tensor_by_name(response, tensor))
            for tensor in self.outputs[name]
        }

    def _tensor(self, name: str, array: np.ndarray) -> Any:
        import torch

        return self.triton.Tensor.from_dlpack(name, torch.from_numpy(np.ascontiguousarray(array)))

    @staticmethod
    def _array(tensor: Any) -> np.ndarray:
        import torch

        return torch.from_dlpack(tensor.to_dlpack()).cpu().numpy()
