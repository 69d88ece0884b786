"""Prompts from lists, files and datasets; settings: which steps of which batches are kept, by which process."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from optimum_segquant.calibration import (
    CalibrationSettings,
    NormalSteps,
    WeightedSteps,
    default_prompts,
    held_out_prompts,
    read_prompts,
)

TWO = ("a red circle", "a blue square")


class Table:
    """Behaves like a ``datasets.Dataset``: column names, rows as dicts, images decoded on the way."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def select_columns(self, names: list[str]) -> Table:
        return Table(**{name: self.columns[name] for name in names})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Any]:
        assert "image" not in self.columns, "an image was decoded"
        return {name: values[row] for name, values in self.columns.items()}

    def __iter__(self):
        return (self[row] for row in range(len(self)))


def file(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_the_packages_own_prompts_are_many_and_varied():
    own, others = default_prompts(), held_out_prompts()
    assert len(own) == 64
    assert len(others) == 32
    assert len({*own, *others}) == 96
    lengths = [len(prompt.split()) for prompt in (*own, *others)]
    assert min(lengths) <= 7
    assert max(lengths) >= 16
    assert read_prompts() == own
    assert default_prompts(3) == own[:3]
    with pytest.raises(ValueError, match="the package has 64 such prompts, 65 were asked for"):
        default_prompts(65)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a red circle\n\n  a blue square  \n"),
        ("p.txt", b"\xef\xbb\xbfa red circle\r\na blue square\r\n"),
        ("p.json", json.dumps(list(TWO))),
        ("p.json", json.dumps([{"id": 1, "prompt": TWO[0]}, {"id": 2, "prompt": TWO[1]}])),
        ("p.json", json.dumps({"Prompt": TWO, "id": [1, 2]})),
        ("p.jsonl", '{"caption": "a red circle"}\n\n{"caption": "a blue square"}\n'),
        ("p.jsonl", '"a red circle"\n"a blue square"'),
        ("p.csv", "id,text\n1,a red circle\n2,a blue square\n"),
        ("p.csv", 'anything\n"a red circle"\n"a blue square"\n'),
    ],
    ids=[
        "txt",
        "txt of Windows",
        "json strings",
        "json objects",
        "json columns",
        "jsonl",
        "jsonl strings",
        "csv",
        "one",
    ],
)
def test_files(name: str, text: str | bytes, tmp_path: Path):
    path = file(tmp_path, name, text)
    assert read_prompts(path) == TWO
    assert read_prompts(str(path), limit=1) == TWO[:1]


def test_lines_end_where_the_format_says(tmp_path: Path):
    """Unicode has more line breaks than these formats: one inside of a prompt does not cut it."""
    odd = "a red\u2028circle\x85on the left\x0bside"
    for name, text in (
        ("p.txt", f"{odd}\nb\n"),
        ("p.jsonl", json.dumps(odd, ensure_ascii=False) + '\n"b"\n'),
        ("p.csv", f'prompt\n{odd}\n"b"\n'),
    ):
        assert read_prompts(file(tmp_path, name, text)) == (odd, "b"), name
    assert read_prompts(file(tmp_path, "p.csv", 'prompt\r\n"a\r\nb"\r\n')) == ("a\nb",)


def test_a_column_can_be_named(tmp_path: Path):
    path = file(tmp_path, "p.csv", 'id,text,long\n1,x,"a red circle"\n2,y,"a blue square, ""quoted"""\n')
    assert read_prompts(path, column="long") == ("a red circle", 'a blue square, "quoted"')
    with pytest.raises(ValueError, match=r"p\.csv has no column 'prompt'; it has id, text, long"):
        read_prompts(path, column="prompt")


def test_datasets_and_lists():
    assert read_prompts(["a red circle", "a blue square"]) == TWO
    assert read_prompts([{"prompt": "a red circle"}, {"prompt": "a blue square"}]) == TWO
    assert read_prompts(Table(image=[1, 2], prompt=list(TWO))) == TWO
    assert read_prompts(iter(Table(text=list(TWO))), limit=1) == TWO[:1]
    with pytest.raises(ValueError, match=r"choose one of the dataset's splits: dataset\['train'\]"):
        read_prompts({"train": Table(prompt=list(TWO))})
    with pytest.raises(ValueError, match="has the columns a, b: say which one holds the prompts"):
        read_prompts(Table(a=["x"], b=["y"]))
    with pytest.raises(ValueError, match=r"row 2: a prompt must be text, not a int; is 'prompt' the right column\?"):
        read_prompts(Table(prompt=["x", 3]))


