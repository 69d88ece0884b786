"""Solutions of calibration stages on disk: everything that a solution holds comes back, and damage is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelopt_ext.calibrate.checkpoint import MANIFEST, StageCheckpoints
from modelopt_ext.calibrate.polarity import Treatment
from modelopt_ext.calibrate.search import LinearSolution
from modelopt_ext.nn import SegLayout


def full_solution() -> LinearSolution:
    """With another value than the default in every field."""
    values: dict[str, Any] = {
        "layout": SegLayout((2, 4), (3,), (3,), ("none", "dual8")),
        "smoothing": torch.rand(1, 6),
        "shift": torch.rand(6),
        "input_amax": {"block0_0": torch.tensor(1.5), "block0_1": torch.tensor(2.5)},
        "weight_amax": {"block0_0": torch.rand(3, 1)},
        "down": torch.rand(2, 6).bfloat16(),
        "up": torch.rand(3, 2).bfloat16(),
        "correction": torch.rand(3),
        "weight": torch.rand(3, 6),
        "treatments": (Treatment(shift=True), Treatment(polarity="dual8")),
        "alphas": ((0.5, None),),
        "stages": (("low rank", "GPTQ"),),
        "too_few_rows": True,
        "hessian": "accumulated",
        "sqnr": 31.5,
    }
    assert set(values) == {field.name for field in dataclasses.fields(LinearSolution)}, "a field is missing here"
    return LinearSolution(**values)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return type(one) is type(other) and one == other


def test_every_field_comes_back(tmp_path: Path) -> None:
    solutions = {
        "full": full_solution(),
        "bare": LinearSolution(SegLayout((6,), (3,), (3,), ("none",)), None, None, sqnr=20.0),
    }
    checksums = {"full": 1, "bare": 2}
    StageCheckpoints(str(tmp_path), {"model": "a"}).save(3, solutions, checksums)
    checkpoints = StageCheckpoints(str(tmp_path), {"model": "a"})
    assert checkpoints.load(2, checksums) is None
    found = checkpoints.load(3, checksums)
    assert found is not None
    for name, solution in solutions.items():
        for field in dataclasses.fields(LinearSolution):
            assert same(getattr(solution, field.name), getattr(found[name], field.name)), (name, field.name)


@pytest.mark.parametrize("text", ["[]", "7", '{"model"'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    StageCheckpoints(str(tmp_path), {"model": "a"})
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="give another checkpoint_dir"):
        StageCheckpoints(str(tmp_path), {"model": "a"})
