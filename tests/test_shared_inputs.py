"""``share_inputs``: q, k and v of an attention with one smoothing, shift and input scale, solved as one Linear."""

from __future__ import annotations

import copy
import re
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import pytest
import torch
from test_packed import one_block
from test_quantize import loop_over, outputs, sd3_inputs, sqnr
from torch import Tensor, nn

import modelopt_ext
from modelopt_ext import PackedLinear
from modelopt_ext.calibrate.shared_inputs import siblings
from modelopt_ext.export.onnx.merge import merge_equal_nodes
from modelopt_ext.export.tensorrt import check_tensorrt
from modelopt_ext.presets import PRESETS
from optimum_segquant import export_onnx

QUICK = {"samples": 128, "alpha_grid": [0.3, 0.6], "clip_grid": [1.0, 0.8], "progress": False}


def quantized(preset: str, **algorithm: Any) -> nn.Module:
    config = copy.deepcopy(PRESETS[preset])
    config["algorithm"].update({**QUICK, **algorithm})
    return mtq.quantize(one_block(), config, loop_over(range(6)))


def shared_tensors(model: nn.Module, names: tuple[str, ...]) -> list[list[Tensor]]:
    """For each tensor that fused Linears have in common, its values in every one of them."""
    layers = [model.get_submodule(name) for name in names]
    assert all(isinstance(layer, PackedLinear) for layer in layers)
    fields = ("inverse_smoothing", "shift", "input_scale", "input_scale_negative", "low_rank_down")
    values = [[getattr(layer, field) for layer in layers] for field in fields]
    return [found for found in values if any(value is not None for value in found)]


@pytest.mark.parametrize("preset", ["SEGQUANT_INT8_CFG", "SEGQUANT_INT8_PER_TENSOR_CFG", "SEGQUANT_W4A8_CFG"])
def test_linears_that_read_one_tensor_have_one_treatment(preset: str) -> None:
    plain = one_block()
    alone, together = quantized(preset), quantized(preset, share_inputs=True)
    plan = modelopt_ext.plan_of(together)
    assert plan is not None
    groups = list(siblings(plan))
    attention = {f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"}
    assert attention in [set(group) for group in groups]
    assert not any("norm1.linear" in name for group in groups for name in group)
    expected = outputs(plain)
    apart, shared = sqnr(expected, outputs(alone)), sqnr(expected, outputs(together))
    assert shared > apart - 1.5
    modelopt_ext.compress(together)
    seen = {group: shared_tensors(together, group) for group in groups}
    # With scales per token a group may have nothing to share; static scales are there in any case.
    assert any(seen.values())
    assert all(seen.values()) or preset == "SEGQUANT_W4A8_CFG"
    for found in seen.values():
        for first, *others in found:
            assert all(torch.equal(first, other) for other in others)


def test_without_it_they_are_solved_apart() -> None:
    model = quantized("SEGQUANT_INT8_CFG")
    plan = modelopt_ext.plan_of(model)
    assert plan is not None
    modelopt_ext.compress(model)
    kinds = [shared_tensors(model, group) for group in siblings(plan)]
    assert any(
        any((first is None) != (other is None) or not torch.equal(first, other) for other in others)
        for found in kinds
        for first, *others in found
    )


def test_different_settings_for_one_input_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"share_inputs: .*to_q.* read one tensor but have different formats or settings"
    ):
        quantized("SEGQUANT_INT8_CFG", share_inputs=True, layers={"*.attn.to_q": {"polarity": "none", "alpha": 0.5}})


def test_a_checkpoint_of_stages_goes_on(tmp_path: Any) -> None:
    layerwise = {"enable": True, "checkpoint_dir": str(tmp_path), "get_qdq_activations_from_prev_layer": False}
    first = quantized("SEGQUANT_INT8_CFG", share_inputs=True, layerwise=layerwise)
    assert list(tmp_path.glob("stage_*.safetensors"))
    again = quantized("SEGQUANT_INT8_CFG", share_inputs=True, layerwise=layerwise)
    assert torch.equal(outputs(first), outputs(again))


@pytest.mark.parametrize("share", [False, True])
def test_tensorrt_sees_one_tensor_and_one_scale(share: bool, tmp_path: Any) -> None:
    model = quantized("SEGQUANT_INT8_CFG", share_inputs=share)
    export_onnx(model, tmp_path / "model", target="tensorrt", inputs=sd3_inputs(0))
    path = tmp_path / "model" / "model.onnx"
    scales = [violation for violation in check_tensorrt(path) if violation.rule == "attention-scales"]
    assert bool(scales) != share
    sources = {}
    graph = onnx.load(path).graph
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and (found := re.search(r"blocks\.0/attn/to_([qkv])/", node.name)):
            sources[found[1]] = node.input[0]
    assert sorted(sources) == ["k", "q", "v"]
    assert len(set(sources.values())) == (1 if share else 3)


def test_only_equal_nodes_are_merged() -> None:
    def constant(name: str, value: float) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(np.array([value], np.float32), name)

    def sub(constant: str, output: str) -> onnx.NodeProto:
        return onnx.helper.make_node("Sub", ["x", constant], [output])

    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    sums = [onnx.helper.make_node("Sum", ["u", "v", "w"], ["y"])]
    nodes = [sub("one", "u"), sub("also_one", "v"), sub("two", "w"), *sums]
    constants = [constant("one", 1), constant("also_one", 1), constant("two", 2)]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], constants)
    merge_equal_nodes(graph)
    assert [list(node.input) for node in graph.node] == [["x", "one"], ["x", "two"], ["u", "u", "w"]]
