"""The README's Python, as it stands there, on a tiny pipeline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from optimum.onnxruntime import ORTDiffusionPipeline
from tiny_pipelines import tiny_sd3_pipeline

import modelopt_ext
from modelopt_ext.export.tensorrt import check_tensorrt
from optimum_segquant import CalibrationSettings
from optimum_segquant.calibration import read_prompts
from optimum_segquant.evaluation import sample_trajectories

README = (Path(__file__).parent.parent / "README.md").read_text()


def block_with(word: str) -> str:
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if word in block]
    return block


def test_the_usage_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    usage = block_with("velocity_sqnr")
    pipe = tiny_sd3_pipeline()
    names = {"pipe": pipe, "prompts": ["a red circle"], "other_prompts": ["a blue square", "a green triangle"]}
    exec(usage, names)

    assert any(isinstance(module, modelopt_ext.SegLinear) for module in pipe.transformer.modules())
    (sqnr,) = re.findall(r"^\d+\.\d+$", capsys.readouterr().out, re.MULTILINE)
    assert float(sqnr) > 20
    restored = SD3Transformer2DModel.from_pretrained("quantized").eval()
    inputs = names["unseen"][0].inputs
    with torch.no_grad():
        assert torch.equal(restored(**inputs)[0], pipe.transformer(**inputs)[0])


@pytest.mark.slow
def test_the_deployment_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    pipe = tiny_sd3_pipeline()
    prompts, use = ["a red circle", "a blue square"], {"num_inference_steps": 4, "height": 16, "width": 16}
    calibration = sample_trajectories(pipe, prompts, steps=4, **use)
    mtq.quantize(pipe.transformer, modelopt_ext.SEGQUANT_CFG, calibration.forward_loop)
    exec(block_with("modelopt_ext.compress"), {"pipe": pipe})

    def image(pipeline: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompts[0], generator=generator, output_type="np", **use).images[0]

    expected = image(pipe)
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None}
    assert np.array_equal(image(StableDiffusion3Pipeline.from_pretrained("packed", **without_t5)), expected)
    assert np.abs(image(ORTDiffusionPipeline.from_pretrained("onnx", **without_t5)) - expected).max() < 0.05
    assert not [
        violation for violation in check_tensorrt("tensorrt/transformer/model.onnx") if violation.severity == "error"
    ]


@pytest.mark.slow
def test_prompts_to_a_directory_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    use = {"num_inference_steps": 3, "height": 16, "width": 16}
    pipe, full_precision = tiny_sd3_pipeline(), tiny_sd3_pipeline()
    block = block_with("quantize_pipeline").replace('"prompts.txt"', "settings").replace("held_out=8", "held_out=2")
    size = {"height": 16, "width": 16}
    settings = CalibrationSettings(read_prompts("prompts.txt"), num_inference_steps=3, steps=3, call_kwargs=size)
    names: dict[str, Any] = {"pipe": pipe, "settings": settings}
    exec(block, names)
    assert "SEGQUANT_CFG" in capsys.readouterr().out
    assert (tmp_path / "quantized" / "model_index.json").is_file()

    others = {
        "pipe": full_precision,
        "quantized_pipe": pipe,
        "result": names["result"],
        "prompts": ["a green triangle"],
    }
    asked = "num_inference_steps=28, guidance_scale=4.5"
    block = block_with("write_report")
    assert asked in block
    exec(block.replace(asked, "**use"), {**others, "use": use})
    assert (tmp_path / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")