def test_a_dataset_by_name_or_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, ...]] = []
    module: Any = ModuleType("datasets")
    module.load_dataset = lambda name, split: asked.append(("load_dataset", name, split)) or Table(prompt=list(TWO))
    module.load_from_disk = lambda name: asked.append(("load_from_disk", name)) or {"test": Table(prompt=list(TWO))}
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_prompts("someone/prompts", split="test") == TWO
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert read_prompts(tmp_path, split="test") == TWO
    assert asked == [("load_dataset", "someone/prompts", "test"), ("load_from_disk", str(tmp_path))]

    def unreachable(name: str, split: str) -> None:
        raise ConnectionError("no\nnetwork")

    module.load_dataset = unreachable
    with pytest.raises(ValueError, match=r"dataset 'someone/prompts', .* \(ConnectionError: no network\): check its"):
        read_prompts("someone/prompts")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'someone/prompts' is no prompts file; .* pip install datasets"):
        read_prompts("someone/prompts")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n  \n", r"p\.txt has no prompts"),
        ("p.txt", b"caf\xe9", r"p\.txt is no UTF-8 text \(byte 3\): save it as UTF-8"),
        ("p.json", "[", r"p\.json is no valid JSON \(Expecting value.*\): correct it, or use \.txt"),
        ("p.json", '{"prompt": "x"}', r"expected a list of strings, a list of objects or an object of equally long"),
        ("p.jsonl", '"x"\n{', r"p\.jsonl is no valid JSONL \(line 2: "),
        ("p.csv", 'a,b\n"x', r"p\.csv is no valid CSV"),
        ("p.csv", "prompt\na red circle, on the left\n", r"line 2 has more fields than the header: .* in quotes"),
        ("p.json", '{"prompt": ["x", "y"], "id": [1]}', r"or an object of equally long lists"),
        ("p.json", '[{"prompt": "x"}, {"promt": "y"}]', r"row 2 has no column 'prompt'; it has promt"),
        ("p.pdf", "x", r"p\.pdf: name prompts files by what they hold, \.txt, \.json, \.jsonl, \.csv"),
    ],
)
def test_wrong_files(name: str, text: str | bytes, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(file(tmp_path, name, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["prompts.txt", "./prompts", "a/b/prompts", Path("prompts")], ids=str)
def test_missing_files(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no prompts file .*prompts.*relative to {tmp_path}"):
        read_prompts(name)


# -- settings ----------------------------------------------------------------------------------------------------------


def settings(**fields: Any) -> CalibrationSettings:
    return CalibrationSettings(prompts=[f"prompt {i}" for i in range(10)], **{"batch_size": 2, **fields})


def test_steps_that_are_kept():
    assert settings(steps=3).kept_steps(0, 21) == {0, 10, 20}
    assert settings(steps=8).kept_steps(3, 4) == {0, 1, 2, 3}  # at most 8
    assert settings(steps=None).kept_steps(0, 5) == {0, 1, 2, 3, 4}
    assert settings(steps=[4, 1]).kept_steps(0, 5) == {1, 4}
    with pytest.raises(ValueError, match=r"steps must be indices from 0 to 4, got \[5\]: there are 5 steps"):
        settings(steps=[1, 5]).kept_steps(0, 5)


def test_steps_from_a_distribution_differ_by_batch_and_not_by_run():
    chosen = settings(steps=WeightedSteps(2, (0, 1, 1, 8, 0)))
    drawn = Counter(step for batch in range(400) for step in chosen.kept_steps(batch, 5))
    assert set(drawn) == {1, 2, 3}
    assert drawn[3] > 350 > drawn[1] > 100
    assert all(len(chosen.kept_steps(batch, 5)) == 2 for batch in range(5))
    assert [chosen.kept_steps(b, 5) for b in range(9)] == [chosen.kept_steps(b, 5) for b in range(9)]
    assert [chosen.kept_steps(b, 5) for b in range(9)] != [
        settings(steps=chosen.steps, seed=1).kept_steps(b, 5) for b in range(9)
    ]
    with pytest.raises(ValueError, match="5 weights for 6 denoising steps"):
        chosen.kept_steps(0, 6)

    near_the_image = settings(steps=NormalSteps(4, mean=0.75, std=0.1))
    steps = [step for batch in range(100) for step in near_the_image.kept_steps(batch, 101)]
    assert np.mean(steps) == pytest.approx(75, abs=2)
    assert np.std(steps) == pytest.approx(10, abs=1.5)


@pytest.mark.parametrize("bound", [1, 3, 7, 40, 1000])
def test_calls_are_bounded_and_spread_evenly(bound: int):
    chosen = settings(max_calls=bound)  # 5 batches
    kept = {batch: chosen.thinned(batch, 8) for batch in range(5)}
    total = sum(map(len, kept.values()))
    assert total == min(bound, 5 * 8)
    assert max(map(len, kept.values())) - min(map(len, kept.values())) <= 1
    assert all(indices == sorted(set(indices)) and set(indices) <= set(range(8)) for indices in kept.values())
    if bound == 7:  # one or two of eight in each batch: other ones each time
        assert len({index for indices in kept.values() for index in indices}) >= 5


def test_shares_are_one_process_data_dealt_out_by_batches():
    whole = settings(per_prompt_kwargs={"image": range(10)}, call_kwargs={"guidance_scale": 4.0})
    shares = [whole.share(rank, 3) for rank in range(3)]
    assert [[batch.number for batch in share.batches] for share in shares] == [[0, 3], [1, 4], [2]]
    union = sorted((batch for share in shares for batch in share.batches), key=lambda batch: batch.number)
    assert tuple(union) == whole.batches
    assert union[3].prompts == ("prompt 6", "prompt 7")
    assert union[3].seeds == (6, 7)
    assert union[3].call_kwargs == {"guidance_scale": 4.0, "image": [6, 7]}
    drawn = settings(steps=WeightedSteps(2, (1,) * 9), max_calls=7)
    assert drawn.share(1, 3).kept_steps(4, 9) == drawn.kept_steps(4, 9)
    assert drawn.share(1, 3).quota(4) == drawn.quota(4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": "a red circle"}, r"prompts must be a list of strings: write \['a red circle'\], or read_prompts"),
        ({"prompts": []}, "the list of prompts has no prompts"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": "4"}, "batch_size must be a whole number, got '4'"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"steps": "all"}, "steps must be a number of steps, their indices, a distribution or None, got 'all'"),
        (
            {"per_prompt_kwargs": {"negative_prompt": "ten letter"}},
            r"negative_prompt has one value a prompt: give a lis",
        ),
        ({"max_calls": 0}, "max_calls must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"steps": 0}, "at least one step must be kept"),
        ({"steps": []}, "steps is empty"),
        ({"call_kwargs": {"generator": 1}}, "'generator' is set here: give seed instead"),
        ({"call_kwargs": {"output_type": "pil"}}, "'output_type' is set here: leave it out"),
        ({"per_prompt_kwargs": {"image": [1]}}, "image has 1 values for 10 prompts: give one a prompt"),
        ({"call_kwargs": {"a": 1}, "per_prompt_kwargs": {"a": range(10)}}, "a is both in call_kwargs and in"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1, got 2"),
    ],
    ids=str,
)
def test_impossible_settings(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        CalibrationSettings(**{"prompts": [f"prompt {i}" for i in range(10)], **fields})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedSteps(2, (0, 1)), "2 steps can't be drawn from 1 with a weight above zero"),
        (lambda: WeightedSteps(1, (-1, 2)), "must be finite and not negative"),
        (lambda: NormalSteps(0), "at least one step must be kept"),
        (lambda: NormalSteps(1, mean=2), r"mean must be in \[0, 1\] and std above 0"),
    ],
)
def test_impossible_distributions(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
