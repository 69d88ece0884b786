"""Save and restore: bit-equal outputs in a new process by each of ModelOpt's ways, and errors for broken files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from test_quantize import loop_over, outputs, quiet
from tiny_pipelines import tiny_sd3_transformer
from torch import Tensor, nn

import modelopt_ext
from modelopt_ext import SegLinear
from modelopt_ext.mode import METADATA_KEY, MODE

HERE = Path(__file__).parent

# Runs in a new process; prints the numbers of segmented Linears. Every way starts from a model of its own.
RESTORE = """
import sys, torch
sys.path.insert(0, {here!r})
import modelopt.torch.opt as mto
import modelopt_ext
from test_quantize import outputs
from tiny_pipelines import tiny_sd3_transformer

folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])

def restore():
    return mto.restore(tiny_sd3_transformer(seed=7, dtype=dtype), folder + "/saved.pt")

def state():
    state = torch.load(folder + "/state.pt", weights_only=True)
    model = mto.restore_from_modelopt_state(tiny_sd3_transformer(seed=7, dtype=dtype), state)
    model.load_state_dict(torch.load(folder + "/weights.pt", weights_only=True))
    return model

def from_pretrained():
    mto.enable_huggingface_checkpointing()
    return type(tiny_sd3_transformer()).from_pretrained(folder, torch_dtype=dtype)

for way in (restore, state, from_pretrained):
    model = way().eval()
    torch.save(outputs(model, dtype), folder + "/" + way.__name__ + ".pt")
    print("segmented", way.__name__, sum(isinstance(module, modelopt_ext.SegLinear) for module in model.modules()))
