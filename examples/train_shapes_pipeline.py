"""Train a small text-to-image pipeline from nothing on drawn pictures, on one GPU, in minutes.

    python examples/train_shapes_pipeline.py --output examples/pipelines/shapes-sd3
    python examples/train_shapes_pipeline.py --denoiser flux --parts examples/pipelines/shapes-sd3 --output shapes-flux
    python examples/train_shapes_pipeline.py --denoiser sdxl --parts examples/pipelines/shapes-sd3 --output shapes-sdxl

The first command trains everything: the VAE on the pictures, then the denoiser on the latents together with all three
text encoders, which start at random and learn from the denoiser's loss alone. The others reuse the VAE and the CLIP
encoders of that pipeline, frozen, and train another denoiser on the same latents. FLUX reads its prompts from T5's
states, and the T5 of that pipeline knows no word order, as CLIP told SD3's transformer all it needed. So FLUX gets a
new T5, taught to say what the CLIP encoders say of every word, then trained on together with the denoiser, slowly.

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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import score_shapes
import shapes
import shapes_models
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn
from training import Schedule, train
from transformers import CLIPTextModelWithProjection, T5EncoderModel

log = logging.getLogger("train_shapes_pipeline")

CHUNK = 4096  # scenes a worker samples with one seed
DROP_CAPTION = 0.1  # share of samples that are trained with the empty caption
DROP_T5 = 0.1  # share of samples that are trained with zeros for the T5 states, where a pipeline may lack T5
T5_LAYERS = 3  # of the T5 that is taught for FLUX
T5_RATE = 0.15  # of the denoiser's learning rate, for a T5 that was taught: its attention is unscaled and easily upset
WATCH_PROMPTS, WATCH_SEED = 64, 60_000  # none of the prompts that judge the result
WATCH_SLACK = 0.05  # share of prompts by which a later state may be worse than the best before and still be kept
SPARE_SECONDS = 35.0  # kept for judging and saving the final state
SHORT_TEXT = 32  # tokens; every caption fits
LONG_EVERY = 10  # one step in so many pads T5's text to the pipeline's default length
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


def _sample_chunk(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    scenes, captions = shapes.sample(seed, CHUNK)
    return shapes.pack(scenes), *_token_ids(captions)


def _token_ids(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    def ids(tokenizer: Callable[..., Any], length: int) -> torch.Tensor:
        tokens = tokenizer(captions, padding="max_length", max_length=length, truncation=True)["input_ids"]
        return torch.tensor(tokens)

    clip, t5 = shapes_models.load_tokenizers(fast=True)
    return ids(clip, shapes_models.CLIP_TOKENS), ids(t5, SHORT_TEXT)


def make_data(count: int, seed: int, device: torch.device) -> Data:
    """Sample ``count`` scenes with tokenized captions, in worker processes.

    The workers are forked, which is quick: call this before anything uses the GPU.
    """
    seeds = [seed * 1_000_003 + i for i in range(math.ceil(count / CHUNK))]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as workers:
        chunks = list(workers.map(_sample_chunk, seeds))
    scenes, clip_ids, t5_ids = (torch.cat(parts)[:count] for parts in zip(*chunks, strict=True))
    empty_clip_ids, empty_t5_ids = _token_ids([""])
    return Data(
        scenes.to(device),
        torch.cat([clip_ids, empty_clip_ids]).to(device),
        torch.cat([t5_ids, empty_t5_ids]).to(device),
    )


# ---------------------------------------------------------------------------------------------------------------------
# VAE


def train_vae(data: Data, schedule: Schedule, batch: int, seed: int) -> AutoencoderKL:
    """Train the VAE (L1 and KL), then set its scaling and shift so that latents have mean 0 and deviation 1."""
    device = data.scenes.device
    torch.manual_seed(seed)
    vae = shapes_models.build_vae().to(device)

    def loss(model: AutoencoderKL) -> torch.Tensor:
        pictures = data.pictures(torch.randint(len(data.scenes), (batch,), device=device))
        posterior = model.encode(pictures.to(model.dtype)).latent_dist
        decoded = model.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(decoded.float(), pictures) + KL_WEIGHT * kl

    trained = train("vae", vae, [loss], schedule)
    some = torch.arange(min(2048, len(data.scenes)), device=device)
    mean, deviation = encode(trained, data, some)
    latents = torch.addcmul(mean.float(), deviation.float(), torch.randn(mean.shape, device=device))
    trained.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    with torch.no_grad():
        pictures = data.pictures(some[:512])
        error = (trained.decode(mean[:512].float()).sample - pictures).square().mean().item() / 4
    log.info(
        "vae: PSNR %.1f dB, latents %.3f +- %.3f, of which sampled %.3f",
        -10 * math.log10(error), latents.mean(), latents.std(), deviation.float().square().mean().sqrt(),
    )  # fmt: skip
    return trained


@torch.no_grad()
def encode(vae: AutoencoderKL, data: Data, rows: torch.Tensor, batch: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents of rows, (len(rows), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE) float16."""
    means, deviations = [], []
    for part in rows.split(batch):
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
            posterior = vae.encode(data.pictures(part)).latent_dist
        means.append(posterior.mean.half())
        deviations.append(posterior.std.half())
    return torch.cat(means), torch.cat(deviations)


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
        self, clip_1: CLIPTextModelWithProjection, clip_2: CLIPTextModelWithProjection, t5: T5EncoderModel
    ) -> None:
        super().__init__()
        self.clip_1, self.clip_2, self.t5 = clip_1, clip_2, t5

    def forward(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor, empty: torch.Tensor) -> Text:
        """Encode token ids (B, tokens) int64; ``empty`` (B,) bool is passed on."""
        first, second = (clip(clip_ids, output_hidden_states=True) for clip in (self.clip_1, self.clip_2))
        end = (clip_ids == self.clip_1.config.eos_token_id).int().argmax(dim=1)
        pooled = first.last_hidden_state.gather(1, end[:, None, None].expand(-1, 1, first.last_hidden_state.shape[-1]))
        return Text(
            clip=(first.hidden_states[-2], second.hidden_states[-2]),
            projected=(first.text_embeds, second.text_embeds),
            pooled=pooled[:, 0],
            t5=self.t5(t5_ids)[0],
            empty=empty,
        )


