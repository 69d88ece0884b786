"""Options for compilers: what they rewrite gives the same numbers, and nothing else is rewritten."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import denoisers
import pytest
import sympy
import torch
from diffusers.models.embeddings import apply_rotary_emb
from packed_models import packed_denoiser, plain_denoiser
from test_quantize import sqnr
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import async_compile, config
from torch._inductor.choices import InductorChoices
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.dependencies import MemoryDep
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.utils import run_and_get_code
from torch._inductor.virtualized import V

from modelopt_ext import compile_options
from modelopt_ext.compilation import Rewrites
from modelopt_ext.compilation.reductions import WholeRows, keep_rows
from modelopt_ext.compilation.scales import spread_together

aten = torch.ops.aten


def operators(graph: torch.fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes]


def rewritten(
    function: Callable[..., Tensor] | nn.Module, *arguments: Any, dynamic: bool | None = False, **inputs: Any
) -> tuple[Tensor, int, int]:
    """The result of what Inductor would get after the pass, its rotations, and how many of its ``cat`` went."""
    turned = gone = 0

    def compile_graph(module: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal turned, gone
        before = operators(module.graph).count(aten.cat.default)
        Rewrites()(module.graph)
        module.graph.lint()
        module.recompile()
        turned += operators(module.graph).count(torch.ops.prims.rev.default)
        gone += before - operators(module.graph).count(aten.cat.default)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compile_graph, decompositions=select_decomp_table)
    with torch.no_grad():
        output = torch.compile(function, backend=backend, dynamic=dynamic)(*arguments, **inputs)
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


class Product(torch.fx.Interpreter):
    """Runs a graph where E4M3 products have no kernel, and checks what cuBLAS asks of scales."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not aten._scaled_mm.default:
            return super().call_function(target, args, kwargs)
        a, b, scale_a, scale_b = args
        assert scale_a.shape == (len(a), 1)
        assert scale_a.is_contiguous()
        assert scale_a.storage_offset() % 32 == 0
        return (a.float() @ b.float()) * scale_a * scale_b


def products(*rows: int, parts: bool = False) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """A graph of products with static scales, as the compiler sees packed Linears, and its inputs."""
    graph, inputs, found = torch.fx.Graph(), [], []
    torch.manual_seed(0)

    def placed(target: Any, value: Tensor, *arguments: Any) -> torch.fx.Node:
        node = graph.placeholder(target) if isinstance(target, str) else graph.call_function(target, arguments)
        node.meta["val"] = value
        if isinstance(target, str):
            inputs.append(value)
        return node

    sources = []
    for index, count in enumerate(rows):
        shapes = {"a": (count, 16), "b": (16, 8), "scale_b": (1, 8), "scale": (1, 2 if parts else 1)}
        sources.append({name: placed(f"{name}_{index}", torch.randn(shape)) for name, shape in shapes.items()})
    for count, source in zip(rows, sources, strict=True):
        scale = source["scale"]
        if parts:
            scale = placed(aten.slice.Tensor, scale.meta["val"][:, 1:], scale, 1, 1, 2)
        wide = placed(aten.expand.default, scale.meta["val"].expand(count, 1), scale, [count, 1])
        copy = placed(aten.clone.default, wide.meta["val"].clone(), wide)
        found.append(graph.call_function(aten._scaled_mm.default, (source["a"], source["b"], copy, source["scale_b"])))
    graph.output(tuple(found))
    return torch.fx.GraphModule({}, graph), inputs


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "of-segments"])
@pytest.mark.parametrize("rows", [(70, 70), (512, 70, 513), (65,) * 19], ids=["two", "three-sizes", "many"])
def test_scales_are_spread_together(rows: tuple[int, ...], parts: bool) -> None:
    module, inputs = products(*rows, parts=parts)
    before = copy.deepcopy(module)
    spread_together(module.graph)
    module.graph.lint()
    module.recompile()
    kinds = operators(module.graph)
    assert aten.clone.default not in kinds
    assert kinds.count(torch.ops.prims.iota.default) == -(-len(rows) // 8)
    for found, want in zip(Product(module).run(*inputs), Product(before).run(*inputs), strict=True):
        assert torch.equal(found, want)


def test_scales_of_two_devices_stay_apart() -> None:
    module, _ = products(70, 70, 70, 70)
    copies = [node for node in module.graph.nodes if node.target is aten.clone.default]
    for node in copies[2:]:
        node.meta["val"] = node.meta["val"].to("meta")
    spread_together(module.graph)
    together = [node.args[1][0] for node in module.graph.nodes if node.target is aten.expand.default and node.users]
    assert together == [2, 2]


@pytest.mark.parametrize(("unbind", "expected"), [(-1, 1), (-2, 0)], ids=["neighbours", "halves"])
def test_sizes_that_vary(unbind: int, expected: int) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return apply_rotary_emb(x, (cos, sin), use_real_unbind_dim=unbind, sequence_dim=1)

    arguments = torch.randn(2, 5, 3, 8), torch.randn(5, 8), torch.randn(5, 8)
    for tensor, dim in zip(arguments, (1, 0, 0), strict=True):
        torch._dynamo.mark_dynamic(tensor, dim)
    output, turned, _ = rewritten(rotate, *arguments, dynamic=None)
    assert turned == expected
    assert torch.equal(output, rotate(*arguments))


def test_one_scale_stays() -> None:
    module, _ = products(70)
    before = str(module.graph)
    spread_together(module.graph)
    assert str(module.graph) == before


def test_options_are_equal_and_may_be_cached() -> None:
    assert compile_options() == compile_options()  # or models would be compiled again
    assert compile_options()["post_grad_custom_pre_pass"].uuid() == Rewrites().uuid() is not None


@pytest.mark.parametrize("gpus", [False, True])
def test_workers_start_where_there_is_a_gpu(gpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: started.append(True))
    compile_options()
    assert started == [True] * gpus


def test_another_pass_is_not_lost() -> None:
    with (
        config.patch(post_grad_custom_pre_pass=lambda graph: None),
        pytest.raises(ValueError, match=r"Rewrites\(\)\(graph\) in that pass"),
    ):
        compile_options()


ROW, VALUE = sympy.symbols("row value", integer=True, nonnegative=True)


def kernel(size: int, *reads: Any) -> Any:
    """What Inductor says of a kernel that reduces 64 rows: how it reads them, and how long they are."""
    sizes = (sympy.Integer(64), sympy.Integer(size))
    read_writes = SimpleNamespace(
        reads=[MemoryDep(f"x{i}", index, (ROW, VALUE), sizes) for i, index in enumerate(reads)]
    )
    return SimpleNamespace(
        get_reduction_hint=lambda: ReductionHint.INNER if size <= 1024 else ReductionHint.DEFAULT,
        reduction_nodes=lambda: [SimpleNamespace(read_writes=read_writes)],
        reduction_numel=sympy.Integer(size),
    )


@pytest.mark.parametrize(
    ("features", "options", "expected"),
    [
        (kernel(3072, 3072 * ROW + VALUE), True, True),
        (kernel(3072, 3072 * ROW + VALUE, VALUE, ROW), True, True),
        (kernel(4097, 4097 * ROW + VALUE), True, False),
        (kernel(3072, ROW + 64 * VALUE), True, False),
        (kernel(3072, 3072 * ROW + VALUE, 6144 * ROW + 2 * VALUE), True, False),
        (kernel(3072, 3072 * ROW + VALUE), False, False),
        (kernel(1024, 1024 * ROW + VALUE), False, True),
    ],
    ids=["a-row", "with-weights", "too-long", "a-column", "every-other", "without-the-options", "as-always"],
)
def test_rows_that_fit_are_kept(features: Any, options: bool, expected: bool) -> None:
    with (
        V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator())),
        config.patch(post_grad_custom_pre_pass=Rewrites() if options else None),
    ):
        assert bool(WholeRows.should_use_persistent_reduction(features, False)) == expected


