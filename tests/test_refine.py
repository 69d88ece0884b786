"""Low rank, GPTQ, correction and rotation on whole layers: the module computes what calibration chose."""

from __future__ import annotations

import copy
import logging
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import Tensor, nn

import modelopt_ext
from modelopt_ext.formats import QuantFormat, quantize_dequantize, row_amax
from modelopt_ext.nn import SegLinear
from modelopt_ext.presets import PER_TOKEN, linear_only

INT4_ROWS = {"num_bits": 4, "axis": 0}
INT4_GROUPS = {"num_bits": 4, "block_sizes": {-1: 16, "type": "static"}}
INT8_ROWS = {"num_bits": 8, "axis": 0}
INT8_TENSOR = {"num_bits": 8, "axis": None}
FP8_ROWS = {"num_bits": (4, 3), "axis": 0}
INT4_TOKENS = {"num_bits": 4, **PER_TOKEN}
INT8_TOKENS = {"num_bits": 8, **PER_TOKEN}
INT8_STATIC = {"num_bits": 8, "axis": None}


class Block(nn.Module):
    """AdaLN's chunk into three, then a GELU MLP whose second Linear reads a concatenation: every kind of segment."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(32, 3 * 64)
        self.first = nn.Linear(64, 96)
        self.last = nn.Linear(96 + 64, 48, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(nn.functional.silu(condition))[:, None].chunk(3, dim=-1)
        h = x * (1 + scale) + shift
        return self.last(torch.cat([nn.functional.gelu(self.first(h)), h * gate], dim=-1))


def data(seed: int, batches: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(99)))
    mixing = torch.randn(64, 64, generator=torch.Generator().manual_seed(98)) / 8
    return [
        (
            (torch.randn(8, 40, 64, generator=generator) @ mixing) * spread,
            torch.randn(8, 32, generator=generator),
        )
        for _ in range(batches)
    ]


@pytest.fixture
def model() -> Block:
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    for layer in (block.modulation, block.first, block.last):  # trained weights have a few large directions
        rows, columns = layer.weight.shape
        layer.weight += torch.randn(rows, 4) @ torch.randn(4, columns) / (2 * columns**0.5)
    return block


def quantized(model: nn.Module, weight: dict[str, Any], activation: dict[str, Any] | None, **algorithm: Any) -> Any:
    batches = data(1)

    def loop(module: nn.Module) -> None:
        for x, condition in batches:
            module(x, condition)

    return mtq.quantize(copy.deepcopy(model), linear_only(weight, activation, progress=False, **algorithm), loop)


def noise(model: nn.Module, reference: nn.Module) -> float:
    return sum(float((model(*batch) - reference(*batch)).square().sum()) for batch in data(2))


FORMATS = {
    "W4A8": (INT4_ROWS, INT8_TOKENS),
    "W4A8 groups": (INT4_GROUPS, INT8_TOKENS),
    "W4A4": (INT4_ROWS, INT4_TOKENS),
    "W4A16": (INT4_ROWS, None),
    "W8A8": (INT8_ROWS, INT8_STATIC),
    "W8A8 per tensor": (INT8_TENSOR, INT8_STATIC),
    "FP8": (FP8_ROWS, {"num_bits": (4, 3), "axis": None}),
}


# Not W8A8 with weight scales per channel: static activations are all of its error.
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "W8A8"])
def test_gptq_lowers_the_error_on_unseen_data(model: Block, name: str) -> None:
    weight, activation = FORMATS[name]
    # The modulation has too few rows for GPTQ, and its error would hide that of the others.
    nearest = quantized(model, weight, activation, exclude=["modulation"], samples=4096)
    solved = quantized(model, weight, activation, exclude=["modulation"], samples=4096, gptq=True)
    assert noise(solved, model) < noise(nearest, model)


@pytest.mark.parametrize("name", ["W4A8", "W4A8 groups", "W4A4", "W4A16"])
def test_low_rank_lowers_the_error_further(model: Block, name: str) -> None:
    weight, activation = FORMATS[name]
    without = quantized(model, weight, activation, exclude=["modulation"], gptq=True)
    solved = quantized(model, weight, activation, exclude=["modulation"], gptq=True, low_rank={"rank": 8})
    assert noise(solved, model) < 0.9 * noise(without, model)
    assert any(m.weight_quantizer.down is not None for m in solved.modules() if isinstance(m, SegLinear))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("weight", "activation", "algorithm"),
    [
        (INT8_ROWS, INT8_STATIC, {"gptq": True}),
        (INT8_TENSOR, INT8_STATIC, {"gptq": True, "polarity": "dual"}),
        (INT4_GROUPS, INT8_TOKENS, {"gptq": True, "low_rank": {"rank": 8}, "weight_clip_grid": (1.0, 0.9, 0.8)}),
        (INT4_ROWS, INT4_TOKENS, {"gptq": True, "rotate": True, "low_rank": {"rank": 4}}),
        (FP8_ROWS, INT8_TOKENS, {"gptq": True, "correct_activations": True, "bias_correction": True}),
    ],
)
def test_stored_weights_round_to_the_codes_that_were_chosen(
    model: Block, dtype: torch.dtype, weight: dict[str, Any], activation: dict[str, Any], algorithm: dict[str, Any]
) -> None:
    """Rounding the stored weight gives it back: what GPTQ chose survives smoothing, rotation, branch and storage."""
    batches = [(x.to(dtype), condition.to(dtype)) for x, condition in data(1)]
    cfg = linear_only(weight, activation, progress=False, **algorithm)
    before = {name: value.clone() for name, value in model.to(dtype).state_dict().items()}
    module = mtq.quantize(model, cfg, lambda m: [m(*batch) for batch in batches])
    checked = 0
    for name, layer in module.named_modules():
        if not isinstance(layer, SegLinear):
            continue
        changed = (layer.plain_weight != before[f"{name}.weight"]).any(dim=1)
        bank, layout = layer.weight_quantizer, layer.layout
        codes = bank(layer.plain_weight.float())[changed]
        exact = bank(layer.plain_weight.float(), "residual")
        if bank.smoothing is not None:
            groups = [layout.group_of(i) for i, r in enumerate(layout.weight_slices) for _ in range(r.stop - r.start)]
            exact = exact * bank.smoothing[groups]
        exact = modelopt_ext.nn.rotation.rotate_segments(exact, layout.in_slices, layout.rotation)[changed]
        if not changed.any():
            continue
        # Storage moves a value by at most one rounding of its dtype, which must stay far inside half a step.
        whole = layer.plain_weight.float() if bank.smoothing is None else layer.plain_weight * bank.smoothing[groups]
        off = (codes - exact).abs().max() / whole.abs().max()
        assert off < (1e-5 if dtype == torch.float32 else 2.0**-8 if dtype == torch.bfloat16 else 2.0**-10)
        checked += 1
    assert checked


def test_rotation_is_taken_where_it_lowers_the_error(model: Block) -> None:
    """It spreads outlier channels; on GELU's output, all of one sign, it makes one of the mean."""
    settings: dict[str, Any] = {"alpha": None, "polarity": "none"}
    only_first = ["modulation", "last"]
    plain = quantized(model, INT8_ROWS, INT4_TOKENS, exclude=only_first, **settings)
    searched = quantized(model, INT8_ROWS, INT4_TOKENS, exclude=only_first, rotate="search", **settings)
    assert noise(searched, model) < 0.8 * noise(plain, model)
    assert searched.first.layout.rotation == (64,)
    forced = quantized(model, INT8_ROWS, INT4_TOKENS, rotate=True, **settings)
    assert forced.last.layout.rotation == (32, 64)


