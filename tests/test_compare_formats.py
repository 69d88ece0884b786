"""The table over formats and methods: rows, formats, the journal, and numbers against direct evaluation."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import compare_formats
import modelopt.torch.quantization as mtq
import pytest
import torch
from compare_formats import (
    FP8_TENSOR,
    INT4_CHANNEL,
    INT8_CHANNEL,
    INT8_TOKEN,
    NOTHING,
    OURS,
    PLAIN,
    Journal,
    Measurement,
    Results,
    Row,
    format_of,
    format_table,
    table_rows,
    verdicts,
)
from torch import nn

from modelopt_ext.presets import PRESETS, linear_only
from modelopt_ext.sensitivity import LayerSensitivity, SensitivityTable
from optimum_segquant.evaluation import PeakMemory, generate_images, image_metrics, sample_trajectories, velocity_sqnr

SDXL = compare_formats.PIPELINES / "shapes-sdxl"
SMALL = "--prompts 2 --steps 2 --calibration-steps 2 --unseen-steps 2 --images 1 --seeds 1".split()


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Two rows of the SDXL-style pipeline, run by the command line."""
    path = tmp_path_factory.mktemp("formats") / "run.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *values, **_: lines.append(" ".join(map(str, values))))
        arguments = [*SMALL, "--pipelines", str(SDXL), "--rows", "plain W8A8 per-token", "plain W8A16"]
        compare_formats.main([*arguments, "--json", str(path)])
    return "\n".join(lines), path


def test_table_shows_what_direct_evaluation_gives(printed: tuple[str, Path]) -> None:
    text, path = printed
    pipeline = compare_formats.load_pipeline(SDXL, "cpu")
    options = compare_formats.parse_arguments([*SMALL, "--pipelines", str(SDXL)])
    sampling = compare_formats.sampling(pipeline, 2, batch_size=2)
    assert sampling["guidance_scale"] == 4.0
    assert "max_sequence_length" not in sampling  # SDXL has no T5
    prompts = compare_formats.score_shapes.unseen_prompts(2, seed=compare_formats.UNSEEN_SEED)
    unseen = sample_trajectories(
        pipeline, prompts, seeds=100 * compare_formats.UNSEEN_SEED, num_inference_steps=2, steps=2, height=64, width=64,
        batch_size=2, guidance_scale=4.0,
    )  # fmt: skip
    data = compare_formats.sample(pipeline, 0, options)
    torch.testing.assert_close(unseen[1].output, data.unseen[1].output, atol=0, rtol=0)
    assert not torch.equal(data.calibration[0].inputs["sample"], data.unseen[0].inputs["sample"])

    quantized = copy.deepcopy(pipeline.unet)
    config = linear_only(INT8_CHANNEL, INT8_TOKEN, progress=False, **NOTHING)
    quantized = mtq.quantize(quantized, config, data.calibration.forward_loop)
    expected = velocity_sqnr(quantized, unseen).overall
    original, pipeline.unet = pipeline.unet, quantized
    pictures = generate_images(
        pipeline,
        data.prompts,
        seeds=100 * compare_formats.IMAGE_SEED,
        num_inference_steps=2,
        height=64,
        width=64,
        batch_size=1,
        guidance_scale=4.0,
    )
    pipeline.unet = original
    metrics = image_metrics(pictures, data.reference)

    measured = {m.row: m for m in Journal(path).measurements()}["plain W8A8 per-token"]
    assert measured.sqnr == pytest.approx(expected, abs=1e-3)
    assert measured.psnr == pytest.approx(metrics.psnr, abs=1e-2)
    assert measured.ssim == pytest.approx(metrics.ssim, abs=1e-4)
    assert (measured.kept, measured.dynamic) == (0.0, 1.0)
    line = next(line for line in text.splitlines() if line.startswith("| W8A8 per-token"))
    assert f"| {expected:.2f} ± — | {expected:.2f} | {metrics.psnr:.1f} |" in line
    assert "100.0 |" in line
    assert "shapes-sdxl: the embedders" in text


