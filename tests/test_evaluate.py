"""``evaluate`` on tiny pipelines: simulated, packed, ONNX Runtime; what it measures against other ways to get it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from metric_networks import save_networks
from tiny_pipelines import tiny_sd3_pipeline
from torch import Tensor

import modelopt_ext
from modelopt_ext.presets import linear_only
from optimum_segquant import write_report
from optimum_segquant.evaluation import (
    Evaluation,
    evaluate,
    evaluate_samples,
    generate_images,
    latent_errors,
    sample_reference,
    sample_trajectories,
    velocity_sqnr,
)
from optimum_segquant.evaluation.latents import LatentStep, StepRecorder

PROMPTS = ["a red circle", "a blue square above a small green triangle", "a large red triangle"]
CALL: dict[str, Any] = {
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
    "batch_size": 2,
    "max_sequence_length": 16,
    "height": 16,
    "width": 16,
}
CONFIG = linear_only({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}, progress=False, alpha=0.5, samples=128)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_networks(tmp_path_factory.mktemp("weights"))


def one_block() -> Any:
    """A tiny Stable Diffusion 3 pipeline with the last of its transformer's blocks."""
    pipeline = tiny_sd3_pipeline()
    del pipeline.transformer.transformer_blocks[:-1]
    return pipeline


@pytest.fixture(scope="module")
def reference() -> Any:
    return one_block()


@pytest.fixture(scope="module")
def quantized(reference: Any) -> Any:
    pipeline = one_block()
    calibration = sample_trajectories(reference, ["a green circle", "a small red square"], **CALL)
    mtq.quantize(pipeline.transformer, CONFIG, calibration.forward_loop)
    return pipeline


@pytest.fixture(scope="module")
def evaluation(reference: Any, quantized: Any, weights: Path) -> Evaluation:
    return evaluate(reference, quantized, PROMPTS, seeds=7, weights=weights, recorded_prompts=1, **CALL)


def test_every_part_is_there(evaluation: Evaluation) -> None:
    assert evaluation.missing == {}
    assert evaluation.seeds == (7, 8, 9)
    assert evaluation.call == CALL
    assert (evaluation.reference.form, evaluation.quantized.form) == ("full precision", "simulated")
    assert list(evaluation.metrics) == ["psnr", "ssim", "lpips", "fid", "clip_score"]
    assert all(not result.skipped for result in evaluation.metrics.values())
    assert evaluation.versions["torch"] == torch.__version__


def test_images_are_those_of_both_pipelines_alone(evaluation: Evaluation, reference: Any, quantized: Any) -> None:
    assert torch.equal(evaluation.reference_images, generate_images(reference, PROMPTS, seeds=7, **CALL))
    assert torch.equal(evaluation.images, generate_images(quantized, PROMPTS, seeds=7, **CALL))
    noise = (evaluation.images - evaluation.reference_images).square().mean((1, 2, 3))
    assert evaluation.metrics["psnr"].per_image == pytest.approx((-10 * noise.log10()).tolist(), rel=1e-4)


def test_velocity_is_that_of_recorded_trajectories(evaluation: Evaluation, reference: Any, quantized: Any) -> None:
    # One prompt is rounded up to a batch of two.
    trajectories = sample_trajectories(reference, PROMPTS[:2], seeds=7, **CALL)
    assert evaluation.velocity == velocity_sqnr(quantized.transformer, trajectories)
    assert 25 < evaluation.velocity.overall < 70
    assert len(evaluation.velocity.per_timestep) == 4


def test_layers_by_hand(evaluation: Evaluation, reference: Any, quantized: Any) -> None:
    name = "transformer_blocks.0.ff.net.2"
    original, twin = (p.transformer.get_submodule(name) for p in (reference, quantized))
    inputs: list[Tensor] = []
    handle = original.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    trajectories = sample_trajectories(reference, PROMPTS[:2], seeds=7, **CALL)
    handle.remove()
    assert len(inputs) == len(trajectories) == 4
    with torch.no_grad():
        pairs = [(original(x).double(), twin(x).double()) for x in inputs]
    noise = sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)
    assert evaluation.layers[name].local_noise == pytest.approx(float(noise), rel=1e-6)
    linears = [m for m in reference.transformer.modules() if isinstance(m, torch.nn.Linear)]
    assert len(evaluation.layers.layers) == len(linears)


def test_latents_drift_apart_as_both_pipelines_sample(evaluation: Evaluation, reference: Any, quantized: Any) -> None:
    final = [
        torch.cat(
            [
                pipeline(
                    prompt=PROMPTS[:2],
                    generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
                    output_type="latent",
                    **{name: value for name, value in CALL.items() if name != "batch_size"},
                ).images
            ]
        ).double()
        for pipeline in (reference, quantized)
    ]
    errors = evaluation.latents
    assert [error.step for error in errors] == [0, 1, 2, 3]
    assert errors[0].timestep == 1000.0
    noise = (final[0] - final[1]).square().sum() / final[0].square().sum()
    assert errors[-1].noise == pytest.approx(float(noise), rel=1e-6)
    assert errors[-1].sqnr == pytest.approx(-10 * math.log10(float(noise)))
    assert errors[0].noise < errors[-1].noise  # it accumulates
    assert all(error.worst >= error.noise * (1 - 1e-9) for error in errors)


