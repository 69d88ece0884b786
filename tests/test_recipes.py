"""The presets as recipe files: what is on disk is generated, and loading it gives what the preset gives."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.recipe import load_recipe
from torch import Tensor, nn

from modelopt_ext import SegQuantCalibConfig, presets, recipes
from modelopt_ext.presets import PER_TOKEN, linear_only


class TinyMLP(nn.Module):
    """Two Linears with SiLU between; the first one's output is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.first(x).chunk(2, dim=-1)
        return self.second(nn.functional.silu(gate) * value)


def quantized_output(config: object) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, data = TinyMLP().eval(), torch.randn(3, 16, 64)
    mtq.quantize(model, config, lambda m: [m(x) for x in data])
    with torch.no_grad():
        return model(data[0]), model.state_dict()


def needs_a_gpu(config: dict[str, object]) -> bool:
    """NVFP4 (block scales in FP8) has kernels for GPUs only."""
    return "scale_bits" in str(config["quant_cfg"]) and not torch.cuda.is_available()


def test_files_are_what_the_presets_give() -> None:
    """If this fails: python -m modelopt_ext.recipes."""
    on_disk = {file.name: file.read_text(encoding="utf-8") for file in recipes.FOLDER.glob("*.yaml")}
    assert on_disk == recipes.rendered()
    assert len(on_disk) == len(presets.PRESETS)


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_recipe_quantizes_like_its_preset(preset: str) -> None:
    config = presets.PRESETS[preset]
    recipe = load_recipe(recipes.path(recipes.file_name(preset).removesuffix(".yaml")))
    given = mtq.config.QuantizeConfig(**copy.deepcopy(config)).model_dump()
    loaded = recipe.quantize.model_dump()
    assert loaded["quant_cfg"] == given["quant_cfg"]
    algorithm = SegQuantCalibConfig(**config["algorithm"])
    assert SegQuantCalibConfig(**recipe.quantize.algorithm).model_dump() == algorithm.model_dump()
    assert len(recipe.description) > 20
    if needs_a_gpu(config):
        pytest.skip("NVFP4 needs a GPU")
    (expected, expected_state), (result, state) = quantized_output(config), quantized_output(recipe.quantize)
    assert torch.equal(result, expected)
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[key], value) for key, value in expected_state.items())


def test_recipes_differ_where_presets_do() -> None:
    """The comparison above could not see a recipe that ignores its settings; this one does."""
    outputs = {
        name: quantized_output(load_recipe(recipes.path(name)).quantize)[0]
        for name in ("segquant_int8", "segquant_int8_per_tensor", "segquant_fp8")
    }
    assert not torch.equal(outputs["segquant_int8"], outputs["segquant_int8_per_tensor"])
    assert not torch.equal(outputs["segquant_int8"], outputs["segquant_fp8"])


def test_render_holds_grids_float_formats_and_odd_strings(tmp_path: Path) -> None:
    config = linear_only(
        {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
        {"num_bits": (4, 3), **PER_TOKEN},
        alpha_grid=(0.1, 0.5),
        seed=3,
        overrides={"*.norm1: #linear": {"out_segments": [64, 64]}, "*proj*": None},
    )
    file = tmp_path / "own.yaml"
    file.write_text(recipes.render(config, "Everything at once: 'quotes', # and colons."))
    recipe = load_recipe(file, overrides=["quantize.algorithm.samples=100"])
    entries = recipe.quantize.model_dump(exclude_unset=True)["quant_cfg"]
    assert entries[1]["cfg"]["num_bits"] == (2, 1)
    assert entries[1]["cfg"]["block_sizes"] == {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
    assert entries[2]["cfg"]["num_bits"] == (4, 3)
    expected = {**config["algorithm"], "alpha_grid": [0.1, 0.5], "samples": 100}
    assert {**recipe.quantize.algorithm, "alpha_grid": list(recipe.quantize.algorithm["alpha_grid"])} == expected
    assert recipe.description == "Everything at once: 'quotes', # and colons."
    assert "# SmoothQuant" in file.read_text() or "# Migration strengths" in file.read_text()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe 'int9': there are .*segquant_int8"):
        recipes.path("int9")
    with pytest.raises(ValueError, match=r"quant_cfg\[0\]\['cfg'\] is a Tensor: a recipe holds numbers"):
        recipes.render({"quant_cfg": [{"quantizer_name": "*", "cfg": torch.ones(1)}], "algorithm": "max"}, "x")
    with pytest.raises(ValueError, match="quant_cfg and algorithm, not bits"):
        recipes.render({"quant_cfg": [], "algorithm": "max", "bits": 4}, "x")


def test_command_writes_all_and_removes_stale_ones(tmp_path: Path) -> None:
    stale = tmp_path / "segquant_gone.yaml"
    stale.write_text("metadata: {}\n")
    command = [sys.executable, "-m", "modelopt_ext.recipes", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == recipes.rendered()
    assert "segquant_gone.yaml" in done.stderr