@pytest.mark.parametrize("activation", [INT8_TOKENS, INT4_TOKENS])
def test_segments_round_per_token(model: Block, activation: dict[str, Any]) -> None:
    """One scale a token and segment, also on inputs of other sizes than calibration's."""
    layer = quantized(model, INT8_ROWS, activation, alpha=0.5, polarity="none").last
    assert isinstance(layer, SegLinear)
    x = torch.randn(3, 7, 160, generator=torch.Generator().manual_seed(5))
    z = (x / layer.input_quantizer.smoothing[0]).reshape(-1, 160)
    fmt = QuantFormat(activation["num_bits"], per_row=True, dynamic=True)
    parts = [quantize_dequantize(part, row_amax(part, fmt), fmt) for part in z.split([96, 64], dim=1)]
    assert torch.allclose(layer.input_quantizer(x), torch.cat(parts, dim=1).reshape(x.shape), atol=1e-6)


def test_rotate_attribute_of_modelopt_asks_for_the_same(model: Block) -> None:
    ours = quantized(model, INT8_ROWS, INT4_TOKENS, rotate=True)
    theirs = quantized(model, {**INT8_ROWS, "rotate": True}, {**INT4_TOKENS, "rotate": True})
    batch = data(2)[0]
    assert torch.equal(ours(*batch), theirs(*batch))


