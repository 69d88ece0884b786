"""Quantize, save and restore with the newest diffusers, transformers and Optimum (``newest-hosts.txt``).

Not collected by default: the suite runs with the pinned hosts of ``constraints.txt``. Run it as

    pytest tests/smoke_newest_hosts.py
"""

from __future__ import annotations

import copy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from test_loading import (  # noqa: F401 (these run here, too)
    packed_directory,
    pipeline_directory,
    plain_directory,
    test_a_backend_for_whole_pipelines,
    test_at_load_as_without_data,
    test_dequantize,
    test_dequantize_text_encoders,
    test_dtypes,
    test_lora_weights_of_a_pipeline,
    test_pipelines_round_trip,
    test_text_encoders,
    test_text_encoders_at_load,
)
from test_segquant_checkpoint import (  # noqa: F401
    saved,
    test_a_full_disk_keeps_the_old_checkpoint,
    test_round_trip_of_text_encoders,
    test_the_same_model_gives_the_same_files,
    test_without_this_package_nothing_loads,
)
from tiny_pipelines import tiny_sd3_pipeline

import modelopt_ext
from optimum_segquant.evaluation import Trajectories, sample_trajectories, velocity_sqnr

SHIPPED = Path(__file__).parent.parent / "examples" / "pipelines" / "shapes-sd3"

RESTORE = """
import sys, torch
import modelopt.torch.opt as mto
import modelopt_ext
from diffusers import SD3Transformer2DModel

folder, how = sys.argv[1:]
if how == "restore":
    torch.manual_seed(1)
    model = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(folder)).eval()
    model = mto.restore(model, folder + "/saved.pt")
else:
    mto.enable_huggingface_checkpointing()
    model = SD3Transformer2DModel.from_pretrained(folder).eval()
inputs = torch.load(folder + "/inputs.pt", weights_only=True)
with torch.no_grad():
    torch.save(model(**inputs)[0], folder + "/output.pt")
"""


def test_hosts_are_the_newest():
    assert version("diffusers").startswith("0.42.")
    assert version("transformers").startswith("5.")
    assert version("optimum").startswith("2.3.")


@pytest.fixture(scope="module", params=["tiny", "shipped"])
def case(request) -> tuple[SD3Transformer2DModel, Trajectories]:
    if request.param == "tiny":
        pipeline = tiny_sd3_pipeline()
        prompts = ["a red circle", "a blue square"]
    else:
        pipeline = StableDiffusion3Pipeline.from_pretrained(SHIPPED)
        prompts = ["a large red circle left of a small blue square on green", "a small yellow star on black"]
    trajectories = sample_trajectories(
        pipeline, prompts, num_inference_steps=4, guidance_scale=4.0, max_sequence_length=32
    )
    return pipeline.transformer, trajectories


@pytest.mark.parametrize("preset", ["SEGQUANT_CFG", "SEGQUANT_FP8_CFG"])
def test_quantize_save_restore_in_a_new_process(case, preset, tmp_path):
    original, trajectories = case
    model = copy.deepcopy(original)
    config = getattr(modelopt_ext, preset)
    mtq.quantize(model, config, trajectories.forward_loop)
    assert velocity_sqnr(model, trajectories).overall > (30 if preset == "SEGQUANT_CFG" else 20)
    assert any(isinstance(module, modelopt_ext.SegLinear) for module in model.modules())

    inputs = {name: value for name, value in trajectories[0].inputs.items() if value is not None}
    with torch.no_grad():
        expected = model(**inputs)[0]
    mto.enable_huggingface_checkpointing()
    model.save_pretrained(tmp_path)
    mto.save(model, tmp_path / "saved.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    for how in ("restore", "from_pretrained"):
        subprocess.run([sys.executable, "-c", RESTORE, str(tmp_path), how], check=True)
        assert torch.equal(torch.load(tmp_path / "output.pt", weights_only=True), expected)
        (tmp_path / "output.pt").unlink()
