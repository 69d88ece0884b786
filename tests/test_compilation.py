"""Options for compilers: rotations of channels are rewritten, wherever diffusers has them, and nothing else is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import denoisers
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from packed_models import packed_denoiser, plain_denoiser
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code

from modelopt_ext import compile_options
from modelopt_ext.compilation import RotaryPass

aten = torch.ops.aten


def operators(graph: torch.fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes]


def rewritten(function: Callable[..., Tensor] | nn.Module, *arguments: Any, **inputs: Any) -> tuple[Tensor, int, int]:
    """The result of what Inductor would get after the pass, its rotations, and how many of its ``cat`` went."""
    turned = gone = 0

    def compile_graph(module: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal turned, gone
        before = operators(module.graph).count(aten.cat.default)
        RotaryPass()(module.graph)
        module.graph.lint()
        module.recompile()
        turned += operators(module.graph).count(torch.ops.prims.rev.default)
        gone += before - operators(module.graph).count(aten.cat.default)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compile_graph, decompositions=select_decomp_table)
    with torch.no_grad():
        output = torch.compile(function, backend=backend, dynamic=False)(*arguments, **inputs)
    return output, turned, gone


@pytest.mark.parametrize("unbind", [-1, -2], ids=["neighbours", "halves"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits(unbind: int, dtype: torch.dtype) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return apply_rotary_emb(x, (cos, sin), use_real_unbind_dim=unbind, sequence_dim=1)

    torch.manual_seed(0)
    arguments = torch.randn(2, 5, 3, 8, dtype=dtype), torch.randn(5, 8), torch.randn(5, 8)
    output, turned, gone = rewritten(rotate, *arguments)
    assert (turned, gone) == (1, 1)
    assert torch.equal(output, rotate(*arguments))


def first_is_negative(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 0], x[..., 1]], -1)


def second_is_negative(x: Tensor) -> Tensor:
    return torch.stack([x[..., 1], -x[..., 0]], -1)


def of_two(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1], (2 * x)[..., 0]], -1)


def another_dimension(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1], x[..., 0]], 0)


def three(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1], x[..., 0], x[..., 1]], -1)


@pytest.mark.parametrize("function", [first_is_negative, second_is_negative, of_two, another_dimension, three])
def test_what_is_no_rotation_stays(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 2)
    output, turned, gone = rewritten(function, x)
    assert (turned, gone) == (0, 0)
    assert torch.equal(output, function(x))


def test_two_of_more_are_no_pair() -> None:
    x = torch.randn(4, 3)
    output, turned, _ = rewritten(lambda x: torch.stack([-x[..., 1], x[..., 0]], -1), x)
    assert turned == 0
    assert torch.equal(output, torch.stack([-x[..., 1], x[..., 0]], -1))


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "CogView4Transformer2DModel"])
def test_rotations_of_denoisers_are_found(name: str) -> None:
    model, inputs = denoisers.build(name)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
    output, turned, gone = rewritten(lambda **kwargs: model(**kwargs, return_dict=False)[0], **inputs)
    attentions = sum(hasattr(module, "to_k") for module in model.modules())
    assert turned == gone == 2 * attentions  # of q and of k
    assert torch.allclose(output, expected, atol=1e-5)


def test_options_are_equal_and_may_be_cached() -> None:
    assert compile_options() == compile_options()  # or models would be compiled again
    (rotary,) = compile_options().values()
    assert rotary.uuid() == RotaryPass().uuid() is not None


def test_another_pass_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "post_grad_custom_pre_pass", lambda graph: None)
    with pytest.raises(ValueError, match=r"RotaryPass\(\)\(graph\) in that pass"):
        compile_options()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_for_a_gpu_the_numbers_stay() -> None:
    def code_and_output(**options: Any) -> tuple[str, Tensor]:
        torch._dynamo.reset()
        model, inputs = denoisers.build("FluxTransformer2DModel")
        inputs = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        step = torch.compile(model.cuda(), fullgraph=True, dynamic=False, **options)
        with torch.no_grad():
            output, code = run_and_get_code(lambda: step(**inputs, return_dict=False)[0])
        return "\n".join(code), output

    plain, expected = code_and_output()
    light, output = code_and_output(options=compile_options())
    names = r"triton_\w*_stack_\w*"
    assert re.search(names, plain)
    assert not re.search(names, light)
    assert torch.allclose(output, expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packed_models_compile_with_the_options() -> None:
    model = packed_denoiser("SEGQUANT_FP8_CFG").cuda()
    _, inputs = plain_denoiser()
    inputs = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    outputs = []
    for options in ({}, {"options": compile_options()}):
        torch._dynamo.reset()
        with torch.no_grad():
            step = torch.compile(model, fullgraph=True, **options)
            outputs.append(step(**inputs, return_dict=False)[0])
    assert torch.equal(*outputs)
