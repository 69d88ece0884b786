"""Train a small text-to-image pipeline from nothing on drawn pictures, on one GPU, in minutes.

    python examples/train_shapes_pipeline.py --output examples/pipelines/shapes-sd3
    python examples/train_shapes_pipeline.py --denoiser flux --parts examples/pipelines/shapes-sd3 --output shapes-flux
    python examples/train_shapes_pipeline.py --denoiser sdxl --parts examples/pipelines/shapes-sd3 --output shapes-sdxl

The first command trains everything: the VAE on the pictures, then the denoiser on the latents together with all three
text encoders, which start at random and learn from the denoiser's loss alone. The others reuse the VAE and the text
encoders of that pipeline, frozen, and train another denoiser on the same latents.

* SD3 and FLUX style: rectified flow (Esser et al., arXiv 2403.03206): x_s = (1 - s) z + s e for latents z and noise e,
  the model predicts e - z; s is logit-normal, then shifted as the saved scheduler shifts it.
* SDXL style: v-prediction on a variance-preserving schedule with zero terminal signal (Lin et al., arXiv 2305.08891).

A share of the captions is replaced by the empty one (what guidance needs), and a share of the T5 states by zeros (what
a pipeline loaded without T5 gets). A part of the steps pads the text to the length that the pipelines use by default.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import score_shapes
import shapes
import shapes_models
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler
from torch import nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

log = logging.getLogger("train_shapes_pipeline")

CHUNK = 4096  # scenes a worker samples with one seed
DROP_CAPTION = 0.1  # share of samples that are trained with the empty caption
DROP_T5 = 0.1  # share of samples that are trained with zeros for the T5 states
SHORT_TEXT = 32  # tokens; every caption fits
LONG_EVERY = 10  # one step in so many pads T5's text to the pipeline's default length
EMA_DECAY = 0.999
KL_WEIGHT = 5e-4  # nats of KL a latent element against L1 a pixel channel (pixels in -1..1)


# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass
class Data:
    """The training set, on the training device: N pictures, as packed scenes, and N captions."""

    scenes: torch.Tensor  # (N, 3, 7) float32
    clip_ids: torch.Tensor  # (N + 1, CLIP_TOKENS) int64; row N is the empty caption
    t5_ids: torch.Tensor  # (N + 1, SHORT_TEXT) int64, likewise

    def pictures(self, rows: torch.Tensor) -> torch.Tensor:
        """Draw rows: (len(rows), 3, CANVAS, CANVAS) float32 in -1..1."""
        return shapes.render(self.scenes[rows]) * 2 - 1


def _sample_chunk(seed: int) -> tuple[torch.Tensor, list[str]]:
    scenes, captions = shapes.sample(seed, CHUNK)
    return shapes.pack(scenes), captions


def make_data(count: int, seed: int, device: torch.device) -> Data:
    """Sample ``count`` scenes with captions in worker processes and tokenize the captions."""
    seeds = [seed * 1_000_003 + i for i in range(math.ceil(count / CHUNK))]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("forkserver")) as workers:
        chunks = list(workers.map(_sample_chunk, seeds))
    captions = [*[c for _, some in chunks for c in some][:count], ""]
    clip, t5 = shapes_models.load_tokenizers(fast=True)

    def ids(tokenizer: Callable[..., dict[str, torch.Tensor]], length: int) -> torch.Tensor:
        encoded = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return encoded["input_ids"].to(device)

    scenes = torch.cat([s for s, _ in chunks])[:count].to(device)
    return Data(scenes, ids(clip, shapes_models.CLIP_TOKENS), ids(t5, SHORT_TEXT))


# ---------------------------------------------------------------------------------------------------------------------
# The loop that everything is trained with


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. ``seconds`` cuts ``steps`` down, once the speed is known, to what fits."""

    steps: int
    peak: float  # learning rate
    seconds: float | None = None
    warmup: int = 200
    clip: float = 1.0  # gradient norm

    def rate(self, step: int, steps: int) -> float:
        """Linear warm-up, then half a cosine to zero."""
        return self.peak * min((step + 1) / self.warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(name: str, modules: nn.Module, loss_at: Callable[[int], torch.Tensor], schedule: Schedule) -> nn.Module:
    """Minimise ``loss_at(step)`` over the parameters of ``modules``.

    Returns:
        A copy of ``modules`` that holds the exponential moving average of the parameters, in eval mode.
    """
    average = copy.deepcopy(modules).eval().requires_grad_(False)
    live = [p for p in modules.parameters() if p.requires_grad]
    averaged = [a for a, p in zip(average.parameters(), modules.parameters(), strict=True) if p.requires_grad]
    device = live[0].device
    optimizer = torch.optim.AdamW(
        live, lr=schedule.peak, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    steps, started, losses = schedule.steps, time.perf_counter(), torch.zeros((), device=device)
    timed_from = (0, started)
    step = 0
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, steps)
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(live, schedule.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, [p.detach() for p in live], 1 - decay)
        losses += loss.detach()
        step += 1
        if step in (40, 120):
            # The first steps compile; the next eighty tell the speed.
            float(losses)
            now = time.perf_counter()
            pace = (now - timed_from[1]) / (step - timed_from[0])
            log.info("%s: step %d after %.1f s, %.2f ms a step", name, step, now - started, 1e3 * pace)
            if step == 120 and schedule.seconds:
                fits = step + int((schedule.seconds - (now - started)) / pace)
                if fits < steps:
                    log.warning("%s: %d steps fit into the time given, not %d", name, fits, steps)
                    steps = max(fits, step)
            timed_from = (step, now)
        if step % 500 == 0 or step == steps:
            log.info("%s: step %d of %d, loss %.5f", name, step, steps, float(losses) / (step % 500 or 500))
            losses.zero_()
    log.info("%s: %d steps in %.1f s", name, steps, time.perf_counter() - started)
    return average


def batches(count: int, size: int, generator: torch.Generator, device: torch.device) -> Iterator[torch.Tensor]:
    """Endless random batches of row numbers, every row once an epoch."""
    while True:
        order = torch.randperm(count, generator=generator, device=device)
        yield from (part for part in order.split(size) if len(part) == size)


# ---------------------------------------------------------------------------------------------------------------------
# VAE


def train_vae(data: Data, schedule: Schedule, batch: int, seed: int) -> AutoencoderKL:
    """Train the VAE (L1 and KL), then set its scaling and shift so that latents have mean 0 and deviation 1."""
    device = data.scenes.device
    torch.manual_seed(seed)
    vae = shapes_models.build_vae().to(device, memory_format=torch.channels_last)
    generator = torch.Generator(device).manual_seed(seed)
    rows = batches(len(data.scenes), batch, generator, device)

    def loss_at(step: int) -> torch.Tensor:
        pictures = data.pictures(next(rows)).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            posterior = vae.encode(pictures).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(decoded.float(), pictures) + KL_WEIGHT * kl

    trained = train("vae", vae, loss_at, schedule).to(memory_format=torch.contiguous_format)
    assert isinstance(trained, AutoencoderKL)
    some = torch.arange(min(4096, len(data.scenes)), device=device)
    mean, deviation = encode(trained, data, some)
    latents = torch.addcmul(
        mean.float(), deviation.float(), torch.randn(mean.shape, generator=generator, device=device)
    )
    trained.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    with torch.no_grad():
        pictures = data.pictures(some[:512])
        error = (trained.decode(mean[:512].float()).sample - pictures).square().mean().item() / 4
    log.info(
        "vae: PSNR %.1f dB, latents %.3f +- %.3f, of which sampled %.3f",
        -10 * math.log10(error),
        latents.mean(),
        latents.std(),
        deviation.float().square().mean().sqrt(),
    )
    return trained


@torch.no_grad()
def encode(vae: AutoencoderKL, data: Data, rows: torch.Tensor, batch: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents of rows, (len(rows), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE) float16."""
    means, deviations = [], []
    for part in rows.split(batch):
        with autocast(rows.device):
            posterior = vae.encode(data.pictures(part)).latent_dist
        means.append(posterior.mean.half())
        deviations.append(posterior.std.half())
    return torch.cat(means), torch.cat(deviations)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# ---------------------------------------------------------------------------------------------------------------------
# Text


@dataclass
class Text:
    """What the encoders make of a batch of captions (B, tokens, width)."""

    clip: tuple[torch.Tensor, torch.Tensor]  # second to last hidden states of both CLIP encoders
    projected: tuple[torch.Tensor, torch.Tensor]  # (B, width), their projected states at the end token
    pooled: torch.Tensor  # (B, width), the first encoder's state at the end token
    t5: torch.Tensor
    empty: torch.Tensor  # (B,) bool, whether the caption was dropped


class TextEncoders(nn.Module):
    """All three encoders, as the pipelines call them: T5 without a mask, so that its states depend on the padding."""

    def __init__(
        self, clips: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection], t5: T5EncoderModel
    ) -> None:
        super().__init__()
        self.clips = nn.ModuleList(clips)
        self.t5 = t5

    def forward(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor, empty: torch.Tensor) -> Text:
        """Encode token ids (B, tokens) int64; ``empty`` (B,) bool is passed on."""
        outputs = [clip(clip_ids, output_hidden_states=True) for clip in self.clips]
        end = (clip_ids == self.clips[0].config.eos_token_id).int().argmax(dim=1)
        pooled = outputs[0].last_hidden_state[torch.arange(len(end), device=end.device), end]
        return Text(
            clip=(outputs[0].hidden_states[-2], outputs[1].hidden_states[-2]),
            projected=(outputs[0].text_embeds, outputs[1].text_embeds),
            pooled=pooled,
            t5=self.t5(t5_ids)[0],
            empty=empty,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Denoisers: each is a model, and a loss of clean latents


class Sd3(nn.Module):
    """Rectified flow with Stable Diffusion 3's transformer."""

    long_text = 256  # tokens, T5 padding of StableDiffusion3Pipeline by default

    def __init__(self) -> None:
        super().__init__()
        self.model = shapes_models.build_sd3()

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, worth compiling one by one."""
        return list(self.model.transformer_blocks)

    def normalize(self, latents: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
        """Latents as the pipeline's sampler knows them."""
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    def loss(self, latents: torch.Tensor, text: Text, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error of the velocity at random noise levels."""
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        sigma = torch.randn(len(latents), generator=generator, device=latents.device).sigmoid()
        shift = shapes_models.flow_scheduler().config.shift
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        level = sigma[:, None, None, None]
        velocity = self.velocity(torch.lerp(latents, noise, level), sigma, text)
        return F.mse_loss(velocity.float(), noise - latents)

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, text: Text) -> torch.Tensor:
        """The model's prediction of noise minus latents."""
        context = torch.cat(text.clip, dim=-1)
        context = F.pad(context, (0, text.t5.shape[-1] - context.shape[-1]))
        return self.model(
            hidden_states=noisy,
            timestep=sigma * 1000,
            encoder_hidden_states=torch.cat([context, text.t5], dim=1),
            pooled_projections=torch.cat(text.projected, dim=-1),
            return_dict=False,
        )[0]


class Flux(Sd3):
    """Rectified flow with FLUX's transformer: latents packed 2 x 2 into tokens, only T5 as context."""

    long_text = 512

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.model = shapes_models.build_flux()

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, worth compiling one by one."""
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, text: Text) -> torch.Tensor:
        """The model's prediction of noise minus latents."""
        b, c, h, w = noisy.shape
        tokens = noisy.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        places = torch.zeros(h // 2, w // 2, 3, device=noisy.device)
        places[..., 1] = torch.arange(h // 2, device=noisy.device)[:, None]
        places[..., 2] = torch.arange(w // 2, device=noisy.device)[None, :]
        out = self.model(
            hidden_states=tokens,
            timestep=sigma,
            encoder_hidden_states=text.t5,
            pooled_projections=text.pooled,
            txt_ids=torch.zeros(text.t5.shape[1], 3, device=noisy.device),
            img_ids=places.view(-1, 3),
            return_dict=False,
        )[0]
        return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


class Sdxl(nn.Module):
    """v-prediction with SDXL's UNet; a dropped caption is all zeros, as SDXL's pipeline has it."""

    long_text = SHORT_TEXT  # SDXL has no T5

    def __init__(self) -> None:
        super().__init__()
        self.model = shapes_models.build_sdxl()
        scheduler = shapes_models.sdxl_scheduler()
        assert isinstance(scheduler, EulerDiscreteScheduler)
        self.register_buffer("signal", scheduler.alphas_cumprod.float(), persistent=False)

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, worth compiling one by one."""
        return [*self.model.down_blocks, self.model.mid_block, *self.model.up_blocks]

    def normalize(self, latents: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
        """Latents as the pipeline's sampler knows them: SDXL's has no shift."""
        return latents * vae.config.scaling_factor

    def loss(self, latents: torch.Tensor, text: Text, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error of v at uniformly random timesteps."""
        device, b = latents.device, len(latents)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        timestep = torch.randint(len(self.signal), (b,), generator=generator, device=device)
        signal = self.signal[timestep][:, None, None, None]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        keep = ~text.empty
        size = float(shapes.CANVAS)
        prediction = self.model(
            noisy,
            timestep,
            encoder_hidden_states=torch.cat(text.clip, dim=-1) * keep[:, None, None],
            added_cond_kwargs={
                "text_embeds": text.projected[1] * keep[:, None],
                "time_ids": torch.tensor([[size, size, 0.0, 0.0, size, size]], device=device).expand(b, -1),
            },
            return_dict=False,
        )[0]
        return F.mse_loss(prediction.float(), signal.sqrt() * noise - (1 - signal).sqrt() * latents)


KINDS: dict[str, type[Sd3] | type[Flux] | type[Sdxl]] = {"sd3": Sd3, "flux": Flux, "sdxl": Sdxl}


class Trainee(nn.Module):
    """What the denoiser's loss trains: the denoiser, and the text encoders unless they are frozen."""

    def __init__(self, denoiser: nn.Module, text: TextEncoders) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.text = text


def train_denoiser(
    kind: str,
    data: Data,
    vae: AutoencoderKL,
    text: TextEncoders,
    schedule: Schedule,
    batch: int,
    seed: int,
    *,
    compiled: bool,
) -> Trainee:
    """Train a denoiser of ``kind`` on the latents of the data; the text encoders too, where they require gradients."""
    device = data.scenes.device
    count = len(data.scenes)
    means, deviations = encode(vae, data, torch.arange(count, device=device))
    log.info("%s: %d latents cached", kind, count)
    torch.manual_seed(seed)
    trainee = Trainee(KINDS[kind](), text).to(device)
    denoiser = trainee.denoiser
    log.info("%s: %.2f million parameters", kind, sum(p.numel() for p in denoiser.model.parameters()) / 1e6)
    generator = torch.Generator(device).manual_seed(seed)
    rows = batches(count, batch, generator, device)
    frozen = not any(p.requires_grad for p in text.parameters())
    image_tokens = (shapes_models.LATENT_SIZE // 2) ** 2

    def loss_at(step: int) -> torch.Tensor:
        long = step % LONG_EVERY == LONG_EVERY - 1 and denoiser.long_text > SHORT_TEXT
        tokens = denoiser.long_text if long else SHORT_TEXT
        row = next(rows)
        if long:  # as many tokens as other batches have, in fewer pictures
            row = row[
                : max(1, batch * (image_tokens + 2 * SHORT_TEXT) // (image_tokens + SHORT_TEXT + tokens) // 8 * 8)
            ]
        empty = torch.rand(len(row), generator=generator, device=device) < DROP_CAPTION
        caption = torch.where(empty, count, row)
        noise = torch.randn((len(row), *means.shape[1:]), generator=generator, device=device)
        latents = denoiser.normalize(torch.addcmul(means[row].float(), deviations[row].float(), noise), vae)
        with autocast(device), torch.set_grad_enabled(not frozen):
            encoded = text(data.clip_ids[caption], F.pad(data.t5_ids[caption], (0, tokens - SHORT_TEXT)), empty)
        without = torch.rand(len(row), generator=generator, device=device) < DROP_T5
        encoded.t5 = encoded.t5 * ~without[:, None, None]
        with autocast(device):
            return denoiser.loss(latents, encoded, generator)

    if compiled:
        torch._dynamo.config.recompile_limit = 64
        # In place, and dropped by deepcopy: the averaged copy, which is saved, stays plain.
        for block in denoiser.blocks():
            block.compile(dynamic=False)
    trained = train(kind, trainee, loss_at, schedule)
    assert isinstance(trained, Trainee)
    return trained


# ---------------------------------------------------------------------------------------------------------------------


def load_parts(folder: Path, device: torch.device) -> tuple[AutoencoderKL, TextEncoders]:
    """The VAE and the frozen text encoders of a trained SD3-style shapes pipeline."""
    pipe = DiffusionPipeline.from_pretrained(folder).to(device)
    text = TextEncoders((pipe.text_encoder, pipe.text_encoder_2), pipe.text_encoder_3).requires_grad_(False)
    return pipe.vae, text


def new_text_encoders(seed: int, device: torch.device) -> TextEncoders:
    """All three text encoders, untrained."""
    torch.manual_seed(seed)
    clip, t5 = shapes_models.load_tokenizers()
    clips = (shapes_models.build_clip(0, clip), shapes_models.build_clip(1, clip))
    return TextEncoders(clips, shapes_models.build_t5(t5)).to(device)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to save the pipeline in")
    parser.add_argument("--denoiser", choices=sorted(KINDS), default="sd3")
    parser.add_argument("--parts", type=Path, help="SD3-style pipeline to take VAE and text encoders from, frozen")
    parser.add_argument("--pictures", type=int, default=262_144)
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--vae-batch", type=int, default=256)
    parser.add_argument("--vae-seconds", type=float, help="fewer steps if they don't fit into this time")
    parser.add_argument("--steps", type=int, default=12_000, help="steps of the denoiser")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of the denoiser")
    parser.add_argument("--seconds", type=float, help="fewer steps of the denoiser if they don't fit into this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="don't compile the denoiser's blocks")
    parser.add_argument("--prompts", type=int, default=512, help="unseen prompts to judge the result with; 0 for none")
    parser.add_argument("--sheet", type=Path, help="write pictures of the first 64 of these prompts to this PNG")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.denoiser != "sd3" and args.parts is None:
        parser.error(f"--denoiser {args.denoiser} needs --parts: train the sd3 pipeline first and pass its folder")
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention has crashed on short sequences

    data = make_data(args.pictures, args.seed, device)
    log.info("%d pictures with captions", args.pictures)
    if args.parts:
        vae, text = load_parts(args.parts, device)
    else:
        vae = train_vae(data, Schedule(args.vae_steps, 1e-3, args.vae_seconds), args.vae_batch, args.seed)
        text = new_text_encoders(args.seed, device)
    trained = train_denoiser(
        args.denoiser, data, vae, text, Schedule(args.steps, args.rate, args.seconds), args.batch, args.seed,
        compiled=not args.no_compile,
    )  # fmt: skip
    clips = (trained.text.clips[0], trained.text.clips[1])
    pipe = shapes_models.assemble(args.denoiser, trained.denoiser.model, vae, clips, trained.text.t5)
    shapes_models.save(pipe, args.output)
    log.info("saved to %s", args.output)
    if args.prompts:
        pipe.set_progress_bar_config(disable=True)
        prompts = score_shapes.unseen_prompts(args.prompts)
        for guidance in (3.0, 5.0):
            pictures = score_shapes.generate(pipe, prompts, guidance=guidance, batch=128)
            log.info("guidance %.1f: %s", guidance, score_shapes.score(prompts, pictures))
        if args.sheet:
            score_shapes.contact_sheet(pictures[:64]).save(args.sheet)


if __name__ == "__main__":
    main()
