"""Fitting scale and shift: moments of (quantized, full-precision) outputs, shrinkage, choice by cross-validation.

Everything follows from six moments per prompt, timestep and channel: with q the quantized and f the full-precision
output, ``n, sum q, sum f, sum qq, sum qf, sum ff``. The squared error of any (a, b) on any subset of prompts is a
quadratic form in them, so one pass over the data serves every fit and every fold.

Two estimators of a:

- *least squares*, ``cov(q, f) / var(q)``: the smallest error of a single step. Where the error is noise, a < 1.
- *unbiased*, ``var(f) / cov(q, f)`` (PTQD's view: q = (1 + k) f + uncorrelated noise, divide by 1 + k): takes back what
  is correlated with the signal and leaves the noise alone. It does not shrink the output, and so nothing adds up over
  the steps of a trajectory. The default.

Each coefficient is then shrunk towards the identity by what it is worth, ``max(0, 1 - se^2 / x^2)`` with the standard
error over prompts, by jackknife (positive-part James-Stein): few data, little correction.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..evaluation.trajectories import DenoiserCall, Trajectories
from .affine import AffineCorrection, Clock, channel_axis

logger = logging.getLogger(__name__)

Estimator = Literal["least_squares", "unbiased"]

N, Q, F, QQ, QF, FF = range(6)
"""Rows of the moments."""

MIN_PROMPTS = 4  # below this, a standard error over prompts says nothing


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One form of correction: what depends on the timestep, on the channel, and which terms there are."""

    time: Literal["per_step", "constant"]
    granularity: Literal["tensor", "channel"]
    terms: Literal["scale", "shift", "both"]

    def __str__(self) -> str:
        return f"{self.time} {self.granularity} {self.terms}"


CANDIDATES = tuple(
    Candidate(time, granularity, terms)  # type: ignore[arg-type]
    for time, granularity, terms in itertools.product(
        ("constant", "per_step"), ("tensor", "channel"), ("scale", "shift", "both")
    )
)


