"""Mixed precision: the solver against brute force, budgets, what the mix does to a model, refusals."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import random
from collections.abc import Sequence
from typing import Any

import mixed_precision as example
import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from test_sensitivity import CALIBRATION, SCORE, Block, assert_unchanged, inputs, loop_over, noise_of, snapshot
from tiny_pipelines import tiny_sd3_pipeline
from torch import Tensor, nn

from modelopt_ext.config import SegQuantCalibConfig
from modelopt_ext.mixed_precision import (
    DEFAULT_CANDIDATES,
    Allocation,
    Candidate,
    CandidateScores,
    CostModel,
    LayerScores,
    allocate,
    score_candidates,
)
from modelopt_ext.presets import PER_TOKEN

W8, W4, A8 = {"num_bits": 8, "axis": 0}, {"num_bits": 4, "axis": 0}, {"num_bits": 8, "axis": None}
TOKEN = {"num_bits": 8, **PER_TOKEN}
FEW = (Candidate("static", W8, A8), Candidate("token", W8, TOKEN), Candidate("w4", W4, TOKEN), Candidate("full"))
QUICK: dict[str, Any] = {"alpha": None, "progress": False}
MANY = loop_over(range(24))  # enough calls for the search to be sure of what it gains


def made_up(seed: int, layers: int = 4, candidates: int = 3) -> CandidateScores:
    """Random layers whose noises span six orders of magnitude."""
    draw = random.Random(seed)
    formats = [Candidate("a", W4, TOKEN), Candidate("b", W8, A8), Candidate("c", W8), Candidate("d", W4)][:candidates]
    rows = []
    for index in range(layers):
        gain = 10 ** draw.uniform(-8, -2)
        rows.append(
            LayerScores(
                f"layer{index}",
                draw.choice([16, 32, 48]),
                draw.choice([16, 64, 80]),
                rows=draw.choice([2, 64, 1024]),
                calls=draw.choice([1, 2]),
                noise={c.name: gain * 2 ** draw.uniform(-8, 8) for c in formats},
                split={"b": draw.choice([0.0, 0.5, 1.0])},
                branch={"c": draw.choice([0, 300])},
            )
        )
    return CandidateScores(tuple(formats), tuple(rows), kept={"excluded": draw.choice([0, 300])})


def brute_force(
    scores: CandidateScores, bits: float | None, time: float | None, ties: Sequence[Sequence[str]] = ()
) -> Allocation | None:
    best = None
    unit = scores.uniform("a").time
    for combination in itertools.product([c.name for c in scores.candidates], repeat=len(scores.layers)):
        mix = Allocation(scores, dict(zip([layer.name for layer in scores.layers], combination, strict=True)))
        if any(len({mix.choices[name] for name in tie}) > 1 for tie in ties):
            continue
        if bits is not None and mix.bits > bits * (1 + 1e-12):
            continue
        if time is not None and mix.time > time * unit * (1 + 1e-12):
            continue
        if best is None or mix.predicted_sqnr > best.predicted_sqnr:
            best = mix
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("use_bits", "use_time"), [(True, False), (False, True), (True, True)])
def test_solver_equals_brute_force(seed: int, use_bits: bool, use_time: bool):
    scores = made_up(seed)
    low, high = scores.uniform("a"), scores.uniform("c")
    for share in (0.0, 0.2, 0.5, 0.8):
        bits = low.bits + share * (high.bits - low.bits) if use_bits else None
        time = 1.0 + share * (high.time / low.time - 1) + (0.05 if use_bits else 0.0) if use_time else None
        expected = brute_force(scores, bits, time)
        if expected is None:
            with pytest.raises(ValueError, match="no mix"):
                scores.allocate(bits=bits, time=time)
            continue
        mix = scores.allocate(bits=bits, time=time)
        assert mix.predicted_sqnr == pytest.approx(expected.predicted_sqnr, abs=1e-6)
        assert bits is None or mix.bits <= bits * (1 + 1e-9)
        assert time is None or mix.time_relative_to("a") <= time * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_tied_layers_agree_and_are_best_so(seed: int):
    scores = made_up(seed, candidates=4)
    # Overlapping groups are one group; a name that is no candidate's layer does not matter.
    scores = CandidateScores(
        scores.candidates, scores.layers, shared_inputs=(("layer0", "layer2"), ("layer2", "layer3"), ("layer1", "x"))
    )
    mix = scores.allocate(bits=6.5, tie_shared_inputs=True)
    assert mix.choices["layer0"] == mix.choices["layer2"] == mix.choices["layer3"]
    expected = brute_force(scores, 6.5, None, ties=[("layer0", "layer2", "layer3")])
    assert expected is not None
    assert mix.predicted_sqnr == pytest.approx(expected.predicted_sqnr, abs=1e-6)
    assert scores.allocate(bits=6.5).predicted_sqnr >= mix.predicted_sqnr


def test_hundreds_of_layers_are_solved_within_the_budget():
    scores = made_up(0, layers=400, candidates=4)
    mix = scores.allocate(bits=5.0, time=1.03)
    assert 4.99 < mix.bits <= 5.0 * (1 + 1e-9)
    assert mix.time_relative_to("a") <= 1.03 * (1 + 1e-9)
    # No exchange of one layer's candidate is possible any more.
    by_name = {candidate.name: candidate for candidate in scores.candidates}
    elements = sum(layer.weights for layer in scores.layers) + scores.kept["excluded"]
    spare_bits = (5.0 - mix.bits) * elements
    spare_time = 1.03 * scores.uniform("a").time - mix.time
    for layer in scores.layers:
        now = mix.choices[layer.name]
        for name, candidate in by_name.items():
            if layer.noise[name] < layer.noise[now] * (1 - 1e-6):
                more_bits = layer.bits(candidate) - layer.bits(by_name[now])
                more_time = layer.time(candidate, CostModel()) - layer.time(by_name[now], CostModel())
                gain = layer.noise[now] - layer.noise[name]
                total = 10 ** (-mix.predicted_sqnr / 10)
                assert more_bits > spare_bits - 1e-6 or more_time > spare_time - 1e-6 or gain < 1e-6 * total


def test_impossible_budgets_say_what_is_possible():
    scores = made_up(1)
    least = min(scores.uniform("a").bits, scores.uniform("b").bits)
    with pytest.raises(ValueError, match=rf"no mix of a, b, c meets bits=2: the smallest possible is bits={least:.4g}"):
        scores.allocate(bits=2)
    with pytest.raises(ValueError, match=r"meets bits=-1: the smallest possible"):
        scores.allocate(bits=-1)
    with pytest.raises(ValueError, match=r"meets time=0.01: the smallest possible is time=1$"):
        scores.allocate(time=0.01)
    # Fewest bits take candidate a everywhere, whose time is 1 by definition.
    with pytest.raises(ValueError, match=r"together: within these bits the smallest possible is time=1$"):
        scores.allocate(bits=least, time=0.99, costs=CostModel(per_token=200.0))
    with pytest.raises(ValueError, match=r"give a budget: bits=4\.5"):
        scores.allocate()
    with pytest.raises(ValueError, match="no candidate 'z'; there are a, b, c"):
        scores.allocate(bits=8, only=["a", "z"])
    with pytest.raises(ValueError, match="leaves no candidate"):
        scores.allocate(bits=8, only=[])
    with pytest.raises(ValueError, match="no candidate 'z'"):
        scores.allocate(time=1, time_of="z")
    with pytest.raises(ValueError, match="time_of='a' says what time counts in: give time"):
        scores.allocate(bits=8, time_of="a")


def test_cost_model_by_hand():
    costs = CostModel()
    static, token, wide, w4 = Candidate("s", W8, A8), Candidate("t", W8, TOKEN), Candidate("w"), Candidate("4", W4)
    # Many rows: bound by multiply-adds.
    assert costs.time(1000, 64, 32, wide) == 1000 * 64 * 32
    assert costs.time(1000, 64, 32, static) == 1000 * 64 * 32 / 2
    assert costs.time(1000, 64, 32, static, split=0.25) == 1000 * 64 * 32 / 2 * 1.25
    assert costs.time(1000, 64, 32, token) == 1000 * 64 * 32 / 2 + 16 * 1000 * 64
    assert costs.time(1000, 64, 32, w4) == 1000 * 64 * 32  # 16-bit activations: 16-bit products
    assert costs.time(1000, 64, 32, wide, branch=8 * (64 + 32)) == 1000 * (64 * 32 + 8 * (64 + 32))
    # One row: bound by reading the weight, and a second product is free.
    assert costs.time(1, 64, 32, wide) == 160 * 64 * 32
    assert costs.time(1, 64, 32, static) == costs.time(1, 64, 32, static, split=1.0) == 80 * 64 * 32
    assert costs.time(1, 64, 32, w4) == 40 * 64 * 32
    ada = CostModel(compute={16: 1.0, 8: 0.4})
    assert ada.time(1000, 64, 32, static) == pytest.approx(0.4 * 1000 * 64 * 32)
    with pytest.raises(ValueError, match="compute needs a cost for 16 bits"):
        CostModel(compute={8: 0.5})
    with pytest.raises(ValueError, match=r"compute needs a cost for 16 bits, got widths \[8, 32\]"):
        CostModel(compute={8: 0.5, 32: 2.0})


def test_bits_of_formats():
    assert Candidate("").weight_bits == 16
    assert Candidate("", {"num_bits": (4, 3)}).weight_bits == 8
    assert Candidate("", {"num_bits": 4, "block_sizes": {-1: 64}}).weight_bits == 4.25
    nvfp4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
    assert Candidate("", nvfp4).weight_bits == 4.5
    token = Candidate("", W8, TOKEN)
    assert (token.activation_bits, token.is_dynamic) == (8, True)
    assert not Candidate("", W8, A8).is_dynamic
    assert Candidate("").is_full_precision
    layer = LayerScores("l", 32, 16, 1, 1, {}, branch={"r": 192})
    assert layer.bits(Candidate("r", W4)) == 32 * 16 * 4 + 192 * 16


@pytest.fixture(scope="module")
def scores() -> CandidateScores:
    return score_candidates(Block(), CALIBRATION, candidates=FEW, algorithm=QUICK, score_loop=SCORE)


def test_the_sensitive_layer_gets_the_bits(scores: CandidateScores):
    """``spiky`` has one input channel 300 times larger than the others: no scale of a whole row suits it."""
    mix = scores.allocate(bits=7.0)
    assert mix.choices["spiky"] == "full"
    assert mix.bits <= 7.0
    # unused: never called, kept in 16 bits, and counted.
    assert scores.kept == {"unused": 16}
    elements = {"first": 1024, "second": 512, "twice": 256, "spiky": 128, "unused": 16}
    bits = {"static": 8, "token": 8, "w4": 4, "full": 16}
    used = sum(elements[name] * bits[mix.choices.get(name, "full")] for name in elements)
    assert mix.bits == pytest.approx(used / sum(elements.values()))
    assert mix.predicted_sqnr > scores.uniform("w4").predicted_sqnr + 10
    assert scores.allocate(bits=16).choices == dict.fromkeys(["first", "second", "twice", "spiky"], "full")
    text = str(mix)
    assert "kept in full precision: unused" in text
    assert f"{mix.bits:.3f} bits a weight; predicted {mix.predicted_sqnr:.1f} dB" in text


def test_time_budget_spends_where_it_pays(scores: CandidateScores):
    static = scores.uniform("static")
    mix = scores.allocate(time=1.25)
    assert 1 < mix.time_relative_to("static") <= 1.25
    assert mix.predicted_sqnr > static.predicted_sqnr + 3
    assert scores.allocate(time=1.25, only=["static"]).choices == static.choices
    assert scores.allocate(time=1.0, time_of="token").time <= scores.uniform("token").time


def settings(model: nn.Module) -> dict[str, Any]:
    return {
        name: (q.num_bits, q.axis, q._dynamic, None if q.amax is None else q.amax.tolist())
        for name, q in model.named_modules()
        if isinstance(q, TensorQuantizer) and q.is_enabled
    }


def test_a_mix_treats_each_layer_as_its_candidate_did(scores: CandidateScores):
    model = Block()
    choices = {"first": "static", "second": "w4", "twice": "token", "spiky": "full"}
    mix = Allocation(scores, choices)
    quantized = mtq.quantize(copy.deepcopy(model), mix.config(), CALIBRATION)
    found = settings(quantized)
    expected = {}
    for candidate in FEW[:3]:
        uniform = mtq.quantize(copy.deepcopy(model), scores.uniform(candidate.name).config(), CALIBRATION)
        chosen = tuple(f"{name}." for name, choice in choices.items() if choice == candidate.name)
        expected |= {name: value for name, value in settings(uniform).items() if name.startswith(chosen)}
    assert found == expected
    assert any(name.startswith("second.") for name in found)
    assert not any(name.startswith("spiky.") for name in found)
    # Three layers are rounded, and their errors add.
    measured = -10 * math.log10(noise_of(model, quantized))
    assert mix.predicted_sqnr == pytest.approx(measured, abs=1.0)


def test_split_and_polarity_by_layer():
    candidates = (
        Candidate("none", W8, A8, {"polarity": "none"}),
        Candidate("split", W8, A8, {"second_product": True}),
    )
    model = Block()
    scores = score_candidates(model, MANY, candidates=candidates, algorithm=QUICK, score_loop=SCORE)
    second = next(layer for layer in scores.layers if layer.name == "second")
    assert second.split["split"] == 1.0
    assert second.split.get("none", 0.0) == 0.0
    mix = Allocation(scores, {"first": "none", "second": "split", "twice": "none", "spiky": "none"})
    config = mix.config()
    assert config["algorithm"]["layers"]["second"] == {"second_product": True}
    quantized = mtq.quantize(copy.deepcopy(model), config, MANY)
    assert quantized.second.layout.polarity == ("dual8",)
    for name in ("first", "twice", "spiky"):
        layout = getattr(quantized.get_submodule(name), "layout", None)
        assert layout is None or set(layout.polarity) == {"none"}
    measured = -10 * math.log10(noise_of(model, quantized))
    assert mix.predicted_sqnr == pytest.approx(measured, abs=1.0)


def test_settings_by_layer_that_all_candidates_share(scores: CandidateScores):
    """They were there when the candidates were measured, and hold in the mix against a candidate's own."""
    own = {"layers": {"sec*": {"second_product": False}, "second": {"polarity": "shift"}}}
    split = Candidate("split", W8, A8, {"second_product": True, "alpha": 0.5})
    found = score_candidates(Block(), MANY, candidates=[FEW[0], split], algorithm={**QUICK, **own}, score_loop=SCORE)
    config = found.uniform("split").config()
    fields = SegQuantCalibConfig.model_validate(config["algorithm"])
    second, first = fields.for_layer("second"), fields.for_layer("first")
    assert (second.second_product, second.polarity, second.alpha) == (False, "shift", 0.5)
    assert (first.second_product, first.polarity, first.alpha) == (True, "auto", 0.5)
    quantized = mtq.quantize(Block(), config, MANY)
    assert getattr(quantized.second, "layout", None) is None or quantized.second.layout.polarity == ("none",)
    assert found.layers[1].split.get("split", 0.0) == 0
    measured = -10 * math.log10(noise_of(Block(), quantized))
    assert found.uniform("split").predicted_sqnr == pytest.approx(measured, abs=1.0)


