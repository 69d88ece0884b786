"""Packed models in use: compiled, copied, moved, offloaded, under LoRA, in CUDA graphs; on a GPU where there is one."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import accelerate
import modelopt.torch.quantization as mtq
import pytest
import torch
from packed_models import jitter, packed_denoiser, plain_denoiser, quick
from peft import LoraConfig
from test_quantize import sqnr
from tiny_pipelines import tiny_sd3_pipeline
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

import modelopt_ext
from modelopt_ext import PackedLinear
from modelopt_ext.formats import QuantFormat
from modelopt_ext.kernels import cuda, rounding
from modelopt_ext.kernels.operands import Operands
from modelopt_ext.kernels.scaled_mm import _product_of, few_rows, launches_directly, scaled_mm
from modelopt_ext.nn import SegLayout
from modelopt_ext.nn.alike import make_alike
from modelopt_ext.nn.packed_spec import PackedSpec
from modelopt_ext.nn.rotation import rotate
from optimum_segquant.evaluation import sample_trajectories

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "inductor" if DEVICE == "cuda" else "eager"
PRESETS = ("SEGQUANT_INT8_CFG", "SEGQUANT_FP8_CFG", "SEGQUANT_INT8_PER_TOKEN_CFG", "SEGQUANT_W4A8_CFG")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def placed(value: Any, device: str = DEVICE, dtype: torch.dtype = torch.float32) -> Any:
    if isinstance(value, dict):
        return {name: placed(item, device, dtype) for name, item in value.items()}
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    return value


def run(model: nn.Module, seed: int = 7, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    _, inputs = plain_denoiser()
    with torch.no_grad():
        return model(**placed(jitter(inputs, seed), device, dtype), return_dict=False)[0]


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS if DEVICE == "cuda" else PRESETS[:1])
def test_compiled_whole_without_breaks_and_once_for_all_timesteps(preset: str) -> None:
    model = packed_denoiser(preset).to(DEVICE)
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    _, inputs = plain_denoiser()
    call = placed(dict(inputs))
    with torch.no_grad():
        for timestep in (1000.0, 900.0, 500.5, 3.0):
            changed = {**call, "timestep": torch.full_like(call["timestep"], timestep)}
            found, expected = compiled(**changed)[0], model(**changed)[0]
            assert sqnr(expected, found) > 25  # ties of rounding fall the other way
    assert counter.frame_count == 1


def test_blocks_have_the_same_tensors_in_the_same_places() -> None:
    model = packed_denoiser("SEGQUANT_INT8_CFG")
    places: dict[str, list[PackedLinear]] = {}
    for block in model.transformer_blocks:
        for name, layer in block.named_modules():
            if isinstance(layer, PackedLinear):
                places.setdefault(name, []).append(layer)
    compared = 0
    for name, layers in places.items():
        if len({layer.spec.layout.out_groups for layer in layers}) == 1 < len(layers):
            compared += 1
            assert len({layer.shift is None for layer in layers}) == 1, name
            assert len({layer.inverse_smoothing is None for layer in layers}) == 1, name
    assert compared > 5


@pytest.mark.usefixtures("bfloat16_by_default")
def test_what_is_float32_does_not_follow_the_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_disable_current_modes", nullcontext)
    with FakeTensorMode():
        assert cuda.multiplies_fp8.__wrapped__(0)
    layout = SegLayout((8,), (4,), (4,), ("none",))
    specs = [PackedSpec(layout), PackedSpec(layout, shift=True, smoothing=True)]
    blocks = nn.ModuleList(nn.ModuleList([PackedLinear(spec)]) for spec in specs)
    make_alike(blocks)
    equipped: Any = blocks[0]
    assert equipped[0].spec == specs[1]
    assert equipped[0].shift.dtype == equipped[0].inverse_smoothing.dtype == torch.float32


def test_alike_changes_no_number() -> None:
    def layers() -> nn.ModuleList:
        return nn.ModuleList(
            copy.deepcopy(layer)
            for layer in packed_denoiser("SEGQUANT_INT8_CFG").modules()
            if isinstance(layer, PackedLinear) and layer.spec.layout.in_segments == (32,) and layer.bias is not None
        )

    mixed = layers()
    shifts = [layer.shift is None for layer in mixed]
    assert len(set(shifts)) == 2, "the test needs layers with and without a shift"
    x = torch.randn(6, 32)
    before = [layer(x) for layer in mixed]
    groups: dict[Any, list[PackedLinear]] = {}
    for layer in mixed:
        groups.setdefault(layer.spec.layout.out_groups, []).append(layer)
    for same in groups.values():
        make_alike(nn.ModuleList(nn.ModuleList([layer]) for layer in same))
        assert len({layer.spec.shift for layer in same}) == 1
    assert all(torch.equal(a, layer(x)) for a, layer in zip(before, mixed, strict=True))


@pytest.mark.parametrize("preset", PRESETS[:2])
def test_copies_moves_and_state_dicts(preset: str) -> None:
    model = packed_denoiser(preset).to(DEVICE)
    expected = run(model)
    assert torch.equal(run(copy.deepcopy(model)), expected)
    other = packed_denoiser(preset).to(DEVICE)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other), expected)
    assert torch.equal(run(model.to("cpu").to(DEVICE)), expected)


@pytest.mark.parametrize("way", ["cpu_offload", "sequential", "group", "device_map"])
def test_offloading_gives_the_same_numbers(way: str) -> None:
    model = packed_denoiser("SEGQUANT_INT8_CFG")
    expected = run(model.to(DEVICE))
    model.to("cpu")
    if way == "cpu_offload":
        model, _ = accelerate.cpu_offload_with_hook(model, torch.device(DEVICE))
    elif way == "sequential":
        accelerate.cpu_offload(model, torch.device(DEVICE), offload_buffers=True)
    elif way == "group":
        if DEVICE == "cpu":
            pytest.skip("diffusers' group offloading needs a GPU")
        model.enable_group_offload(onload_device=torch.device(DEVICE), offload_type="leaf_level")
    else:
        names = {name: DEVICE for name, _ in model.named_children()}
        accelerate.dispatch_model(model, {**names, "transformer_blocks": "cpu"}, main_device=DEVICE, force_hooks=True)
    assert torch.equal(run(model), expected)


@pytest.mark.slow
def test_lora_adapters_sit_on_top_of_a_compiled_model() -> None:
    model = packed_denoiser("SEGQUANT_INT8_CFG").to(DEVICE)
    plain = run(model)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_out.0"]))
    adapted = run(model)
    assert sqnr(plain, adapted) < 60  # the adapter does something
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    assert sqnr(adapted, run(compiled)) > 25
    model.disable_adapters()
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "spec",
    [
        PackedSpec(SegLayout((32, 32), (48,), (48,), ("none", "dual8")), shift=True, smoothing=True),
        PackedSpec(SegLayout((64,), (32, 16), (32, 16), ("dual",)), "float8_e4m3fn", activations="float8_e4m3fn"),
        PackedSpec(SegLayout((64,), (48,), (48,), ("none",), rotation=(8,)), "int4", per_token=True, rank=4),
        PackedSpec(SegLayout((64,), (48,), (48,), ("none",)), activations=None),
    ],
    ids=["int8", "fp8", "rotated-int4-with-a-branch", "weight-only"],
)
def test_dynamo_sees_one_operator(spec: PackedSpec, mode: Any) -> None:
    """Which gives the same numbers."""
    torch.manual_seed(0)
    layer = PackedLinear(spec)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.copy_(torch.rand(tensor.shape) + 0.1 if tensor.is_floating_point() else torch.zeros(tensor.shape))
    layer.set_codes(torch.randint(-7, 8, (48, 64)))
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return aot_eager(graph, _)

    x = torch.randn(70, 64)
    with mode():
        assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))
    assert seen == [torch.ops.segquant.packed_linear]


def test_rotation_keeps_nothing_that_only_stands_for_a_matrix() -> None:
    x = torch.randn(3, 32, dtype=torch.float64)
    with FakeTensorMode():
        rotate(torch.empty(3, 32, dtype=torch.float64), 16)
    torch.testing.assert_close(rotate(rotate(x, 16), 16), x)


def test_who_traces_sees_operators_instead_of_launches() -> None:
    asked = []

    def traced(x: Tensor) -> Tensor:
        asked.append(launches_directly())
        return x + 1

    traced(torch.zeros(1))
    torch.jit.trace(traced, torch.zeros(1), check_trace=False)
    with FakeTensorMode():
        traced(torch.zeros(1))
    assert asked == [True, False, False]


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch that was built for CUDA, but no GPU")
@pytest.mark.parametrize("per_token", [False, True], ids=["static", "per-token"])
@pytest.mark.parametrize("polarity", ["none", "dual"])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("segments", "groups"), [((64,), (48,)), ((32, 32), (48,)), ((32, 32), (32, 16))])
@pytest.mark.parametrize("codes", ["int8", "float8_e4m3fn"])
def test_a_compiler_gets_through_what_runs_on_a_gpu(
    codes: Any,
    segments: tuple[int, ...],
    groups: tuple[int, ...],
    rotated: bool,
    polarity: str,
    per_token: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With tensors that only say that they are on one."""
    monkeypatch.setattr(cuda, "fp8_fits", lambda *_: True)
    monkeypatch.setattr(cuda, "multiplies_int8", lambda _: True)
    monkeypatch.setattr(cuda, "_lowered", lambda _: "")
    count = len(segments)
    layout = SegLayout(segments, groups, groups, (polarity,) * count, rotation=(8,) * count if rotated else ())
    spec = PackedSpec(layout, codes, activations=codes, per_token=per_token, smoothing=True, shift=True)
    called: list[str] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note)
    with FakeTensorMode(), torch.no_grad():
        layer = PackedLinear(spec, dtype=torch.bfloat16, device="cuda")
        x = torch.empty(1, 200, 64, dtype=torch.bfloat16, device="cuda")
        found = torch.compile(layer, backend=backend, fullgraph=True)(x)
    assert (found.shape, found.dtype, found.device.type) == ((1, 200, 48), torch.bfloat16, "cuda")
    single = codes != "int8" and len(segments) == 1 and polarity == "none"
    products = [name for name in called if "scaled_mm" in name]
    assert len(products) == len(segments) * len(groups)
    assert all(("segquant" in name) != single for name in products)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("codes", ["int8", "float8_e4m3fn"])
