"""The rules of the recorder, one small module each; the modes and hosts it must work in; what it leaves behind."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import denoisers
import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from modelopt.torch.quantization.nn import TensorQuantizer
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from modelopt_ext.dataflow import DataflowRecorder, RecordFirstForward, record
from modelopt_ext.dataflow.axes import Axis, reshape, whole
from modelopt_ext.dataflow.channels import tile
from modelopt_ext.plan import LinearPlan, SegmentPlan

B, S, K, N = 2, 5, 16, 24


class Net(nn.Module):
    """``before`` makes the input of the Linear ``first``, ``after`` uses its output."""

    def __init__(self, before: Callable[..., Tensor], after: Callable[..., Any], features: tuple[int, int] = (K, N)):
        super().__init__()
        self.first = nn.Linear(*features)
        self.table = nn.Parameter(torch.randn(6, features[1] // 6))
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        self.after(self, self.first(self.before(x)))
        return x


def plan_of(
    before: Callable, after: Callable, x: Tensor | None = None, features: tuple[int, int] = (K, N)
) -> LinearPlan:
    model = Net(before, after, features)
    x = torch.randn(B, S, features[0]) if x is None else x
    return record(model, lambda: model(x)).linears["first"]


def nothing(*_: Any) -> None:
    pass


def same(x: Tensor) -> Tensor:
    return x


# -- output side -------------------------------------------------------------------------------------------------------

SIX = (4,) * 6
OUTPUT_CASES = {
    "untouched": (lambda m, y: y * 2, (24,)),
    "chunk": (lambda m, y: y.chunk(3, dim=-1), (8, 8, 8)),
    "split into unequal": (lambda m, y: y.split([3, 5, 16], dim=-1), (3, 5, 16)),
    "tensor_split": (lambda m, y: torch.tensor_split(y, 5, dim=-1), (5, 5, 5, 5, 4)),
    "two slices": (lambda m, y: (y[..., :10], y[..., 10:]), (10, 14)),
    "narrow": (lambda m, y: (y.narrow(-1, 0, 8), y.narrow(-1, 8, 16)), (8, 16)),
    "unflatten, unbind": (lambda m, y: y.unflatten(-1, (6, 4)).unbind(-2), SIX),
    "unflatten, select each": (lambda m, y: [y.unflatten(-1, (6, 4))[..., i, :] for i in range(6)], SIX),
    "chunk on another dim": (lambda m, y: y.reshape(B, S, 6, 4).chunk(6, dim=2), SIX),
    "fused qkv, unbind(0)": (lambda m, y: y.reshape(B, S, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0), (8, 8, 8)),
    "fused qkv, index": (lambda m, y: [y.view(B, S, 3, 8).permute(2, 0, 1, 3)[i] for i in range(3)], (8, 8, 8)),
    "table added before": (lambda m, y: (m.table[None, None] + y.reshape(B, S, 6, 4)).chunk(6, dim=2), SIX),
    "through casts and pointwise": (lambda m, y: F.silu(y.double() * 2 + 1).chunk(2, dim=-1), (12, 12)),
    "through contiguous copies": (lambda m, y: y.transpose(1, 2).contiguous().chunk(2, dim=1), (12, 12)),
    "through expand": (lambda m, y: y[:, None].expand(B, 3, S, N).chunk(2, dim=-1), (12, 12)),
    "through repeat of tokens": (lambda m, y: y.repeat(1, 3, 1).chunk(2, dim=-1), (12, 12)),
    "through an in-place op": (lambda m, y: y.mul_(2).chunk(2, dim=-1), (12, 12)),
    "through a cat of tokens": (lambda m, y: torch.cat([y, torch.ones(B, 2, N)], dim=1).chunk(2, dim=-1), (12, 12)),
    "through a cat of single tokens": (
        lambda m, y: torch.cat([y[:, 0].unsqueeze(1), y[:, 1].unsqueeze(1)], dim=1).chunk(2, dim=-1),
        (12, 12),
    ),
    "nested": (lambda m, y: [part.chunk(2, dim=-1) for part in y.split([8, 16], dim=-1)], (4, 4, 8, 8)),
    "nested, one part only": (lambda m, y: y.split([8, 16], dim=-1)[1].chunk(2, dim=-1), (8, 8, 8)),
    "coarse and fine": (lambda m, y: (y.chunk(2, dim=-1), y.chunk(6, dim=-1)), SIX),
    "parts in any order": (lambda m, y: (y[..., 16:], y[..., :8], y[..., 8:16]), (8, 8, 8)),
    "heads, not cut": (lambda m, y: y.view(B, S, 6, 4).transpose(1, 2).reshape(B * 6, S, 4), (24,)),
    "tokens sliced": (lambda m, y: (y[:, :2], y[:, 2:], y.unbind(0)), (24,)),
    "one slice only": (lambda m, y: y[..., :10], (24,)),
    "a gap": (lambda m, y: (y[..., :10], y[..., 12:]), (24,)),
    "an overlap": (lambda m, y: (y[..., 1:], y[..., :-1]), (24,)),
    "rotary pairs": (lambda m, y: y.reshape(B, S, 12, 2).unbind(-1), (24,)),
    "rotary halves inside heads": (lambda m, y: y.view(B, S, 6, 4).chunk(2, dim=-1), (24,)),
    "strided slices": (lambda m, y: (y[..., ::2], y[..., 1::2]), (24,)),
    "after a norm": (lambda m, y: F.layer_norm(y, (N,)).chunk(2, dim=-1), (24,)),
    "after a matmul": (lambda m, y: (y @ torch.ones(N, N)).chunk(2, dim=-1), (24,)),
    "after a gather": (lambda m, y: y[..., torch.arange(N)].chunk(2, dim=-1), (24,)),
    "channels merged with tokens": (lambda m, y: y.reshape(B, S * N).chunk(2, dim=-1), (24,)),
    "an empty slice": (lambda m, y: (y[..., :0], y[..., 0:]), (24,)),
}


@pytest.mark.parametrize("case", OUTPUT_CASES)
def test_output_segments(case):
    after, expected = OUTPUT_CASES[case]
    assert plan_of(same, after).out_segments == expected


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], (12,)),
        ([(0, 4), (4, 12)], (4, 8)),
        ([(4, 12), (0, 4), (4, 8), (8, 12)], (4, 4, 4)),
        ([(0, 4), (4, 12), (4, 8)], (4, 8)),  # 4:8 alone does not tile 4:12
        ([(0, 8), (4, 12)], (12,)),
        ([(0, 6), (6, 12), (0, 4), (3, 6)], (6, 6)),
        ([(0, 12)], (12,)),
    ],
)
def test_tile(pieces, expected):
    assert tile(pieces, 0, 12) == expected


def test_sums_of_linears_are_cut_together():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(K, N)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.a(x) + self.b(x)[:, :1] + self.c(x[:, 0])[:, None]).chunk(3, dim=-1)

    model = Sum()
    plan = record(model, lambda: model(torch.randn(B, S, K)))
    assert {name: p.out_segments for name, p in plan.linears.items()} == dict.fromkeys("abc", (8, 8, 8))


def test_notes_say_what_was_not_placed(caplog):
    notes = {}
    for case in ("rotary pairs", "one slice only", "a gap", "chunk"):
        model = Net(same, OUTPUT_CASES[case][0])
        with caplog.at_level(logging.WARNING, logger="modelopt_ext"):
            notes[case] = record(model, lambda m: m(torch.randn(B, S, K))).notes.get("first")
    assert "strided" in notes["rotary pairs"]
    assert notes["one slice only"] == "the output is cut at channels 0:10, which do not tile all 24"
    assert notes["a gap"] == "the output is cut at channels 0:10, 12:24, which do not tile all 24"
    assert notes["chunk"] is None
    # A warning for each lost cut; a rotary embedding is no loss.
    assert len(caplog.records) == 2


def test_absurdly_fine_cuts_stay_whole():
    model = Net(same, lambda m, y: y.unbind(-1), (K, 120))
    plan = record(model, lambda: model(torch.randn(B, S, K)))
    assert plan.linears["first"].out_segments == (120,)
    assert plan.notes["first"] == "the output is cut into 120 pieces, more than 64"


# -- input side --------------------------------------------------------------------------------------------------------


def parts(*sizes: int) -> list[Tensor]:
    return [torch.randn(B, S, size) for size in sizes]


INPUT_CASES = {
    "plain": (same, (16,)),
    "cat": (lambda x: torch.cat(parts(6, 10), dim=-1), (6, 10)),
    "cat of many": (lambda x: torch.cat([torch.cat(parts(2, 4), -1), *parts(10)], dim=2), (2, 4, 10)),
    "cat with an empty tensor": (lambda x: torch.cat([torch.empty(0), *parts(6, 10)], dim=-1), (6, 10)),
    "hstack": (lambda x: torch.hstack([p[:, 0] for p in parts(6, 10)]), (6, 10)),
    "cat of tokens": (lambda x: torch.cat([x, x], dim=1), (16,)),
    "cat of tokens, then token slice": (lambda x: torch.cat([x, x], dim=1)[:, S:], (16,)),
    "stack, flatten": (lambda x: torch.stack(parts(8, 8), dim=2).flatten(2), (8, 8)),
    "interleaved stack": (lambda x: torch.stack(parts(8, 8), dim=-1).flatten(2), (16,)),
    "through pointwise": (lambda x: F.relu(torch.cat(parts(6, 10), -1) * 2).double().float(), (6, 10)),
    "union of operands": (lambda x: torch.cat(parts(6, 10), -1) + torch.cat(parts(8, 8), -1), (6, 2, 8)),
    "broadcast operand": (lambda x: x * torch.cat(parts(6, 10), -1)[:, :1], (16,)),
    "through a norm": (lambda x: F.layer_norm(torch.cat(parts(6, 10), -1), (16,)), (6, 10)),
    "through permutes": (lambda x: torch.cat(parts(6, 10), -1).permute(2, 0, 1).contiguous().permute(1, 2, 0), (6, 10)),
    "through unflatten, flatten": (lambda x: torch.cat(parts(4, 12), -1).unflatten(-1, (4, 4)).flatten(2), (4, 12)),
    "unflatten across a cut": (lambda x: torch.cat(parts(6, 10), -1).unflatten(-1, (4, 4)).flatten(2), (16,)),
    "slice of a cat": (lambda x: torch.cat(parts(6, 20), -1)[..., 2:18], (4, 12)),
    "split of a cat": (lambda x: torch.cat(parts(6, 10, 16), -1).split(16, dim=-1)[0], (6, 10)),
    "pieces joined again": (lambda x: torch.cat(x.chunk(2, dim=-1), dim=-1), (8, 8)),
    "unsqueezed and expanded": (lambda x: torch.cat(parts(6, 10), -1)[:, None].expand(B, 3, S, K), (6, 10)),
    "merged with tokens": (lambda x: torch.cat(parts(6, 2), -1)[:, :4].reshape(B, 2, 16), (16,)),
    "after a matmul": (lambda x: torch.cat(parts(6, 10), -1) @ torch.ones(16, 16), (16,)),
    "written by copy": (lambda x: torch.empty(B, S, K).copy_(torch.cat(parts(6, 10), -1)), (6, 10)),
    "heads merged": (lambda x: x.view(B, S, 2, 8).transpose(1, 2).transpose(1, 2).flatten(2), (16,)),
    "more parts than are worth it": (lambda x: torch.cat(parts(*[1] * 80), -1)[..., :16], (16,)),
}


@pytest.mark.parametrize("case", INPUT_CASES)
def test_input_segments(case):
    before, expected = INPUT_CASES[case]
    plan = plan_of(before, nothing)
    assert plan.in_segments == expected
    assert not any(plan.activations)


def test_merge_of_heads_is_opt_in():
    def attend(x: Tensor) -> Tensor:
        heads = x.view(B, S, 2, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)

    model = Net(attend, nothing)
    x = torch.randn(B, S, K)
    assert record(model, lambda: model(x)).linears["first"].in_segments == (16,)
    assert record(model, lambda: model(x), merge_heads=True).linears["first"].in_segments == (8, 8)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((2, 3, 4), (6, 4)),
        ((24,), (2, 3, 4)),
        ((6, 4), (4, 6)),
        ((1, 6, 1), (2, 3)),
        ((2, 1), (1, 2, 1)),
        ((1, 1), (1,)),
        ((), (1,)),
        ((2, 0), (0, 3)),
    ],
)
def test_reshape_of_plain_axes_keeps_sizes(old, new):
    assert reshape(tuple(whole(size) for size in old), new) == tuple(whole(size) for size in new)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([(8, 4)], (3, 4), [(2, 1), (4,)]),
        ([(6, 6)], (3, 4), [(3,), (4,)]),  # the cut falls inside a row
        ([(2, 1), (4,)], (12,), [(8, 4)]),
        ([(3,), (1, 3)], (12,), [(12,)]),  # the inner cut would repeat
        ([(2, 1), (1, 3)], (12,), [(8, 4)]),
        ([(2,), (3, 9)], (2, 4, 3), [(2,), (1, 3), (3,)]),
        ([(1, 5), (4,)], (4, 6), [(4,), (6,)]),
        ([(5,), (1, 3)], (5, 1, 4, 1), [(5,), (1,), (1, 3), (1,)]),
    ],
)
def test_reshape_of_cut_axes(old, new, expected):
    axes = tuple(Axis(sizes, ("",) * len(sizes), ("cat",) * (len(sizes) - 1)) for sizes in old)
    assert [axis.sizes for axis in reshape(axes, new)] == expected


# -- polarity ----------------------------------------------------------------------------------------------------------


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


def erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / 2**0.5))


POLAR_CASES = {
    "plain": (same, ("",)),
    "silu": (F.silu, ("silu",)),
    "silu in place": (lambda x: F.silu(x.clone(), inplace=True), ("silu",)),
    "gelu": (lambda x: F.gelu(x, approximate="tanh"), ("gelu",)),
    "quick gelu by hand": (quick_gelu, ("gelu",)),
    "tanh gelu by hand": (tanh_gelu, ("gelu",)),
    "erf gelu by hand": (erf_gelu, ("gelu",)),
    "silu by hand": (lambda x: x * torch.sigmoid(x), ("silu",)),
    "geglu": (lambda x: x * F.gelu(x.roll(1)), ("gated",)),
    "swiglu": (lambda x: F.silu(x.roll(1)) * x, ("gated",)),
    "polar half of a cat": (lambda x: torch.cat([x[..., :4], F.gelu(x[..., 4:])], dim=-1), ("", "gelu")),
    "two polar halves": (lambda x: torch.cat([F.silu(x[..., :4]), F.gelu(x[..., 4:])], dim=-1), ("silu", "gelu")),
    "activation of a cat": (lambda x: F.silu(torch.cat(parts(4, 12), dim=-1)), ("silu", "silu")),
    "cast, cloned, reshaped": (
        lambda x: F.silu(x).double().clone().view(B * S, K).unflatten(0, (B, S)).float(),
        ("silu",),
    ),
    "scaled up": (lambda x: F.silu(x) * 3, ("silu",)),
    "divided": (lambda x: F.silu(x) / 3, ("silu",)),
    "clamped": (lambda x: F.silu(x).clamp(-60000, 60000), ("silu",)),
    "dropout in eval": (lambda x: F.dropout(F.silu(x), training=False), ("silu",)),
    "gated by a sigmoid": (lambda x: F.silu(x) * torch.sigmoid(x.roll(1)), ("silu",)),
    "some tokens of it": (lambda x: torch.cat([F.silu(x), x], dim=1)[:, :S], ("silu",)),
    "polar and plain tokens": (lambda x: torch.cat([F.silu(x), x], dim=1), ("",)),
    "polar tokens": (lambda x: torch.cat([F.silu(x), F.silu(x)], dim=1), ("silu",)),
    "sign flipped": (lambda x: F.silu(x) * -1, ("",)),
    "shifted": (lambda x: F.silu(x) + 1, ("",)),
    "residual": (lambda x: F.silu(x) + x, ("",)),
    "normed": (lambda x: F.layer_norm(F.silu(x), (K,)), ("",)),
    "another function": (lambda x: F.silu(x).exp(), ("",)),
    "sigmoid gate of another tensor": (lambda x: x * torch.sigmoid(x.roll(1)), ("",)),
    "gate of a sum": (lambda x: x * (1 + torch.tanh(2 * x + 3 * x.roll(1))), ("",)),
    "tanh gate that goes below zero": (lambda x: x * (0.3 + torch.tanh(x)), ("",)),
    "tanh gate": (lambda x: x * torch.tanh(x), ("",)),
    "square": (lambda x: x * x, ("",)),
}


@pytest.mark.parametrize("case", POLAR_CASES)
def test_activations(case):
    before, expected = POLAR_CASES[case]
    assert plan_of(before, nothing).activations == expected


# -- several calls, shared inputs, convolutions -----------------------------------------------------------------------


class Calls(nn.Module):
    """``a`` and ``b`` see two calls each, ``c`` none; ``q``, ``k`` read one tensor, ``v`` an equal copy of it."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcqkv":
            setattr(self, name, nn.Linear(K, N))

    def forward(self, x: Tensor) -> None:
        first, second = torch.cat([x[..., :4], F.silu(x[..., 4:])], -1), torch.cat([x[..., :4], x[..., 4:]], -1)
        self.a(first).chunk(2, -1)
        self.a(second).chunk(3, -1)
        self.b(first)
        self.b(x)
        self.q(x), self.k(x.view(x.shape)), self.v(x.clone())


