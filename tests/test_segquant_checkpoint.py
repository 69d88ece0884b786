"""``segquant`` checkpoints: what is written, what comes back, what is refused."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from packed_models import (
    PACKABLE,
    packed_denoiser,
    packed_text_encoder,
    plain_denoiser,
    same_tensors,
    text_outputs,
)
from packed_models import outputs as denoise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, T5EncoderModel

import modelopt_ext
from modelopt_ext import PackedLinear
from modelopt_ext.presets import linear_only
from optimum_segquant import save_segquant
from optimum_segquant.checkpoints import names
from optimum_segquant.checkpoints.config import CheckpointConfig, CheckpointError
from optimum_segquant.checkpoints.schema import schema, violations
from optimum_segquant.checkpoints.tensors import check_counts, describe, finish, prepare
from optimum_segquant.files import MANIFEST_NAME, DamagedFilesError

CLASSES = {"sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel, "sdxl": UNet2DConditionModel}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture
def saved(tmp_path) -> Path:
    packed_denoiser().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edited(directory: Path, **changes: Any) -> Path:
    """Change the quantization_config, as another release (or a bad editor) would, without a manifest in the way."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"].update(changes)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / MANIFEST_NAME).unlink()
    return directory


# -- round trips -------------------------------------------------------------------------------------------------------

GROUPS_OF_32 = {"SEGQUANT_W4A16_CFG", "SEGQUANT_W4A8_FP8_CFG", "SEGQUANT_W4A8_GROUP_CFG"}
ALWAYS = {
    ("sd3", preset)
    for preset in ("SEGQUANT_INT8_CFG", "SEGQUANT_FP8_SVD_CFG", "SEGQUANT_W4A4_CFG", "SEGQUANT_INT8_PER_TENSOR_CFG")
} | {("flux", "SEGQUANT_W4A8_GROUP_CFG"), ("sdxl", "SEGQUANT_INT8_SVD_CFG")}


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        pytest.param(kind, preset, marks=() if (kind, preset) in ALWAYS else pytest.mark.slow)
        for kind in CLASSES
        for preset in PACKABLE
        if not (kind == "sdxl" and preset in GROUPS_OF_32)  # this UNet has narrower blocks
    ],
)
def test_round_trip(kind: str, preset: str, tmp_path):
    model = packed_denoiser(preset, kind)
    model.save_pretrained(tmp_path)
    loaded = CLASSES[kind].from_pretrained(tmp_path)
    assert same_tensors(loaded, model)
    assert torch.equal(denoise(loaded, kind), denoise(model, kind))
    assert {name: module.spec for name, module in loaded.named_modules() if isinstance(module, PackedLinear)} == {
        name: module.spec for name, module in model.named_modules() if isinstance(module, PackedLinear)
    }


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_round_trip_of_text_encoders(kind: str, tmp_path):
    model = packed_text_encoder(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = {"clip": CLIPTextModelWithProjection, "t5": T5EncoderModel}[kind].from_pretrained(tmp_path)
    assert same_tensors(loaded, model)
    assert torch.equal(text_outputs(loaded), text_outputs(model))


def test_the_same_model_gives_the_same_files(saved, tmp_path):
    SD3Transformer2DModel.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert contents(saved) == contents(tmp_path / "again")


def test_shards(saved, tmp_path):
    model = packed_denoiser()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert same_tensors(SD3Transformer2DModel.from_pretrained(tmp_path / "sharded"), model)
    model.save_pretrained(tmp_path / "sharded")  # no shard of before is left
    assert contents(saved) == contents(tmp_path / "sharded")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(dtype, tmp_path):
    model = packed_denoiser("SEGQUANT_W4A8_CFG").to(dtype)
    model.save_pretrained(tmp_path)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path)
    assert loaded.dtype == dtype, "loaded as it was saved"
    assert same_tensors(loaded, model)
    assert torch.equal(denoise(loaded, dtype=dtype), denoise(model, dtype=dtype))


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = packed_denoiser()
    before = set(vars(model)), dict(model.config)
    model.save_pretrained(tmp_path)
    assert (set(vars(model)), dict(model.config)) == before


def test_models_without_packed_layers_are_saved_as_always(tmp_path):
    model = copy.deepcopy(plain_denoiser()[0])
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", WEIGHTS]
    with pytest.raises(ValueError, match=r"nothing in this SD3Transformer2DModel is packed.*compress"):
        save_segquant(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="Linear has no save_pretrained"):
        save_segquant(torch.nn.Linear(2, 2), tmp_path)


def test_compress_makes_saving_safe(monkeypatch):
    monkeypatch.delitem(sys.modules, "optimum_segquant")
    config = linear_only({"num_bits": 8, "axis": 0}, None, alpha=None, progress=False)
    modelopt_ext.compress(mtq.quantize(copy.deepcopy(plain_denoiser()[0]), config))
    assert "optimum_segquant" in sys.modules


