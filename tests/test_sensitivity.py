"""Sensitivity of single layers: the numbers against other ways to get them, and a model that stays as it was."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from modelopt_ext import compress
from modelopt_ext.presets import PER_TOKEN, linear_only
from modelopt_ext.sensitivity import SensitivityTable, layer_sensitivity, measure, quantized_copy, quantized_layers

PLAIN = {"segments": False, "polarity": "none", "alpha": None, "clip_grid": (1.0,), "progress": False}
W8, A8 = {"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}
CONFIGS = {
    "stock": {**linear_only(W8, A8), "algorithm": "max"},
    "plain": linear_only(W8, A8, **PLAIN),
    "segquant": linear_only(W8, A8, progress=False, second_product_budget=1.0),
    "per token": linear_only({"num_bits": 4, "axis": 0}, {"num_bits": 8, **PER_TOKEN}, progress=False, alpha=0.5),
}


class Block(nn.Module):
    """Polar activations, a cut, a layer that is called twice, and one with outliers among its input channels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(16, 64)
        self.second = nn.Linear(32, 16)
        self.twice = nn.Linear(16, 16)
        self.spiky = nn.Linear(16, 8)
        self.unused = nn.Linear(4, 4)
        scale = torch.ones(16)
        scale[3] = 300.0
        self.register_buffer("spikes", scale)
        with torch.no_grad():
            self.spiky.weight.div_(scale)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.first(x).chunk(2, dim=-1)
        y = self.second(nn.functional.silu(gate) + hidden)
        return self.spiky((y + self.twice(torch.tanh(self.twice(y)))) * self.spikes)


def inputs(seed: int) -> Tensor:
    return torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(seed))


def loop_over(seeds: range) -> Callable[[nn.Module], None]:
    def loop(model: nn.Module) -> None:
        for seed in seeds:
            model(inputs(seed))

    return loop


CALIBRATION, SCORE = loop_over(range(6)), loop_over(range(100, 104))


def noise_of(model: nn.Module, quantized: nn.Module) -> float:
    """On the data of SCORE."""
    with torch.no_grad():
        reference = torch.cat([model(inputs(seed)) for seed in range(100, 104)]).double()
        result = torch.cat([quantized(inputs(seed)) for seed in range(100, 104)]).double()
    return float((reference - result).square().sum() / reference.square().sum())


