"""Solutions of finished stages on disk, so that a calibration that was killed goes on where it was.

A folder with ``manifest.json``, which says what the solutions are of, and ``stage_0000.safetensors`` and so on, with
tensors and, in the header, everything else as JSON. Files appear under their names only when they are complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..nn import SegLayout
from .polarity import Treatment
from .search import LinearSolution

logger = logging.getLogger(__name__)

VERSION = 3
# How far the same data's largest values may lie apart: kernels of GPUs do not always add in the same order.
TOLERANCE = 0.02
MANIFEST = "manifest.json"
_TENSORS = ("smoothing", "shift", "down", "up", "correction", "weight")
_SCALES = ("input_amax", "weight_amax")


def fingerprint(value: Any) -> str:
    """A hash of plain types, the same in every process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def parameters_fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes and dtypes of a model's parameters."""
    return fingerprint([(name, list(p.shape), str(p.dtype)) for name, p in model.named_parameters()])


def weight_checksum(weight: Tensor) -> int:
    """CRC-32 of a weight's bytes, any shape and dtype."""
    return zlib.crc32(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


class StageCheckpoints:
    """The folder of one calibration.

    Args:
        folder: made if it does not exist.
        manifest: plain types that say what is calibrated, with what settings and data; ``"ranges"``, a pair of numbers
            by layer, has to agree within :data:`TOLERANCE`, everything else exactly.

    Raises:
        ValueError: the folder holds another calibration's stages.
    """

    def __init__(self, folder: str, manifest: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps({"version": VERSION, **manifest}))
        path = self._folder / MANIFEST
        if not path.exists():
            if any(self._folder.glob("stage_*.safetensors")):
                raise ValueError(f"{folder} holds stages without {MANIFEST}; delete it, or give another checkpoint_dir")
            _replace(path, json.dumps(wanted, indent=2).encode())
            return
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}); delete {folder}, or give another checkpoint_dir") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} is no manifest of stages; delete {folder}, or give another checkpoint_dir")
        different = sorted(key for key in {*wanted, *found} if not _agree(key, wanted.get(key), found.get(key)))
        if different:
            raise ValueError(
                f"{folder} holds the stages of another calibration (different: {', '.join(different)}). To go on with "
                "it, call with the same model, config and data; to start anew, delete the folder or give another "
                "checkpoint_dir"
            )

    def _path(self, index: int) -> Path:
        return self._folder / f"stage_{index:04d}.safetensors"

    def save(self, index: int, solutions: Mapping[str, LinearSolution], checksums: Mapping[str, int]) -> None:
        """Write the solutions of a stage.

        Args:
            index: the stage's number.
            solutions: by layer.
            checksums: :func:`weight_checksum` of the weights that they were found for.
        """
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for layer, solution in solutions.items():
            for field in _TENSORS:
                value = getattr(solution, field)
                if value is not None:
                    tensors[f"{layer}/{field}"] = value
            for field in _SCALES:
                for block, amax in getattr(solution, field).items():
                    tensors[f"{layer}/{field}/{block}"] = amax
            rest[layer] = {
                "checksum": checksums[layer],
                "layout": solution.layout.to_dict(),
                "treatments": [asdict(treatment) for treatment in solution.treatments],
                "alphas": solution.alphas,
                "stages": solution.stages,
                "too_few_rows": solution.too_few_rows,
                "hessian": solution.hessian,
                "sqnr": solution.sqnr,
                # Without tensors there would be nothing to tell an empty dict of scales from a missing file.
                "scales": {field: list(getattr(solution, field)) for field in _SCALES},
            }
        path = self._path(index)
        partial = path.with_suffix(".partial")
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        save_file(copies, partial, metadata={"solutions": json.dumps(rest)})
        os.replace(partial, path)

    def load(self, index: int, checksums: Mapping[str, int]) -> dict[str, LinearSolution] | None:
        """The solutions of a stage, on the CPU; None if it is not finished.

        Args:
            index: the stage's number.
            checksums: of the weights of all layers that the stage has to have.

        Raises:
            ValueError: the file is damaged, or of other layers or weights.
        """
        path = self._path(index)
        if not path.exists():
            return None
        remedy = "delete it to solve that stage again, or give another checkpoint_dir"
        try:
            with safe_open(path, "pt", device="cpu") as file:
                rest = json.loads(file.metadata()["solutions"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except Exception as error:  # safetensors, JSON and the file system have no error in common
            raise ValueError(f"{path} can't be read ({error}); {remedy}") from error
        if set(rest) != set(checksums):
            raise ValueError(f"{path} is not of the layers {', '.join(checksums)}; {remedy}")
        changed = [layer for layer in rest if rest[layer]["checksum"] != checksums[layer]]
        if changed:
            raise ValueError(f"{path} was solved for other weights of {', '.join(changed)}; {remedy}")
        logger.info("segquant: stage %d comes from %s", index, path)
        return {layer: _solution(layer, data, tensors) for layer, data in rest.items()}


def _solution(layer: str, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LinearSolution:
    fields: dict[str, Any] = {field: tensors.get(f"{layer}/{field}") for field in _TENSORS}
    for field in _SCALES:
        fields[field] = {block: tensors[f"{layer}/{field}/{block}"] for block in data["scales"][field]}
    return LinearSolution(
        layout=SegLayout.from_dict(data["layout"]),
        treatments=tuple(Treatment(**treatment) for treatment in data["treatments"]),
        alphas=tuple(tuple(group) for group in data["alphas"]),
        stages=tuple(tuple(group) for group in data["stages"]),
        too_few_rows=data["too_few_rows"],
        hessian=data["hessian"],
        sqnr=data["sqnr"],
        **fields,
    )


def _agree(key: str, wanted: Any, found: Any) -> bool:
    if key != "ranges" or not (isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() == found.keys()):
        return bool(wanted == found)
    pairs = [(a, b) for layer in wanted for a, b in zip(wanted[layer], found[layer], strict=True)]
    return all(abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) for a, b in pairs)


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