# -- what is in the files ----------------------------------------------------------------------------------------------


def test_files(saved):
    assert sorted(os.listdir(saved)) == ["config.json", WEIGHTS, MANIFEST_NAME]
    config = json.loads((saved / "config.json").read_text())
    assert "_name_or_path" not in config
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["format_version"]) == ("segquant", 2)
    assert violations(quantization, schema()) == []
    model = packed_denoiser()
    with safe_open(saved / WEIGHTS, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    assert found.keys() == model.state_dict().keys()
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            assert found[f"{name}.weight"].dtype == torch.int8
            assert found[f"{name}.weight"].shape == (1, *module.weight.shape)
            assert torch.equal(found[f"{name}.weight_scale"].view(torch.float32), module.weight_scale)


def test_size(saved):
    """One byte a weight: a quarter of float32."""
    plain = plain_denoiser()[0]
    weights = sum(module.weight.numel() for module in plain.modules() if isinstance(module, torch.nn.Linear))
    found = sum(tensor.nbytes for name, tensor in load_file(saved / WEIGHTS).items() if tensor.dtype == torch.int8)
    assert found == weights


def test_the_config_holds_every_spec_once(saved):
    layers = json.loads((saved / "config.json").read_text())["quantization_config"]["layers"]
    specs = [json.dumps([layer["spec"], layer["bias"]], sort_keys=True) for layer in layers]
    assert len(set(specs)) == len(specs)
    described = CheckpointConfig.from_dict({**json.loads((saved / "config.json").read_text())["quantization_config"]})
    assert described == describe(packed_denoiser())


def test_names_of_a_full_size_flux_fold_into_a_few_patterns():
    with torch.device("meta"):
        model = FluxTransformer2DModel()
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) > 400
    folded = names.fold(linears)
    assert len(folded) < 30
    assert names.unfold(folded) == sorted(linears)


@pytest.mark.parametrize(
    "patterns", [["a.{0-1}.{2-3}.b"], ["{0-12}"], ["x.01"], ["x.{9-11}.y", "x.12"]], ids=lambda patterns: patterns[0]
)
def test_folding_is_exact(patterns):
    unfolded = names.unfold(patterns)
    assert names.unfold(names.fold(unfolded)) == unfolded


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["a.{1-0}"], "broken range"),
        (["a.{0-}"], "broken range"),
        (["a.{0-99999999}"], "broken range"),
        (["{0-9999}.{0-9999}"], "no model has"),
        (["a.{0-2}", "a.1"], "listed twice"),
    ],
)
def test_broken_patterns(patterns, message):
    with pytest.raises(ValueError, match=message):
        names.unfold(patterns)


# -- atomic saves ------------------------------------------------------------------------------------------------------


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_old_checkpoint(saved, tmp_path, monkeypatch):
    before = contents(tmp_path)
    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        packed_denoiser("SEGQUANT_INT8_CFG").save_pretrained(saved)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["saved"]
    with pytest.raises(OSError, match="No space left"):
        packed_denoiser().save_pretrained(tmp_path / "new")
    assert os.listdir(tmp_path) == ["saved"]


def test_no_pickle(tmp_path):
    with pytest.raises(ValueError, match="never pickle"):
        packed_denoiser().save_pretrained(tmp_path / "x", safe_serialization=False)
    with pytest.raises(ValueError, match="never pickle"):
        packed_text_encoder().save_pretrained(tmp_path / "x", safe_serialization=False)
    assert os.listdir(tmp_path) == []


def test_uploads_come_after(tmp_path):
    with pytest.raises(ValueError, match="upload_folder"):
        packed_denoiser().save_pretrained(tmp_path / "x", push_to_hub=True)
    assert os.listdir(tmp_path) == []


def test_one_process_writes(tmp_path):
    packed_denoiser().save_pretrained(tmp_path / "x", is_main_process=False)
    assert os.listdir(tmp_path) == []


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 3, "2", True, None])
def test_unknown_format_versions(saved, version):
    with pytest.raises(CheckpointError, match=r"format_version .*reads version 2: update"):
        SD3Transformer2DModel.from_pretrained(edited(saved, format_version=version))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "layers has 0 entries, needs 1"),
        ({"layers": "all"}, "layers is 'all', not of type array"),
        ({"dtype": "float64"}, "dtype is 'float64', not 'float32' or 'bfloat16' or 'float16'"),
        ({"architecture": 1}, "architecture is 1, not of type string"),
        ({"scale": 3}, "unknown key 'scale'"),
    ],
)
def test_configs_that_break_the_schema(saved, change, message):
    with pytest.raises(CheckpointError, match=message):
        SD3Transformer2DModel.from_pretrained(edited(saved, **change))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "weights"), "int3", r"layers\[0\]\.spec\.weights is 'int3'"),
        (("spec", "rank"), -1, r"spec\.rank is -1, below 0"),
        (("spec", "rank"), True, r"spec\.rank is True, not of type integer"),
        (("spec", "per_token"), 1, r"spec\.per_token is 1, not of type boolean"),
        (("spec", "layout", "polarity"), ["triple"], r"polarity\[0\] is 'triple'"),
        (("spec", "layout", "polarity"), ["none", "none"], "damaged"),
        (("modules",), ["a.{0-"], "broken range"),
        (("bias",), None, r"bias is None, not of type boolean"),
    ],
)
def test_layers_that_break_the_schema(path, value, message):
    config = describe(packed_denoiser()).to_dict()
    place: Any = config["layers"][0]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        CheckpointConfig.from_dict(config)