def only(quantized: nn.Module, name: str, sides: str = "input_quantizer weight_quantizer") -> nn.Module:
    """A copy in which the quantizers of one layer alone round."""
    kept = tuple(f"{name}.{side}" for side in sides.split())
    changed = copy.deepcopy(quantized)
    for path, module in changed.named_modules():
        if isinstance(module, TensorQuantizer) and not path.startswith(kept):
            module._if_quant = False
    return changed


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "types": [type(module) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for name, value in before.pop("state").items():
        assert torch.equal(after["state"][name], value), name
    del after["state"]
    assert after == before


@pytest.fixture
def model() -> Block:
    return Block()


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_a_quantized_model_with_all_other_layers_off(model: Block, name: str):
    before = snapshot(model)
    table = layer_sensitivity(model, CONFIGS[name], CALIBRATION, score_loop=SCORE, parts=True)
    assert_unchanged(model, before)
    assert [row.name for row in table.layers if row.rows] == ["first", "second", "twice", "spiky"]
    quantized = quantized_copy(model, CONFIGS[name], CALIBRATION)
    for row in table.layers:
        if not row.rows:
            continue
        for value, sides in (
            (row.noise, "input_quantizer weight_quantizer"),
            (row.activation_noise, "input_quantizer"),
            (row.weight_noise, "weight_quantizer"),
        ):
            expected = noise_of(model, only(quantized, row.name, sides))
            assert 1e-9 < expected < 1
            # Layers that round nothing may still scale there and back: both ways differ by float32 rounding.
            assert value == pytest.approx(expected, rel=1e-3), (row.name, sides)


def test_worst_layer_first_and_errors_add(model: Block):
    table = layer_sensitivity(model, CONFIGS["plain"], CALIBRATION, score_loop=SCORE)
    assert table.ranking[0].name == "spiky"
    assert table.ranking[0].sqnr < table.ranking[1].sqnr - 10
    together = -10 * math.log10(noise_of(model, quantized_copy(model, CONFIGS["plain"], CALIBRATION)))
    assert table.predicted_sqnr == pytest.approx(together, abs=1.0)
    assert table.floor == 0


def test_local_noise_is_that_of_the_layers_own_output(model: Block):
    table = layer_sensitivity(model, CONFIGS["segquant"], CALIBRATION, score_loop=SCORE, local_only=True)
    quantized = quantized_copy(model, CONFIGS["segquant"], CALIBRATION)
    seen: list[Tensor] = []
    handle = model.second.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        SCORE(model)
        handle.remove()
        x = torch.cat(seen)
        reference, result = model.second(x).double(), quantized.second(x).double()
    row = table["second"]
    assert row.noise is None
    assert math.isnan(row.sqnr)
    assert math.isnan(table.predicted_sqnr)
    assert row.local_noise == pytest.approx(float((reference - result).square().sum() / reference.square().sum()))


def test_counts(model: Block):
    calls = 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1

    handle = model.register_forward_pre_hook(count)
    quantized = quantized_copy(model, CONFIGS["plain"], CALIBRATION)
    handle.remove()
    layers = sum(name != "unused" for name in quantized_layers(quantized))
    handle = model.register_forward_pre_hook(count)
    calls = 0
    table = layer_sensitivity(model, CONFIGS["stock"], CALIBRATION, score_loop=SCORE, batches=2)
    handle.remove()
    # The calibration (6 calls) runs the copy, which counts too: it has a copy of the hook. SCORE runs twice.
    assert calls == 6 + 2 * 4 + 2 * (1 + layers)
    assert table.calls == 2
    twice = table["twice"]
    assert (twice.weights, twice.rows, twice.calls, twice.multiply_adds) == (256, 35, 2, 2 * 35 * 256)


def test_multiply_adds_of_convolutions():
    convolutions = nn.Sequential(nn.Conv2d(4, 6, 2, stride=2), nn.ConvTranspose2d(6, 4, 3, stride=3))
    config = copy.deepcopy(CONFIGS["stock"])
    for entry in config["quant_cfg"]:
        entry.pop("parent_class", None)
    table = layer_sensitivity(convolutions, config, lambda model: model(torch.ones(2, 4, 8, 8)))
    # 2 images of 4 x 4 windows; every one of the 4 x 4 places that "1" reads is multiplied by its whole kernel.
    assert [(row.name, row.multiply_adds) for row in table.layers] == [
        ("0", 2 * 16 * 6 * 4 * 2 * 2),
        ("1", 2 * 16 * 6 * 4 * 3 * 3),
    ]


def test_measured_calls_are_spread_evenly(model: Block):
    measured: list[int] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.spiky

        def forward(self, x: Tensor, index: int) -> Tensor:
            measured.append(index)
            return self.inner(x)

    def loop(spy: nn.Module) -> None:
        for index in range(12):
            spy(inputs(index), index)

    table = layer_sensitivity(Spy(), CONFIGS["stock"], loop, batches=3)
    assert table.calls == 3
    assert sorted(index for index in range(12) if measured.count(index) > 3) == [2, 6, 10]
    more = layer_sensitivity(Spy(), CONFIGS["stock"], loop, batches=50)
    assert more.calls == 12


def test_loop_goes_on_from_full_precision(model: Block):
    states: list[Tensor] = []

    def sampler(network: nn.Module) -> None:
        x = inputs(0)
        states.clear()
        for _ in range(4):
            x = x - 0.1 * nn.functional.pad(network(x), (0, 8))
            states.append(x)

    with torch.no_grad():
        sampler(model)
    expected = torch.stack(states)
    layer_sensitivity(model, CONFIGS["stock"], sampler)
    assert torch.equal(torch.stack(states), expected)


@dataclass
class Output:
    sample: Tensor
    extra: Any = None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, "text", torch.tensor(3)),
        lambda y: {"sample": y, "mask": torch.ones(3, dtype=torch.bool)},
        lambda y: Output(y),
        lambda y: [Output((y[:1], {"rest": y[1:]}))],
    ],
    ids=["tuple", "mapping", "dataclass", "nested"],
)
def test_outputs_of_any_form(model: Block, wrap: Callable[[Tensor], Any]):
    class Wrapped(Block):
        def forward(self, x: Tensor) -> Any:
            return wrap(super().forward(x))

    expected = layer_sensitivity(model, CONFIGS["plain"], CALIBRATION)
    found = layer_sensitivity(Wrapped(), CONFIGS["plain"], CALIBRATION)
    assert [row.noise for row in found.layers] == pytest.approx([row.noise for row in expected.layers])