def test_the_choices_of_others_stay(caplog: pytest.LogCaptureFixture) -> None:
    class Own(InductorChoices):
        pass

    for choices, expected in ((InductorChoices(), WholeRows), (WholeRows(), WholeRows), (Own(), Own)):
        with V.set_choices_handler(choices):
            keep_rows()
            assert type(V.choices) is expected
    assert [record.getMessage() for record in caplog.records] == [
        "segquant: Inductor's choices are Own here; norms over long rows stay slower"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_norm_is_one_pass() -> None:
    """And what is compiled without the options afterwards stays as it was."""
    norm, x = nn.LayerNorm(3072, elementwise_affine=False), torch.randn(64, 3072, device="cuda", dtype=torch.bfloat16)
    codes = []
    for options in (compile_options(), None):
        torch._dynamo.reset()
        output, (code,) = run_and_get_code(torch.compile(norm, options=options), x)
        codes.append(code)
        assert sqnr(norm(x), output) > 45
    assert [re.findall("triton_(?:per|red)_", code)[0] for code in codes] == ["triton_per_", "triton_red_"]


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
    assert torch.allclose(output, expected, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packed_models_compile_with_the_options() -> None:
    model = packed_denoiser("SEGQUANT_FP8_CFG").to("cuda", torch.bfloat16)
    _, inputs = plain_denoiser()
    # Products of few rows take one scale.
    many = {name: value.repeat(16, *[1] * (value.dim() - 1)).to("cuda") for name, value in inputs.items()}
    many = {name: value.bfloat16() if value.is_floating_point() else value for name, value in many.items()}
    outputs, launches = [], []
    for options in ({}, {"options": compile_options()}):
        torch._dynamo.reset()
        with torch.no_grad():
            step = torch.compile(model, fullgraph=True, dynamic=False, **options)
            output, (code,) = run_and_get_code(step, **many, return_dict=False)
        outputs.append(output[0])
        launches.append(code.count(".run("))
    assert sqnr(outputs[0], outputs[1]) > 30  # sums of norms have another order
    assert launches[1] < 0.8 * launches[0]
