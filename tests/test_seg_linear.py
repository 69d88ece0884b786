"""SegLinear against a float64 evaluation of its equation, written independently of the module and of the search."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.nn.functional as F
from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer
from torch import Tensor, nn

from modelopt_ext.nn import SegLayout, SegLinear, input_block, to_seg_linear, weight_block

K, N = 24, 20
INPUTS, GROUPS = (8, 16), (4, 16)


@dataclass
class Case:
    """Numbers of a segmented Linear: what a calibration would have found, here drawn at random."""

    layout: SegLayout
    smoothing: Tensor | None = None
    shift: Tensor | None = None
    bits: int | tuple[int, int] = 8
    dynamic: bool = False

    def amax(self, name: str) -> float:
        # Any positive number will do; small enough that clamping happens and counts.
        return 0.5 + (hash_of(name) % 7) / 4


def hash_of(name: str) -> int:
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(name))


def build(case: Case, dtype: torch.dtype = torch.float32, bias: bool = True) -> SegLinear:
    torch.manual_seed(0)
    linear = QuantModuleRegistry.convert(nn.Linear(K, N, bias=bias))
    linear.weight.data.normal_()
    input_cfg = {"num_bits": case.bits, "axis": None}
    if case.dynamic:
        input_cfg = {"num_bits": case.bits, "type": "dynamic", "block_sizes": {-1: None, "type": "dynamic"}}
    linear.input_quantizer.set_from_attribute_config(input_cfg)
    linear.weight_quantizer.set_from_attribute_config({"num_bits": case.bits, "axis": 0})
    module = to_seg_linear(linear, case.layout)
    for bank in (module.input_quantizer, module.weight_quantizer):
        bank.set_buffer("_smoothing", case.smoothing)
    module.input_quantizer.set_buffer("_shift", case.shift)
    if not case.dynamic:
        for name in module.input_quantizer.block_names():
            module.input_quantizer.block(name).amax = torch.tensor(case.amax(name))
    for name in module.weight_quantizer.block_names():
        row = int(name.removeprefix("block").split("_")[0])
        rows = case.layout.weight_segments[row]
        module.weight_quantizer.block(name).amax = case.amax(name) + torch.arange(rows).reshape(-1, 1) / 8
    return module.to(dtype).eval()


def q(x: Tensor, amax: Tensor | float, low: int, high: int) -> Tensor:
    """Symmetric integers in float64: codes [low, high], ``amax`` maps to ``high``."""
    scale = torch.as_tensor(amax, dtype=torch.float64) / high
    return (x / scale).round().clamp(low, high) * scale


def evaluate(case: Case, module: SegLinear, x: Tensor) -> Tensor:
    """y[o] = sum_t Q((x[t] - c[t]) / s[o,t]) Q(W[o,t] s[o,t])^T + W c + b[o], in float64, INT8."""
    x, weight = x.double(), module.plain_weight.detach().double()
    layout = case.layout
    shift = torch.zeros(K, dtype=torch.float64) if case.shift is None else case.shift.double()
    outputs = []
    for index, rows in enumerate(layout.weight_slices):
        group = layout.group_of(index)
        s = torch.ones(K, dtype=torch.float64) if case.smoothing is None else case.smoothing[group].double()
        y = torch.zeros(*x.shape[:-1], rows.stop - rows.start, dtype=torch.float64)
        for t, channels in enumerate(layout.in_slices):
            z = (x[..., channels] - shift[channels]) / s[channels]
            name = weight_block(index, t)
            w = q(
                weight[rows, channels] * s[channels],
                case.amax(name) + torch.arange(rows.stop - rows.start).reshape(-1, 1) / 8,
                -128,
                127,
            )
            names = input_block(group, t), input_block(group, t, negative=True)
            if layout.polarity[t] == "none":
                amax = z.abs().amax(-1, keepdim=True) if case.dynamic else case.amax(names[0])
                parts = [q(z, amax, -128, 127)]
            else:
                up, down = z.clamp(min=0), (-z).clamp(min=0)
                tops = [
                    v.amax(-1, keepdim=True) if case.dynamic else torch.tensor(case.amax(n))
                    for v, n in zip((up, down), names, strict=True)
                ]
                if layout.polarity[t] == "dual":
                    parts = [q(up, tops[0], -128, 127), q(-down, tops[1], -128, 127)]
                else:
                    parts = [q(up, tops[0], 0, 255), -q(down, tops[1], 0, 255)]
            y = y + sum(part @ w.T for part in parts)
        outputs.append(y)
    out = torch.cat(outputs, -1) + weight @ shift
    return out if module.bias is None else out + module.bias.detach().double()


def smoothing(groups: int) -> Tensor:
    return torch.rand(groups, K, generator=torch.Generator().manual_seed(1)) + 0.5


def shift() -> Tensor:
    return torch.randn(K, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).float()


CASES = {
    "input-segments": Case(SegLayout(INPUTS, (N,), (N,), ("none", "none"))),
    "output-groups": Case(SegLayout((K,), GROUPS, GROUPS, ("none",)), smoothing(2)),
    "weight-segments": Case(SegLayout((K,), (N,), (5, 5, 10), ("none",)), smoothing(1)),
    "blocks": Case(SegLayout(INPUTS, GROUPS, (4, 8, 8), ("none", "none")), smoothing(2)),
    "dual": Case(SegLayout(INPUTS, (N,), (N,), ("none", "dual"))),
    "dual8": Case(SegLayout(INPUTS, (N,), (N,), ("dual8", "none"))),
    "dual8-groups": Case(SegLayout(INPUTS, GROUPS, GROUPS, ("none", "dual8")), smoothing(2)),
    "shift": Case(SegLayout((K,), (N,), (N,), ("none",)), None, shift()),
    "everything": Case(SegLayout(INPUTS, GROUPS, (4, 6, 10), ("dual8", "none")), smoothing(2), shift()),
    "per-token": Case(SegLayout(INPUTS, (N,), (N,), ("none", "dual8")), dynamic=True),
    "per-token-smoothed": Case(
        SegLayout(INPUTS, GROUPS, GROUPS, ("dual", "none")), smoothing(2), shift(), dynamic=True
    ),
}


@pytest.mark.parametrize("shape", [(7, K), (2, 3, K)], ids=["rows", "tokens"])
@pytest.mark.parametrize("name", CASES)
def test_equation(name: str, shape: tuple[int, ...]):
    case = CASES[name]
    module = build(case)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        y = module(x)
    expected = evaluate(case, module, x)
    assert y.shape == expected.shape
    # A code that lies between two integers may round either way in float32; there is none in these numbers.
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    plain = F.linear(x, module.plain_weight, module.bias)
    assert (y - plain).abs().max() > 1e-3, "nothing was quantized"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["everything", "dual", "per-token"])
def test_half_precision_stays_close_to_the_equation(name: str, dtype: torch.dtype):
    case = CASES[name]
    module = build(case, dtype)
    # torch's .to(dtype) casts the scales too; the equation is evaluated with the scales as cast.
    x = torch.randn(64, K, generator=torch.Generator().manual_seed(3)).to(dtype)
    with torch.no_grad():
        y = module(x)
    assert y.dtype == dtype
    expected = evaluate(case, module, x)
    relative = (y.double() - expected).norm() / expected.norm()
    assert relative < (0.01 if dtype == torch.float16 else 0.03)


def test_fp8_blocks_round_to_e4m3():
    case = Case(SegLayout(INPUTS, (N,), (N,), ("none", "dual")), bits=(4, 3))
    module = build(case)
    x = torch.randn(16, K, generator=torch.Generator().manual_seed(3))

    def e4m3(v: Tensor, amax: Tensor | float) -> Tensor:
        scale = torch.as_tensor(amax, dtype=torch.float64) / 448
        return (v / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale

    y = module.bias.detach().double().expand(16, N).clone()
    for t, channels in enumerate(case.layout.in_slices):
        w = e4m3(
            module.plain_weight[:, channels].detach().double(),
            case.amax(weight_block(0, t)) + torch.arange(N).reshape(-1, 1) / 8,
        )
        part = x[:, channels].double()
        if t == 0:
            rounded = e4m3(part, case.amax(input_block(0, 0)))
        else:
            rounded = e4m3(part.clamp(min=0), case.amax(input_block(0, 1)))
            rounded = rounded + e4m3(part.clamp(max=0), case.amax(input_block(0, 1, negative=True)))
        y += rounded @ w.T
    with torch.no_grad():
        torch.testing.assert_close(module(x).double(), y, rtol=1e-4, atol=1e-3)


def test_dual_reaches_code_minus_128():
    """amax = -min * 127/128 puts the most negative value on the last code of int8 (the paper's s- = -min/128)."""
    module = build(Case(SegLayout((K,), (N,), (N,), ("dual",))))
    bank = module.input_quantizer
    bank.block(input_block(0, 0, negative=True)).amax = torch.tensor(0.25 * 127 / 128)
    x = torch.full((1, K), -0.25)
    torch.testing.assert_close(bank(x), x, rtol=0, atol=1e-7)


def test_shift_is_given_back_in_full_precision():
    """With x equal to the shift every code is zero and the output is W x + b, not Q(W) x + b."""
    case = CASES["shift"]
    module = build(case)
    x = case.shift.reshape(1, K)
    with torch.no_grad():
        torch.testing.assert_close(module(x), F.linear(x, module.plain_weight, module.bias))


def test_without_bias():
    case = CASES["everything"]
    module = build(case, bias=False)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(module(x).double(), evaluate(case, module, x), rtol=1e-4, atol=1e-4)


def test_is_a_linear_with_the_original_state():
    module = build(CASES["everything"])
    assert isinstance(module, nn.Linear)
    assert type(module).__name__ == "SegQuantLinear"
    assert (module.in_features, module.out_features) == (K, N)
    plain = nn.Linear(K, N)
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in plain.named_parameters()]
    torch.manual_seed(0)
    reference = nn.Linear(K, N)
    reference.weight.data.normal_()
    assert torch.equal(module.weight, reference.weight), "segmenting must not touch the weight"