def test_a_schema_with_unknown_rules_is_refused():
    with pytest.raises(NotImplementedError, match="pattern"):
        violations("x", {"type": "string", "pattern": "x+"})


def test_another_architecture(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "num_layers": 1, "joint_attention_dim": 40}))
    (saved / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"of a SD3Transformer2DModel, does not fit.*no such module"):
        SD3Transformer2DModel.from_pretrained(saved)
    with pytest.raises(CheckpointError, match="does not fit this FluxTransformer2DModel"):
        prepare(plain_denoiser("flux")[0], describe(packed_denoiser()), None)


def test_tampered_files_are_refused(saved):
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (saved / WEIGHTS).write_bytes(content)
    with pytest.raises(DamagedFilesError, match=f"{WEIGHTS} is altered"):
        SD3Transformer2DModel.from_pretrained(saved)


def test_tampered_configs_are_refused(saved):
    text = (saved / "config.json").read_text()
    (saved / "config.json").write_text(text.replace('"rank": 6', '"rank": 5'))
    with pytest.raises(DamagedFilesError, match=r"config\.json is altered"):
        SD3Transformer2DModel.from_pretrained(saved)


@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_files_are_refused(sharded, tmp_path):
    packed_denoiser().save_pretrained(tmp_path, max_shard_size="50KB" if sharded else "1GB")
    last = max(tmp_path.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-100])
    # A file that is no safetensors any more is refused by diffusers itself, before it asks anyone.
    error, message = (DamagedFilesError, "truncated") if sharded else (OSError, f"Unable to load weights.*{last.name}")
    with pytest.raises(error, match=message):
        SD3Transformer2DModel.from_pretrained(tmp_path)


def test_truncated_text_encoders_are_refused(tmp_path):
    packed_text_encoder().save_pretrained(tmp_path, max_shard_size="20KB")
    last = max(tmp_path.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(DamagedFilesError, match=f"{last.name} is truncated"):
        CLIPTextModelWithProjection.from_pretrained(tmp_path)


def test_lost_tensors_are_named(saved):
    tensors = load_file(saved / WEIGHTS)
    del tensors["proj_out.weight_scale"]
    save_file(tensors, saved / WEIGHTS, metadata={"format": "pt"})
    (saved / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"lack 1 tensors of quantized layers \(proj_out\.weight_scale\)"):
        SD3Transformer2DModel.from_pretrained(saved)


def test_lost_tensors_of_text_encoders_are_named(tmp_path):
    packed_text_encoder().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if name.endswith("fc1.weight_scale"))]
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"lack .*weight_scale"):
        CLIPTextModelWithProjection.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lack tensors of quantized layers \(1 weight_scale\)"):
        check_counts([file], describe(packed_text_encoder()))


def test_checkpoints_without_a_manifest_load_with_a_note(saved, caplog):
    (saved / MANIFEST_NAME).unlink()
    with caplog.at_level(logging.INFO, "optimum_segquant"):
        loaded = SD3Transformer2DModel.from_pretrained(saved)
    assert same_tensors(loaded, packed_denoiser())
    assert "its files are not checked" in caplog.text


def test_empty_tensors_are_not_taken_for_loaded():
    model = packed_denoiser()
    model.proj_out.weight_scale = model.proj_out.weight_scale.to("meta")
    with pytest.raises(CheckpointError, match=r"proj_out\.weight_scale was not loaded"):
        finish(model)


WITHOUT_PLUGIN = """
import sys
from diffusers import SD3Transformer2DModel
from transformers import T5EncoderModel

assert "optimum_segquant" not in sys.modules
for host, directory in ((SD3Transformer2DModel, sys.argv[1]), (T5EncoderModel, sys.argv[2])):
    try:
        host.from_pretrained(directory)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    else:
        print("LOADED")
"""


def test_without_this_package_nothing_loads(saved, tmp_path):
    packed_text_encoder("t5").save_pretrained(tmp_path / "t5")
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGIN, str(saved), str(tmp_path / "t5")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "LOADED" not in run.stdout
    assert "Unknown quantization type, got segquant" in run.stdout
    assert "size mismatch" in run.stdout + run.stderr
