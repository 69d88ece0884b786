"""Affine error correction: recovers what is known, does nothing where nothing helps, and leaves pipelines whole."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import pickle
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from tiny_pipelines import tiny_sd3_pipeline, tiny_sd_pipeline
from torch import Tensor, nn

from modelopt_ext.presets import PER_TOKEN, linear_only
from optimum_segquant.correction import (
    FILE_NAME,
    AffineCorrection,
    Clock,
    confirm,
    correct_denoiser,
    correct_pipeline,
    correct_scheduler,
    final_latents,
    fit_affine_correction,
)
from optimum_segquant.correction.fit import N, clock_of, collect_moments, squared_error
from optimum_segquant.evaluation import DenoiserCall, Trajectories, sample_trajectories, velocity_sqnr

PROMPTS = ["a large red circle", "a small blue square", "a green triangle", "a small red square on blue"] * 2
TIMES = (1000.0, 800.0, 500.0, 100.0)
SAMPLING: dict[str, Any] = {"num_inference_steps": 6, "batch_size": 4, "guidance_scale": 3.0, "height": 16, "width": 16}


class Echo(nn.Module):
    """A denoiser whose output is its input: the recorded input is the quantized output."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return hidden_states


def echoed(
    scale: Tensor, shift: Tensor, noise: float, prompts: int = 16, times: tuple[float, ...] = TIMES, seed: int = 0
) -> Trajectories:
    """f = scale[t] * q + shift[t] + noise, q standard normal; (T, C) coefficients in the order of ``times``."""
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for step, time in enumerate(times):
        q = torch.randn(prompts, scale.shape[1], 8, 8, generator=generator)
        f = scale[step, :, None, None] * q + shift[step, :, None, None]
        f = f + noise * torch.randn(q.shape, generator=generator)
        calls.append(DenoiserCall({"hidden_states": q, "timestep": torch.full((prompts,), time)}, f, time, step))
    return Trajectories(tuple(calls))


def given(channels: int = 4, times: tuple[float, ...] = (100.0, 900.0), **fields: Any) -> AffineCorrection:
    steps = torch.linspace(0, 1, len(times))[:, None]
    values: dict[str, Any] = {
        "timesteps": times,
        "scale": 0.9 + 0.2 * steps + 0.01 * torch.arange(channels),
        "shift": 0.05 * steps - 0.02 * torch.arange(channels),
        "denoiser": "SD3Transformer2DModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "clock": Clock(),
    }
    return AffineCorrection(**{**values, **fields})


@pytest.mark.parametrize("estimator", ["least_squares", "unbiased"])
def test_recovers_a_known_correction_per_timestep_and_channel(estimator: Any) -> None:
    scale = torch.tensor([[1.2, 0.9], [1.1, 1.0], [1.0, 1.1], [0.8, 1.3]])
    shift = torch.tensor([[0.3, -0.2], [0.1, 0.0], [0.0, 0.2], [-0.4, 0.1]])
    correction = fit_affine_correction(Echo(), echoed(scale, shift, 0.02), estimator=estimator)
    assert correction.method == f"{estimator} per_step channel both"
    assert correction.timesteps == (100.0, 500.0, 800.0, 1000.0)
    torch.testing.assert_close(correction.scale, scale.flip(0), atol=2e-3, rtol=0)
    torch.testing.assert_close(correction.shift, shift.flip(0), atol=2e-3, rtol=0)
    unseen = echoed(scale, shift, 0.02, seed=1)
    denoiser = Echo()
    before = velocity_sqnr(denoiser, unseen).overall
    with correct_denoiser(denoiser, correction):
        after = velocity_sqnr(denoiser, unseen).overall
    signal = 10 * math.log10(float((scale**2 + shift**2).mean() + 0.02**2) / 0.02**2)
    assert after == pytest.approx(signal, abs=0.3)
    assert after - before == pytest.approx(correction.gain_db, abs=0.5)
    assert correction.gain_se_db < 0.2