def test_settings_of_four_bits_by_layer():
    """GPTQ and a low-rank branch for one layer only; its factors count as weight bits."""
    fitted = Candidate("fitted", W4, TOKEN, {"gptq": True, "low_rank": {"rank": 4}})
    model = Block()
    scores = score_candidates(
        model, CALIBRATION, candidates=(FEW[2], fitted), algorithm=QUICK, score_loop=SCORE, exclude=["unused"]
    )
    first = next(layer for layer in scores.layers if layer.name == "first")
    assert first.branch == {"fitted": 4 * (16 + 64)}
    assert first.noise["fitted"] < first.noise["w4"]
    mix = Allocation(scores, {"first": "fitted", "second": "w4", "twice": "w4", "spiky": "w4"})
    assert mix.bits == pytest.approx((4 * 1920 + 16 * 4 * (16 + 64) + 16 * 16) / 1936)
    quantized = mtq.quantize(copy.deepcopy(model), mix.config(), CALIBRATION)
    assert quantized.first.weight_quantizer.up.shape == (64, 4)
    assert getattr(quantized.second.weight_quantizer, "up", None) is None
    measured = -10 * math.log10(noise_of(model, quantized))
    assert mix.predicted_sqnr == pytest.approx(measured, abs=1.0)


def test_local_scores(scores: CandidateScores):
    local = score_candidates(Block(), CALIBRATION, candidates=FEW, algorithm=QUICK, score_loop=SCORE, scores="local")
    for true, guessed in zip(scores.layers, local.layers, strict=True):
        assert guessed.noise["w4"] == true.noise["w4"]  # the reference is measured
        assert guessed.noise["full"] == 0
        for name in ("static", "token"):
            assert 0.3 < guessed.noise[name] / true.noise[name] < 3
    assert any(a.noise["token"] != b.noise["token"] for a, b in zip(scores.layers, local.layers, strict=True))