def test_several_calls_and_uncalled(caplog):
    model = Calls()
    with caplog.at_level(logging.WARNING, logger="modelopt_ext"):
        plan = record(model, lambda: model(torch.randn(B, S, K)))
    # Output cuts of all calls (8, 12, 16); input cuts of every call, with a tag only where all agree.
    assert plan.linears["a"] == LinearPlan((4, 12), (8, 4, 4, 8), ("", ""))
    assert plan.linears["b"] == LinearPlan((16,), (24,))
    assert plan.notes == {"b": "the input is joined differently in its 2 calls; only cuts in all of them are kept"}
    assert plan.uncalled == ("c",)
    assert "never called in the recorded forward, so without segments: c;" in caplog.text
    assert plan.shared_inputs == (("k", "q"),)


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        (same, True),
        (lambda x: x[:], True),
        (lambda x: x.expand(4, 4, K), True),
        (lambda x: x.mul_(2), False),
        (lambda x: x.transpose(0, 1), False),
        (lambda x: x.permute(1, 0, 2), False),
        (lambda x: x.clone(), False),
        (lambda x: x[:2], False),
    ],
)
def test_only_the_very_same_values_are_shared(change, shared):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(K, N), nn.Linear(K, N)

        def forward(self, x: Tensor) -> None:
            self.a(x), self.b(change(x))

    model = Two()
    with torch.no_grad():
        assert record(model, lambda: model(torch.randn(4, 4, K))).shared_inputs == ((("a", "b"),) if shared else ())


