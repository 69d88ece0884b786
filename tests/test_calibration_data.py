"""Recorded calibration data: what is kept of a pipeline's run, on disk, after a kill, a full disk or damage."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UniPCMultistepScheduler,
)
from modelopt.torch.quantization.nn import TensorQuantizer
from tiny_pipelines import (
    tiny_controlnet_pipeline,
    tiny_flux_pipeline,
    tiny_sd3_pipeline,
    tiny_sdxl_pipeline,
    tiny_vae,
    tiny_wan_pipeline,
)

import modelopt_ext
from optimum_segquant.calibration import (
    CalibrationData,
    CalibrationMismatchError,
    CalibrationSettings,
    WeightedSteps,
    record_calibration,
)
from optimum_segquant.calibration import cache as cache_module
from optimum_segquant.calibration import shards as shards_module
from optimum_segquant.evaluation import DenoiserCall, sample_trajectories, velocity_sqnr
from optimum_segquant.files import DamagedFilesError

PROMPTS = ["a red circle", "a blue square above a green triangle", "a large circle", "a small square", "a triangle"]
USE = {"guidance_scale": 4.0, "height": 16, "width": 16}


def settings(**fields: Any) -> CalibrationSettings:
    own = {"prompts": PROMPTS, "batch_size": 2, "num_inference_steps": 6, "steps": 3, "call_kwargs": USE}
    return CalibrationSettings(**{**own, **fields})


def record(pipeline: Any, chosen: CalibrationSettings | None = None, **options: Any) -> CalibrationData:
    return record_calibration(pipeline, chosen or settings(), **{"progress": False, **options})


def equal(a: Any, b: Any) -> bool:
    """Bit-equal nests, types included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_calls(a: Any, b: Any) -> bool:
    def plain(call: DenoiserCall) -> list[Any]:
        return [call.inputs, call.output, repr(call.timestep), call.step, call.batch]

    return equal([plain(call) for call in a], [plain(call) for call in b])