def test_a_correction_that_leaves_no_error_has_a_finite_gain(tmp_path: Path) -> None:
    ones = torch.ones(4, 2)
    correction = fit_affine_correction(Echo(), echoed(2 * ones, 0 * ones, 0.0))
    torch.testing.assert_close(correction.scale, 2 * ones, atol=1e-6, rtol=0)
    # The error without it is f / 2; what is left is below the rounding of float64.
    assert 100 < correction.gain_db <= 10 * math.log10(0.25 / torch.finfo(torch.float64).eps) + 1e-6
    assert math.isfinite(correction.gain_se_db)
    path = correction.save(tmp_path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("steps", [[2], [1, 4]])
def test_prompts_are_counted_across_batches(steps: list[int]) -> None:
    """8 prompts in batches of 4, with one step a trajectory, too, where no falling step says that a batch begins."""
    pipeline = tiny_sd3_pipeline()
    recorded = sample_trajectories(pipeline, PROMPTS, steps=steps, **SAMPLING)
    times, moments = collect_moments(pipeline.transformer, recorded)
    assert moments.shape == (6, len(PROMPTS), len(steps), 4)
    assert moments[N].unique().tolist() == [2 * 8 * 8]  # both halves of guidance
    assert times == sorted(recorded.timesteps)


def test_interpolates_between_timesteps_and_holds_at_the_ends() -> None:
    correction = given(channels=1)
    a, b = correction.coefficients(torch.tensor([0.0, 100.0, 300.0, 900.0, 1000.0]))
    torch.testing.assert_close(a[:, 0], torch.tensor([0.9, 0.9, 0.95, 1.1, 1.1]))
    torch.testing.assert_close(b[:, 0], torch.tensor([0.0, 0.0, 0.0125, 0.05, 0.05]))


def test_tokens_images_videos_and_dtypes() -> None:
    correction = given(channels=4)
    a, b = correction.coefficients(torch.tensor([300.0]))
    image = torch.randn(2, 4, 8, 8)
    expected = image * a[0, :, None, None] + b[0, :, None, None]
    torch.testing.assert_close(correction.apply(image, 300.0), expected)
    video, tokens = image[:, :, None], image.flatten(2).mT.contiguous()
    torch.testing.assert_close(correction.apply(video, torch.tensor([300.0]))[:, :, 0], expected)
    torch.testing.assert_close(correction.apply(tokens, torch.tensor([300, 300])), expected.flatten(2).mT)
    half = correction.apply(image.bfloat16(), 300.0)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.03, rtol=0.01)
    mixed = correction.apply(image, torch.tensor([100.0, 900.0]))  # one timestep an item
    torch.testing.assert_close(mixed[1], correction.apply(image, 900.0)[1])


def test_estimators_see_noise_differently() -> None:
    """q = f + noise: least squares shrinks by the Wiener factor, the unbiased estimator leaves it alone."""
    generator = torch.Generator().manual_seed(0)
    calls = []
    for step, time in enumerate(TIMES):
        f = torch.randn(32, 2, 16, 16, generator=generator)
        q = f + 0.5 * torch.randn(f.shape, generator=generator)
        calls.append(DenoiserCall({"hidden_states": q, "timestep": torch.tensor(time)}, f, time, step))
    trajectories = Trajectories(tuple(calls))
    wiener = fit_affine_correction(Echo(), trajectories, estimator="least_squares")
    assert torch.allclose(wiener.scale, torch.tensor(1 / 1.25), atol=0.01)
    assert wiener.gain_db == pytest.approx(10 * math.log10(1.25), abs=0.05)
    unbiased = fit_affine_correction(Echo(), trajectories, estimator="unbiased")
    assert torch.allclose(unbiased.scale, torch.tensor(1.0), atol=0.01)


def test_no_worse_than_without_where_there_is_nothing_to_correct() -> None:
    """Errors that no affine map explains, few prompts: identity, or a loss within the noise."""
    ones, zeros = torch.ones(4, 3), torch.zeros(4, 3)
    identities = 0
    for seed in range(12):
        correction = fit_affine_correction(Echo(), echoed(ones, zeros, 0.3, prompts=4, seed=seed))
        identities += correction.is_identity
        unseen = echoed(ones, zeros, 0.3, prompts=32, seed=100 + seed)
        denoiser = Echo()
        before = velocity_sqnr(denoiser, unseen).overall
        with correct_denoiser(denoiser, correction):
            assert velocity_sqnr(denoiser, unseen).overall > before - 0.02
    assert identities >= 9


def test_few_prompts_shrink_the_correction() -> None:
    """A true scale of 1.02 under noise that differs from prompt to prompt is believed the more, the more is seen."""
    generator = torch.Generator().manual_seed(0)
    shrunk = {}
    for prompts in (4, 64):
        values = []
        for _ in range(10):
            q = torch.randn(prompts, 1, 8, 8, generator=generator)
            f = (1.02 + 0.04 * torch.randn(prompts, 1, 1, 1, generator=generator)) * q
            call = DenoiserCall({"hidden_states": q, "timestep": torch.tensor(5.0)}, f, 5.0, 0)
            values.append(float(fit_affine_correction(Echo(), Trajectories((call,)), significance=0).scale.mean()))
        shrunk[prompts] = sum(values) / len(values)
    assert 1 < shrunk[4] < shrunk[64] < 1.025
    assert shrunk[64] > 1.012


