"""The README's Python, as it stands there, on a tiny pipeline."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny_pipelines import tiny_sd3_pipeline

import modelopt_ext

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_usage_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    (usage,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "velocity_sqnr" in block]
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