def count_calls(module: torch.nn.Module) -> list[int]:
    """Grows by one with each forward that is carried out."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.fixture(scope="module")
def pipeline():
    return tiny_sd3_pipeline()


@pytest.fixture(scope="module")
def recorded(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[CalibrationData, Path]:
    folder = tmp_path_factory.mktemp("recorded") / "data"
    return record(pipeline, components=["denoiser", "text_encoder_2"], cache_dir=folder), folder


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_recorded_calls_are_those_of_sampling(pipeline: Any, recorded: tuple[CalibrationData, Path]):
    data, folder = recorded
    assert sorted(data) == ["text_encoder_2", "transformer"]
    calls = data["transformer"]
    reference = sample_trajectories(pipeline, PROMPTS, batch_size=2, num_inference_steps=6, steps=3, **USE)
    assert same_calls(calls, reference)
    assert len(calls) == 9  # 3 batches, 3 steps
    assert calls.timesteps == reference.timesteps
    assert [call.step for call in calls] == [0, 2, 5] * 3
    assert velocity_sqnr(pipeline.transformer, calls).overall == float("inf")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["pipeline"] == "StableDiffusion3Pipeline"
    assert manifest["settings"]["call_kwargs"] == USE
    assert manifest["scheduler"][0] == "FlowMatchEulerDiscreteScheduler"
    assert PROMPTS[0] not in (folder / "manifest.json").read_text()
    assert {path.name for path in (folder / "transformer").iterdir()} == {
        f"batch-0000{i}.{kind}" for i in range(3) for kind in ("json", "safetensors")
    }


def test_text_encoders_are_recorded_without_denoising(pipeline: Any, recorded: tuple[CalibrationData, Path]):
    texts = recorded[0]["text_encoder_2"]
    assert len(texts) == 6  # with and without the prompt
    assert texts.timesteps == ()
    first = next(iter(texts))
    assert first.inputs["input_ids"].dtype == torch.int64
    assert first.inputs["output_hidden_states"] is True
    texts.forward_loop(pipeline.text_encoder_2)
    assert velocity_sqnr(pipeline.text_encoder_2, texts).overall == float("inf")
    other = tiny_sd3_pipeline()
    steps = count_calls(other.transformer)
    alone = record(other, components="text_encoder_2")
    assert same_calls(alone["text_encoder_2"], texts)
    assert steps == []  # the first call of every batch is stopped before it runs


def test_a_trajectory_ends_with_the_last_step_that_is_kept():
    pipeline = tiny_sd3_pipeline()
    steps, decoded = count_calls(pipeline.transformer), count_calls(pipeline.vae.decoder)
    data = record(pipeline, settings(steps=[1, 0]))
    assert [call.step for call in data["transformer"]] == [0, 1] * 3
    assert len(steps) == 2 * 3
    assert decoded == []


def test_nested_arguments_survive():
    pipeline = tiny_sdxl_pipeline()
    calls = record(pipeline)["unet"]
    reference = sample_trajectories(pipeline, PROMPTS, batch_size=2, num_inference_steps=6, steps=3, **USE)
    assert same_calls(calls, reference)
    assert set(next(iter(calls)).inputs["added_cond_kwargs"]) == {"text_embeds", "time_ids"}


def test_a_controlnet_and_what_the_unet_gets_from_it():
    pipeline = tiny_controlnet_pipeline()
    images = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    data = record(pipeline, settings(per_prompt_kwargs={"image": images}), components=["denoiser", "controlnet"])
    assert {name: len(calls) for name, calls in data.items()} == {"unet": 9, "controlnet": 9}
    first = next(iter(data["unet"]))
    residuals = first.inputs["down_block_additional_residuals"]
    assert isinstance(residuals, (list, tuple))
    assert residuals[0].shape == (4, 8, 8, 8)
    assert torch.equal(residuals[-1], next(iter(data["controlnet"])).output)
    assert all(part.abs().max() > 0 for part in residuals)
    for name, calls in data.items():
        assert velocity_sqnr(getattr(pipeline, name), calls).overall == float("inf")
    # Each batch has its own images, also the last, shorter one.
    conditions = [call.inputs["controlnet_cond"] for call in data["controlnet"] if call.step == 0]
    assert [len(condition) for condition in conditions] == [4, 4, 2]
    assert torch.equal(conditions[2][0], images[4])


def test_two_denoisers_of_one_trajectory_share_its_steps():
    video = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
    data = record(tiny_wan_pipeline(), settings(prompts=PROMPTS[:2], steps=4, call_kwargs=video))
    # Two calls a step: guidance calls the denoiser with and without the prompt.
    assert [call.step for call in data["transformer"]] == [0, 0]
    assert [call.step for call in data["transformer_2"]] == [2, 2, 3, 3, 5, 5]
    message = r"WanPipeline never called its transformer_2 in the steps that are kept \(\(0, 1\) of 6\)"
    with pytest.raises(ValueError, match=message):
        record(tiny_wan_pipeline(), settings(prompts=PROMPTS[:2], steps=(0, 1), call_kwargs=video))


class TwoStages:
    """A prior and a decoder, each with denoising steps of its own, in one pipeline."""

    def __init__(self) -> None:
        self.stages = tiny_sd3_pipeline(seed=0), tiny_sd3_pipeline(seed=1)
        self.components = dict(zip(("prior", "decoder"), (stage.transformer for stage in self.stages), strict=True))

    def __call__(self, prompt: list[str], num_inference_steps: int, **kwargs: Any) -> Any:
        return [stage(prompt=prompt, num_inference_steps=num_inference_steps, **kwargs) for stage in self.stages][-1]


def test_denoisers_of_separate_trajectories_have_steps_of_their_own():
    data = record(TwoStages(), settings(prompts=PROMPTS[:2], steps=2))
    assert sorted(data) == ["decoder", "prior"]
    assert [call.step for call in data["prior"]] == [call.step for call in data["decoder"]] == [0, 5]


def test_flux_calls_are_bounded():
    use = {"height": 16, "width": 16, "max_sequence_length": 16, "true_cfg_scale": 3.0, "negative_prompt": ""}
    data = record(tiny_flux_pipeline(), settings(call_kwargs=use, max_calls=7, steps=None))
    calls = list(data["transformer"])
    assert [sum(call.batch == batch for call in calls) for batch in range(3)] == [2, 2, 3]
    assert len({call.step for call in calls}) >= 4
    few = record(tiny_flux_pipeline(), settings(call_kwargs=use, max_calls=1, steps=None))
    assert len(few["transformer"]) == 1
    assert few.sampled == 1  # batches without a share are not run


def test_a_pipeline_without_prompts():
    torch.manual_seed(0)
    pipeline = DiTPipeline(
        transformer=DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8
        ).eval(),
        vae=tiny_vae(),
        scheduler=DDIMScheduler(),
    )
    with pytest.raises(ValueError, match="DiTPipeline takes no prompt: give what it takes instead, one value a prompt"):
        record(pipeline, settings(call_kwargs={}))
    data = record(pipeline, settings(call_kwargs={}, per_prompt_kwargs={"class_labels": [1, 2, 3, 4, 5]}))
    labels = [call.inputs["class_labels"][0].item() for call in data["transformer"] if call.step == 0]
    assert labels == [1, 3, 5]


def test_what_cannot_be_passed_on_or_written_is_named():
    pipeline = tiny_sd3_pipeline()
    with pytest.raises(
        ValueError, match="StableDiffusion3Pipeline takes no argument 'guidence_scale', is 'guidance_sc"
    ):
        record(pipeline, settings(call_kwargs={"guidence_scale": 4.0}))
    use = {**USE, "joint_attention_kwargs": {"masks": [object()]}}
    with pytest.raises(ValueError, match=r"joint_attention_kwargs\.masks\[0\] holds a object, which can't be written"):
        record(pipeline, settings(call_kwargs=use))


# -- the folder --------------------------------------------------------------------------------------------------------


def test_data_that_is_there_is_used(recorded: tuple[CalibrationData, Path]):
    data, folder = recorded
    pipeline = tiny_sd3_pipeline()
    texts, steps = count_calls(pipeline.text_encoder), count_calls(pipeline.transformer)
    again = record(pipeline, cache_dir=folder)
    assert (again.sampled, again.reused) == (0, 3)
    assert (texts, steps) == ([], [])
    assert same_calls(again["transformer"], data["transformer"])
    # A component that is not there yet is sampled beside those that are.
    more = record(pipeline, cache_dir=folder, components=["transformer", "text_encoder"])
    assert more.sampled == 3
    assert same_calls(more["transformer"], data["transformer"])


def changed(change: Callable[[Any], object]) -> Any:
    pipeline = tiny_sd3_pipeline()
    change(pipeline)
    return pipeline


OTHER = {
    "seed": (lambda: (tiny_sd3_pipeline(), settings(seed=1)), r"settings\.seed \(0 there, 1 here\)"),
    "prompts": (lambda: (tiny_sd3_pipeline(), settings(prompts=PROMPTS[:4])), r"prompts\.count \(5 there, 4 here\)"),
    "guidance": (
        lambda: (tiny_sd3_pipeline(), settings(call_kwargs={**USE, "guidance_scale": 5.0})),
        r"settings\.call_kwargs\.guidance_scale \(4\.0 there, 5\.0 here\)",
    ),
    "steps": (
        lambda: (tiny_sd3_pipeline(), settings(steps=WeightedSteps(1, (1,) * 6))),
        r"settings\.steps \(3 there",
    ),
    "weights": (
        lambda: (changed(lambda p: p.text_encoder.text_projection.weight.data.mul_(1.001)), settings()),
        r"models\.text_encoder\.weights",
    ),
    "dtype": (lambda: (changed(lambda p: p.to(torch.bfloat16)), settings()), r"models\.transformer\.weights"),
    "scheduler": (
        lambda: (
            changed(lambda p: p.register_modules(scheduler=UniPCMultistepScheduler(use_flow_sigmas=True))),
            settings(),
        ),
        "scheduler",
    ),
    "pipeline": (
        lambda: (tiny_sdxl_pipeline(), settings()),
        r'pipeline \("StableDiffusion3Pipeline" there, "StableDiffusionXLPipeline" here\)',
    ),
}


@pytest.mark.parametrize("kind", OTHER)
def test_data_of_something_else_is_refused(kind: str, recorded: tuple[CalibrationData, Path]):
    make, message = OTHER[kind]
    before = sorted((path, path.stat().st_mtime_ns) for path in recorded[1].rglob("*"))
    pipeline, chosen = make()
    with pytest.raises(CalibrationMismatchError, match=message) as caught:
        record(pipeline, chosen, cache_dir=recorded[1])
    assert str(caught.value).endswith("give another folder, or overwrite=True to sample again")
    assert before == sorted((path, path.stat().st_mtime_ns) for path in recorded[1].rglob("*"))


def test_versions_belong_to_the_data(recorded: tuple[CalibrationData, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("optimum_segquant.calibration.identity.versions", lambda: {"torch": "1.0", "numpy": "1.0"})
    with pytest.raises(CalibrationMismatchError, match=r'versions\.torch \("2\.\d+.*" there, "1\.0" here\)') as caught:
        record(tiny_sd3_pipeline(), cache_dir=recorded[1])
    assert "numpy" not in str(caught.value)


def test_overwrite_samples_again(tmp_path: Path):
    record(tiny_sd3_pipeline(), settings(prompts=PROMPTS[:2], steps=1), cache_dir=tmp_path)
    other = settings(prompts=PROMPTS[:2], steps=1, seed=3)
    with pytest.raises(CalibrationMismatchError):
        record(tiny_sd3_pipeline(), other, cache_dir=tmp_path)
    data = record(tiny_sd3_pipeline(), other, cache_dir=tmp_path, overwrite=True)
    assert data.sampled == 1
    assert record(tiny_sd3_pipeline(), other, cache_dir=tmp_path, overwrite=True).reused == 1


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(FileExistsError, match="holds files but no calibration data: give an empty or new folder"):
        record(tiny_sd3_pipeline(), cache_dir=tmp_path, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file: give a folder for calibration data"):
        record(tiny_sd3_pipeline(), cache_dir=tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_damage_is_found_and_mended_by_sampling_that_batch_again(tmp_path: Path):
    pipeline = tiny_sd3_pipeline()
    expected = record(pipeline, settings(steps=2))["transformer"]
    record(pipeline, settings(steps=2), cache_dir=tmp_path)
    path = tmp_path / "transformer" / "batch-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    message = rf"{re.escape(str(path))} is altered .*: delete it and start again, then this batch alone is sampled anew"
    with pytest.raises(DamagedFilesError, match=message):
        record(pipeline, settings(steps=2), cache_dir=tmp_path)["transformer"].forward_loop(pipeline.transformer)
    path.write_bytes(content[:-9])
    with pytest.raises(DamagedFilesError, match=r"is truncated or altered \(\d+ of \d+ bytes\)"):
        record(pipeline, settings(steps=2), cache_dir=tmp_path)  # seen before anything is sampled or read
    path.unlink()
    again = record(pipeline, settings(steps=2), cache_dir=tmp_path)
    assert (again.sampled, again.reused) == (1, 2)
    assert same_calls(again["transformer"], expected)

    path.with_suffix(".json").write_text('{"size": 1')
    with pytest.raises(DamagedFilesError, match=r"batch-00001\.json can't be read \(JSONDecodeError: "):
        record(pipeline, settings(steps=2), cache_dir=tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DamagedFilesError, match=r"manifest\.json is no JSON .*: delete "):
        record(pipeline, settings(steps=2), cache_dir=tmp_path)


def test_a_full_disk_costs_nothing_that_was_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save = shards_module.save_file
    written: list[Path] = []

    def full(tensors: Any, path: Path, **options: Any) -> None:
        if len(written) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **options)
        written.append(path)

    pipeline = tiny_sd3_pipeline()
    monkeypatch.setattr(shards_module, "save_file", full)
    with pytest.raises(
        OSError, match=r"No space left on device while batch 2 of transformer was written .*: free some"
    ):
        record(pipeline, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(OSError, match=r"of transformer was written .*: give a cache_dir on a disk with more room"):
        record(pipeline)
    monkeypatch.undo()
    steps = count_calls(pipeline.transformer)
    data = record(pipeline, cache_dir=tmp_path)
    assert (data.sampled, data.reused) == (1, 2)
    assert len(steps) == 6
    assert same_calls(data["transformer"], record(pipeline)["transformer"])


def test_one_call_is_in_memory_at_a_time(recorded: tuple[CalibrationData, Path], monkeypatch: pytest.MonkeyPatch):
    read: list[Path] = []
    original = cache_module.read_shard

    def watched(path: Path):
        for call in original(path):
            read.append(path)
            yield call

    monkeypatch.setattr(cache_module, "read_shard", watched)
    calls = iter(recorded[0]["transformer"])
    next(calls)
    assert len(read) == 1
    next(calls)
    assert len(read) == 2


def test_bars_show_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pipeline = tiny_sd3_pipeline()
    data = record(pipeline, cache_dir=tmp_path, progress=True)
    data["transformer"].forward_loop(pipeline.transformer)
    shown = capsys.readouterr().err
    assert re.search(r"Sampling: +\d+%\|.*\| \d+/18 \[\d\d:\d\d<\d\d:\d\d, .*step", shown)
    assert "18/18" in shown
    assert re.search(r"Calibrating transformer: 100%\|.*\| 9/9 \[", shown)
    record(pipeline, cache_dir=tmp_path)
    assert capsys.readouterr().err == ""


# -- several processes, kills ------------------------------------------------------------------------------------------


def test_processes_fill_one_folder_with_the_data_of_one(tmp_path: Path, recorded: tuple[CalibrationData, Path]):
    shares = [
        record(tiny_sd3_pipeline(), settings().share(rank, 2), cache_dir=tmp_path, components="denoiser")
        for rank in (0, 1)
    ]
    assert [[call.batch for call in data["transformer"]] for data in shares] == [[0] * 3 + [2] * 3, [1] * 3]
    with pytest.raises(ValueError, match="max_calls=1 leaves none for process 1 of 2: raise it"):
        record(tiny_sd3_pipeline(), settings(max_calls=1).share(1, 2))
    with pytest.raises(ValueError, match="9 processes can't share 3 batches of prompts: give more prompts"):
        record(tiny_sd3_pipeline(), settings().share(0, 9))
    whole = record(tiny_sd3_pipeline(), cache_dir=tmp_path)
    assert whole.reused == 3
    assert same_calls(whole["transformer"], recorded[0]["transformer"])


def many() -> CalibrationSettings:
    """10 batches with one call each, drawn at random."""
    return settings(prompts=PROMPTS * 4, steps=WeightedSteps(2, (1, 1, 1, 2, 0, 0)), max_calls=10)


def record_many(folder: Path) -> None:
    record(tiny_sd3_pipeline(), many(), cache_dir=folder)


def test_a_killed_run_goes_on_and_gives_the_same_data_and_scales(tmp_path: Path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = multiprocessing.get_context("fork").Process(target=record_many, args=(killed,))
    process.start()
    deadline = time.monotonic() + 240
    while len(list(killed.glob("transformer/*.json"))) < 3 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = len(list(killed.glob("transformer/*.json")))
    assert 3 <= done < 10

    pipeline = tiny_sd3_pipeline()
    resumed = record(pipeline, many(), cache_dir=killed)
    assert resumed.reused == done
    assert resumed.sampled == 10 - done
    straight = record(pipeline, many(), cache_dir=whole)
    assert same_calls(resumed["transformer"], straight["transformer"])
    assert len(straight["transformer"]) == 10
    for path in whole.rglob("*.*"):
        assert path.read_bytes() == (killed / path.relative_to(whole)).read_bytes(), path
    assert not list(killed.rglob("*.partial"))

    config = copy.deepcopy(modelopt_ext.SEGQUANT_INT8_PER_TENSOR_CFG)
    config["algorithm"].update(alpha=0.5, clip_grid=(1.0,), samples=64, progress=False, exclude=["*_blocks.[12].*"])

    def scales(data: CalibrationData) -> dict[str, torch.Tensor]:
        model = mtq.quantize(copy.deepcopy(pipeline.transformer), config, data["transformer"].forward_loop)
        found = {name: part.amax for name, part in model.named_modules() if isinstance(part, TensorQuantizer)}
        return {name: amax for name, amax in found.items() if amax is not None}

    first, second = scales(resumed), scales(straight)
    assert len(first) > 40
    assert equal(first, second)