def test_speed_and_size(evaluation: Evaluation, reference: Any) -> None:
    size = sum(t.numel() * t.element_size() for t in reference.transformer.state_dict().values())
    assert evaluation.reference.bytes == pytest.approx(size, rel=0.01)
    for facts in (evaluation.reference, evaluation.quantized):
        assert 0 < facts.seconds_per_step < 2 * facts.seconds_per_image * len(PROMPTS)
        assert (facts.pipeline, facts.denoiser) == ("StableDiffusion3Pipeline", "SD3Transformer2DModel")
        assert facts.dtype == "float32"
        assert facts.device.startswith("cpu, ")


def test_json_has_everything_but_images(evaluation: Evaluation) -> None:
    data = json.loads(evaluation.to_json())
    assert data["prompts"] == PROMPTS
    assert data["metrics"]["psnr"]["value"] == evaluation.metrics["psnr"].value
    assert data["metrics"]["clip_score"]["reference"] == evaluation.metrics["clip_score"].reference
    assert data["velocity"]["sqnr_db"] == evaluation.velocity.overall
    assert [row["name"] for row in data["layers"]] == [row.name for row in evaluation.layers.layers]
    assert data["latents"][-1]["noise"] == evaluation.latents[-1].noise
    assert modelopt_ext.SegmentPlan.from_dict(data["plan"]) == evaluation.plan
    assert "images" not in data
    lines = evaluation.summary().splitlines()
    assert f"velocity SQNR  {evaluation.velocity.overall:.2f} dB" in lines
    assert any(line.startswith("clip_score") and "(full precision" in line for line in lines)


def test_a_report_of_it(evaluation: Evaluation, tmp_path: Path) -> None:
    text = write_report(tmp_path / "report.html", evaluation, config=CONFIG).read_text()
    assert f"{evaluation.velocity.overall:.1f}<span" in text
    assert all(f">{row.name}</td>" in text for row in evaluation.layers.layers)
    assert text.count("data:image/png") == 2 * len(PROMPTS)
    assert "int8" in text


def test_packed(reference: Any, quantized: Any, evaluation: Evaluation) -> None:
    packed = copy.deepcopy(quantized)
    modelopt_ext.compress(packed.transformer)
    found = evaluate(reference, packed, PROMPTS, seeds=7, metrics=["psnr"], recorded_prompts=1, **CALL)
    assert found.missing == {}
    assert found.quantized.form == "packed"
    assert found.quantized.bytes < 0.5 * found.reference.bytes
    assert found.velocity.overall == pytest.approx(evaluation.velocity.overall, abs=0.2)
    for row in found.layers.layers:
        assert row.local_sqnr == pytest.approx(evaluation.layers[row.name].local_sqnr, abs=1.0)


def test_onnx_runtime_has_images_and_latents(reference: Any, quantized: Any, tmp_path: Path) -> None:
    from optimum.onnxruntime import ORTDiffusionPipeline

    from optimum_segquant import export_onnx

    path = export_onnx(quantized, tmp_path / "onnx", verify=False)
    onnx = ORTDiffusionPipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None)
    found = evaluate(reference, onnx, PROMPTS, seeds=7, metrics=["psnr"], **CALL)
    assert found.quantized.form == "ONNX Runtime"
    assert found.quantized.bytes == (path / "transformer" / "model.onnx").stat().st_size
    assert found.quantized.device == "cpu, CPUExecutionProvider"
    assert found.metrics["psnr"].value > 30
    assert len(found.latents) == 4
    assert found.velocity is None
    assert found.layers is None
    assert set(found.missing) == {"velocity", "layers"}
    assert "runs in ONNX Runtime" in found.to_dict()["velocity"]["missing"]
    assert "velocity       missing: the denoiser runs in ONNX Runtime" in found.summary()