def test_allocate_is_both_steps_and_deterministic(scores: CandidateScores):
    mixes = [
        allocate(Block(), CALIBRATION, bits=6, candidates=FEW, algorithm=QUICK, score_loop=SCORE) for _ in range(2)
    ]
    assert mixes[0] == mixes[1]
    assert mixes[0].choices == scores.allocate(bits=6).choices
    assert mixes[0].config() == scores.allocate(bits=6).config()


def test_excluded_layers(scores: CandidateScores, tmp_path: Any):
    measured = score_candidates(
        Block(),
        CALIBRATION,
        candidates=FEW[:3],
        algorithm={**QUICK, "exclude": ["first"]},
        score_loop=SCORE,
        exclude=["sp*"],
    )
    assert measured.kept == {"first": 1024, "spiky": 128, "unused": 16}
    mix = measured.allocate(bits=11.9)
    assert not any("spiky" in entry["quantizer_name"] for entry in mix.config()["quant_cfg"])
    assert mix.bits <= 11.9
    with pytest.raises(ValueError, match=r"the smallest possible is bits=11.2"):
        measured.allocate(bits=8)
    mix.save(tmp_path / "mix.json")
    assert json.loads((tmp_path / "mix.json").read_text())["choices"] == mix.choices
    with pytest.raises(ValueError, match="every layer stays in full precision"):
        scores.uniform("full").config()


