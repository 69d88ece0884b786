"""GELU by the logistic function: the same numbers, in compiled models on a GPU only."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import gelu

from modelopt_ext.nn.gelu import TanhGELU, as_logistic, lighten_gelu


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_the_same_function(dtype: torch.dtype, bound: float) -> None:
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.tensor([-1e4, -300.0, 0.0, 300.0, 1e4])]).to(dtype)
    exact = gelu(x.double(), approximate="tanh")
    error = (as_logistic(x).double() - exact).abs()
    assert (error <= bound * exact.abs().clamp(min=1)).all()
    assert as_logistic(torch.tensor([float("nan")])).isnan().all()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        GELU(8, 16, approximate="tanh"), nn.GELU(approximate="tanh"), nn.Linear(16, 8), GELU(8, 8), nn.GELU()
    ).eval()


def operators(module: nn.Module, x: Tensor) -> list[str]:
    """What a compiler gets to see."""
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True)(x)
    return found


def test_without_a_gpu_nothing_changes() -> None:
    plain = model()
    light = copy.deepcopy(plain)
    lighten_gelu(light)
    assert [type(module) for module in light] == [GELU, TanhGELU, nn.Linear, GELU, nn.GELU]
    assert light.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(4, 8)
    for twin in (light, copy.deepcopy(light), pickle.loads(pickle.dumps(light))):
        assert torch.equal(twin(x), plain(x))
    assert sum("gelu" in name for name in operators(light, x)) == 4
    exported = torch.export.export(light, (x,)).run_decompositions()
    assert sum("gelu" in str(node.target) for node in exported.graph.nodes) == 4


def test_a_compiler_for_a_gpu_sees_the_logistic_function() -> None:
    light = nn.Sequential(nn.GELU(approximate="tanh"), nn.GELU())
    lighten_gelu(light)
    with FakeTensorMode():
        names = operators(light, torch.empty(4, 8, device="cuda"))
    assert sum("gelu" in name for name in names) == 1  # the exact one
    assert sum("exp2" in name for name in names) == 1