def test_select_picks_what_is_compared(model: Block):
    half = layer_sensitivity(model, CONFIGS["plain"], CALIBRATION, select=lambda y: y[..., :4])
    whole = layer_sensitivity(model, CONFIGS["plain"], CALIBRATION)
    assert half["first"].noise != whole["first"].noise
    with pytest.raises(ValueError, match="no floating-point tensor in the model's output, a Tensor; pick"):
        layer_sensitivity(model, CONFIGS["plain"], CALIBRATION, select=lambda y: None)


def test_inputs_that_the_model_writes_to(model: Block):
    class Careless(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            x.zero_()
            return y

    def loop(network: nn.Module) -> None:
        for seed in range(3):
            network(inputs(seed))

    found = layer_sensitivity(Careless(), CONFIGS["per token"], loop)
    assert found.floor == 0
    assert found == layer_sensitivity(model, CONFIGS["per token"], loop)


def test_dropout_is_off_and_comes_back(model: Block):
    model = nn.Sequential(model, nn.Dropout(0.5)).train()
    model[0].eval()
    before = snapshot(model)
    table = layer_sensitivity(model, CONFIGS["plain"], CALIBRATION)
    assert table.floor == 0
    assert_unchanged(model, before)


def test_floor_of_a_random_model(model: Block, caplog: pytest.LogCaptureFixture):
    class Noisy(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y + 1e-2 * y.std() * torch.randn_like(y)

    with caplog.at_level(logging.WARNING):
        table = layer_sensitivity(Noisy(), CONFIGS["plain"], CALIBRATION)
    assert table.floor == pytest.approx(2e-4, rel=0.5)
    assert "full precision repeats itself to 3" in caplog.text
    assert "repeats itself to" in str(table)


def test_uncalled_layers_are_named(model: Block, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        table = layer_sensitivity(model, CONFIGS["per token"], CALIBRATION)
    assert "the data never reached unused" in caplog.text
    assert (table["unused"].rows, table["unused"].noise) == (0, 0)
    assert "never called" in table.table()


def test_table_text_and_json(model: Block, tmp_path: Any):
    table = layer_sensitivity(model, CONFIGS["plain"], CALIBRATION, parts=True)
    lines = str(table).splitlines()
    assert lines[0].split() == "layer alone, dB activations weights local, dB weights, % multiply-adds, %".split()
    body = [line.split() for line in lines[2 : 2 + len(table.layers)]]
    assert [float(line[1]) for line in body] == sorted(float(line[1]) for line in body)
    assert body[0][0] == "spiky"
    assert sum(float(line[-1]) for line in body if line[-1] != "called") == pytest.approx(100, abs=0.05)
    assert len({len(line) for line in lines[:2]}) == 1
    assert "rank correlation" in lines[-1]
    assert "... and " in table.table(limit=2)
    table.save(tmp_path / "table.json")
    again = SensitivityTable.from_dict(json.loads((tmp_path / "table.json").read_text()))
    assert again == table
    with pytest.raises(ValueError, match="not a sensitivity table"):
        SensitivityTable.from_dict({"layers": []})
    with pytest.raises(KeyError, match="nothing"):
        table["nothing"]


def test_deterministic(model: Block):
    first, second = (layer_sensitivity(model, CONFIGS["segquant"], CALIBRATION) for _ in range(2))
    assert first == second


def test_refusals_leave_the_model_alone(model: Block):
    before = snapshot(model)
    data = iter([inputs(seed) for seed in range(4)])

    def exhausted(network: nn.Module) -> None:
        for x in data:
            network(x)

    runs = 0

    def broken_later(network: nn.Module) -> None:
        nonlocal runs
        runs += 1
        network(inputs(0))
        if runs == 3:  # after calibration and counting: while layers are measured
            raise RuntimeError("disk full")

    left = [inputs(seed) for seed in range(4)]

    def shrinking(network: nn.Module) -> None:
        for x in left:
            network(x)
        left.pop()

    with pytest.raises(ValueError, match="the loop never called the model"):
        layer_sensitivity(model, CONFIGS["stock"], exhausted)
    with pytest.raises(ValueError, match="called the model 4 times when it was run first and 3 times then"):
        layer_sensitivity(model, CONFIGS["stock"], CALIBRATION, score_loop=shrinking)
    with pytest.raises(RuntimeError, match="disk full"):
        layer_sensitivity(model, CONFIGS["stock"], broken_later)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        layer_sensitivity(model, CONFIGS["stock"], CALIBRATION, batches=0)
    nothing = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
    with pytest.raises(ValueError, match="quantizes no layer"):
        layer_sensitivity(model, nothing, CALIBRATION)
    with pytest.raises(ValueError, match="holds NaN or infinity; check the data"):
        layer_sensitivity(
            model, CONFIGS["stock"], CALIBRATION, score_loop=lambda network: network(inputs(0) * math.nan)
        )
    with pytest.raises(ValueError, match="zero on all measured calls"):
        layer_sensitivity(model, CONFIGS["stock"], CALIBRATION, select=lambda y: y * 0)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="went through ModelOpt already"):
        layer_sensitivity(quantized_copy(model, CONFIGS["stock"], CALIBRATION), CONFIGS["stock"], CALIBRATION)
    with pytest.raises(ValueError, match=r"first.weight is not in memory"):
        layer_sensitivity(Block().to("meta"), CONFIGS["stock"], CALIBRATION)


def test_an_own_forward_of_a_layer_survives(model: Block):
    """accelerate's hooks put a forward of their own on modules."""
    own = model.first.forward
    model.first.forward = lambda x: own(x)  # type: ignore[method-assign]
    mine = model.first.forward
    table = layer_sensitivity(model, CONFIGS["per token"], CALIBRATION)
    assert model.first.forward is mine
    assert table["second"].noise == layer_sensitivity(Block(), CONFIGS["per token"], CALIBRATION)["second"].noise


def test_stock_modelopt_configs(model: Block):
    table = layer_sensitivity(model, mtq.INT8_SMOOTHQUANT_CFG, CALIBRATION)
    assert table["spiky"].sqnr > layer_sensitivity(model, CONFIGS["stock"], CALIBRATION)["spiky"].sqnr + 5


def test_packed_layers(model: Block):
    """The same local noise as with simulated quantization, but for ties of rounding; no parts."""
    quantized = quantized_copy(model, CONFIGS["plain"], CALIBRATION)
    simulated = measure(model, quantized, SCORE, local_only=True)
    packed = compress(quantized)
    table = measure(model, packed, SCORE, local_only=True)
    assert [row.name for row in table.layers] == [row.name for row in simulated.layers]
    for row in table.layers:
        assert row.local_noise == pytest.approx(simulated[row.name].local_noise, rel=0.02), row.name
        assert row.weights == simulated[row.name].weights
    alone = measure(model, packed, SCORE)
    assert alone["spiky"].noise == pytest.approx(alone["spiky"].local_noise, rel=1e-6)  # the last layer
    with pytest.raises(ValueError, match="measure parts before compress"):
        measure(model, packed, SCORE, parts=True)
