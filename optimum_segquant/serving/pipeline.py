"""A diffusers pipeline whose models run somewhere else: in a server, or in ONNX Runtime under a server's rules.

Optimum's pipelines ask ONNX Runtime sessions for every model. :class:`ServedSession` is such a session to them, with
the names, types and shapes of the exported model, and hands each call to an :data:`Infer`. Tokenizers, scheduler and
guidance are those of the exported pipeline, in this process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto

from .served import Infer, ServedModel
from .signature import TENSOR_TYPES, ModelSignature, TensorSignature

__all__ = ["PipelineModel", "ServedSession", "load_pipeline", "read_pipeline_models", "write_pipeline_models"]

MODELS_FILE = "served_models.json"

_ONNX_TYPES = {name: number for number, name in TENSOR_TYPES.items()}
_ERRORS_ONLY = 3  # ONNX Runtime's log level

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class PipelineModel:
    """One model of a pipeline.

    Attributes:
        signature: of the exported file, as Optimum's pipeline expects it.
        served: the model as the server takes it.
    """

    signature: ModelSignature
    served: ServedModel


class ServedSession(onnxruntime.InferenceSession):
    """A session of ONNX Runtime in name, types and shapes, whose runs are handed on.

    Args:
        signature: of the model that it stands for.
        folder: where the model's ``config.json`` is.
        run: what to do with the inputs of a call.
    """

    def __init__(self, signature: ModelSignature, folder: Path, run: Run) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        super().__init__(_skeleton(signature).SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._model_path = str(folder / "model.onnx")
        self._outputs = [tensor.name for tensor in signature.outputs]
        self._hand_on = run

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, np.ndarray], run_options: Any = None
    ) -> list[np.ndarray]:
        """Hand a call on; ``run_options`` are those of a session in this process, and not used."""
        found = self._hand_on(input_feed)
        return [found[name] for name in output_names or self._outputs]


def load_pipeline(folder: str | os.PathLike[str], infer: Infer) -> Any:
    """Build the pipeline of a directory that :func:`write_pipeline_models` completed.

    Args:
        folder: with ``model_index.json``, scheduler, tokenizers and the models' configs.
        infer: runs one request.

    Returns:
        An ``ORTDiffusionPipeline``; call it like any diffusers pipeline.

    Raises:
        ImportError: optimum-onnx is missing.
        ValueError: the directory is none of a served pipeline.
    """
    # Not through optimum_segquant.exporters: a server that runs a pipeline needs no ModelOpt.
    try:
        from optimum.onnxruntime import ORTDiffusionPipeline
    except ImportError as error:
        raise ImportError("optimum-onnx or onnxruntime is missing: pip install 'optimum-segquant[onnx]'") from error

    folder = Path(folder)
    sessions = {
        f"{component}_session": ServedSession(model.signature, folder / component, _remote(model.served, infer))
        for component, model in read_pipeline_models(folder).items()
    }
    return ORTDiffusionPipeline.from_pretrained(folder, export=False, **sessions)


def _remote(model: ServedModel, infer: Infer) -> Run:
    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return model.response([infer(model.name, request) for request in model.requests(inputs)])

    return run


def write_pipeline_models(folder: Path, models: Mapping[str, PipelineModel]) -> None:
    """Say in a pipeline's directory which served model stands for which component."""
    content = {
        component: {
            "served": model.served.to_dict(),
            "inputs": [[tensor.name, tensor.data_type, list(tensor.shape)] for tensor in model.signature.inputs],
            "outputs": [[tensor.name, tensor.data_type, list(tensor.shape)] for tensor in model.signature.outputs],
        }
        for component, model in models.items()
    }
    (folder / MODELS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_pipeline_models(folder: Path) -> dict[str, PipelineModel]:
    """The inverse of :func:`write_pipeline_models`.

    Raises:
        ValueError: there is no such file in ``folder``, or it is damaged.
    """
    path = folder / MODELS_FILE
    try:
        return {
            component: PipelineModel(
                ModelSignature(_signatures(entry["inputs"]), _signatures(entry["outputs"])),
                ServedModel.from_dict(entry["served"]),
            )
            for component, entry in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {MODELS_FILE}: it is no pipeline of a model repository") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): write the model repository again") from error


def _signatures(entries: Sequence[Any]) -> tuple[TensorSignature, ...]:
    return tuple(TensorSignature(name, data_type, tuple(shape)) for name, data_type, shape in entries)


def _skeleton(signature: ModelSignature) -> ModelProto:
    """A graph with these inputs and outputs, and nothing of use between them."""
    nodes, constants = [], []
    for index, tensor in enumerate(signature.outputs):
        value = onnx.helper.make_tensor(f"value_{index}", _ONNX_TYPES[tensor.data_type], [1], [0])
        constants.append(onnx.numpy_helper.from_array(np.ones(len(tensor.shape), np.int64), f"shape_{index}"))
        nodes.append(onnx.helper.make_node("ConstantOfShape", [f"shape_{index}"], [tensor.name], value=value))
    graph = onnx.helper.make_graph(
        nodes,
        "served",
        [_value(tensor) for tensor in signature.inputs],
        [_value(tensor) for tensor in signature.outputs],
        constants,
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)


def _value(tensor: TensorSignature) -> onnx.ValueInfoProto:
    kind = _ONNX_TYPES[tensor.data_type]
    assert kind != TensorProto.UNDEFINED
    # Axes without a name have a made-up one here, which ONNX Runtime reports as any other.
    return onnx.helper.make_tensor_value_info(tensor.name, kind, list(tensor.shape))