def test_a_finished_file_is_not_measured_again(printed: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = printed[1]
    before = path.read_bytes()
    arguments = [*SMALL, "--pipelines", str(SDXL), "--rows", "plain W8A16", "--json", str(path)]
    with pytest.raises(SystemExit, match="add --resume"):
        compare_formats.main(arguments)
    with pytest.raises(SystemExit, match="was measured with"):
        compare_formats.main([*arguments, "--resume", "--steps", "3"])
    path.write_bytes(before + b'{"row": "plain W8A16", "pip')  # killed while writing
    compare_formats.main([*arguments, "--resume"])
    assert path.read_bytes() == before
    table = capsys.readouterr().out
    assert "| W8A16 | plain W8A16 |" in table
    assert "per-token |" not in table


def test_rows_cover_the_formats_and_presets() -> None:
    rows = table_rows()
    configs = [config for row in rows.values() for config in row.configs]
    for name, preset in PRESETS.items():
        quiet = {**preset, "algorithm": {**preset["algorithm"], "progress": False}}
        assert quiet in configs, name
    formats = {method: {row.format for row in rows.values() if row.method == method} for method in ("ModelOpt", PLAIN)}
    assert {"W8A8 static", "FP8", "W8A16", "W4A16", "W4A8", "W4A4", "NVFP4"} <= formats["ModelOpt"]
    assert {"W8A8 static", "W8A8 per-token", "FP8", "W8A16", "W4A16", "W4A8", "W4A4"} == formats[PLAIN]
    assert rows["SEGQUANT_INT8_CFG"].format == "W8A8 static"
    assert rows["paper W4A4"].format == "W4A4"
    assert [config["algorithm"]["alpha"] for config in rows["paper W4A4"].configs] == [0.5, "search"]
    assert rows["ModelOpt NVFP4_DEFAULT_CFG"].needs_gpu
    assert not rows["ModelOpt W4A8_AWQ_BETA_CFG"].needs_gpu
    for name in compare_formats.QUICK_ROWS:
        assert name in rows


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (mtq.INT8_SMOOTHQUANT_CFG, "W8A8 static"),
        (mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, "FP8"),
        (mtq.INT4_AWQ_CFG, "W4A16"),
        (mtq.W4A8_AWQ_BETA_CFG, "W4A8"),
        (mtq.NVFP4_DEFAULT_CFG, "NVFP4"),
        (linear_only(INT8_CHANNEL, INT8_TOKEN), "W8A8 per-token"),
        (linear_only(INT8_CHANNEL, {"num_bits": 8, "axis": None, "type": "dynamic"}), "W8A8 per-token"),
        (linear_only(INT4_CHANNEL, None), "W4A16"),
    ],
)
def test_format_of(config: dict, expected: str) -> None:
    assert format_of(config) == expected


def test_format_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="quantizes no weights"):
        format_of({"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"})


def rows_of(*names: str) -> list[Row]:
    return [table_rows()[name] for name in names]


def test_table_means_and_verdicts() -> None:
    names = ("ModelOpt INT8_DEFAULT_CFG", "paper W8A8", "SEGQUANT_INT8_CFG")
    filled: dict[str, Any] = {
        "psnr": 30.0,
        "ssim": 0.9,
        "seconds": 2.0,
        "memory": 500.0,
        "memory_rise": 50.0,
        "kept": 0.0,
        "dynamic": 0.25,
    }
    measured = [
        Measurement(name, pipeline, seed, sqnr=base + step + seed, **filled)
        for name, base in zip(names, (30.0, 31.0, 34.0), strict=True)
        for pipeline, step in (("a", 0.0), ("b", 10.0))
        for seed in (0, 1, 2)
    ]
    results = Results(measured, rows_of(*names))
    ours = table_rows()["SEGQUANT_INT8_CFG"]
    assert results.sqnr(ours) == pytest.approx(40.0)
    line = format_table(results).splitlines()[-1]
    assert line.startswith(
        "|  | SEGQUANT_INT8_CFG | 35.00 ± 1.00 | 45.00 ± 1.00 | 40.00 | 30.0 | 0.900 | 2.0 | 500 (+50) |"
    )
    assert line.endswith("| 0.0 | 25.0 |")
    assert "ModelOpt INT8_DEFAULT_CFG +4.00 dB (target +3: reached)" in verdicts(results)
    assert "paper W8A8 +3.00 dB (target +0: reached)" in verdicts(results)
    # A row that failed on one pipeline has no mean over the pipelines, and is not the best of anything.
    failed = [m for m in measured if (m.row, m.pipeline) != ("SEGQUANT_INT8_CFG", "b")]
    failed.append(Measurement("SEGQUANT_INT8_CFG", "b", 0, error="ValueError: no"))
    results = Results(failed, rows_of(*names))
    assert math.isnan(results.sqnr(ours))
    assert verdicts(results) == ""
    assert "SEGQUANT_INT8_CFG did not run on 1 (b 0, ...): ValueError: no" in compare_formats.notes(results, {})


def test_a_row_that_fails_is_reported_and_the_better_config_counts() -> None:
    pipeline = compare_formats.load_pipeline(SDXL, "cpu")
    options = compare_formats.parse_arguments([*SMALL, "--pipelines", str(SDXL)])
    data = compare_formats.sample(pipeline, 0, options)
    broken = linear_only(FP8_TENSOR, FP8_TENSOR, progress=False, polarity="dual8")
    result = compare_formats.measure_row(Row("broken", OURS, (broken,)), data, "p", 0)
    assert result.error is not None
    assert result.error.startswith("ValueError: polarity='dual8' needs integer activations")
    assert result.sqnr is None

    coarse, fine = ({"num_bits": bits, "axis": 0} for bits in (3, 8))
    both = tuple(linear_only(weight, None, progress=False, **NOTHING) for weight in (coarse, fine))
    result = compare_formats.measure_row(Row("both", OURS, both), data, "p", 0)
    assert result.choice == 1
    assert result.sqnr is not None
    assert result.sqnr > 30