def test_weight_read_outside_its_forward_is_noted():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.a.weight).chunk(2, -1)[0]

    model = Tied()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            plan = record(model, lambda: model(torch.randn(B, S, K)))
        assert plan.uncalled == ("a",)
        assert plan.notes == {"a": "its weight is also read outside its forward, where no segments apply"}


def test_convolutions_of_concatenated_channels():
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(4, 16)
            self.conv = nn.Conv2d(16, 8, 3, padding=1)
            self.plain = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(self.conv(F.silu(self.norm(torch.cat([x[:, :4], x[:, 4:]], dim=1)))))

    model = Skip()
    assert record(model, lambda: model(torch.randn(B, 16, 4, 4))).convs == {"conv": (4, 12)}
    # A batch of one without its batch dim.
    conv = nn.Sequential(nn.Identity(), nn.Conv2d(16, 8, 1))
    conv[0].forward = lambda x: torch.cat([x[:4], x[4:]], dim=0)
    assert record(conv, lambda: conv(torch.randn(16, 4, 4))).convs == {"1": (4, 12)}


# -- modes and hosts --------------------------------------------------------------------------------------------------


def assert_clean(model: nn.Module) -> None:
    """No hook on any module, no dispatch mode, no tracker state."""
    for module in model.modules():
        for name, hooks in vars(module).items():
            if "hooks" in name and isinstance(hooks, dict):
                assert not hooks, (module, name)
    assert _get_current_dispatch_mode_stack() == []


