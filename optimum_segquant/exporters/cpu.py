"""Whether this machine's CPU gives the numbers of a graph."""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from modelopt_ext.export.onnx import Target

logger = logging.getLogger(__name__)

# More channels than a vector of codes has, and rows and columns for whole tiles.
_ROWS, _CHANNELS, _COLUMNS = 16, 256, 64
_OPSET, _IR_VERSION = 20, 9


@cache
def multiplies_signed_weights() -> bool:
    """Whether ONNX Runtime multiplies uint8 activations by int8 weights without saturation here: found out by trying.

    Of x86 CPUs those with VNNI or AMX do (Intel's servers since 2019, AMD's since 2022). Others add two products in 16
    bits, where the largest do not fit.
    """
    weight = np.tile(np.array([127, -128], np.int8), (_CHANNELS, _COLUMNS // 2))
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "largest_codes",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [_ROWS, _CHANNELS])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [_ROWS, _COLUMNS])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.full((_ROWS, _CHANNELS), 255, np.uint8)
    return bool(np.array_equal(session.run(None, {"x": x})[0], x.astype(np.int32) @ weight.astype(np.int32)))


def is_exact_here(target: Target) -> bool:
    """Whether ONNX Runtime's integer products of graphs for ``target`` are exact on this CPU."""
    return not target.needs_vnni or multiplies_signed_weights()


def runs_optimized(target: Target) -> bool:
    """Whether a graph for ``target`` is run here with ONNX Runtime's optimizations to be compared with PyTorch.

    Without, all is computed in floats, as the graph says.
    """
    if not is_exact_here(target):
        logger.warning("this CPU has neither VNNI nor AMX: graphs for %s are compared as floats only", target.name)
        return False
    return target.runtime == "onnxruntime"
