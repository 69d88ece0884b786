"""The example scripts on the shipped pipeline, with less data than they use by themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import ablation
import modelopt.torch.quantization as mtq
import pytest
import quantize_shapes
from PIL import Image

SMALL = "--steps 8 --calibration-prompts 4 --calibration-steps 4 --unseen-prompts 4 --unseen-steps 4 --images 4".split()


@pytest.mark.slow
def test_main_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    quantize_shapes.main([*SMALL, "--columns", "2", "--out", str(tmp_path), "--rows", "*SMOOTHQUANT*", "SEGQUANT_CFG*"])
    results = json.loads((tmp_path / "results.json").read_text())["quantized"]
    sqnr = {name: row["velocity_sqnr_db"] for name, row in results.items()}
    assert list(sqnr) == [
        "ModelOpt INT8_SMOOTHQUANT_CFG",
        "INT8_SMOOTHQUANT_CFG, Linears only",
        "SEGQUANT_CFG",
        "SEGQUANT_CFG, all layers static",
    ]
    assert sqnr["SEGQUANT_CFG"] > sqnr["ModelOpt INT8_SMOOTHQUANT_CFG"] + 8
    assert sqnr["SEGQUANT_CFG"] > sqnr["INT8_SMOOTHQUANT_CFG, Linears only"] + 2
    for row in results.values():
        assert row["psnr_db"] > 15
        assert 0.5 < row["ssim"] <= 1
        assert 0 <= row["prompts_followed"] <= 1
        assert len(row["velocity_sqnr_db_by_timestep"]) == 4
    picture = Image.open(tmp_path / "comparison.png")
    # Full precision, then three configs with their differences; two columns of 64 x 64 images, twice as large.
    assert picture.size == (180 + 2 * 132, 84 + 7 * 132)
    printed = capsys.readouterr().out
    assert f"| SEGQUANT_CFG | {sqnr['SEGQUANT_CFG']:.1f} |" in printed
    assert "time, text and patch embedders hold" in printed


def test_linears_only_keeps_the_rest_of_the_config():
    limited = quantize_shapes.linears_only(mtq.INT8_SMOOTHQUANT_CFG)
    assert limited["algorithm"] == "smoothquant"
    original = mtq.INT8_SMOOTHQUANT_CFG["quant_cfg"]
    assert len(limited["quant_cfg"]) == len(original)
    changed = [new for new, old in zip(limited["quant_cfg"], original, strict=True) if new != old]
    assert [(entry["quantizer_name"], entry["parent_class"]) for entry in changed] == [
        ("*weight_quantizer", "nn.Linear"),
        ("*input_quantizer", "nn.Linear"),
    ]
    assert not any("parent_class" in entry and entry["parent_class"] == "nn.Linear" for entry in original)


def test_unknown_rows_and_pipelines_are_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match="matches none of: ModelOpt INT8_DEFAULT_CFG"):
        quantize_shapes.main(["--rows", "nothing"])
    with pytest.raises(SystemExit, match="holds no pipeline"):
        quantize_shapes.main(["--pipeline", str(tmp_path)])


@pytest.mark.slow
def test_ablation_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = ablation.main(["--quick", "--weights", "per-channel", "--json", str(tmp_path / "ablation.json")])
    assert json.loads((tmp_path / "ablation.json").read_text()) == {"velocity_sqnr_db": results}
    assert list(results) == ["per-channel"]
    plain, everything = results["per-channel"]["plain"], results["per-channel"]["all"]
    assert len(plain) == len(everything) == 2
    assert all(a > p for a, p in zip(everything, plain, strict=True))
    assert "2 seeds; mean ± standard deviation" in capsys.readouterr().out


def test_ablation_table_and_verdicts():
    rows = {
        "plain": [30.0, 31.0, 32.0],
        "better": [31.0, 32.1, 33.2],
        "same": [30.5, 30.5, 32.0],
        "worse": [29.0, 30.1, 31.2],
    }
    table = ablation.format_table({"per-channel": rows}).splitlines()
    assert table[2] == "| plain | 31.00 ± 1.00 | | |"
    assert table[3] == "| better | 32.10 ± 1.10 | +1.10 ± 0.10 | helps |"
    assert table[4].endswith("| no difference |")
    assert table[5].endswith("| -0.90 ± 0.10 | harms |")
    assert ablation.verdict([1.0]) == "one seed"
    assert math.isnan(ablation.spread([1.0]))