"""


def segmented(model: nn.Module) -> int:
    return sum(isinstance(module, SegLinear) for module in model.modules())


def save(model: nn.Module, folder: Path) -> None:
    mto.save(model, folder / "saved.pt")
    torch.save(mto.modelopt_state(model), folder / "state.pt")
    torch.save(model.state_dict(), folder / "weights.pt")
    mto.enable_huggingface_checkpointing()
    model.save_pretrained(folder)


def restored_elsewhere(folder: Path, dtype: torch.dtype) -> dict[str, tuple[Tensor, int]]:
    """Outputs and number of segmented Linears of the model restored by a new process, by way."""
    script = RESTORE.format(here=str(HERE))
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder), str(dtype).removeprefix("torch.")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    counted = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("segmented")]
    return {way: (torch.load(folder / f"{way}.pt", weights_only=True), int(count)) for way, count in counted}


CASES = {
    "static": ("SEGQUANT_INT8_CFG", torch.float32),
    "paper": ("SEGQUANT_INT8_PER_TENSOR_CFG", torch.float32),
    "dynamic": ("SEGQUANT_INT8_DYNAMIC_CFG", torch.float32),
    "fp8": ("SEGQUANT_FP8_CFG", torch.float32),
    "bfloat16": ("SEGQUANT_INT8_CFG", torch.bfloat16),
    "float16": ("SEGQUANT_INT8_CFG", torch.float16),
}


@pytest.mark.parametrize("case", CASES)
def test_bit_equal_in_a_new_process(case: str, tmp_path: Path):
    preset, dtype = CASES[case]
    model = tiny_sd3_transformer(dtype=dtype)
    mtq.quantize(model, quiet(getattr(modelopt_ext, preset)), loop_over(range(12), dtype))
    save(model, tmp_path)
    expected = outputs(model, dtype)
    found = restored_elsewhere(tmp_path, dtype)
    assert list(found) == ["restore", "state", "from_pretrained"]
    for way, (result, count) in found.items():
        assert count == segmented(model) > 0, way
        assert torch.equal(result, expected), way


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    model = tiny_sd3_transformer()
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), loop_over(range(4)))
    folder = tmp_path_factory.mktemp("static")
    save(model, folder)
    return folder, model


def test_weights_of_a_checkpoint_are_the_plain_ones(static: tuple[Path, nn.Module]):
    weights = torch.load(static[0] / "weights.pt", weights_only=True)
    for name, value in tiny_sd3_transformer().state_dict().items():
        assert torch.equal(weights[name], value)


def test_calibrated_twice_and_folded_models_restore(tmp_path: Path):
    model = tiny_sd3_transformer()
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG), loop_over(range(4)))
    mtq.quantize(model, quiet(modelopt_ext.SEGQUANT_CFG, alpha=0.5, polarity="dual8"), loop_over(range(4)))
    mtq.fold_weight(model)
    expected = outputs(model)
    mto.save(model, tmp_path / "saved.pt")
    assert torch.equal(outputs(mto.restore(tiny_sd3_transformer(seed=7), tmp_path / "saved.pt")), expected)


def test_plan_travels_with_the_checkpoint(static: tuple[Path, nn.Module]):
    folder, model = static
    twin = mto.restore(tiny_sd3_transformer(seed=7), folder / "saved.pt")
    assert modelopt_ext.plan_of(twin) == modelopt_ext.plan_of(model)
    assert modelopt_ext.plan_of(twin).linears["transformer_blocks.1.norm1.linear"].out_segments == (32,) * 6


def test_metadata_is_of_plain_types(static: tuple[Path, nn.Module]):
    def check(value: object) -> None:
        if isinstance(value, dict):
            assert type(value) is dict
            for key, item in value.items():
                assert type(key) is str
                check(item)
        elif isinstance(value, list):
            assert type(value) is list
            for item in value:
                check(item)
        else:
            assert type(value) in (str, int, float, bool, type(None))

    state = dict(mto.modelopt_state(static[1])["modelopt_state_dict"])[MODE]
    check(state["metadata"][METADATA_KEY])
    assert isinstance(state["config"], dict)


def restore_state(state: dict) -> nn.Module:
    return mto.restore_from_modelopt_state(tiny_sd3_transformer(seed=7), state)


def state_of(folder: Path) -> tuple[dict, dict]:
    """The saved state and, inside it, our metadata."""
    state = torch.load(folder / "state.pt", weights_only=True)
    return state, dict(state["modelopt_state_dict"])[MODE]["metadata"]


def test_truncated_checkpoint(static: tuple[Path, nn.Module], tmp_path: Path):
    content = (static[0] / "saved.pt").read_bytes()
    (tmp_path / "saved.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(RuntimeError, match="checkpoint file is corrupted"):
        mto.restore(tiny_sd3_transformer(), tmp_path / "saved.pt")


def test_missing_tensors(static: tuple[Path, nn.Module]):
    weights = torch.load(static[0] / "weights.pt", weights_only=True)
    name = next(name for name in weights if name.endswith("input_quantizer._smoothing"))
    del weights[name]
    model = restore_state(state_of(static[0])[0])
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        model.load_state_dict(weights)


def test_incomplete_metadata(static: tuple[Path, nn.Module]):
    state, metadata = state_of(static[0])
    del metadata[METADATA_KEY]["layouts"]
    with pytest.raises(mto.conversion.ApplyModeError, match="metadata is incomplete; save the model again"):
        restore_state(state)


def test_unknown_version(static: tuple[Path, nn.Module]):
    state, metadata = state_of(static[0])
    metadata[METADATA_KEY]["version"] = 99
    with pytest.raises(mto.conversion.ApplyModeError, match=r"version 99, this package reads version 1"):
        restore_state(state)


def test_layout_that_does_not_fit(static: tuple[Path, nn.Module]):
    state, metadata = state_of(static[0])
    layouts = metadata[METADATA_KEY]["layouts"]
    name = next(iter(layouts))
    layouts["no.such.layer"] = dict(layouts[name])
    layouts[name]["out_groups"] = [1, 1]
    with pytest.raises(mto.conversion.ApplyModeError) as error:
        restore_state(state)
    assert "no.such.layer: no such Linear" in str(error.value)
    assert f"{name}: weight_segments" in str(error.value)


def test_another_architecture(static: tuple[Path, nn.Module]):
    state, _ = state_of(static[0])
    with pytest.raises(mto.conversion.ApplyModeError):
        mto.restore_from_modelopt_state(nn.Sequential(nn.Linear(4, 4)), state)


def test_without_the_plugin_the_missing_mode_is_named(static: tuple[Path, nn.Module]):
    script = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import modelopt.torch.opt as mto\n"
        "from tiny_pipelines import tiny_sd3_transformer\n"
        f"mto.restore(tiny_sd3_transformer(), {str(static[0] / 'saved.pt')!r})\n"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "Mode segquant_calibrate not found" in result.stderr


def test_diffusers_alone_loads_the_plain_weights(static: tuple[Path, nn.Module]):
    """Without ModelOpt and the plugin the quantizers are ignored, and what remains is the full-precision model."""
    script = (
        f"import sys, torch; sys.path.insert(0, {str(HERE)!r})\n"
        "from diffusers import SD3Transformer2DModel\n"
        f"model = SD3Transformer2DModel.from_pretrained({str(static[0])!r}).eval()\n"
        "assert 'modelopt' not in sys.modules and 'modelopt_ext' not in sys.modules\n"
        f"torch.save(model.state_dict(), {str(static[0] / 'plain.pt')!r})\n"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    plain = torch.load(static[0] / "plain.pt", weights_only=True)
    original = tiny_sd3_transformer().state_dict()
    assert plain.keys() == original.keys()
    assert all(torch.equal(plain[name], value) for name, value in original.items())
