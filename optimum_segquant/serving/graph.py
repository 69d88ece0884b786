"""Changes to an exported graph that a server needs: one timestep for each row instead of one for all.

diffusers' UNets are exported with a timestep without axes. Triton has no tensors without axes beside a batch, and
TensorRT's back end none at all. Inside, the timestep is made a vector (Unsqueeze) and repeated for every row (Expand);
taking it as a vector with one value for each row leaves out the first step and changes no number. Requests with
different timesteps can then share a batch.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from .signature import STEP_AXIS, signature_of

__all__ = ["with_row_timesteps"]


def with_row_timesteps(model: ModelProto) -> ModelProto | None:
    """Give every input without axes one for the rows of the batch, where the graph allows it.

    Args:
        model: an exported denoiser, without or with its weights; it is not changed.

    Returns:
        The changed copy, None if there is nothing to change.

    Raises:
        ValueError: an input without axes is used in another way than by Unsqueeze and Expand.
    """
    scalars = [tensor.name for tensor in signature_of(model).inputs if not tensor.shape]
    if not scalars:
        return None
    changed = ModelProto()
    changed.CopyFrom(model)
    for name in scalars:
        _add_rows(changed, name)
    return changed


def _add_rows(model: ModelProto, name: str) -> None:
    graph = model.graph
    readers = [node for node in graph.node if name in node.input]
    if not readers or any(not _adds_first_axis(model, node) for node in readers):
        raise ValueError(
            f"the input {name} has no axes and is not simply repeated for the rows of a batch: serve this model with "
            "the ONNX Runtime back end, or export it with a vector of timesteps"
        )
    for node in readers:
        if not _is_expanded(model, node.output[0]):
            raise ValueError(
                f"the input {name} has no axes and is not repeated for the rows of a batch: serve this model with the "
                "ONNX Runtime back end, or export it with a vector of timesteps"
            )
        for other in graph.node:
            for index, value in enumerate(other.input):
                if value == node.output[0]:
                    other.input[index] = name
        graph.node.remove(node)
    value = next(value for value in graph.input if value.name == name)
    value.type.tensor_type.shape.dim.add(dim_param=STEP_AXIS)


def _adds_first_axis(model: ModelProto, node: NodeProto) -> bool:
    """Whether a node makes a vector of one number."""
    if node.op_type != "Unsqueeze" or len(node.input) != 2:
        return False
    axes = _constant(model, node.input[1])
    return axes is not None and axes.tolist() == [0]


def _is_expanded(model: ModelProto, name: str) -> bool:
    """Whether every use of a vector, after changes of its type, repeats it along its axis."""
    readers = [node for node in model.graph.node if name in node.input]
    return bool(readers) and all(
        (node.op_type == "Expand" and node.input[0] == name)
        or (node.op_type in ("Cast", "Identity") and _is_expanded(model, node.output[0]))
        for node in readers
    )


def _constant(model: ModelProto, name: str) -> np.ndarray | None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            return onnx.numpy_helper.to_array(tensor)
    for node in model.graph.node:
        if name in node.output and node.op_type == "Constant":
            return onnx.numpy_helper.to_array(node.attribute[0].t)
    return None