def sd3() -> tuple[nn.Module, dict[str, Any], SegmentPlan]:
    model, inputs = denoisers.build("SD3Transformer2DModel-3.5")
    with torch.no_grad():
        plan = record(model, lambda: model(**inputs))
    assert len(plan.segmented) == 15
    return model, inputs, plan


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_same_plan_in_every_mode(mode, autocast):
    model, inputs, plan = sd3()
    with mode(), torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        expected = model(**inputs).sample
        outputs = []
        assert record(model, lambda: outputs.append(model(**inputs).sample)) == plan
    assert torch.equal(outputs[0], expected)
    assert outputs[0].requires_grad == (mode is torch.enable_grad)
    assert_clean(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_works_through_a_recorded_forward(checkpointing):
    model, inputs, plan = sd3()
    outputs = []
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    assert record(model, lambda: outputs.append(model(**inputs).sample)) == plan
    outputs[0].sum().backward()
    gradient = model.transformer_blocks[0].norm1.linear.weight.grad.clone()
    model.zero_grad()
    model(**inputs).sample.sum().backward()
    assert torch.equal(gradient, model.transformer_blocks[0].norm1.linear.weight.grad)


def test_meta_device_and_half_precision():
    model, inputs, plan = sd3()
    half = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        assert record(model.to(torch.bfloat16), lambda: model(**half)) == plan
        meta = {k: v.to("meta") for k, v in half.items()}
        assert record(model.to("meta"), lambda: model(**meta)) == plan


def test_offloaded_weights():
    model, inputs, plan = sd3()
    cpu_offload(model, execution_device="cpu")
    assert model.proj_out.weight.is_meta
    with torch.no_grad():
        assert record(model, lambda: model(**inputs)) == plan
    assert model.proj_out.weight.is_meta


def test_lora_on_top():
    model, inputs, plan = sd3()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "linear"], init_lora_weights="gaussian"))
    with torch.no_grad():
        adapted = record(model, lambda: model(**inputs))
    for name, linear in plan.linears.items():
        base = f"{name}.base_layer"
        assert adapted.linears[base if base in adapted.linears else name] == linear
    name = "transformer_blocks.0.norm1.linear"
    assert adapted.linears[f"{name}.lora_A.default"] == LinearPlan((32,), (2,), ("silu",))
    assert adapted.linears[f"{name}.lora_B.default"] == LinearPlan((2,), (32,) * 9)