def test_disabled_is_full_precision_to_the_bit():
    module = build(CASES["everything"])
    x = torch.randn(5, K)
    mtq.disable_quantizer(module, "*")
    with torch.no_grad():
        assert torch.equal(module(x), F.linear(x, module.plain_weight, module.bias))
    mtq.enable_quantizer(module, "*")
    with torch.no_grad():
        assert not torch.equal(module(x), F.linear(x, module.plain_weight, module.bias))


def test_fold_weight_keeps_the_outputs():
    module = build(CASES["everything"])
    x = torch.randn(5, K)
    with torch.no_grad():
        before = module(x)
        mtq.fold_weight(nn.Sequential(module))
        torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-5)
        again = module.plain_weight.clone()
        mtq.fold_weight(nn.Sequential(module))
        assert torch.equal(module.plain_weight, again)
    assert not module.weight_quantizer.is_enabled


def test_deepcopy_and_state_dict():
    module = build(CASES["everything"])
    twin = copy.deepcopy(module)
    x = torch.randn(5, K)
    with torch.no_grad():
        assert torch.equal(module(x), twin(x))
        module.input_quantizer.block(input_block(0, 0)).amax = torch.tensor(9.0)
        assert not torch.equal(module(x), twin(x)), "the copy shares quantizers with the original"
        twin.load_state_dict(module.state_dict())
        assert torch.equal(module(x), twin(x))


