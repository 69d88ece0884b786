"""The correction itself: scale and shift of a denoiser's output, per timestep and channel, and its file.

With T recorded timesteps (knots) and C channels, an output v of shape (B, C, ...) or (B, tokens, C) becomes

    a(t) * v + b(t),

a and b linearly interpolated between the knots and constant beyond the first and the last one. Because guidance mixes
outputs with weights that sum to one, ``u + s (c - u)``, and a, b are the same for both, correcting u and c and then
guiding equals guiding and then correcting: the denoiser and the scheduler are equally good places for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE_NAME = "affine_correction.json"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Clock:
    """How the scheduler's time follows from the denoiser's timestep argument: ``scale * timestep + offset``.

    Most pipelines pass the scheduler's timestep on (1, 0); FLUX divides it by 1000 (1000, 0); some count the other way
    round, ``1 - t / 1000`` (-1000, 1000).
    """

    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and math.isfinite(self.offset)) or self.scale == 0:
            raise ValueError(f"a clock needs a finite scale other than 0 and a finite offset, got {self}")

    def denoiser_time(self, scheduler_time: Tensor) -> Tensor:
        """Return the denoiser's timestep argument for a timestep of the scheduler, any shape."""
        return (scheduler_time - self.offset) / self.scale


@dataclasses.dataclass(frozen=True, eq=False)
class AffineCorrection:
    """Per-timestep scale and shift of a denoiser's output.

    Attributes:
        timesteps: T knots, ascending, in the units of the denoiser's timestep argument.
        scale: (T, C) float32, the factor a; 1 corrects nothing.
        shift: (T, C) float32, the summand b, in the units of the output; 0 corrects nothing.
        denoiser: class name of the denoiser it was fitted to.
        scheduler: class name of the scheduler whose trajectories it was fitted on; None if not given.
        clock: how that scheduler counts time; None if it was not given, or its time cannot be mapped.
        method: what was chosen, for example ``"least_squares per_step channel both"``; ``"identity"`` for nothing.
        gain_db: velocity SQNR gained on prompts left out of the fit, dB.
        gain_se_db: standard error of ``gain_db`` over the prompts, dB.
        prompts: how many prompts the fit saw.

    Raises:
        ValueError: shapes that do not fit, knots that do not ascend, or numbers that are not finite.
    """

    timesteps: tuple[float, ...]
    scale: Tensor
    shift: Tensor
    denoiser: str
    scheduler: str | None = None
    clock: Clock | None = None
    method: str = "given"
    gain_db: float = 0.0
    gain_se_db: float = 0.0
    prompts: int = 0

    def __post_init__(self) -> None:
        knots = len(self.timesteps)
        if knots == 0 or any(b <= a for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise ValueError(f"timesteps must be at least one and ascend, got {self.timesteps}")
        if self.scale.ndim != 2 or self.scale.shape != self.shift.shape or len(self.scale) != knots:
            raise ValueError(
                f"scale and shift must both be (timesteps, channels) with {knots} timesteps, "
                f"got {tuple(self.scale.shape)} and {tuple(self.shift.shape)}"
            )
        for name, values in (("timesteps", torch.tensor(self.timesteps)), ("scale", self.scale), ("shift", self.shift)):
            if not torch.isfinite(values).all():
                raise ValueError(f"{name} of the correction holds NaN or infinity: fit it again")
        object.__setattr__(self, "scale", self.scale.detach().cpu().float())
        object.__setattr__(self, "shift", self.shift.detach().cpu().float())

    @property
    def channels(self) -> int:
        """C, the channels of the outputs that it corrects."""
        return self.scale.shape[1]

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing: the fit found nothing that helps."""
        return bool((self.scale == 1).all() and (self.shift == 0).all())

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Interpolate scale and shift.

        Args:
            timesteps: (B,), in the denoiser's units, on any device.

        Returns:
            Two (B, C) float32 tensors on the device of ``timesteps``; nothing is copied to the host.
        """
        device = timesteps.device
        scale, shift = self.scale.to(device), self.shift.to(device)
        if len(self.timesteps) == 1:
            return scale.expand(len(timesteps), -1), shift.expand(len(timesteps), -1)
        knots = torch.tensor(self.timesteps, device=device)
        times = timesteps.float().clamp(knots[0], knots[-1])
        above = torch.searchsorted(knots, times).clamp(1, len(knots) - 1)
        below = above - 1
        weight = ((times - knots[below]) / (knots[above] - knots[below]))[:, None]
        return torch.lerp(scale[below], scale[above], weight), torch.lerp(shift[below], shift[above], weight)

    def apply(self, output: Tensor, timestep: Tensor | float) -> Tensor:
        """Correct an output.

        Args:
            output: (B, C, ...) with at least four dimensions, or (B, tokens, C).
            timestep: in the denoiser's units: one number, (B,), or (B, ...) of which the largest entry counts.

        Returns:
            The corrected output in the same shape and dtype, computed in float32.

        Raises:
            ValueError: another number of channels, or timesteps that do not belong to the batch.
        """
        axis = channel_axis(output)
        if output.shape[axis] != self.channels:
            raise ValueError(
                f"the correction has {self.channels} channels, the output {tuple(output.shape)} has "
                f"{output.shape[axis]} in dimension {axis}: fit it on this model. Where a scheduler gets only part of "
                "the denoiser's channels (learned variance), correct the denoiser instead."
            )
        times = torch.as_tensor(timestep, device=output.device)
        times = times.reshape(1) if times.numel() == 1 else times.flatten(1).amax(1) if times.ndim > 1 else times
        if len(times) not in (1, len(output)):
            raise ValueError(f"{len(times)} timesteps for a batch of {len(output)}: give one, or one an item")
        shape = [len(times)] + [1] * (output.ndim - 1)
        shape[axis] = self.channels
        scale, shift = (values.reshape(shape) for values in self.coefficients(times))
        return torch.addcmul(shift, output.float(), scale).to(output.dtype)

    def save(self, folder: str | Path) -> Path:
        """Write ``affine_correction.json`` into a folder, usually that of a saved pipeline; returns its path."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        document |= {"timesteps": list(self.timesteps), "scale": self.scale.tolist(), "shift": self.shift.tolist()}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> AffineCorrection:
        """Read what :meth:`save` wrote.

        Args:
            folder: the folder, or the file itself.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or written by a newer version.
        """
        path = Path(folder)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no {FILE_NAME} at {folder}: fit a correction and save() it there")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}): fit the correction again") from error
        return cls._from_document(document, path)

    @classmethod
    def _from_document(cls, document: Mapping[str, Any], path: Path) -> AffineCorrection:
        version = document.get("format_version") if isinstance(document, Mapping) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this package reads {FORMAT_VERSION}: "
                "install the package that wrote it, or fit the correction again"
            )
        fields = {key: value for key, value in document.items() if key != "format_version"}
        try:
            fields["timesteps"] = tuple(float(value) for value in fields["timesteps"])
            fields["scale"], fields["shift"] = torch.tensor(fields["scale"]), torch.tensor(fields["shift"])
            fields["clock"] = None if fields["clock"] is None else Clock(**fields["clock"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): fit the correction again") from error

    def __str__(self) -> str:
        """One line a knot: timestep, and the range of scale and shift over the channels."""
        lines = [f"{self.denoiser}: {self.method}, {self.gain_db:+.2f} ± {self.gain_se_db:.2f} dB on prompts left out"]
        for knot, a, b in zip(self.timesteps, self.scale, self.shift, strict=True):
            lines.append(f"  t = {knot:9.4g}   a {a.min():.4f} ... {a.max():.4f}   b {b.min():+.4f} ... {b.max():+.4f}")
        return "\n".join(lines)


def channel_axis(output: Tensor) -> int:
    """Return the dimension of the channels: 2 of (B, tokens, C), 1 of (B, C, H, W) and (B, C, frames, H, W).

    Raises:
        ValueError: fewer than three dimensions.
    """
    if output.ndim < 3:
        raise ValueError(
            f"expected an output (B, C, H, W), (B, C, F, H, W) or (B, tokens, C), got {tuple(output.shape)}"
        )
    return 2 if output.ndim == 3 else 1