def test_layer_counts_name_the_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = compare_formats.load_pipeline(SDXL, "cpu")
    options = compare_formats.parse_arguments([*SMALL, "--pipelines", str(SDXL)])
    data = compare_formats.sample(pipeline, 0, options)
    monkeypatch.setitem(compare_formats.PER_LAYER_FORMATS, "coarse", ({"num_bits": 8, "axis": None}, INT8_TOKEN))
    monkeypatch.setitem(compare_formats.STEPS, "same", (NOTHING, NOTHING))
    errors = compare_formats.LayerErrors(data, "coarse")
    count = compare_formats.count_layers(errors, "same", "p", 0)
    linears = [name for name, module in pipeline.unet.named_modules() if isinstance(module, nn.Linear)]
    assert (count.layers, count.worse, count.gain) == (len(linears), (), 0.0)
    values = errors(NOTHING)
    assert set(values) == set(linears)
    assert all(20 < value < 70 for value in values.values())

    # 20 dB with it and 21 dB without: worse; the others 10 dB better or equal.
    monkeypatch.setitem(compare_formats.STEPS, "other", ({"alpha": 0.5}, {"alpha": None}))
    noises = iter([{"a": 1e-2, "b": 1e-3, "c": 1e-3, "d": 0.0}, {"a": 10**-2.1, "b": 1e-2, "c": 1e-3, "d": 0.0}])

    def fake_measure(*_: object, **__: object) -> SensitivityTable:
        return SensitivityTable(tuple(LayerSensitivity(n, 1, 1, 1, noise) for n, noise in next(noises).items()), 1)

    monkeypatch.setattr(compare_formats, "quantized_copy", lambda model, config, loop: model)
    monkeypatch.setattr(compare_formats, "measure", fake_measure)
    count = compare_formats.count_layers(compare_formats.LayerErrors(data, "coarse"), "other", "p", 0)
    assert count.layers == 4
    assert [(name, round(loss, 6)) for name, loss in count.worse] == [("a", 1.0)]
    assert count.gain == pytest.approx((-1 + 10 + 0) / 3)
    text = compare_formats.layer_lines([count], "x")
    assert text.splitlines() == [
        "x: not worse in 3 of 4 Linears, 75.0 % (target 95 %: missed), mean gain +3.00 dB",
        "    a: -1.00 dB",
    ]
    assert "p a: -1.00 dB, 2 times" in compare_formats.layer_lines([count, count], "x")


def test_journal_keeps_the_last_of_equal_measurements(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a" / "run.jsonl")
    journal.start({"steps": 3}, resume=False)
    for sqnr in (1.0, 2.0):
        journal.append({"row": "r", "pipeline": "p", "seed": 0, "sqnr": sqnr})
    assert journal.settings() == {"steps": 3}
    assert journal.measurements() == [Measurement("r", "p", 0, sqnr=2.0)]
    assert all(json.loads(line) for line in journal.path.read_text().splitlines())


def test_printing_part_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the rows asked for count, whatever else the file holds: rows of another version, rows that failed."""
    journal = Journal(tmp_path / "run.jsonl")
    journal.start({"steps": 3}, resume=False)
    numbers = ("sqnr", "psnr", "ssim", "seconds", "memory", "memory_rise", "kept", "dynamic")
    for seed, pipeline in ((0, "a"), (1, "a"), (0, "b"), (1, "b")):
        journal.append({"row": "plain W8A16", "pipeline": pipeline, "seed": seed, **dict.fromkeys(numbers, 1.0)})
    for name in ("SEGQUANT_OF_ANOTHER_VERSION_CFG", "plain W4A4"):
        journal.append({"row": name, "pipeline": "c", "seed": 0, "error": "ValueError: no"})
    compare_formats.main(["--print", "--json", str(journal.path), "--rows", "plain W8A16"])
    printed = capsys.readouterr().out
    assert "shapes-c" not in printed
    assert "| W8A16 | plain W8A16 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 |" in printed
    assert "no" not in printed.split("---|\n")[1].split("Mean ±")[0]
    assert "over 2 seeds" in printed
    with pytest.raises(SystemExit, match="1 measurements of rows that are not ModelOpt's failed"):
        compare_formats.main(["--print", "--json", str(journal.path)])


def test_peak_memory_sees_a_large_tensor_come_and_go() -> None:
    with PeakMemory("cpu") as memory:
        large = torch.ones(64 * 2**20 // 4)  # 64 MiB
        large += 1
        del large
    assert 60 * 2**20 < memory.peak - memory.before < 200 * 2**20