def test_inside_modelopt_calibration_and_after():
    model, inputs, plan = sd3()
    found = []

    def forward_loop(model: nn.Module) -> None:
        with RecordFirstForward(model) as recording:
            model(**inputs)
            model(**inputs)
        found.append(recording.plan)

    with torch.no_grad():
        mtq.quantize(model, mtq.INT8_SMOOTHQUANT_CFG, forward_loop)
        assert type(model.proj_out).__name__ == "QuantLinear"
        forward_loop(model)
    assert len(found) >= 2
    assert all(p == plan for p in found)
    assert_clean(model)


def test_quantizers_between_layers_are_transparent():
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(K, N), nn.Linear(N, K)
            self.quantizer = TensorQuantizer()
            self.quantizer.amax = torch.tensor(4.0)

        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.quantizer(self.a(x)).chunk(2, -1)
            return self.b(self.quantizer(torch.cat([up, F.silu(gate)], dim=-1)))

    model = Quantized()
    with torch.no_grad():
        plan = record(model, lambda: model(torch.randn(B, S, K)))
    assert plan.linears["a"].out_segments == (12, 12)
    assert plan.linears["b"] == LinearPlan((12, 12), (16,), ("", "silu"))


def test_linear_subclass_and_a_linear_inside_a_linear():
    class Outer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(K, N)
            self.inner, self.other = nn.Linear(N, N), nn.Linear(N, N)

        def forward(self, x: Tensor) -> Tensor:
            wide = torch.cat([x, x[..., :8]], -1)
            return super().forward(x) + self.inner(wide).chunk(2, -1)[0].repeat(1, 1, 2) + self.other(wide)

    model = nn.Sequential(Outer(), nn.Unflatten(-1, (3, 8)))
    plan = record(model, lambda: model(torch.randn(B, S, K)).unbind(-2))
    # What happens inside a Linear is its own arithmetic.
    inside = dict.fromkeys(("0.inner", "0.other"), LinearPlan.trivial(N, N))
    assert plan == SegmentPlan(linears={"0": LinearPlan.trivial(K, N), **inside})

    model.forward = lambda x: model[1](model[0](x)).unbind(-2)
    plan = record(model, lambda: model(torch.randn(B, S, K)))
    assert plan == SegmentPlan(linears={"0": LinearPlan((K,), (8, 8, 8)), **inside})


