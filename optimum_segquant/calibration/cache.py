"""Recorded calls on disk: a folder that a killed run goes on with, and that is read call by call.

    manifest.json                             what the data belongs to, see :mod:`.identity`
    transformer/batch-00000.safetensors       calls of a component in a batch, see :mod:`.shards`
    transformer/batch-00000.json              size, SHA-256, number of calls and timesteps of that file

Files appear under their names only when they are complete, and a batch depends on nothing but its number, so several
processes may fill one folder, and batches that are there are never sampled again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from ..evaluation import DenoiserCall, RecordedCalls
from ..evaluation.calls import distinct_timesteps
from ..files import DamagedFilesError, full_disk_named, replaced_file, sha256_of
from .identity import differences
from .shards import read_shard, write_shard

__all__ = ["MANIFEST", "CachedCalls", "CalibrationCache", "CalibrationMismatchError"]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = "segquant-calibration"
_VERSION = 1


class CalibrationMismatchError(ValueError):
    """A folder holds calibration data of another model, other prompts or other settings."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of recorded calls and what it has to hold.

    Attributes:
        path: of the safetensors file.
        size: in bytes.
        sha256: 64 hexadecimal digits.
        timesteps: one a call, NaN where it has none.
    """

    path: Path
    size: int
    sha256: str
    timesteps: tuple[float, ...]

    def check(self, *, content: bool = True) -> None:
        """Compare the file with what is known of it.

        Args:
            content: its checksum, too, for which it is read; else its size.

        Raises:
            DamagedFilesError: it is missing, truncated or altered.
        """
        problem = None
        if not self.path.is_file():
            problem = "missing"
        elif self.path.stat().st_size != self.size:
            problem = f"truncated or altered ({self.path.stat().st_size} of {self.size} bytes)"
        elif content and sha256_of(self.path) != self.sha256:
            problem = "altered (its checksum differs)"
        if problem is not None:
            raise DamagedFilesError(
                f"{self.path} is {problem}: delete it and start again, then this batch alone is sampled anew"
            )


class CachedCalls(RecordedCalls):
    """Calls of one component on disk; one call is in memory at a time.

    Args:
        component: its name.
        shards: in order.
        progress: show a bar in :meth:`forward_loop`.
        keep: object that must live as long as the files are needed.
    """

    def __init__(
        self, component: str, shards: Sequence[Shard], *, progress: bool = False, keep: object | None = None
    ) -> None:
        self.component = component
        self.progress = progress
        self._shards = tuple(shards)
        self._keep = keep
        self._checked: set[Path] = set()

    def __len__(self) -> int:
        return sum(len(shard.timesteps) for shard in self._shards)

    def __iter__(self) -> Iterator[DenoiserCall]:
        for shard in self._shards:
            if shard.path not in self._checked:
                shard.check()
                self._checked.add(shard.path)
            yield from read_shard(shard.path)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The distinct timesteps, from noise to image."""
        return distinct_timesteps(timestep for shard in self._shards for timestep in shard.timesteps)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(shard.size for shard in self._shards)

    def forward_loop(self, denoiser: nn.Module) -> None:
        """Run the component over all recorded inputs: the ``forward_loop`` argument of ``mtq.quantize``.

        Args:
            denoiser: the model that is being calibrated.
        """
        label = f"Calibrating {self.component}"
        for _ in tqdm(self.replay(denoiser), total=len(self), desc=label, unit="call", disable=not self.progress):
            pass


class CalibrationCache:
    """The folder of one calibration.

    Attributes:
        folder: where it is.
        is_temporary: whether it is gone with the process, for what a full disk says.

    Args:
        folder: made if it does not exist.
        identity: what the data belongs to, plain types.
        overwrite: remove data that belongs to something else, instead of refusing it.

    Raises:
        CalibrationMismatchError: the folder holds data that belongs to something else; the fields are named.
        FileExistsError: the folder holds files that are no calibration data.
        DamagedFilesError: its manifest can't be read.
        OSError: the disk is full, or the folder can't be written.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.folder = Path(folder).expanduser()
        self.is_temporary = False
        wanted = json.loads(json.dumps({"format": _FORMAT, "version": _VERSION, **identity}))
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{self.folder} is a file: give a folder for calibration data")
        if not (self.folder / MANIFEST).exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise FileExistsError(f"{self.folder} holds files but no calibration data: give an empty or new folder")
        if (self.folder / MANIFEST).exists():
            found = self._read_manifest()
            different = differences(wanted, found)
            if not different:
                return
            if not overwrite:
                raise CalibrationMismatchError(
                    f"{self.folder} holds calibration data of something else, different in {'; '.join(different)}: "
                    "give another folder, or overwrite=True to sample again"
                )
            logger.info("%s is sampled again, different in %s", self.folder, "; ".join(different))
            shutil.rmtree(self.folder)
        with full_disk_named(f"{self.folder} was made", "free some, or give a folder on another disk"):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced_file(self.folder / MANIFEST) as partial:
                partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        remedy = f"delete {self.folder}, or give another folder"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DamagedFilesError(f"{path} is no JSON ({error}): {remedy}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise DamagedFilesError(f"{path} is no manifest of calibration data: {remedy}")
        return content

    def is_complete(self, batch: int, components: Collection[str]) -> bool:
        """Whether a batch of these components is there."""
        return all(path.is_file() for name in components for path in self._paths(name, batch))

    def _paths(self, component: str, batch: int) -> tuple[Path, Path]:
        stem = self.folder / component / f"batch-{batch:05d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")

    def write(self, component: str, batch: int, calls: Sequence[DenoiserCall]) -> None:
        """Write a batch of a component.

        Raises:
            ValueError: an argument can't be written.
            OSError: the disk is full; what was complete is still there.
        """
        path, index = self._paths(component, batch)
        path.parent.mkdir(exist_ok=True)
        for left_by_a_kill in path.parent.glob(f"{path.stem}.*.partial"):
            left_by_a_kill.unlink()
        remedy = "free some, or move the folder to another disk, and start again; the batches before it are kept"
        if self.is_temporary:
            remedy = "give a cache_dir on a disk with more room"
        with full_disk_named(f"batch {batch} of {component} was written to {self.folder}", remedy):
            with replaced_file(path) as partial:
                write_shard(partial, calls)
            entry = {
                "size": path.stat().st_size,
                "sha256": sha256_of(path),
                "timesteps": [None if math.isnan(call.timestep) else call.timestep for call in calls],
            }
            with replaced_file(index) as partial:
                partial.write_text(json.dumps(entry) + "\n", encoding="utf-8")

    def shards(self, component: str, batches: Collection[int]) -> list[Shard]:
        """The files of a component, in the order of their batches.

        Raises:
            DamagedFilesError: a file has no entry or an unreadable one.
        """
        return [self._shard(component, batch) for batch in sorted(batches)]

    def _shard(self, component: str, batch: int) -> Shard:
        path, index = self._paths(component, batch)
        try:
            entry = json.loads(index.read_text(encoding="utf-8"))
            timesteps = tuple(math.nan if value is None else float(value) for value in entry["timesteps"])
            return Shard(path, int(entry["size"]), str(entry["sha256"]), timesteps)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedFilesError(
                f"{index} can't be read ({type(error).__name__}: {error}): delete it and start again, then this batch "
                "alone is sampled anew"
            ) from error