def fit_affine_correction(
    denoiser: nn.Module,
    trajectories: Trajectories,
    *,
    scheduler: Any = None,
    estimator: Estimator = "unbiased",
    guidance_scale: float | None = None,
    folds: int = 4,
    significance: float = 2.5,
) -> AffineCorrection:
    """Fit a correction of a quantized denoiser on recorded full-precision trajectories.

    The form (constant or per timestep; per channel or one for all; scale, shift or both) is the one with the lowest
    error on prompts left out, half of it measured at timesteps left out, too. If even that one is not better than no
    correction by ``significance`` standard errors, the result is the identity.

    Args:
        denoiser: the quantized denoiser. A corrected one is refused.
        trajectories: recorded with the full-precision denoiser, at least four prompts; best not the ones that the
            quantizer was calibrated on, whose error is smaller than the error in use.
        scheduler: the scheduler they were recorded with; needed to apply the correction in a scheduler.
        estimator: ``"unbiased"`` or ``"least_squares"``, see above. Least squares gains more in single steps and has
            been seen to lose in finished images: :func:`confirm` it.
        guidance_scale: fit the guided output ``u + s (c - u)``, which is what the scheduler reads, instead of its
            parts; give it wherever the pipeline uses guidance. What corrects u and c best need not correct their
            amplified difference. Calls must hold the unconditional half first and the conditional half second. Only
            with ``"unbiased"``: least squares would shrink where guidance amplifies noise, and weaken guidance.
        folds: parts of the prompts that are left out in turn.
        significance: standard errors by which the gain must exceed zero, for many prompts; more for few (Student).

    Raises:
        ValueError: too few prompts, outputs of another shape, or arguments that do not go together.
        FloatingPointError: the quantized denoiser returned NaN or infinity.
    """
    if estimator not in ("least_squares", "unbiased"):
        raise ValueError(f"estimator must be 'least_squares' or 'unbiased', got {estimator!r}")
    if guidance_scale is not None and estimator != "unbiased":
        raise ValueError(
            "guidance_scale goes with estimator='unbiased': least squares on guided outputs weakens the guidance"
        )
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    times, moments = collect_moments(denoiser, trajectories, guidance_scale)
    prompts = moments.shape[1]
    if prompts < MIN_PROMPTS:
        raise ValueError(
            f"trajectories of {prompts} prompts are too few to tell a correction from chance: record at least "
            f"{MIN_PROMPTS}, better 32, with sample_trajectories"
        )
    best, gain, base, held_out = choose(torch.tensor(times).double(), moments, estimator, min(folds, prompts))
    scale, shift = solve(moments, best, estimator)
    mean, spread = float(gain.mean()), float(gain.std()) / math.sqrt(prompts)
    if not mean > student(significance, prompts - 1) * spread:
        logger.info("no affine correction helps on prompts left out (best: %s): identity", best)
        scale, shift = torch.ones_like(scale), torch.zeros_like(shift)
        method, gain_db, gain_se = "identity", 0.0, 0.0
    else:
        method = f"{estimator} {best}" + ("" if guidance_scale is None else f" guided {guidance_scale:g}")
        # Sums of squares know an error only to their own rounding: where the correction leaves none, to that.
        remaining = held_out.clamp(min=float(torch.finfo(moments.dtype).eps * moments[FF].sum() / prompts))
        gain_db = 10 * math.log10(float(base.sum() / remaining.sum()))
        share = base / base.sum() - remaining / remaining.sum()  # each prompt's part in the logarithm of the ratio
        gain_se = 10 / math.log(10) * float(share.std()) * math.sqrt(prompts)
    correction = AffineCorrection(
        timesteps=tuple(times),
        scale=scale,
        shift=shift,
        denoiser=type_name(denoiser),
        scheduler=None if scheduler is None else type(scheduler).__name__,
        clock=None if scheduler is None else clock_of(scheduler, trajectories),
        method=method,
        gain_db=gain_db,
        gain_se_db=gain_se,
        prompts=prompts,
    )
    logger.info("%s", correction)
    return correction


def type_name(denoiser: nn.Module) -> str:
    """Return the class name of a denoiser, the same before and after quantization and compilation."""
    module = getattr(denoiser, "_orig_mod", denoiser)
    original = getattr(module, "get_original_cls_by_level", None)  # of ModelOpt's dynamic modules
    return (original(level=0) if callable(original) else type(module)).__name__


def clock_of(scheduler: Any, trajectories: Trajectories) -> Clock | None:
    """Return how a scheduler's time follows from the recorded timesteps; None if it does not.

    Diffusers' pipelines pass the scheduler's timestep t as it is, as t / N, or as 1 - t / N (N = num_train_timesteps).
    Recorded trajectories tell which: by their range, and by whether time rises or falls along the steps.
    """
    length = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    values = [call.timestep for call in trajectories]
    if not length or min(values) < 0:
        return None  # time in log sigma, as in EDM: no map to a linear timestep
    unit = max(values) <= 1 + 1e-6
    first, last = min(trajectories, key=lambda call: call.step), max(trajectories, key=lambda call: call.step)
    rising = last.timestep > first.timestep
    factor = float(length) if unit else 1.0
    return Clock(-factor, float(length)) if rising else Clock(factor, 0.0)