class Student(nn.Module):
    """A T5 encoder with a linear map from its states to those of the CLIP encoders."""

    def __init__(self, t5: T5EncoderModel) -> None:
        super().__init__()
        self.t5 = t5
        self.head = nn.Linear(shapes_models.T5_WIDTH, sum(shapes_models.CLIP_WIDTHS))

    def forward(self, t5_ids: torch.Tensor) -> torch.Tensor:
        """(B, tokens) int64 to (B, tokens, sum of the CLIP widths)."""
        said: torch.Tensor = self.head(self.t5(t5_ids)[0])
        return said


def teach_t5(data: Data, text: TextEncoders, schedule: Schedule, batch: int, seed: int) -> tuple[T5EncoderModel, float]:
    """Teach a new T5 encoder what the CLIP encoders of ``text`` say of every word, in short and in padded texts.

    Both tokenizers cut captions alike, but for CLIP's start token. CLIP reads forwards only, so its states, among them
    the one at the end token, hold the order of the words before.

    Returns:
        The encoder, and the share of the variance of CLIP's states that it can't tell, 0..1, on captions of ``data``.
    """
    device, count = data.scenes.device, len(data.scenes)
    torch.manual_seed(seed)
    student = Student(shapes_models.build_t5(shapes_models.load_tokenizers()[1], T5_LAYERS, neighbours=True)).to(device)

    def states(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            clips = [
                clip(data.clip_ids[rows], output_hidden_states=True).hidden_states[-2]
                for clip in (text.clip_1, text.clip_2)
            ]
        return torch.cat(clips, dim=-1)[:, 1:SHORT_TEXT], data.t5_ids[rows, : SHORT_TEXT - 1] != 0

    some = torch.arange(min(2048, count), device=device)
    wanted, words = states(some)
    mean, deviation = wanted[words].mean(0), wanted[words].std(0)

    def error(model: Student, rows: torch.Tensor, tokens: int) -> torch.Tensor:
        wanted, words = states(rows)
        said = model(F.pad(data.t5_ids[rows], (0, tokens - SHORT_TEXT)))[:, : SHORT_TEXT - 1].float()
        square = (said - (wanted - mean) / deviation).square().mean(-1)
        return (square * words).sum() / words.sum()

    def short(model: Student) -> torch.Tensor:
        return error(model, torch.randint(count + 1, (batch,), device=device), SHORT_TEXT)

    def long(model: Student) -> torch.Tensor:
        size = max(1, batch * SHORT_TEXT // Flux.long_text)
        return error(model, torch.randint(count + 1, (size,), device=device), Flux.long_text)

    taught = train("t5", student, [short] * (LONG_EVERY - 1) + [long], schedule)
    with torch.no_grad():
        missed = error(taught, some, SHORT_TEXT).item()
    log.info("t5: taught all but %.2f %% of what CLIP says", 100 * missed)
    return taught.t5, missed


# ---------------------------------------------------------------------------------------------------------------------
# Denoisers: each is a model, and a loss of clean latents


class Denoiser(nn.Module):
    """What a kind of pipeline adds to its model: how latents are scaled, and the loss. Constants live on ``device``."""

    long_text = SHORT_TEXT  # tokens that the pipeline pads T5's text to by default
    drop_t5 = DROP_T5
    repeated: tuple[str, ...]  # names of the model's lists of blocks
    model: nn.Module

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, worth compiling one by one."""
        return [m for name in self.repeated for m in self.model.get_submodule(name).children()]

    def normalize(self, latents: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
        """Latents of the VAE as the pipeline's sampler knows them."""
        raise NotImplementedError

    def loss(self, latents: torch.Tensor, text: Text) -> torch.Tensor:
        """Mean squared error of the model's prediction at random noise levels. Latents (B, C, H, W) float32."""
        raise NotImplementedError


class Flow(Denoiser):
    """Rectified flow."""

    def __init__(self) -> None:
        super().__init__()
        self.shift: float = shapes_models.flow_scheduler().config.shift

    def normalize(self, latents: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
        """Latents of the VAE as the pipeline's sampler knows them."""
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    def loss(self, latents: torch.Tensor, text: Text) -> torch.Tensor:
        """Mean squared error of the velocity at random noise levels. Latents (B, C, H, W) float32."""
        noise = torch.randn_like(latents)
        sigma = torch.randn(len(latents), device=latents.device).sigmoid()
        sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        noisy = torch.lerp(latents, noise, sigma[:, None, None, None])
        return F.mse_loss(self.velocity(noisy.to(text.t5.dtype), sigma, text).float(), noise - latents)

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, text: Text) -> torch.Tensor:
        """The model's prediction of noise minus latents, of the shape of ``noisy`` (B, C, H, W); sigma (B,) in 0..1."""
        raise NotImplementedError


class Sd3(Flow):
    """Stable Diffusion 3's transformer."""

    long_text = 256
    repeated = ("transformer_blocks",)

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.model = shapes_models.build_sd3().to(device)

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, text: Text) -> torch.Tensor:
        """The model's prediction of noise minus latents, of the shape of ``noisy`` (B, C, H, W); sigma (B,) in 0..1."""
        context = torch.cat(text.clip, dim=-1)
        context = F.pad(context, (0, text.t5.shape[-1] - context.shape[-1]))
        prediction: torch.Tensor = self.model(
            hidden_states=noisy,
            timestep=sigma * 1000,
            encoder_hidden_states=torch.cat([context, text.t5], dim=1),
            pooled_projections=torch.cat(text.projected, dim=-1),
            return_dict=False,
        )[0]
        return prediction


class Flux(Flow):
    """FLUX's transformer: latents packed 2 x 2 into tokens, only T5 as context."""

    long_text = 512
    drop_t5 = 0.0  # without T5 there is no FLUX
    repeated = ("transformer_blocks", "single_transformer_blocks")

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.model = shapes_models.build_flux().to(device)

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, text: Text) -> torch.Tensor:
        """The model's prediction of noise minus latents, of the shape of ``noisy`` (B, C, H, W); sigma (B,) in 0..1."""
        b, c, h, w = noisy.shape
        tokens = noisy.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        places = torch.zeros(h // 2, w // 2, 3, device=noisy.device)
        places[..., 1] = torch.arange(h // 2, device=noisy.device)[:, None]
        places[..., 2] = torch.arange(w // 2, device=noisy.device)[None, :]
        out: torch.Tensor = self.model(
            hidden_states=tokens,
            timestep=sigma,
            encoder_hidden_states=text.t5,
            pooled_projections=text.pooled,
            txt_ids=torch.zeros(text.t5.shape[1], 3, device=noisy.device),
            img_ids=places.view(-1, 3),
            return_dict=False,
        )[0]
        return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


class Sdxl(Denoiser):
    """v-prediction with SDXL's UNet; a dropped caption is all zeros, as SDXL's pipeline has it."""

    repeated = ("down_blocks", "up_blocks")

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.model = shapes_models.build_sdxl().to(device)
        # Not buffers: these stay float32 when the model is cast.
        self.signal = shapes_models.sdxl_scheduler().alphas_cumprod.to(device, torch.float32)
        canvas = float(shapes.CANVAS)
        self.sizes = torch.tensor([[canvas, canvas, 0.0, 0.0, canvas, canvas]], device=device)

    def normalize(self, latents: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
        """Latents of the VAE as the pipeline's sampler knows them: SDXL's has no shift."""
        return latents * vae.config.scaling_factor

    def loss(self, latents: torch.Tensor, text: Text) -> torch.Tensor:
        """Mean squared error of v at uniformly random timesteps. Latents (B, C, H, W) float32."""
        noise = torch.randn_like(latents)
        timestep = torch.randint(len(self.signal), (len(latents),), device=latents.device)
        signal = self.signal[timestep][:, None, None, None]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        keep = (~text.empty).to(text.t5.dtype)
        prediction = self.model(
            noisy.to(text.t5.dtype),
            timestep,
            encoder_hidden_states=torch.cat(text.clip, dim=-1) * keep[:, None, None],
            added_cond_kwargs={
                "text_embeds": text.projected[1] * keep[:, None],
                "time_ids": self.sizes.expand(len(latents), -1),
            },
            return_dict=False,
        )[0]
        return F.mse_loss(prediction.float(), signal.sqrt() * noise - (1 - signal).sqrt() * latents)


KINDS: dict[str, Callable[[torch.device], Denoiser]] = {"sd3": Sd3, "flux": Flux, "sdxl": Sdxl}


class Trainee(nn.Module):
    """What the denoiser's loss trains: the denoiser, and the text encoders unless they are frozen."""

    def __init__(self, denoiser: Denoiser, text: TextEncoders) -> None:
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
    text_rate: float = 1.0,
    watch: Callable[[Trainee], None] | None = None,
) -> Trainee:
    """Train a denoiser of ``kind`` on the latents of the data; the text encoders too, where they require gradients.

    ``text_rate`` is a factor on the text encoders' learning rate; ``watch`` gets the moving average now and then.
    """
    device, count = data.scenes.device, len(data.scenes)
    means, deviations = encode(vae, data, torch.arange(count, device=device))
    log.info("%s: %d latents cached", kind, count)
    torch.manual_seed(seed)
    trainee = Trainee(KINDS[kind](device), text)
    parameters = sum(p.numel() for p in trainee.denoiser.model.parameters())
    log.info("%s: %.2f million parameters", kind, parameters / 1e6)
    frozen = not any(p.requires_grad for p in text.parameters())

    def loss(worker: Trainee, size: int, tokens: int) -> torch.Tensor:
        row = torch.randint(count, (size,), device=device)
        noise = torch.randn(size, *means.shape[1:], device=device)
        latents = worker.denoiser.normalize(torch.addcmul(means[row].float(), deviations[row].float(), noise), vae)
        empty = torch.rand(size, device=device) < DROP_CAPTION
        caption = torch.where(empty, count, row)
        t5_ids = F.pad(data.t5_ids[caption], (0, tokens - SHORT_TEXT))  # T5 pads with token 0
        with torch.set_grad_enabled(not frozen):
            encoded: Text = worker.text(data.clip_ids[caption], t5_ids, empty)
        if drop := worker.denoiser.drop_t5:
            encoded.t5 = encoded.t5 * (torch.rand(size, 1, 1, device=device) >= drop).to(encoded.t5.dtype)
        return worker.denoiser.loss(latents, encoded)

    def short_loss(worker: Trainee) -> torch.Tensor:
        return loss(worker, batch, SHORT_TEXT)

    def long_loss(worker: Trainee) -> torch.Tensor:
        tokens = worker.denoiser.long_text
        image_tokens = (shapes_models.LATENT_SIZE // 2) ** 2
        size = batch * (image_tokens + 2 * SHORT_TEXT) // (image_tokens + SHORT_TEXT + tokens)
        with torch.compiler.set_stance("force_eager"):  # not worth compiling a second size
            return loss(worker, max(1, size), tokens)

    def compile_blocks(worker: Trainee) -> None:
        for block in worker.denoiser.blocks():
            block.compile(dynamic=False)

    losses = [short_loss] * LONG_EVERY
    if trainee.denoiser.long_text > SHORT_TEXT:
        losses[-1] = long_loss

    def rates(name: str) -> float:
        return text_rate if name.startswith("text.") else 1.0

    return train(kind, trainee, losses, schedule, compile_blocks, rates=rates, watch=watch)


def assemble(kind: str, trained: Trainee, vae: AutoencoderKL) -> DiffusionPipeline:
    """The stock pipeline of what was trained."""
    clips = trained.text.clip_1, trained.text.clip_2
    pipe = shapes_models.assemble(kind, trained.denoiser.model, vae, clips, trained.text.t5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Keeper:
    """Judges states of a training and keeps the best on disk, as pipelines; of about equally good ones the last."""

    def __init__(self, kind: str, vae: AutoencoderKL, folder: Path) -> None:
        self.kind, self.vae, self.folder = kind, vae, folder
        self.best = 0.0
        self.prompts = score_shapes.unseen_prompts(WATCH_PROMPTS, seed=WATCH_SEED)

    def __call__(self, trained: Trainee) -> None:
        """Judge a state and save it unless it is clearly worse than the best so far."""
        # Of a copy: saving rounds to half precision.
        pipe = assemble(self.kind, copy.deepcopy(trained), copy.deepcopy(self.vae))
        pictures = score_shapes.generate(pipe, self.prompts, batch=WATCH_PROMPTS)
        judged = score_shapes.score(self.prompts, pictures)
        log.info("%s now: %s", self.kind, judged)
        if judged.rate < self.best - WATCH_SLACK:
            log.warning("%s: not kept, %.1f %% was reached before", self.kind, 100 * self.best)
            return
        self.best = max(self.best, judged.rate)
        shapes_models.save(pipe, self.folder)


# ---------------------------------------------------------------------------------------------------------------------


def load_parts(folder: Path, device: torch.device) -> tuple[AutoencoderKL, TextEncoders]:
    """The VAE and the text encoders, frozen, of a trained SD3-style shapes pipeline."""
    pipe = DiffusionPipeline.from_pretrained(folder).to(device)
    text = TextEncoders(pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    return pipe.vae, text.requires_grad_(False)


def new_text_encoders(seed: int, device: torch.device) -> TextEncoders:
    """All three text encoders, untrained."""
    torch.manual_seed(seed)
    clip, t5 = shapes_models.load_tokenizers()
    clips = shapes_models.build_clip(0, clip), shapes_models.build_clip(1, clip)
    return TextEncoders(*clips, shapes_models.build_t5(t5)).to(device)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to save the pipeline in")
    parser.add_argument("--denoiser", choices=sorted(KINDS), default="sd3")
    parser.add_argument("--parts", type=Path, help="SD3-style pipeline to take VAE and text encoders from")
    parser.add_argument("--pictures", type=int, default=262_144)
    parser.add_argument("--vae-steps", type=int, default=3364)
    parser.add_argument("--vae-batch", type=int, default=128)
    parser.add_argument("--vae-seconds", type=float, help="fewer steps of the VAE if they don't fit into this time")
    parser.add_argument("--steps", type=int, default=13_415, help="steps of the denoiser")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--t5-steps", type=int, default=4000, help="steps of teaching FLUX's T5")
    parser.add_argument("--t5-seconds", type=float, default=60, help="fewer of these if they don't fit into this time")
    parser.add_argument("--seconds", type=float, help="fewer steps of the denoiser if they don't fit into this time")
    parser.add_argument("--minutes", type=float, help="the same, for the whole run: what is kept is written by then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=512, help="unseen prompts to judge the result with; 0 for none")
    parser.add_argument("--sheet", type=Path, help="write pictures of the first 64 of these prompts to this PNG")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.denoiser != "sd3" and args.parts is None:
        parser.error(f"--denoiser {args.denoiser} needs --parts: train the sd3 pipeline first and pass its folder")
    started, device = time.perf_counter(), torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention has crashed on short sequences

    data = make_data(args.pictures, args.seed, device)
    log.info("%d pictures with captions", args.pictures)
    if args.parts:
        vae, text = load_parts(args.parts, device)
    else:
        schedule = Schedule(args.vae_steps, args.rate, args.vae_seconds)
        vae, text = train_vae(data, schedule, args.vae_batch, args.seed), new_text_encoders(args.seed, device)
    text_rate = 1.0
    if args.denoiser == "flux":
        text.t5 = teach_t5(data, text, Schedule(args.t5_steps, args.rate, args.t5_seconds), args.batch, args.seed)[0]
        text.t5.requires_grad_(True)
        text_rate = T5_RATE
    seconds = args.seconds
    if args.minutes:
        left = 60 * args.minutes - (time.perf_counter() - started) - SPARE_SECONDS
        if left <= 0:
            parser.error(f"--minutes {args.minutes} were over before the denoiser's training: allow more")
        seconds = min(seconds or left, left)
    keeper = Keeper(args.denoiser, vae, args.output)
    schedule = Schedule(args.steps, args.rate, seconds)
    trained = train_denoiser(
        args.denoiser, data, vae, text, schedule, args.batch, args.seed, text_rate=text_rate, watch=keeper
    )
    keeper(trained)
    log.info("saved to %s", args.output)
    if args.prompts:
        pipe = DiffusionPipeline.from_pretrained(args.output).to(device)
        pipe.set_progress_bar_config(disable=True)
        prompts = score_shapes.unseen_prompts(args.prompts)
        for guidance in (3.0, 5.0):
            pictures = score_shapes.generate(pipe, prompts, guidance=guidance, batch=128)
            log.info("guidance %.1f: %s", guidance, score_shapes.score(prompts, pictures))
        if args.sheet:
            score_shapes.contact_sheet(pictures[:64]).save(args.sheet)


if __name__ == "__main__":
    main()