def test_keyword_input_and_root_linear():
    linear = nn.Linear(K, N)
    plan = record(linear, lambda: linear(input=F.silu(torch.randn(B, K))))
    assert plan.linears == {"": LinearPlan.trivial(K, N)}  # silu ran before the recorded forward

    model = nn.ModuleDict({"a": nn.Linear(K, N)})
    model.forward = lambda x: model["a"](input=F.silu(x))
    assert record(model, lambda m: m(torch.randn(B, K))).linears["a"].activations == ("silu",)


def test_compiled_parts_run():
    def double(x: Tensor) -> Tensor:
        return x * 2

    model = Net(torch.compile(double, backend="eager", fullgraph=True), lambda m, y: y.chunk(2, -1))
    plan = record(model, lambda: model(torch.randn(B, S, K)))
    assert plan.linears["first"].out_segments == (12, 12)


# -- what is left behind ----------------------------------------------------------------------------------------------


class Failing(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(K, N), nn.Linear(N, N)
        self.error: type[BaseException] | None = error

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).chunk(3, -1)[0].repeat(1, 1, 3))
        if self.error:
            raise self.error("stop")
        return y


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing_behind(error):
    model, x = Failing(error), torch.randn(B, S, K)

    def recorder_around_forward() -> None:
        with DataflowRecorder(model):
            model(x)

    for attempt in (lambda: record(model, lambda: model(x)), recorder_around_forward):
        with pytest.raises(error):
            attempt()
        assert_clean(model)
    model.error = None
    assert record(model, lambda: model(x)).linears["a"].out_segments == (8, 8, 8)


