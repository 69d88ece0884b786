"""The benchmarks of packed models, tiny, on a CPU: what they measure and print, and several processes for real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import benchmark_cpu
import benchmark_gpu
import multi_gpu
import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_benchmark_measures_every_way_and_writes_it_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "numbers.json"
    arguments = "--tiny --device cpu --models sd35 --ways bf16 int8 --batches 1 2 --fuse-qkv --compile".split()
    results = benchmark_gpu.main([*arguments, "--json", str(path)])
    assert json.loads(path.read_text())["device"] == "CPU"
    for way in ("bf16", "int8"):
        for batch in (1, 2):
            assert results[f"sd35, {way}, eager, batch {batch}"]["step ms"] > 0
    assert results["sd35, int8"]["weights GiB"] < results["sd35, bf16"]["weights GiB"]
    assert set(results["products"]["tiny"]) >= {"bf16", "int8 static", "int8 dual8", "fp8 static"}
    assert "TB/s" in capsys.readouterr().out


def test_stages_of_a_compilation_are_parts_of_the_first_call() -> None:
    torch._dynamo.reset()
    call = {"input": torch.randn(4, 8)}
    plain = benchmark_gpu.model_step(nn.Linear(8, 8), call, torch.device("cpu"))
    compiled = torch.compile(nn.Linear(8, 8), backend="aot_eager")
    numbers = benchmark_gpu.model_step(compiled, call, torch.device("cpu"))
    assert "compiling, s" not in plain
    assert numbers["compiling, s"]["Dynamo"] > 0
    assert sum(numbers["compiling, s"].values()) < numbers["first call s"]


def test_plot_of_the_numbers_in_the_repository(tmp_path: Path) -> None:
    results = json.loads((EXAMPLES / "benchmark_gpu.json").read_text())
    benchmark_gpu.plot(results, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no compiled step was measured"):
        benchmark_gpu.plot({"device": "CPU"}, tmp_path / "nothing.png")


def test_packed_beside_simulated_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark_cpu.main("--presets SEGQUANT_CFG --heads 2 --calls 1".split())
    row = re.search(
        r"\| SEGQUANT_CFG \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+)x \| (\d+) \| ([\d.]+) \|", capsys.readouterr().out
    )
    assert row is not None
    assert all(int(milliseconds) > 0 for milliseconds in row.groups()[:3])
    assert 0.25 < float(row[6]) < 0.5, "codes take a quarter of float32, scales and biases what they took"


def test_device_map(capsys: pytest.CaptureFixture[str]) -> None:
    multi_gpu.main(["--device-map", "--tiny", "--device", "cpu"])
    assert "outputs differ by 0.00%" in capsys.readouterr().out


@pytest.mark.slow
def test_context_parallelism_gives_the_same_numbers_in_two_processes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "multi_gpu.py"), "--tiny", "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    difference = re.search(r"2 processes .* outputs differ by ([\d.]+)%", done.stdout)
    assert difference is not None, done.stdout
    assert float(difference[1]) < 0.5
