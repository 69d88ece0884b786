"""Trajectories, velocity SQNR, images and their metrics, on tiny untrained pipelines."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_pipelines import tiny_sd3_pipeline, tiny_sd_pipeline
from torch import nn

from optimum_segquant.evaluation import (
    DenoiserCall,
    Trajectories,
    denoiser_of,
    generate_images,
    image_metrics,
    sample_trajectories,
    sqnr_db,
    velocity_sqnr,
)

PROMPTS = ["a red circle", "a blue square above a small green triangle", "a large red triangle"]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_sd3_pipeline()


@pytest.fixture(scope="module")
def trajectories(pipeline):
    return sample_trajectories(pipeline, PROMPTS, seeds=7, num_inference_steps=4, batch_size=2, guidance_scale=4.0)


class Noisy(nn.Module):
    """A denoiser plus noise whose energy is a given fraction of the output's."""

    def __init__(self, denoiser: nn.Module, fraction: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.fraction = fraction

    def forward(self, **kwargs):
        output = self.denoiser(**kwargs)[0]
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        return (output + noise * (output.norm() / noise.norm()) * self.fraction**0.5,)


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def test_trajectories_hold_every_call_of_guided_sampling(trajectories):
    # 3 prompts in batches of 2 and 1, 4 steps each; guidance doubles the batch.
    assert [call.step for call in trajectories] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [call.batch for call in trajectories] == [0] * 4 + [1] * 4
    assert [len(call.output) for call in trajectories] == [4] * 4 + [2] * 4
    assert trajectories.timesteps == tuple(sorted({c.timestep for c in trajectories}, reverse=True))
    assert trajectories.timesteps[0] == 1000.0
    assert len(trajectories.timesteps) == 4
    first = trajectories[0]
    assert first.inputs["hidden_states"].shape == first.output.shape == (4, 4, 8, 8)
    # Both halves of a guided batch start from the same latents but read different prompts.
    conditional, unconditional = first.inputs["hidden_states"].chunk(2)
    assert torch.equal(conditional, unconditional)
    texts = first.inputs["encoder_hidden_states"].chunk(2)
    assert not torch.equal(*texts)
    assert all(tensor.device.type == "cpu" for tensor in first.inputs.values() if isinstance(tensor, torch.Tensor))


def test_text_embeddings_are_stored_once_per_trajectory(trajectories):
    embeddings = [call.inputs["encoder_hidden_states"].data_ptr() for call in trajectories]
    assert len(set(embeddings[:4])) == 1
    assert len(set(embeddings)) == 2
    latents = [call.inputs["hidden_states"].data_ptr() for call in trajectories]
    assert len(set(latents)) == 8


def test_trajectories_repeat_to_the_bit(pipeline, trajectories):
    torch.manual_seed(123)  # the state of the global generator must not matter
    again = sample_trajectories(pipeline, PROMPTS, seeds=7, num_inference_steps=4, batch_size=2, guidance_scale=4.0)
    assert len(again) == len(trajectories)
    for a, b in zip(again, trajectories, strict=True):
        assert torch.equal(a.output, b.output)
        assert a.inputs.keys() == b.inputs.keys()
        assert all(equal(a.inputs[name], b.inputs[name]) for name in a.inputs)


def test_other_seeds_give_other_trajectories(pipeline, trajectories):
    other = sample_trajectories(pipeline, PROMPTS, seeds=8, num_inference_steps=4, batch_size=2, guidance_scale=4.0)
    assert not torch.equal(other[0].inputs["hidden_states"], trajectories[0].inputs["hidden_states"])
    # seeds=8 stands for 8, 9, 10: its first prompt starts from the noise of the second prompt of seeds=7.
    assert torch.equal(other[0].inputs["hidden_states"][0], trajectories[0].inputs["hidden_states"][1])


def test_noise_does_not_depend_on_the_batch(pipeline, trajectories):
    single = sample_trajectories(pipeline, PROMPTS[1:2], seeds=[8], num_inference_steps=4, guidance_scale=4.0)
    assert torch.equal(single[0].inputs["hidden_states"][0], trajectories[0].inputs["hidden_states"][1])
    torch.testing.assert_close(single[3].output[1], trajectories[3].output[3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("steps", "kept"), [(None, [0, 1, 2, 3, 4]), (1, [0]), (2, [0, 4]), (3, [0, 2, 4]), ([1, 3], [1, 3])]
)
def test_a_subset_of_the_steps(pipeline, steps, kept):
    subset = sample_trajectories(pipeline, PROMPTS[:1], num_inference_steps=5, steps=steps)
    assert [call.step for call in subset] == kept


def test_subset_equals_the_same_steps_of_the_whole(pipeline, trajectories):
    subset = sample_trajectories(
        pipeline, PROMPTS, seeds=7, num_inference_steps=4, steps=[1, 3], batch_size=2, guidance_scale=4.0
    )
    whole = [call for call in trajectories if call.step in (1, 3)]
    assert all(torch.equal(a.output, b.output) for a, b in zip(subset, whole, strict=True))


def test_positional_arguments_of_a_unet_are_recorded_by_name():
    pipeline = tiny_sd_pipeline()
    recorded = sample_trajectories(pipeline, PROMPTS[:1], num_inference_steps=3)
    assert {"sample", "timestep", "encoder_hidden_states"} <= recorded[0].inputs.keys()
    assert recorded.timesteps == (667.0, 334.0, 1.0)
    assert velocity_sqnr(pipeline.unet, recorded).overall == math.inf


def test_sampling_leaves_no_trace():
    pipeline = tiny_sd3_pipeline()
    pipeline.set_progress_bar_config(disable=True, desc="mine")
    pipeline.transformer.train()
    pipeline.transformer.transformer_blocks[0].eval()
    pipeline.scheduler.set_timesteps(9)
    config = copy.deepcopy(dict(pipeline.config))
    scheduler, timesteps = pipeline.scheduler, pipeline.scheduler.timesteps.clone()
    weights = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    flags = [module.training for module in pipeline.transformer.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    sample_trajectories(pipeline, PROMPTS[:1], num_inference_steps=2)
    generate_images(pipeline, PROMPTS[:1], num_inference_steps=2)

    assert torch.equal(torch.rand(3), expected)  # the global generator did not move
    assert pipeline.scheduler is scheduler
    assert torch.equal(pipeline.scheduler.timesteps, timesteps)
    assert dict(pipeline.config) == config
    assert pipeline._progress_bar_config == {"disable": True, "desc": "mine"}
    assert [module.training for module in pipeline.transformer.modules()] == flags
    assert all(torch.equal(weights[name], tensor) for name, tensor in pipeline.transformer.state_dict().items())
    assert not pipeline.transformer._forward_hooks
    assert not pipeline.transformer._forward_pre_hooks


def test_an_exception_leaves_no_hook_and_no_state():
    pipeline = tiny_sd3_pipeline()
    scheduler = pipeline.scheduler
    with pytest.raises(ValueError, match="divisible by"):
        sample_trajectories(pipeline, PROMPTS, num_inference_steps=2, height=3)

    def fail(module, args, kwargs):
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        calls.append(1)

    calls: list[int] = []
    handle = pipeline.transformer.transformer_blocks[1].register_forward_pre_hook(fail, with_kwargs=True)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        sample_trajectories(pipeline, PROMPTS, num_inference_steps=3)
    handle.remove()
    assert calls == [1]
    assert torch.equal(torch.get_rng_state(), state)
    assert pipeline.scheduler is scheduler
    assert not pipeline.transformer._forward_hooks
    assert not pipeline.transformer._forward_pre_hooks
    assert len(sample_trajectories(pipeline, PROMPTS, num_inference_steps=3)) == 3  # and the same call works


def test_forward_loop_replays_the_recorded_inputs_in_order(pipeline, trajectories):
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, **kwargs):
            assert not torch.is_grad_enabled()
            assert not self.training
            seen.append({name: copy.deepcopy(value) for name, value in kwargs.items()})
            kwargs["hidden_states"].zero_()  # a rude model must not change the recording
            return (kwargs["hidden_states"],)

    spy = Spy().train()
    trajectories.forward_loop(spy)
    assert spy.training
    assert len(seen) == len(trajectories)
    for kwargs, call in zip(seen, trajectories, strict=True):
        assert kwargs.keys() == call.inputs.keys()
        assert all(equal(kwargs[name], call.inputs[name]) for name in kwargs)
    assert trajectories[0].inputs["hidden_states"].abs().sum() > 0


def test_full_precision_has_infinite_sqnr(pipeline, trajectories):
    result = velocity_sqnr(pipeline.transformer, trajectories)
    assert result.overall == math.inf
    assert list(result.per_timestep) == list(trajectories.timesteps)
    assert set(result.per_timestep.values()) == {math.inf}


@pytest.mark.parametrize("decibel", [10.0, 33.0])
def test_sqnr_of_known_noise(pipeline, trajectories, decibel):
    result = velocity_sqnr(Noisy(pipeline.transformer, 10 ** (-decibel / 10)), trajectories)
    assert result.overall == pytest.approx(decibel, abs=1e-4)
    assert list(result.per_timestep.values()) == pytest.approx([decibel] * 4, abs=1e-4)


def test_sqnr_weighs_calls_by_energy():
    def call(scale: float, step: int) -> DenoiserCall:
        timestep = 1000.0 - step
        return DenoiserCall(
            {"timestep": torch.tensor(timestep), "scale": scale}, torch.full((2, 3), scale), timestep, step
        )

    class Offset(nn.Module):
        def forward(self, timestep, scale):
            return torch.full((2, 3), scale + 0.1)

    result = velocity_sqnr(Offset(), Trajectories((call(1.0, 0), call(10.0, 1))))
    assert result.per_timestep[1000.0] == pytest.approx(20.0, abs=1e-4)
    assert result.per_timestep[999.0] == pytest.approx(40.0, abs=1e-4)
    assert result.overall == pytest.approx(10 * math.log10((1 + 100) / (2 * 0.01)), abs=1e-4)


def test_modelopt_calibrates_on_trajectories(trajectories):
    import modelopt.torch.quantization as mtq

    transformer = tiny_sd3_pipeline().transformer
    mtq.quantize(transformer, mtq.INT8_DEFAULT_CFG, trajectories.forward_loop)
    quantizer = transformer.context_embedder.input_quantizer
    largest = max(float(call.inputs["encoder_hidden_states"].abs().max()) for call in trajectories)
    assert float(quantizer.amax) == pytest.approx(largest, rel=1e-6)
    result = velocity_sqnr(transformer, trajectories)
    assert 15 < result.overall < 60


def test_images_are_repeatable_and_in_range(pipeline):
    images = generate_images(pipeline, PROMPTS, seeds=3, num_inference_steps=3)
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    torch.rand(7)
    assert torch.equal(images, generate_images(pipeline, PROMPTS, seeds=[3, 4, 5], num_inference_steps=3))
    torch.testing.assert_close(
        images, generate_images(pipeline, PROMPTS, seeds=3, num_inference_steps=3, batch_size=1), atol=1e-4, rtol=0
    )
    assert not torch.allclose(images, generate_images(pipeline, PROMPTS, seeds=4, num_inference_steps=3), atol=1e-2)


def test_psnr_of_known_difference():
    reference = torch.full((2, 3, 16, 16), 0.5)
    images = reference.clone()
    images[0] += 0.1
    images[1] += 0.01
    metrics = image_metrics(images, reference)
    assert metrics.psnr_per_image == pytest.approx((20.0, 40.0), abs=1e-3)
    assert metrics.psnr == pytest.approx(30.0, abs=1e-3)


def test_ssim_of_known_difference():
    # For constant images SSIM is its luminance term (2ab + c)/(a^2 + b^2 + c), c = 0.01^2.
    reference, images = torch.full((2, 3, 16, 16), 0.5), torch.full((2, 3, 16, 16), 0.5)
    images[1] = 0.25
    metrics = image_metrics(images, reference)
    expected = (2 * 0.5 * 0.25 + 1e-4) / (0.5**2 + 0.25**2 + 1e-4)
    assert metrics.ssim_per_image == pytest.approx((1.0, expected), abs=1e-4)
    assert metrics.psnr_per_image[0] == math.inf


def test_sqnr_db():
    assert sqnr_db(1000.0, 1.0) == pytest.approx(30.0)
    assert sqnr_db(1.0, 0.0) == math.inf
    with pytest.raises(ValueError, match="zero everywhere"):
        sqnr_db(0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": "a red circle"}, r"write \['a red circle'\]"),
        ({"prompts": [1]}, "must be strings, got int"),
        ({"seeds": [1, 2]}, "3 prompts but 2 seeds"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"steps": 0}, "steps must be from 1"),
        ({"steps": 5}, "steps must be from 1"),
        ({"steps": [0, 9]}, "indices from 0 to 3"),
        ({"steps": []}, "at least one"),
        ({"generator": None}, "'generator' is set here"),
        ({"output_type": "pil"}, "output_type is set here"),
        ({"denoiser": "prior"}, "has no prior"),
    ],
)
def test_impossible_arguments_say_what_to_do(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_trajectories(pipeline, **{"prompts": PROMPTS, "num_inference_steps": 4, **arguments})


def test_objects_without_a_denoiser_are_refused(pipeline):
    with pytest.raises(ValueError, match="expected a diffusers pipeline, got Linear"):
        denoiser_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"not a torch\.nn\.Module"):
        denoiser_of(pipeline, "scheduler")