def collect_moments(
    denoiser: nn.Module, trajectories: Trajectories, guidance_scale: float | None = None
) -> tuple[list[float], Tensor]:
    """Replay trajectories through the quantized denoiser and sum what a fit needs.

    Returns:
        The T timesteps, ascending, and the moments, (6, P, T, C) float64, zero where a prompt lacks a timestep.
    """
    if any(type(hook).__name__ == "AffineHook" for hook in denoiser._forward_hooks.values()):
        raise ValueError("the denoiser is corrected already: remove() that correction before fitting another")
    times = sorted(trajectories.timesteps)
    sums: dict[tuple[int, int], Tensor] = {}
    offset = items = 0
    batch, step = trajectories[0].batch, -1
    for call, output in trajectories.replay(denoiser):
        if call.batch != batch or call.step < step:  # a new batch of prompts begins
            offset += items
        batch, step = call.batch, call.step
        if output.shape != call.output.shape:
            raise ValueError(
                f"the denoiser returned {tuple(output.shape)} where {tuple(call.output.shape)} was recorded: "
                "the trajectories belong to another model"
            )
        result = output.detach().cpu().double()
        if not torch.isfinite(result).all():
            raise FloatingPointError(
                f"the quantized denoiser returned NaN or infinity at timestep {call.timestep:g}: "
                "look for the layer with velocity_sqnr and a wider dtype before correcting it"
            )
        halves = holds_guidance(call)
        pair = torch.stack([result, call.output.double()])
        if guidance_scale is not None:
            if not halves:
                raise ValueError(
                    "guidance_scale needs calls with the unconditional and the conditional half in one batch; these "
                    "hold one kind each: leave guidance_scale=None"
                )
            unconditional, conditional = pair.chunk(2, dim=1)
            pair = unconditional + guidance_scale * (conditional - unconditional)
        values = pair.movedim(channel_axis(result) + 1, 2).flatten(3)  # (2, B, C, elements)
        q, f = values
        summed = torch.stack([torch.ones_like(q), q, f, q * q, q * f, f * f]).sum(-1)  # (6, B, C)
        items = len(q) // 2 if halves and guidance_scale is None else len(q)
        for row in range(len(q)):
            key = (offset + row % items, times.index(call.timestep))
            sums[key] = sums[key] + summed[:, row] if key in sums else summed[:, row]
    prompts, channels = offset + items, next(iter(sums.values())).shape[1]
    moments = torch.zeros(6, prompts, len(times), channels, dtype=torch.float64)
    for (prompt, time), value in sums.items():
        moments[:, prompt, time] = value
    return times, moments


def holds_guidance(call: DenoiserCall) -> bool:
    """Whether a call's batch holds both halves of guidance: the same latents twice, as diffusers' pipelines do."""
    latents = next((v for v in call.inputs.values() if isinstance(v, Tensor) and v.ndim >= 3), None)
    if latents is None or len(latents) % 2 or len(latents) != len(call.output):
        return False
    first, second = latents.chunk(2)
    return torch.equal(first, second)