def test_progress_counts_steps(reference: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sample_reference(reference, PROMPTS, recorded_prompts=1, **CALL)
    assert "Sampling StableDiffusion3Pipeline: 100%" in (shown := capsys.readouterr().err)
    assert "8/8" in shown  # two calls of four steps
    sample_reference(reference, PROMPTS[:1], recorded_prompts=1, progress=False, **CALL)
    assert capsys.readouterr().err == ""


def test_in_place_with_samples_of_before(reference: Any, quantized: Any, evaluation: Evaluation) -> None:
    samples = sample_reference(reference, PROMPTS, seeds=7, recorded_prompts=1, **CALL)
    found = evaluate_samples(samples, quantized, metrics=["psnr"])
    assert found.velocity == evaluation.velocity
    assert found.latents == evaluation.latents
    assert found.metrics["psnr"] == evaluation.metrics["psnr"]
    assert found.missing == {
        "layers": "no full-precision denoiser: use evaluate with both pipelines, or give full_precision"
    }
    found = evaluate_samples(samples, quantized, full_precision=reference.transformer, metrics=["psnr"])
    assert found.layers == evaluation.layers


def test_nothing_quantized_has_no_error(reference: Any) -> None:
    found = evaluate(reference, one_block(), PROMPTS[:1], metrics=["psnr"], **CALL)
    assert found.velocity.overall == math.inf
    assert [error.noise for error in found.latents] == [0.0] * 4
    assert found.metrics["psnr"].value == math.inf
    assert found.missing == {"layers": "the denoiser holds no layer that ModelOpt or SegQuant quantized"}
    data = json.loads(found.to_json())
    assert data["metrics"]["psnr"]["value"] is None  # infinite; a skipped one has no value at all
    assert data["velocity"]["sqnr_db"] is None


def test_a_part_that_fails_costs_only_itself(reference: Any, quantized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("optimum_segquant.evaluation.evaluator.measure", fail)
    found = evaluate(reference, quantized, PROMPTS[:1], metrics=["psnr"], **CALL)
    assert found.missing == {"layers": "RuntimeError: out of memory"}
    assert found.velocity is not None


def test_wrong_calls_fail_before_anything_is_sampled(
    reference: Any, quantized: Any, weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("sampled before the arguments were checked")

    monkeypatch.setattr("optimum_segquant.evaluation.evaluator.generate_images", refuse)
    for arguments, message in (
        (
            {"quantized": reference},
            "have the same denoiser.*sample_reference before quantizing in place",
        ),
        ({"quantized": "pipe"}, "expected a diffusers pipeline with a transformer or unet, got str"),
        ({"metrics": ["lpip"]}, "'lpip' is unknown"),
        ({"prompts": "a red circle"}, r"write \['a red circle'\]"),
        ({"seeds": [1]}, "3 prompts but 1 seeds"),
        ({"recorded_steps": 0}, "recorded_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"layer_calls": 0}, "layer_calls must be at least 1"),
        ({"callback_on_step_end": print}, "callback_on_step_end is set here"),
    ):
        keywords = {
            "reference": reference,
            "quantized": quantized,
            "prompts": PROMPTS,
            "metrics": [],
            **CALL,
            **arguments,
        }
        with pytest.raises(ValueError, match=message):
            evaluate(**keywords)
    (tmp_path / "lpips.pt").write_text("no network")
    with pytest.raises(ValueError, match=r"lpips\.pt is damaged"):
        evaluate(reference, quantized, PROMPTS, weights=tmp_path, metrics=["lpips"], **CALL)


def test_sizes_that_differ_are_named(reference: Any, quantized: Any) -> None:
    class Larger:
        """Its images have another size, whatever is asked for."""

        components = quantized.components
        scheduler = quantized.scheduler

        def __call__(self, prompt: Any, height: int, width: int, **keywords: Any) -> Any:
            return quantized(prompt=prompt, height=8, width=8, **keywords)

    found = evaluate(reference, Larger(), PROMPTS[:1], metrics=["psnr", "ssim"], **CALL)
    assert (
        found.metrics["psnr"].skipped == "the pipelines give images of 16 x 16 and 8 x 8 pixels: pass height and width"
    )
    assert found.missing["latents"] == "Larger takes no callback_on_step_end, which would show its latents"


def step(values: list[float], index: int = 0) -> LatentStep:
    return LatentStep(index, 1000.0, tuple(torch.tensor([value]) for value in values))


def test_latent_errors_by_hand() -> None:
    (error,) = latent_errors([step([3.0, 4.0])], [step([3.3, 4.0])])
    assert error.noise == pytest.approx(0.09 / 25)
    assert error.worst == pytest.approx(0.09 / 9)
    with pytest.raises(ValueError, match="1 and 2 steps"):
        latent_errors([step([1.0])], [step([1.0]), step([1.0], 1)])
    with pytest.raises(FloatingPointError, match="NaN or infinity after step 0"):
        latent_errors([step([1.0])], [step([math.nan])])
    with pytest.raises(ValueError, match="zero after step 0"):
        latent_errors([step([0.0])], [step([1.0])])


def test_pipelines_that_hide_their_latents_are_named() -> None:
    class Hidden:
        _callback_tensor_inputs = ("prompt_embeds",)

        def __call__(self, callback_on_step_end: Any = None) -> None: ...

    assert StepRecorder.why_not(Hidden()) == "Hidden does not show its latents to callback_on_step_end"
    assert StepRecorder.why_not(one_block()) == ""


def test_recorder_keeps_the_first_prompts_over_batches() -> None:
    recorder = StepRecorder(prompts=3)
    for batch in range(3):
        for index in range(2):
            latents = torch.arange(2.0).reshape(2, 1) + 10 * batch + 100 * index
            assert recorder(None, index, torch.tensor(500), {"latents": latents})["latents"] is latents
    first, second = recorder.steps()
    assert torch.cat(first.latents).tolist() == [0.0, 1.0, 10.0]
    assert torch.cat(second.latents).tolist() == [100.0, 101.0, 110.0]
    assert len(recorder.seconds) == 3  # the first step of every call is not timed
