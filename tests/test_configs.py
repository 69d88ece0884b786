"""Quantization configs by name, from YAML files and dicts; wrong ones end in one line that says what is meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest

import modelopt_ext
from modelopt_ext import recipes
from modelopt_ext.export.native import native_config
from optimum_segquant.configs import is_segquant, preset_names, resolve_config, with_algorithm

RECIPE = recipes.path("segquant_int8").read_text()


def test_presets_by_name():
    names = preset_names()
    assert set(modelopt_ext.presets.PRESETS) <= set(names)
    assert names[0] == "SEGQUANT_CFG"
    assert names[len(modelopt_ext.presets.PRESETS)] == "NATIVE_FP8_CFG"
    for name in names:
        assert resolve_config(name).name == name
    assert resolve_config("segquant_w4a8").config == modelopt_ext.SEGQUANT_W4A8_CFG
    assert resolve_config("native_fp8").config == native_config("fp8")
    assert resolve_config("INT8_DEFAULT_CFG").config == mtq.INT8_DEFAULT_CFG
    copied = resolve_config("SEGQUANT_CFG").config
    copied["algorithm"]["alpha"] = 7
    assert modelopt_ext.SEGQUANT_CFG["algorithm"].get("alpha") != 7


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_are_their_presets(name: str):
    found = resolve_config(recipes.path(name))
    assert found.name == f"{name}.yaml"
    assert is_segquant(found.config)
    expected = modelopt_ext.SegQuantCalibConfig.model_validate(resolve_config(name).config["algorithm"])
    assert modelopt_ext.SegQuantCalibConfig.model_validate(found.config["algorithm"]) == expected


def test_files_and_dicts(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: segquant_w4a8\nalgorithm:\n  exclude: [proj_out]\n  seed: 3\n")
    found = resolve_config(path)
    assert found.name == "mine.yaml"
    assert found.config == with_algorithm(modelopt_ext.SEGQUANT_W4A8_CFG, exclude=["proj_out"], seed=3)
    assert "exclude" not in modelopt_ext.SEGQUANT_W4A8_CFG["algorithm"]
    path.write_text("quant_cfg:\n- {quantizer_name: '*', enable: false}\nalgorithm: max\n")
    assert resolve_config(str(path)).config["algorithm"] == "max"
    assert resolve_config(mtq.INT8_SMOOTHQUANT_CFG).name == "custom"
    assert resolve_config(found) is found
    stock = resolve_config({"preset": "INT8_SMOOTHQUANT_CFG", "algorithm": {"alpha": 0.8}}).config
    assert stock["algorithm"] == {"method": "smoothquant", "alpha": 0.8}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("embedders:", "embeders:", "wrong.yaml: embeders is unknown, is 'embedders' meant?"),
        ("algorithm:", "algoritm:", "wrong.yaml: quantize.algoritm is unknown, is 'algorithm' meant?"),
        ("quant_cfg:", "quantcfg:", "wrong.yaml: quantize.quantcfg is unknown, is 'quant_cfg' meant?"),
        ("num_bits: 8", "num_bit: 8", "wrong.yaml: quantize.quant_cfg.cfg.num_bit is unknown, is 'num_bits' meant?"),
        ("method: segquant", "method: segqant", "wrong.yaml: there is no algorithm 'segqant', is 'segquant' meant?"),
        (
            "quantize:",
            "quantise:",
            "wrong.yaml has no section 'quantize'; 'quantise' is unknown: a recipe has metadata",
        ),
        (
            "per_token",
            "per_tokn",
            "wrong.yaml: embedders: Input should be 'as_configured', 'per_token', 'eight_bit' or",
        ),
        ("enable: false", "enable: [false", "wrong.yaml is no valid YAML: while parsing a flow sequence"),
        ("recipe_type: ptq", "recipe_type: qat", "wrong.yaml: Recipe file"),
        (RECIPE, "- one\n- two\n", "wrong.yaml is no config: a config holds quant_cfg and algorithm, or a preset and"),
        (RECIPE, "preset: SEGQUANT_CFG\nalpha: 1\n", "wrong.yaml: 'alpha' is unknown beside a preset"),
        (
            RECIPE,
            "preset: SEGQUANT_CFG\nalgorithm: max\n",
            "wrong.yaml: algorithm must be a mapping of fields to change",
        ),
        (RECIPE, "quant_cfgs: []\n", "wrong.yaml has no quant_cfg, 'quant_cfgs' is unknown, is 'quant_cfg' meant?"),
    ],
    ids=lambda text: text[:25],
)
def test_wrong_files(old: str, new: str, message: str, tmp_path: Path):
    path = tmp_path / "wrong.yaml"
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(ValueError, match="wrong") as caught:
        resolve_config(path)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("SEGQUANT_W4A9_CFG", "there is no preset and no file 'SEGQUANT_W4A9_CFG', is 'SEGQUANT_W4A8_CFG' meant?"),
        ({"algorithm": "max"}, "the config has no quant_cfg: a config holds quant_cfg and algorithm, or"),
        (
            {"preset": "SEGQUANT_CFG", "algorithm": {"alpha": 2.0}},
            r"the config: alpha: .*alpha is a number in \[0, 1\]",
        ),
        ({"quant_cfg": [], "algorithm": "smoothqant"}, "there is no algorithm 'smoothqant', is 'smoothquant' meant?"),
    ],
    ids=str,
)
def test_wrong_names_and_dicts(source: Any, message: str):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        resolve_config(source)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"there is no config file nothing\.yaml: check the path \(it is rela"):
        resolve_config("nothing.yaml")