def test_tied_by_what_the_model_shares():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
            with torch.no_grad():
                self.v.weight.mul_(30)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))

    measured = score_candidates(Attention(), CALIBRATION, candidates=FEW[1:3], algorithm=QUICK)
    assert measured.shared_inputs == (("k", "q", "v"),)
    free = measured.allocate(bits=6)
    assert {free.choices["v"], free.choices["out"]} == {"token"}
    tied = measured.allocate(bits=6, tie_shared_inputs=True)
    assert tied.choices == {"q": "w4", "k": "w4", "v": "w4", "out": "token"}


def test_refusals_leave_the_model_alone(caplog: pytest.LogCaptureFixture):
    model = Block()
    before = snapshot(model)

    def broken(network: nn.Module) -> None:
        network(inputs(0))
        raise RuntimeError("disk full")

    with pytest.raises(ValueError, match="pass forward_loop, which calls the model on real data"):
        allocate(model, None, bits=5)
    with pytest.raises(ValueError, match="give a budget"):
        allocate(model, CALIBRATION)
    with pytest.raises(ValueError, match=r"names of their own, .* got \['token', 'token'\]"):
        allocate(model, CALIBRATION, bits=5, candidates=[FEW[1], FEW[1]])
    with pytest.raises(ValueError, match="there must be at least one"):
        allocate(model, CALIBRATION, bits=5, candidates=[])
    with pytest.raises(ValueError, match="all candidates are full precision"):
        allocate(model, CALIBRATION, bits=5, candidates=[FEW[3]])
    with pytest.raises(ValueError, match=r"'\*attention\*' matches no Linear; names are like first, second, twice"):
        allocate(model, CALIBRATION, bits=5, exclude=["*attention*"])
    for policy in ("embedders", "last_layers"):
        with pytest.raises(ValueError, match=f"{policy} .*; leave {policy}='as_configured'"):
            allocate(model, CALIBRATION, bits=5, algorithm={policy: "eight_bit"})
    with pytest.raises(ValueError, match="candidate 'x': 'samples' can't be set by layer"):
        Candidate("x", W8, None, {"samples": 8})
    with pytest.raises(ValueError, match="scores is 'measured' or 'local', got 'guess'"):
        allocate(model, CALIBRATION, bits=5, scores="guess")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="candidate 'static': forward_loop raised RuntimeError: disk full"):
        allocate(model, broken, bits=5, candidates=FEW)
    odd = Candidate("odd", {"num_bits": 4, "axis": 1}, TOKEN)
    with pytest.raises(ValueError, match=r"candidate 'odd': .*axis=1 is not supported"):
        allocate(model, CALIBRATION, bits=5, candidates=[odd])
    assert_unchanged(model, before)
    with caplog.at_level(logging.WARNING):
        score_candidates(model, CALIBRATION, candidates=FEW[:2], algorithm=QUICK, batches=1)
    assert "the data never reached unused; they stay in full precision" in caplog.text