def test_squared_error_from_moments() -> None:
    q, f = torch.randn(2, 50).double()
    moments = torch.stack([torch.ones_like(q), q, f, q * q, q * f, f * f]).sum(1)
    a, b = torch.tensor(1.3).double(), torch.tensor(-0.2).double()
    torch.testing.assert_close(squared_error(moments, a, b), (f - a * q - b).square().sum())


def test_guided_fit_uses_the_guided_output() -> None:
    """Errors that cancel in u and c but not in u + s (c - u) are seen only by the guided fit."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(16, 2, 8, 8, generator=generator)
    delta = 0.5 * torch.randn(base.shape, generator=generator)
    f = torch.cat([base, base + delta])
    q = torch.cat([base, base + 0.8 * delta])  # quantization weakened the effect of the prompt
    latents = torch.cat([base, base])

    class Replay(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return q

    call = DenoiserCall({"hidden_states": latents, "timestep": torch.tensor(5.0)}, f, 5.0, 0)
    correction = fit_affine_correction(Replay(), Trajectories((call,)), estimator="unbiased", guidance_scale=4.0)
    fg, qg = base + 4 * delta, base + 3.2 * delta
    expected = float((fg * fg).sum() / (fg * qg).sum())
    assert correction.method.endswith("guided 4")
    assert correction.prompts == 16
    assert float(correction.scale.mean()) == pytest.approx(expected, rel=0.01)
    single = dataclasses.replace(
        call, inputs={"hidden_states": torch.randn(32, 2, 8, 8), "timestep": torch.tensor(5.0)}
    )
    with pytest.raises(ValueError, match="leave guidance_scale=None"):
        fit_affine_correction(Replay(), Trajectories((single,)), estimator="unbiased", guidance_scale=4.0)


@pytest.mark.parametrize("at", ["denoiser", "scheduler"])
def test_removing_restores_the_pipeline_bit_for_bit(at: Any) -> None:
    pipeline = tiny_sd3_pipeline()
    arguments = {**SAMPLING, "seeds": 5}
    before = final_latents(pipeline, PROMPTS[:2], **arguments)
    scheduler, keys = pipeline.scheduler, list(pipeline.transformer.state_dict())
    handle = correct_pipeline(pipeline, given(), at=at)
    assert not torch.equal(final_latents(pipeline, PROMPTS[:2], **arguments), before)
    assert list(pipeline.transformer.state_dict()) == keys
    handle.remove()
    handle.remove()  # harmless
    assert pipeline.scheduler is scheduler
    assert torch.equal(final_latents(pipeline, PROMPTS[:2], **arguments), before)


def pipelines() -> list[tuple[str, Any, str]]:
    euler = EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    return [
        ("flow matching", tiny_sd3_pipeline(), "SD3Transformer2DModel"),
        ("DDIM, noise", tiny_sd_pipeline(), "UNet2DConditionModel"),
        ("Euler, v", tiny_sd_pipeline(), "UNet2DConditionModel", euler),  # type: ignore[list-item]
    ]


@pytest.mark.parametrize("case", range(3), ids=["flow", "ddim-epsilon", "euler-v"])
def test_denoiser_and_scheduler_give_the_same_images_under_guidance(case: int) -> None:
    _, pipeline, denoiser, *scheduler = pipelines()[case]
    if scheduler:
        pipeline.scheduler = scheduler[0]
    correction = given(denoiser=denoiser, scheduler=type(pipeline.scheduler).__name__)
    with correct_pipeline(pipeline, correction):
        first = final_latents(pipeline, PROMPTS[:2], **SAMPLING)
    with correct_pipeline(pipeline, correction, at="scheduler"):
        second = final_latents(pipeline, PROMPTS[:2], **SAMPLING)
    plain = final_latents(pipeline, PROMPTS[:2], **SAMPLING)
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)
    assert (first - plain).abs().max() > 0.05


def test_corrected_scheduler_is_its_parent_to_everyone(tmp_path: Path) -> None:
    pipeline = tiny_sd3_pipeline()
    original = pipeline.scheduler
    corrected = correct_scheduler(original, given())
    assert isinstance(corrected, FlowMatchEulerDiscreteScheduler)
    assert isinstance(corrected, SchedulerMixin)
    assert corrected.config == original.config
    assert corrected.order == original.order
    assert inspect.signature(corrected.step) == inspect.signature(original.step)
    corrected.set_timesteps(7)
    assert len(corrected.timesteps) == 7
    output, sample = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    expected = copy.deepcopy(original)
    expected.set_timesteps(7)
    wanted = expected.step(given().apply(output, expected.timesteps[0]), expected.timesteps[0], sample)[0]
    for twin in (copy.deepcopy(corrected), pickle.loads(pickle.dumps(corrected)), corrected):
        result = twin.step(model_output=output, timestep=twin.timesteps[0], sample=sample, return_dict=False)[0]
        assert torch.equal(result, wanted)
    assert type(original) is FlowMatchEulerDiscreteScheduler  # the given one stays as it is
    pipeline.scheduler = corrected
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    assert type(loaded.scheduler) is FlowMatchEulerDiscreteScheduler
    assert loaded.scheduler.config.shift == 3.0


def test_save_beside_the_pipeline_and_load(tmp_path: Path) -> None:
    correction = given(gain_db=0.125, method="least_squares per_step channel both", clock=Clock(-1000.0, 1000.0))
    assert correction.save(tmp_path) == tmp_path / FILE_NAME
    for place in (tmp_path, tmp_path / FILE_NAME):
        loaded = AffineCorrection.load(place)
        assert torch.equal(loaded.scale, correction.scale)
        assert torch.equal(loaded.shift, correction.shift)
        plain = [f.name for f in dataclasses.fields(loaded) if f.name not in ("scale", "shift")]
        assert all(getattr(loaded, name) == getattr(correction, name) for name in plain)
    assert "+0.12" in str(loaded)
    assert "SD3Transformer2DModel" in str(loaded)


def test_damaged_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="fit a correction and save"):
        AffineCorrection.load(tmp_path)
    path = given().save(tmp_path)
    text = path.read_text()
    path.write_text(text[:100])
    with pytest.raises(ValueError, match="is not JSON"):
        AffineCorrection.load(tmp_path)
    path.write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="format version 2, this package reads 1"):
        AffineCorrection.load(tmp_path)
    document = json.loads(text)
    document["scale"][0][0] = math.nan
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="scale of the correction holds NaN"):
        AffineCorrection.load(tmp_path)
    del document["shift"]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"damaged.*shift"):
        AffineCorrection.load(tmp_path)


@pytest.mark.parametrize(
    ("times", "clock"),
    [
        ((999.0, 500.0, 1.0), Clock(1.0, 0.0)),
        ((1.0, 0.5, 0.02), Clock(1000.0, 0.0)),
        ((0.0, 0.5, 0.98), Clock(-1000.0, 1000.0)),
        ((1.5, 0.2, -1.3), None),
    ],
    ids=["as it is", "unit", "reversed unit", "log sigma"],
)
def test_clock_is_read_from_the_trajectories(times: tuple[float, ...], clock: Clock | None) -> None:
    ones = torch.ones(3, 1)
    trajectories = echoed(ones, 0 * ones, 0.1, times=times)
    assert clock_of(FlowMatchEulerDiscreteScheduler(), trajectories) == clock
    if clock is not None:
        scheduler_times = torch.tensor(times) * clock.scale + clock.offset
        assert (scheduler_times >= 0).all()
        assert (scheduler_times.diff() < 0).all()  # the scheduler counts down
        torch.testing.assert_close(clock.denoiser_time(scheduler_times), torch.tensor(times))


def test_refusals() -> None:
    ones = torch.ones(4, 2)
    few = echoed(ones, 0 * ones, 0.1, prompts=3)
    with pytest.raises(ValueError, match="trajectories of 3 prompts are too few"):
        fit_affine_correction(Echo(), few)
    with pytest.raises(ValueError, match="guidance_scale goes with estimator='unbiased'"):
        fit_affine_correction(Echo(), few, estimator="least_squares", guidance_scale=4.0)
    with pytest.raises(ValueError, match="'least_squares' or 'unbiased'"):
        fit_affine_correction(Echo(), few, estimator="ridge")  # type: ignore[arg-type]
    broken = dataclasses.replace(few[1], inputs={**few[1].inputs, "hidden_states": few[1].output * math.nan})
    with pytest.raises(FloatingPointError, match="NaN or infinity at timestep 800"):
        fit_affine_correction(Echo(), Trajectories((few[0], broken)))
    other = dataclasses.replace(few[0], output=few[0].output[:, :1])
    with pytest.raises(ValueError, match="belong to another model"):
        fit_affine_correction(Echo(), Trajectories((other,)))
    with pytest.raises(ValueError, match="holds NaN"):
        given(shift=torch.full((2, 4), math.nan))
    with pytest.raises(ValueError, match="must be at least one and ascend"):
        given(times=(5.0, 5.0))
    with pytest.raises(ValueError, match=r"4 channels, the output \(2, 8, 4, 4\) has 8.*correct the denoiser"):
        given().apply(torch.randn(2, 8, 4, 4), 5.0)
    with pytest.raises(ValueError, match="3 timesteps for a batch of 2"):
        given().apply(torch.randn(2, 4, 4, 4), torch.ones(3))

    pipeline = tiny_sd3_pipeline()
    with pytest.raises(ValueError, match="fitted to a UNet2DConditionModel, this denoiser is a SD3Transformer2DModel"):
        correct_pipeline(pipeline, given(denoiser="UNet2DConditionModel"))
    with pytest.raises(ValueError, match=r"fitted with FlowMatch.*this is a DDIMScheduler.*any_scheduler=True"):
        correct_scheduler(DDIMScheduler(), given())
    assert isinstance(correct_scheduler(DDIMScheduler(), given(), any_scheduler=True), DDIMScheduler)
    with pytest.raises(ValueError, match=r"fit it with scheduler=pipeline\.scheduler"):
        correct_scheduler(pipeline.scheduler, given(clock=None))
    with pytest.raises(ValueError, match="corrected already"):
        correct_scheduler(correct_scheduler(pipeline.scheduler, given()), given())
    with correct_pipeline(pipeline, given()):
        for at in ("denoiser", "scheduler"):
            with pytest.raises(ValueError, match="corrected already"):
                correct_pipeline(pipeline, given(), at=at)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give at least 4"):
        confirm(pipeline, given(), torch.zeros(2, 4, 8, 8), PROMPTS[:2])


def test_quantized_pipeline_end_to_end(tmp_path: Path) -> None:
    """At four bits on a (tiny, untrained) pipeline: the held-out promise holds on unseen prompts and timesteps."""
    pipeline = tiny_sd3_pipeline()
    reference = final_latents(pipeline, PROMPTS, seeds=300, **SAMPLING)
    fitting = sample_trajectories(pipeline, PROMPTS * 2, seeds=100, steps=(0, 2, 4, 5), **SAMPLING)
    unseen = sample_trajectories(pipeline, PROMPTS, seeds=200, steps=(1, 3, 5), **SAMPLING)
    config = linear_only({"num_bits": 4, "axis": 0}, {"num_bits": 8, **PER_TOKEN}, alpha=None, polarity="none")
    denoiser = mtq.quantize(pipeline.transformer, config, fitting.forward_loop)
    correction = fit_affine_correction(denoiser, fitting, scheduler=pipeline.scheduler)
    assert (correction.denoiser, correction.clock, correction.prompts) == ("SD3Transformer2DModel", Clock(), 16)
    correction.save(tmp_path)
    before = velocity_sqnr(denoiser, unseen).overall
    with correct_pipeline(pipeline, AffineCorrection.load(tmp_path)):
        after = velocity_sqnr(denoiser, unseen).overall
        with pytest.raises(ValueError, match="corrected already"):
            fit_affine_correction(denoiser, fitting)
    assert not correction.is_identity
    assert after > before + 0.5
    assert after - before == pytest.approx(correction.gain_db, abs=1.0)
    guided = fit_affine_correction(denoiser, fitting, guidance_scale=SAMPLING["guidance_scale"])
    gain = confirm(pipeline, guided, reference, PROMPTS, seeds=300, **SAMPLING)
    assert len(gain.per_prompt_db) == len(PROMPTS)
    assert gain.helps
    assert gain.gain_db > 0.3
    harmful = dataclasses.replace(guided, scale=guided.scale * 0.5)
    assert confirm(pipeline, harmful, reference, PROMPTS, seeds=300, **SAMPLING).harms
    identity = dataclasses.replace(guided, scale=torch.ones_like(guided.scale), shift=0 * guided.shift)
    assert confirm(pipeline, identity, reference, PROMPTS, seeds=300, **SAMPLING).gain_db == 0