def test_a_compiler_writes_codes_once(codes: Any) -> None:
    """However many products read them."""
    spec = PackedSpec(SegLayout((64, 64), (48,), (48,), ("none", "none")), codes, activations=codes)
    layer = PackedLinear(spec, dtype=torch.bfloat16, device=DEVICE)
    for tensor in (*layer.parameters(), *layer.buffers()):
        torch.nn.init.constant_(tensor, 1) if tensor.is_floating_point() else tensor.data.zero_()
    x = torch.randn(200, 128, dtype=torch.bfloat16, device=DEVICE)
    torch._dynamo.reset()
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(layer, fullgraph=True), x)
    assert len(re.findall(r"'(?:in_)?out_ptr\d+': '\*(?:i8|fp8e4nv)'", code)) == 1


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "any-size"])
@pytest.mark.parametrize("sizes", [(200, 1100), (20, 60), (3, 8)], ids=["many", "between", "few"])
@pytest.mark.parametrize(
    ("codes", "segments", "groups", "polarity", "expected"),
    [
        ("int8", (128,), (48,), "none", "_tiles"),
        ("int8", (64, 64), (48,), "none", "_tiles"),
        ("int8", (128,), (48,), "dual8", "_tiles"),
        ("int8", (128,), (32, 16), "none", "_tiles"),
        ("float8_e4m3fn", (128,), (48,), "none", "extern_kernels._scaled_mm"),
        ("float8_e4m3fn", (64, 64), (48,), "none", "extern_kernels._scaled_mm"),
        ("float8_e4m3fn", (128,), (32, 16), "none", "extern_kernels._scaled_mm"),
        ("float8_e4m3fn", (120, 8), (48,), "none", "segquant.scaled_mm"),
    ],
)
def test_compiled_code_launches_by_itself(
    codes: Any,
    segments: tuple[int, ...],
    groups: tuple[int, ...],
    polarity: str,
    expected: str,
    sizes: tuple[int, int],
    dynamic: bool,
) -> None:
    """But for parts that have to be copied."""
    kind = torch.int8 if codes == "int8" else torch.float8_e4m3fn
    expected = "_few_rows" if max(sizes) <= few_rows(kind) else expected
    torch.manual_seed(0)
    layout = SegLayout(segments, groups, groups, (polarity,) * len(segments))
    layer = PackedLinear(PackedSpec(layout, codes, activations=codes), dtype=torch.bfloat16, device=DEVICE)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(0.1)
    layer.set_codes(torch.randint(-60, 60, (48, 128), device=DEVICE))
    torch._dynamo.reset()
    step = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for rows in sizes:
        x = torch.randn(rows, 128, dtype=torch.bfloat16, device=DEVICE)
        with torch.no_grad():
            found, code = run_and_get_code(step, x)
            assert sqnr(layer(x).float(), found.float()) > 40
        launched = re.findall(
            r"(_tiles|_few_rows)_\d+\.run\(|(extern_kernels\._scaled_mm)\(|(segquant\.scaled_mm)\.default\(",
            "".join(code),
        )
        assert {name for names in launched for name in names if name} == ({expected} if code else set())