def test_autocast():
    module = build(CASES["everything"])
    x = torch.randn(64, K)
    with torch.no_grad():
        full = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - full).norm() / full.norm() < 0.02


def test_gradients_reach_input_and_weight():
    module = build(CASES["blocks"])
    x = torch.randn(5, K, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert module.plain_weight.grad is not None
    assert module.plain_weight.grad.abs().sum() > 0


def test_stock_calibration_reaches_every_block():
    """A SegLinear calibrated by ModelOpt's own max algorithm: each block gets the amax of what it reads."""
    module = build(Case(SegLayout(INPUTS, (N,), (N,), ("none", "dual8"))))
    model = nn.Sequential(module)
    x = torch.randn(50, K)
    for quantizer in module.modules():
        if isinstance(quantizer, TensorQuantizer):
            quantizer.reset_amax()
    mtq.calibrate(model, "max", lambda m: m(x))
    bank = module.input_quantizer
    assert bank.block(input_block(0, 0)).amax == x[:, :8].abs().max()
    assert bank.block(input_block(0, 1)).amax == x[:, 8:].max()
    assert bank.block(input_block(0, 1, negative=True)).amax == (-x[:, 8:]).max()
    block = module.weight_quantizer.block(weight_block(0, 1))
    assert torch.equal(block.amax, module.plain_weight[:, 8:].abs().amax(1, keepdim=True))


def test_a_pattern_reconfigures_the_blocks_and_keeps_their_polarity():
    module = build(Case(SegLayout(INPUTS, (N,), (N,), ("none", "dual8"))))
    entry = {"quantizer_name": "*input_quantizer", "parent_class": "nn.Linear", "cfg": {"num_bits": 4, "axis": None}}
    mtq.set_quantizer_by_cfg(nn.Sequential(module), [entry])
    blocks = {name: module.input_quantizer.block(name) for name in module.input_quantizer.block_names()}
    assert {name: block.num_bits for name, block in blocks.items()} == dict.fromkeys(blocks, 4)
    assert {name: block.unsigned for name, block in blocks.items()} == {
        "block0_0": False,
        "block0_1": True,
        "block0_1_negative": True,
    }


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (((K,), (N,), (N,), ("triple",)), "polarity"),
        (((K,), (N,), (N,), ()), "polarity"),
        (((0, K), (N,), (N,), ("none",) * 2), "positive"),
        (((K,), (8, 12), (10, 10), ("none",)), "refine"),
        (((K,), (N,), (N, 4), ("none",)), "same number of rows"),
    ],
)
def test_impossible_layouts_are_refused(layout: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        SegLayout(*layout)


def test_a_layout_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"24 -> 20 features, the Linear has 8 -> 4"):
        to_seg_linear(QuantModuleRegistry.convert(nn.Linear(8, 4)), CASES["blocks"].layout)


def test_layout_round_trip():
    layout = CASES["everything"].layout
    assert SegLayout.from_dict(layout.to_dict()) == layout
    with pytest.raises(ValueError, match="keys"):
        SegLayout.from_dict({**layout.to_dict(), "colour": "red"})