def test_an_error_inside_a_linear_that_the_model_handles():
    class Retry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(K + 1, N), nn.Linear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.a(x)
            except RuntimeError:
                return self.b(F.silu(x)).chunk(2, -1)[0]

    model = Retry()
    plan = record(model, lambda: model(torch.randn(B, S, K)))
    assert plan.linears["b"] == LinearPlan((16,), (12, 12), ("silu",))


def test_first_forward_only_and_a_failed_one_is_retried():
    model, x = Failing(RuntimeError), torch.randn(B, S, K)
    with RecordFirstForward(model) as recording:
        assert recording.plan is None
        with contextlib.suppress(RuntimeError):
            model(x)
        assert recording.plan is None
        model.error = None
        model(x)
        assert recording.plan.linears["a"].out_segments == (8, 8, 8)
        assert_clean(model)  # detached already inside the loop
        model.b = nn.Linear(N, 7)
        model(x)
    assert recording.plan.linears["b"].out_features == N


def test_a_forward_run_while_an_error_is_handled_is_recorded():
    model, x = Failing(RuntimeError), torch.randn(B, S, K)
    model.error = None
    with RecordFirstForward(model) as recording:
        try:
            raise KeyError("earlier")
        except KeyError:
            model(x)
    assert recording.plan.linears["a"].out_segments == (8, 8, 8)


def test_a_loop_that_never_calls_the_model():
    model = Calls()
    with RecordFirstForward(model) as recording:
        model.a(torch.randn(B, K))  # a part of it is not the model
    assert recording.plan is None
    with pytest.raises(ValueError, match="never called the Calls that is to be planned"):
        record(model, lambda: None)
    assert_clean(model)


def test_recorder_can_be_entered_again():
    model = Net(same, lambda m, y: y.chunk(m.parts, -1))
    recorder = DataflowRecorder(model)
    for model.parts in (2, 3):
        with recorder:
            model(torch.randn(B, S, K))
        assert recorder.plan().linears["first"].out_segments == (N // model.parts,) * model.parts


def test_no_tensor_is_kept_alive():
    alive = []

    class Count(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                x = self.a(F.silu(torch.cat(x.chunk(2, -1), -1)))
                alive.append(len(recorder._tracker._facts))
            return x

    model = Count()
    recorder = DataflowRecorder(model)
    with torch.no_grad(), recorder:
        kept = model(torch.randn(B, S, K))
    assert kept.shape == (B, S, K)
    assert max(alive) == alive[0] <= 4
    assert len(recorder._tracker._facts) == 0


def test_a_failing_rule_only_loses_channels(monkeypatch, caplog):
    def broken(*_: Any) -> None:
        raise AssertionError("broken rule")

    monkeypatch.setattr("modelopt_ext.dataflow.axes.concatenate", broken)
    monkeypatch.setattr("modelopt_ext.dataflow.tracker.ChannelTracker.token", broken)
    with caplog.at_level(logging.DEBUG, logger="modelopt_ext"):
        plan = plan_of(lambda x: torch.cat(parts(6, 10), -1), lambda m, y: y.chunk(2, -1))
    assert "channels are lost here" in caplog.text
    assert "first: a call is not recorded" in caplog.text
    assert plan == LinearPlan((16,), (12, 12))