def test_default_candidates():
    assert len({candidate.name for candidate in DEFAULT_CANDIDATES}) == len(DEFAULT_CANDIDATES)
    bits = {(c.weight_bits, c.activation_bits, c.is_dynamic) for c in DEFAULT_CANDIDATES}
    assert bits == {(8, 8, False), (8, 8, True), (8, 16, False), (4, 8, True), (4, 16, False), (16, 16, False)}


@pytest.mark.slow
def test_example(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    few = [c for c in example.CANDIDATES if c.name in ("w8a8", "w8a16", "w16a16")]
    monkeypatch.setattr(example, "CANDIDATES", few)
    monkeypatch.setattr(example, "load_pipeline", lambda folder: tiny_sd3_pipeline())
    path = tmp_path / "results.json"
    rows = {row.name: row for row in example.main(["--quick", "--json", str(path), "--times", "--bits", "12"])}
    assert list(rows) == ["w8a8 everywhere", "w8a16 everywhere", "mix, 12 bits", "mix, 12 bits, 8-bit activations"]
    mix, narrow = rows["mix, 12 bits"], rows["mix, 12 bits, 8-bit activations"]
    assert mix.mix.bits <= 12 + 1e-9
    assert mix.measured > rows["w8a16 everywhere"].measured + 1
    assert set(narrow.mix.choices.values()) == {"w8a8"}
    assert narrow.measured == rows["w8a8 everywhere"].measured
    for row in rows.values():
        assert row.mix.predicted_sqnr == pytest.approx(row.measured, abs=3)
    printed = capsys.readouterr().out
    assert f"| mix, 12 bits | {mix.mix.bits:.2f} |" in printed
    saved = json.loads(path.read_text())
    assert saved["rows"]["w8a16 everywhere"]["measured_sqnr_db"] == rows["w8a16 everywhere"].measured
    assert len(saved["sensitivity"]["layers"]) > 10