def squared_error(moments: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Sum of ``(f - a q - b)^2`` from the moments (6, ...); scale and shift broadcast to one row of them."""
    n, q, f, qq, qf, ff = moments
    return ff + scale**2 * qq + shift**2 * n - 2 * scale * qf - 2 * shift * f + 2 * scale * shift * q


def raw_coefficients(moments: Tensor, terms: str, estimator: str) -> tuple[Tensor, Tensor]:
    """Unshrunk coefficients from moments (6, ...).

    Returns:
        ``a - 1`` and the mean of ``f - a' q``: the shift in centred form, with a' = 1, so that both are zero for the
        identity and neither depends on the other.
    """
    n, q, f, qq, qf, ff = moments
    centred = terms == "both"
    counted = n.clamp(min=1)
    var_q = qq - q * q / counted if centred else qq
    var_f = ff - f * f / counted if centred else ff
    cov = qf - q * f / counted if centred else qf
    zero = torch.zeros_like(n)
    numerator, denominator = (cov, var_q) if estimator == "least_squares" else (var_f, cov)
    usable = (n > 0) & (denominator > 0)
    slope = torch.where(usable, numerator / torch.where(usable, denominator, 1.0) - 1, zero)
    mean = torch.where(n > 0, (f - q) / counted, zero)
    return (zero if terms == "shift" else slope), (zero if terms == "scale" else mean)


def solve(moments: Tensor, candidate: Candidate, estimator: str) -> tuple[Tensor, Tensor]:
    """Fit one candidate on the moments of all given prompts.

    Args:
        moments: (6, P, T, C) float64.

    Returns:
        Scale and shift, (T, C) float64 each, shrunk towards 1 and 0.
    """
    prompts, times, channels = moments.shape[1:]
    pooled = moments
    if candidate.time == "constant":
        pooled = pooled.sum(2, keepdim=True)
    if candidate.granularity == "tensor":
        pooled = pooled.sum(3, keepdim=True)
    total = pooled.sum(1, keepdim=True)
    left_out = total - pooled  # one prompt less, for each prompt
    shrunk = []
    fitted = zip(
        raw_coefficients(total.squeeze(1), candidate.terms, estimator),
        raw_coefficients(left_out, candidate.terms, estimator),
        strict=True,
    )
    for value, leaving in fitted:
        variance = (prompts - 1) / prompts * (leaving - leaving.mean(0)).square().sum(0)
        tiny = torch.finfo(value.dtype).tiny
        shrunk.append(value * (1 - variance / value.square().clamp(min=tiny)).clamp(min=0))
    slope, mean = shrunk
    n, q = total.squeeze(1)[N], total.squeeze(1)[Q]
    # Uncentre: f ~ q + slope (q - mean q) + mean. Without a shift the line goes through the origin.
    shift = mean - slope * q / n.clamp(min=1) if candidate.terms == "both" else mean
    return (1 + slope).expand(times, channels).clone(), shift.expand(times, channels).clone()


def student(normal: float, freedom: int) -> float:
    """Student's quantile for the level that ``normal`` is the normal quantile of, by Cornish and Fisher's expansion."""
    cube, fifth = normal**3, normal**5
    return normal + (cube + normal) / (4 * freedom) + (5 * fifth + 16 * cube + 3 * normal) / (96 * freedom**2)


def choose(times: Tensor, moments: Tensor, estimator: str, folds: int) -> tuple[Candidate, Tensor, Tensor, Tensor]:
    """Cross-validate all candidates.

    Args:
        times: (T,) ascending.
        moments: (6, P, T, C).

    Returns:
        The best candidate; its gain (P,), the squared error it takes away from each prompt while that is left out,
        averaged over measuring at the knots and between them; the squared error of each prompt (P,) without
        correction; and with it, at the knots, while the prompt is left out.
    """
    prompts = moments.shape[1]
    fold_of = torch.arange(prompts) % folds
    ones, zeros = torch.ones(moments.shape[2:]).double(), torch.zeros(moments.shape[2:]).double()
    base = squared_error(moments, ones, zeros).sum((1, 2))
    best: tuple[Candidate, Tensor, Tensor] | None = None
    for candidate in CANDIDATES:
        at_knots, between = torch.zeros(prompts).double(), torch.zeros(prompts).double()
        for fold in range(folds):
            held = fold_of == fold
            scale, shift = solve(moments[:, ~held], candidate, estimator)
            at_knots[held] = squared_error(moments[:, held], scale, shift).sum((1, 2))
            interpolated = neighbours_mean(times, scale), neighbours_mean(times, shift)
            between[held] = squared_error(moments[:, held], *interpolated).sum((1, 2))
        gain = base - (at_knots + between) / 2
        if best is None or gain.sum() > best[1].sum():
            best = candidate, gain, at_knots
    assert best is not None
    candidate, gain, held_out = best
    return candidate, gain, base, held_out


def neighbours_mean(times: Tensor, values: Tensor) -> Tensor:
    """Each inner knot's row of ``values`` (T, C) as if that knot were missing; first and last row as they are."""
    if len(times) < 3:
        return values
    weight = ((times[1:-1] - times[:-2]) / (times[2:] - times[:-2]))[:, None]
    return torch.cat([values[:1], torch.lerp(values[:-2], values[2:], weight), values[-1:]])