def test_bias_correction_removes_the_mean_error(model: Block) -> None:
    # Clipping GELU's output to a seventh of its range leaves a one-sided error behind.
    settings: dict[str, Any] = {"alpha": None, "polarity": "none", "clip_grid": (0.15,)}
    batches = data(1)

    def mean_error(module: nn.Module) -> float:
        return float(sum((module(*b) - model(*b)).mean(dim=(0, 1)) for b in batches).norm())

    without = quantized(model, INT8_ROWS, INT8_STATIC, **settings)
    corrected = quantized(model, INT8_ROWS, INT8_STATIC, bias_correction=True, **settings)
    assert mean_error(corrected) < 0.7 * mean_error(without)


def test_save_and_restore_is_bit_equal(model: Block, tmp_path: Any) -> None:
    settings: dict[str, Any] = {"gptq": True, "low_rank": {"rank": 4}, "bias_correction": True, "rotate": "search"}
    module = quantized(model, INT4_GROUPS, INT8_TOKENS, correct_activations=True, **settings)
    mto.save(module, tmp_path / "model.pt")
    restored = mto.restore(copy.deepcopy(model), tmp_path / "model.pt")
    for batch in data(2):
        assert torch.equal(restored(*batch), module(*batch))


def test_fold_weight_changes_nothing(model: Block) -> None:
    module = quantized(model, INT4_ROWS, INT8_TOKENS, gptq=True, low_rank={"rank": 4}, rotate="search")
    batch = data(2)[0]
    before = module(*batch)
    mtq.fold_weight(module)
    assert torch.allclose(module(*batch), before, atol=1e-5 * float(before.abs().max()))


def test_settings_of_single_layers(model: Block) -> None:
    module = quantized(model, INT4_ROWS, INT8_TOKENS, layers={"l*": {"low_rank": {"rank": 16}}}, exclude=["modulation"])
    assert not module.modulation.weight_quantizer.is_enabled
    assert module.last.weight_quantizer.down is not None
    assert not hasattr(module.first.weight_quantizer, "_down") or module.first.weight_quantizer.down is None


@pytest.mark.parametrize(
    ("weight", "activation", "algorithm", "message"),
    [
        (
            INT4_ROWS,
            INT8_TOKENS,
            {"low_rank": {"rank": 500, "over": "refuse"}},
            r"rank 500 .*modulation|modulation.*500",
        ),
        ({"num_bits": 4, "block_sizes": {-1: 48, "type": "static"}}, INT8_TOKENS, {}, r"modulation.*groups of 48"),
        (INT8_ROWS, INT8_STATIC, {"rotate": True}, r"rotate needs dynamic activation scales"),
        (
            {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
            None,
            {},
            r"NVFP4 weights.*GPU",
        ),
        (INT8_ROWS, INT8_STATIC, {"exclude": ["nothing*"]}, r"'nothing\*' matches no quantized Linear"),
        (INT8_ROWS, INT8_STATIC, {"layers": {"no.such": {"gptq": True}}}, r"'no.such' matches no quantized Linear"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    model: Block, weight: dict[str, Any], activation: dict[str, Any] | None, algorithm: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantized(model, weight, activation, **algorithm)


def test_unknown_layer_setting_is_refused(model: Block) -> None:
    with pytest.raises(ValueError, match=r"sets \['samples'\]"):
        quantized(model, INT8_ROWS, INT8_STATIC, layers={"*": {"samples": 3}})


def test_weights_that_are_not_fitted_are_named(model: Block, caplog: pytest.LogCaptureFixture) -> None:
    """The modulation sees one row an item: GPTQ would fit its few rows and go wrong between them."""
    before = model.modulation.weight.clone()
    with caplog.at_level(logging.WARNING, logger="modelopt_ext"):
        module = quantized(model, INT4_ROWS, INT8_TOKENS, gptq=True)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "the weights of modulation are not fitted" in warning
    assert torch.equal(module.modulation.weight, before)
    assert not torch.equal(module.first.weight, model.first.weight)


def test_fewer_rows_than_channels_and_dead_channels(model: Block) -> None:
    x, condition = data(1)[0]
    x[..., 5:40] = 0
    loop = lambda m: m(x[:4, :2], condition[:4])  # noqa: E731
    cfg = linear_only(INT4_ROWS, INT8_TOKENS, progress=False, gptq=True, correct_activations=True)
    module = mtq.quantize(copy.deepcopy(model), cfg, loop)
    assert torch.isfinite(module(x, condition)).all()
    plain = quantized(model, INT4_ROWS, INT8_TOKENS)
    assert noise(module, model) < 4 * noise(plain, model)