def test_a_compiler_is_told_what_does_not_fit() -> None:
    a, b = torch.zeros(100, 48, dtype=torch.int8), torch.zeros(32, 64, dtype=torch.int8)
    with pytest.raises(Exception, match="48 channels do not go with a weight of 64"):
        torch.compile(scaled_mm, backend="eager", fullgraph=True)(a, b, torch.ones(1, 1), torch.ones(32))


def test_older_gpus_get_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel that does not compile here")

    monkeypatch.setattr(cuda, "has_triton", lambda: True)
    monkeypatch.setattr(cuda, "multiplies_int8", cuda.multiplies_int8.__wrapped__)
    monkeypatch.setattr(cuda, "multiplies_fp8", lambda _: False)
    monkeypatch.setattr(cuda, "code_gemm", unexpected)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setitem(sys.modules, "modelopt_ext.kernels.triton_rounding", SimpleNamespace(fused=unexpected))
    monkeypatch.setattr(rounding, "reference", lambda *_: "the reference")
    monkeypatch.setattr(sys.modules["modelopt_ext.kernels.scaled_mm"], "reference", lambda *_: torch.ones(8, 8))
    with FakeTensorMode():
        a, b, x = (torch.empty(n, 64, device="cuda:0", dtype=kind) for n, kind in ((8, torch.int8),) * 2 + ((8, None),))
        one, scale = (torch.empty(size, device="cuda:0") for size in ((1, 1), (8,)))
        assert _product_of(Operands(a, b, one, scale), torch.bfloat16).dtype == torch.bfloat16
        assert rounding.quantize(x, QuantFormat((4, 3)), (64,), ("none",)) == "the reference"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("preset", [*PRESETS, "SEGQUANT_W4A8_GROUP_CFG", "SEGQUANT_W8A16_CFG", "SEGQUANT_INT8_SVD_CFG"])
