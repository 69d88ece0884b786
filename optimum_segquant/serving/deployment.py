"""A deployment: a directory that says what it holds, where that comes from and how it is run, and can prove it.

``deployment.json`` is the record; ``segquant_manifest.json`` holds the checksum of it and of every other file, and is
verified before anything is used. ``README.md`` says to people how the files are served.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import DamagedFilesError, verify_manifest, write_manifest
from ..versions import installed_versions
from .commands import Command, render
from .sizes import AxisRange

__all__ = ["DEPLOYMENT_FILE", "Deployment", "load_deployment", "readme_name"]

DEPLOYMENT_FILE = "deployment.json"
README_FILE, SERVING_FILE = "README.md", "SERVING.md"
_MARK = f"`{DEPLOYMENT_FILE}` says how the files were made"
_FORMAT = "segquant-deployment"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Deployment:
    """What a deployment directory holds.

    Attributes:
        kind: ``"triton"``, a model repository, or ``"vllm-omni"``, a pipeline in stock keys.
        backends: what runs each model.
        sizes: by model, the range of each dynamic axis.
        pipeline: directory of the pipeline's tokenizers, scheduler and configs, relative; None if there is no pipeline.
        source: the record of the export: source model, quantization config, segment plan, formats, versions.
        commands: that build and serve it.
        versions: of all packages that wrote it.
    """

    kind: str
    backends: Mapping[str, str]
    sizes: Mapping[str, Mapping[str, AxisRange]]
    pipeline: str | None
    source: Mapping[str, Any] | None
    commands: tuple[Command, ...]
    versions: Mapping[str, str] = dataclasses.field(default_factory=installed_versions)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``deployment.json`` holds it."""
        commands = [dataclasses.asdict(command) for command in self.commands]
        found = {**dataclasses.asdict(self), "commands": commands}
        return {"format": _FORMAT, "format_version": _FORMAT_VERSION, **found}

    @classmethod
    def from_dict(cls, data: Any) -> Deployment:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: not such data, or of another release.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise ValueError(f"not a deployment: its format is not {_FORMAT!r}")
        if data.get("format_version") != _FORMAT_VERSION:
            raise ValueError(
                f"format_version {data.get('format_version')!r}, this release reads {_FORMAT_VERSION}: update "
                "optimum-segquant, or use the release that wrote it"
            )
        try:
            return cls(
                kind=data["kind"],
                backends=data["backends"],
                sizes={
                    model: {axis: AxisRange(**size) for axis, size in axes.items()}
                    for model, axes in data["sizes"].items()
                },
                pipeline=data["pipeline"],
                source=data["source"],
                commands=tuple(Command(**command) for command in data["commands"]),
                versions=data["versions"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a deployment: {error}") from error

    def write(self, directory: Path) -> None:
        """Write record, README and manifest into a directory that holds everything else already.

        A README that somebody else has written stays; the commands are then in :data:`SERVING_FILE`.
        """
        (directory / DEPLOYMENT_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        (directory / readme_name(directory)).write_text(self.readme(), encoding="utf-8")
        write_manifest(directory)

    def readme(self) -> str:
        """How the files are built and served, as Markdown."""
        source = self.source or {}
        what = source.get("source") or source.get("class") or "a pipeline"
        models = "\n".join(f"| {name} | {backend} |" for name, backend in self.backends.items())
        table = f"| model | back end |\n|---|---|\n{models}\n\n" if self.backends else ""
        return (
            f"# {what}, quantized with SegQuant\n\n"
            f"{table}"
            f"{_MARK}; `segquant_manifest.json` has their checksums:\n\n"
            "```\noptimum-cli segquant serve . --check\n```\n\n"
            "The commands below are run in this directory.\n\n"
            f"{render(self.commands)}\n"
        )


def readme_name(directory: Path) -> str:
    """Name of the file with the commands: README.md, unless that is a model card or the like."""
    readme = directory / README_FILE
    if readme.is_file() and _MARK not in readme.read_text(encoding="utf-8", errors="replace"):
        return SERVING_FILE
    return README_FILE


def load_deployment(directory: str | os.PathLike[str], *, verify: bool = True) -> Deployment:
    """Read a deployment's record, after every file has been found intact.

    Args:
        directory: of the deployment.
        verify: False skips the checksums, e.g. where they were verified a moment ago.

    Raises:
        DamagedFilesError: a file is missing, truncated or altered; each is named.
        ValueError: ``directory`` holds no deployment, or one of another release.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory: give that of a deployment")
    path = directory / DEPLOYMENT_FILE
    if not path.is_file() and not (directory / "segquant_manifest.json").is_file():
        raise ValueError(
            f"{directory} holds no deployment: write one with write_model_repository or `optimum-cli segquant serve`"
        )
    if verify:
        verify_manifest(directory)
    try:
        return Deployment.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise DamagedFilesError(f"{path} is missing: copy, download or write the deployment again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