def test_another_model_is_refused(pipeline, trajectories):
    class Wrong(nn.Module):
        def forward(self, **kwargs):
            return (kwargs["hidden_states"][:, :2],)

    with pytest.raises(ValueError, match="belong to another model"):
        velocity_sqnr(Wrong(), trajectories)


def test_nan_is_named(pipeline, trajectories):
    class Broken(nn.Module):
        def forward(self, **kwargs):
            return (kwargs["hidden_states"] * math.nan,)

    with pytest.raises(FloatingPointError, match="timestep 1000"):
        velocity_sqnr(Broken(), trajectories)
    broken = tiny_sd3_pipeline()
    broken.transformer.proj_out.bias.data[0] = math.inf
    with pytest.raises(FloatingPointError, match="step 0"):
        sample_trajectories(broken, PROMPTS[:1], num_inference_steps=2)
    with pytest.raises(FloatingPointError, match=r"images of prompts \[0, 1\]"):
        generate_images(broken, PROMPTS[:2], num_inference_steps=2)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 16, 15), "one shape"),
        (torch.zeros(3, 16, 16), "one shape"),
        (torch.full((2, 3, 16, 16), 255.0), r"images must lie in \[0, 1\]"),
        (torch.full((2, 3, 16, 16), math.nan), r"images must lie in \[0, 1\]"),
    ],
)
def test_image_metrics_refuse_what_is_no_image(images, message):
    with pytest.raises(ValueError, match=message):
        image_metrics(images, torch.zeros(2, 3, 16, 16))


def test_small_images_are_refused():
    with pytest.raises(ValueError, match="at least 11 x 11"):
        image_metrics(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