def test_a_gpu_gives_a_cpus_numbers_layer_by_layer(preset: str, dtype: torch.dtype) -> None:
    model = packed_denoiser(preset).to(dtype)
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        for name, layer in model.named_modules()
        if isinstance(layer, PackedLinear)
    ]
    run(model, dtype=dtype, device="cpu")
    for handle in handles:
        handle.remove()
    for name, inputs in seen.items():
        layer = model.get_submodule(name)
        with torch.no_grad():
            expected = layer(inputs)
            found = layer.to("cuda")(inputs.cuda()).cpu()
        # The outputs' own rounding (8 or 11 bits), that of parts, and a tie here and there.
        assert sqnr(expected.float(), found.float()) > 40, name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_cuda_graphs(preset: str) -> None:
    model = packed_denoiser(preset).to("cuda", torch.bfloat16)
    _, inputs = plain_denoiser()
    call = placed(jitter(inputs, 7), "cuda", torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            model(**call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(**call)[0]
        call["hidden_states"].mul_(0.5)
        graph.replay()
        assert torch.equal(captured, model(**call)[0])
        reduced = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        assert sqnr(captured.float(), reduced(**call)[0].float()) > 20


@pytest.mark.gpu
@needs_gpu
def test_a_pipeline_with_model_offload() -> None:
    pipe = tiny_sd3_pipeline()
    prompts = sample_trajectories(pipe, ["a red circle"] * 4, num_inference_steps=4)
    modelopt_ext.compress(mtq.quantize(pipe.transformer, quick("SEGQUANT_INT8_CFG"), prompts.forward_loop))

    def picture() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        call = pipe("a red circle", num_inference_steps=2, height=16, width=16, output_type="pt", generator=generator)
        return call.images.cpu()

    pipe.to("cuda")
    expected = picture()
    pipe.to("cpu")
    pipe.enable_model_cpu_offload()
    assert torch.equal(picture(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_map_over_two_gpus() -> None:
    model = packed_denoiser("SEGQUANT_INT8_CFG")
    expected = run(copy.deepcopy(model).to("cuda"))
    names = {name: 0 for name, _ in model.named_children()}
    del names["transformer_blocks"]
    blocks = {f"transformer_blocks.{i}": i % 2 for i in range(len(model.transformer_blocks))}
    accelerate.dispatch_model(model, {**names, **blocks})
    assert {p.device.index for p in model.parameters()} == {0, 1}
    assert torch.equal(run(model).to("cuda:0"), expected)
