"""Calibration by several processes (gloo, on the CPU): the model that one process gives, in all, or an error in all."""

from __future__ import annotations

import copy
import functools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, dispatch_model
from modelopt.torch.quantization.nn import TensorQuantizer
from processes import Failed, in_processes
from test_quantize import quiet, sd3_inputs
from test_sequential import SEQUENTIAL, W4A4, Chain, chain_data, changed, checkpointed
from tiny_pipelines import tiny_sd3_transformer, tiny_unet
from torch import Tensor, nn

import modelopt_ext
from modelopt_ext import distributed
from modelopt_ext.calibrate import driver
from modelopt_ext.calibrate.dealing import deal
from modelopt_ext.calibrate.hessian import SecondMoments
from modelopt_ext.distributed import share
from modelopt_ext.plan import SegmentPlan
from optimum_segquant.calibration import CalibrationSettings
from optimum_segquant.calibration.distributed import join_processes, own_share, split
from optimum_segquant.evaluation import DenoiserCall, Trajectories

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")


def chain() -> Chain:
    torch.manual_seed(0)
    return Chain().requires_grad_(False)


def unet() -> nn.Module:
    return tiny_unet(text_channels=16)


def loop(calls: int, inputs: Callable[[int], Any]) -> Callable[[nn.Module], None]:
    """Calls the model with this process's share of ``calls`` inputs, tensors or keyword arguments."""

    def forward_loop(model: nn.Module) -> None:
        with torch.no_grad():
            for call in share(range(calls)):
                arguments = inputs(call)
                model(**arguments) if isinstance(arguments, dict) else model(arguments)

    return forward_loop


def of_chain(call: int) -> Tensor:
    return chain_data(1)[call]


def of_unet(call: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(call)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([100.0 * call, 500.0]),
        "encoder_hidden_states": torch.randn(2, 6, 16, generator=generator),
    }


def quantized(model: nn.Module, config: dict[str, Any], forward_loop: Callable[[nn.Module], object] | None) -> Any:
    """State and plan of the model once it is quantized."""
    mtq.quantize(model, config, forward_loop)
    return model.state_dict(), modelopt_ext.plan_of(model)


State = tuple[dict[str, Tensor], SegmentPlan]


def assert_same(one: State, other: State) -> None:
    """Bit for bit."""
    assert not isinstance(one, Failed), one
    assert not isinstance(other, Failed), other
    (first, plan), (second, other_plan) = one, other
    assert plan == other_plan
    assert list(first) == list(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


FEW = {"alpha_grid": (0.4,), "clip_grid": (1.0, 0.8)}  # settings to try, for speed
CONVOLUTIONS = quiet(modelopt_ext.with_convolutions(modelopt_ext.SEGQUANT_CFG), **FEW)
CONVOLUTIONS["quant_cfg"].append({"quantizer_name": "*", "parent_class": "nn.Linear", "enable": False})
BMM = [{"quantizer_name": "*[qkv]_bmm_quantizer", "cfg": {"num_bits": 8}, "enable": True}]
CHAIN_W4A4 = changed(W4A4, low_rank={"rank": 4}, weight_clip_grid=(1.0, 0.9), bias_correction=True)
SAME: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[int], Any], int]] = {
    "everything that is searched": (tiny_sd3_transformer, quiet(modelopt_ext.SEGQUANT_CFG, **FEW), sd3_inputs, 3),
    "gptq and low rank": (chain, CHAIN_W4A4, of_chain, 5),
    "the sample is all rows": (chain, changed(CHAIN_W4A4, samples=10_000), of_chain, 3),
    "the sample is few rows": (chain, changed(CHAIN_W4A4, samples=300, activation_ranges=("max", "mean")), of_chain, 6),
    "sequential": (chain, changed(CHAIN_W4A4, **SEQUENTIAL), of_chain, 5),
    "convolutions": (unet, CONVOLUTIONS, of_unet, 3),
    "shared inputs and attention products": (
        tiny_sd3_transformer,
        {
            "quant_cfg": [*modelopt_ext.SEGQUANT_INT8_PER_TENSOR_CFG["quant_cfg"], *BMM],
            "algorithm": {
                "method": "segquant",
                "share_inputs": True,
                "progress": False,
                "alpha": 0.5,
                "polarity": "none",
            },
        },
        sd3_inputs,
        3,
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_model_as_one_process_in_all_processes(case: str):
    """Bit for bit: the same forwards, one thread each, and sums that are exact. Shares are of unequal size."""
    model, config, inputs, calls = SAME[case]
    one = quantized(model(), config, loop(calls, inputs))
    assert any("amax" in name for name in one[0])
    for state in in_processes(lambda: quantized(model(), config, loop(calls, inputs))):
        assert_same(one, state)


def test_three_processes_one_without_data():
    one = quantized(chain(), CHAIN_W4A4, loop(2, of_chain))
    for state in in_processes(lambda: quantized(chain(), CHAIN_W4A4, loop(2, of_chain)), size=3):
        assert_same(one, state)


def test_accumulated_hessians():
    """Their sums are rounded in another order: few codes differ, and the error by less than 2 %."""
    config = changed(W4A4, gptq={"hessian": "accumulated"}, samples=100)
    reference, one = chain(), chain()
    mtq.quantize(one, config, loop(5, of_chain))
    several = in_processes(lambda: quantized(chain(), config, loop(5, of_chain)))
    assert_same(*several)
    other = mtq.quantize(chain(), config, loop(5, of_chain))
    other.load_state_dict(several[0][0])
    for name, value in one.state_dict().items():
        if "amax" in name or "smoothing" in name:
            assert torch.equal(value, several[0][0][name]), name
    changed_weights = [
        (weight != several[0][0][name]).float().mean() for name, weight in one.state_dict().items() if "weight" in name
    ]
    assert max(changed_weights) < 0.02
    errors = [sum(float((m(x) - reference(x)).square().sum()) for x in chain_data(2)) for m in (one, other)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_second_moments_of_two_sets_of_rows():
    rows = torch.randn(70, 12, generator=torch.Generator().manual_seed(0)) * 3 + 50
    parts = [SecondMoments() for _ in range(3)]
    for moments, part in zip(parts, (rows, rows[:30], rows[30:]), strict=True):
        moments.update(part)
    joined = parts[1] | parts[2]
    assert joined.count == 70
    shift = torch.full((12,), 49.0)
    exact = (rows.double() - 49).T @ (rows.double() - 49)
    for moments in (parts[0], joined, SecondMoments() | joined):
        torch.testing.assert_close(moments.about(shift, torch.device("cpu")).double(), exact, rtol=1e-4, atol=0.05)


def test_unmarked_calls_are_numbered_as_data_dealt_in_turn():
    def forward_loop(model: nn.Module) -> None:
        for call in range(5):
            model(of_chain(call))

    def dealt(model: nn.Module) -> None:
        for call in range(dist.get_rank(), 5, 2):
            model(of_chain(call))

    one = quantized(chain(), CHAIN_W4A4, forward_loop)
    for state in in_processes(lambda: quantized(chain(), CHAIN_W4A4, dealt)):
        assert_same(one, state)


@pytest.mark.parametrize("away", ["cpu_offload", "device_map"])
def test_offloaded_models(away: str):
    config = changed(W4A4, low_rank={"rank": 4})

    def model() -> nn.Module:
        one = chain()
        if away == "cpu_offload":
            return cpu_offload(one, execution_device=torch.device("cpu"))
        parts = {"first": "cpu", **{f"blocks.{i}": "cpu" for i in range(len(one.blocks))}}
        return dispatch_model(one, parts, main_device="cpu", force_hooks=True)

    def outputs_of(one: nn.Module) -> Tensor:
        mtq.quantize(one, config, loop(3, of_chain))
        return torch.cat([one(x) for x in chain_data(2)])

    assert hasattr(model().blocks[0], "_hf_hook")
    expected = outputs_of(chain())
    for found in in_processes(lambda: outputs_of(model())):
        assert torch.equal(found, expected)


def test_without_data():
    config = quiet(modelopt_ext.SEGQUANT_INT8_DYNAMIC_CFG)
    one = quantized(tiny_sd3_transformer(), config, None)
    for state in in_processes(lambda: quantized(tiny_sd3_transformer(), config, None)):
        assert_same(one, state)


def test_alone_beside_others():
    """distributed_sync=False: each process on its own, with other data and other weights."""
    config = changed(W4A4, distributed_sync=False)

    def alone() -> State:
        model = chain()
        model.first.weight.data.mul_(1 + dist.get_rank())
        return quantized(model, config, lambda model: [model(x) for x in chain_data(dist.get_rank() + 1)])

    first, second = in_processes(alone)
    expected = quantized(chain(), W4A4, lambda model: [model(x) for x in chain_data(1)])
    assert_same(first, expected)
    assert not torch.equal(second[0]["first.weight"], first[0]["first.weight"])


# -- Errors ------------------------------------------------------------------------------------------------------------


@functools.cache
def untouched() -> dict[str, Tensor]:
    return chain().state_dict()


def failing(config: dict[str, Any], forward_loop: Callable[[nn.Module], object], model: nn.Module | None = None) -> Any:
    """The error of quantizing, and whether the model is as it was and can be quantized again."""
    model = model or chain()
    before = copy.deepcopy(model.state_dict())
    start = time.monotonic()
    try:
        mtq.quantize(model, config, forward_loop)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    else:
        message = "no error"
    seconds = time.monotonic() - start
    same = all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    quantizes = any(q.is_enabled for q in model.modules() if isinstance(q, TensorQuantizer))
    segments = any(isinstance(m, modelopt_ext.SegLinear) for m in model.modules())
    return message, seconds, same and not quantizes and not segments


def assert_all_failed(results: list[Any], message: str) -> None:
    """In all processes, within seconds, with one message, and the model as it was."""
    for result in results:
        assert not isinstance(result, Failed), result
        found, seconds, as_it_was = result
        assert message in found
        assert seconds < 30
        assert as_it_was


def test_an_error_in_one_forward_loop_ends_all():
    def forward_loop(model: nn.Module) -> None:
        model(of_chain(0))
        if dist.get_rank() == 1:
            raise OSError("no such batch")

    results = in_processes(lambda: failing(W4A4, forward_loop))
    assert_all_failed(
        results, "ValueError: rank 1 of 2 failed: forward_loop raised OSError: no such batch; the model is unchanged"
    )


def test_data_that_is_not_finite_in_one_process_ends_all():
    def forward_loop(model: nn.Module) -> None:
        model(of_chain(0) * (float("nan") if dist.get_rank() == 1 else 1.0))

    results = in_processes(lambda: failing(W4A4, forward_loop))
    assert_all_failed(results, "rank 1 of 2 failed: the inputs of first hold NaN or infinity")


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("where", ["solve_linear", "_configure"])
def test_an_error_in_one_process_takes_everything_back(where: str, sequential: bool, monkeypatch: pytest.MonkeyPatch):
    """While layers are solved, and while they are changed; after that the same models can be quantized."""
    config = changed(W4A4, **(SEQUENTIAL if sequential else {}))
    rank = 0 if sequential and where == "solve_linear" else 1  # stages of a single layer are the first process's
    original, count = getattr(driver, where), 0

    def stop(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if dist.get_rank() == rank and count == 3:
            raise MemoryError("no room")
        return original(*arguments, **options)

    def twice() -> Any:
        model = chain()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, where, stop)
            first = failing(config, loop(4, of_chain), model)
        return first, quantized(model, config, loop(4, of_chain))

    results = in_processes(twice)
    assert_all_failed([first for first, _ in results], f"rank {rank} of 2 failed: MemoryError: no room")
    expected = quantized(chain(), config, loop(4, of_chain))
    for _, state in results:
        assert_same(state, expected)


def test_an_interrupt_stays_one():
    def interrupted() -> str:
        def forward_loop(model: nn.Module) -> None:
            if dist.get_rank() == 1:
                raise KeyboardInterrupt

        try:
            mtq.quantize(chain(), W4A4, forward_loop)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    assert in_processes(interrupted) == ["ValueError: rank 1 of 2 failed: KeyboardInterrupt: ", "KeyboardInterrupt: "]


def test_a_process_that_dies_is_noticed():
    def forward_loop(model: nn.Module) -> None:
        if dist.get_rank() == 1:
            os._exit(0)  # as if it was killed; 0, so that in_processes does not mind

    def surviving() -> Any:
        return failing(W4A4, forward_loop)

    (found, seconds, _) = in_processes(surviving, expected=[0])[0]
    assert found.startswith("RuntimeError: lost contact with another process of this calibration")
    assert seconds < 30


def test_a_process_that_does_not_come_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch):
    def half() -> Any:
        if dist.get_rank() == 0:
            distributed.MEETING_TIMEOUT = distributed.timedelta(seconds=1)
            return failing(W4A4, loop(2, of_chain))
        time.sleep(3)
        return None

    found, seconds, as_it_was = in_processes(half)[0]
    assert found.startswith("RuntimeError: a process group of 2 is initialized, but not all of its processes came")
    assert "distributed_sync=False" in found
    assert seconds < 10
    assert as_it_was


def test_no_data_anywhere_is_refused():
    results = in_processes(lambda: failing(W4A4, lambda model: None))
    assert_all_failed(results, "ValueError: forward_loop never ran a quantized Linear of the model")


def test_an_error_in_all_processes_stays_what_it_is():
    config = changed(W4A4, exclude=["nothing.*"])
    for message, _, as_it_was in in_processes(lambda: failing(config, loop(2, of_chain))):
        assert message.startswith("ValueError: exclude: 'nothing.*' matches no quantized Linear")
        assert as_it_was


def other_weights() -> Any:
    model = chain()
    if dist.get_rank() == 1:
        model.blocks[2].weight.data.add_(1e-3)
    return failing(W4A4, loop(2, of_chain), model)


def other_config() -> Any:
    return failing(changed(W4A4, alpha=0.5 if dist.get_rank() else 0.4), loop(2, of_chain))


def other_bits() -> Any:
    config = copy.deepcopy(W4A4)
    config["quant_cfg"][-1]["cfg"]["num_bits"] = 8 - 4 * dist.get_rank()
    return failing(config, loop(2, of_chain))


def other_loop() -> Any:
    return failing(W4A4, loop(2, of_chain) if dist.get_rank() else None)


@pytest.mark.parametrize(
    ("other", "different"),
    [
        (other_weights, r"the weights, e.g. blocks.2.weight"),
        (other_config, "algorithm"),
        (other_bits, "quant_cfg"),
        (other_loop, "forward_loop"),
    ],
)
def test_processes_that_do_not_do_the_same_are_told(other: Callable[[], Any], different: str):
    assert_all_failed(in_processes(other), f"ValueError: ranks 0 and 1 differ in {different}")


def test_sharded_models_are_refused():
    def sharded() -> Any:
        model = Chain()
        for layer in model.blocks:
            torch.distributed.fsdp.fully_shard(layer, mesh=dist.init_device_mesh("cpu", (2,)))
        try:
            mtq.quantize(model, W4A4, loop(2, of_chain))
        except Exception as error:
            return str(error)

    assert all("load the whole model in every process" in found for found in in_processes(sharded))


def test_histograms_can_not_be_merged():
    config = copy.deepcopy(SAME["shared inputs and attention products"][1])
    config["quant_cfg"][-1]["cfg"] = {"num_bits": 8, "calibrator": "histogram"}

    def refused() -> str:
        try:
            mtq.quantize(tiny_sd3_transformer(), config, loop(2, sd3_inputs))
        except Exception as error:
            return str(error)
        return "no error"

    for message in in_processes(refused):
        assert "bmm_quantizer has a HistogramCalibrator, which can't be merged over processes" in message
        assert "calibrator='max'" in message


def test_data_that_was_not_shared_out_is_noticed(caplog: pytest.LogCaptureFixture):
    def everything() -> str:
        with caplog.at_level(logging.WARNING):
            mtq.quantize(chain(), W4A4, lambda model: [model(x) for x in chain_data(1)])
        return caplog.text

    first, second = in_processes(everything)
    assert "all 2 processes read the same calibration data" in first
    assert not second, "what all decide alike is told once"
    assert logging.getLogger("modelopt_ext").level == logging.NOTSET


# -- Checkpoints -------------------------------------------------------------------------------------------------------


def test_going_on_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The main process alone writes and reads, on behalf of all."""
    solve = driver._Solver.solve
    solved: list[str] = []

    def stop(self: Any, name: str, *arguments: Any) -> Any:
        solved.append(name)
        if name == "blocks.3":
            raise MemoryError("no room")
        return solve(self, name, *arguments)

    def first() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver._Solver, "solve", stop)
            folder = tmp_path / ("kept" if dist.get_rank() == 0 else "nobody's")
            return failing(checkpointed(folder), loop(4, of_chain))

    def second() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver._Solver, "solve", lambda *a: solved.append(a[1]) or solve(*a))
            folder = tmp_path / ("kept" if dist.get_rank() == 0 else "nobody's")
            return quantized(chain(), checkpointed(folder), loop(4, of_chain)), solved

    def same_folder(function: Callable[[], Any]) -> Any:
        return in_processes(function)

    for found, _, as_it_was in same_folder(first):
        assert "failed: MemoryError: no room" in found
        assert as_it_was
    assert len(list((tmp_path / "kept").glob("stage_*.safetensors"))) == 4
    expected = quantized(chain(), changed(W4A4, **SEQUENTIAL), loop(4, of_chain))
    results = same_folder(second)
    for state, _ in results:
        assert_same(state, expected)
    assert sorted(results[0][1] + results[1][1]) == ["blocks.3", "blocks.4", "blocks.5"]
    assert not (tmp_path / "nobody's").exists()


# -- Launchers ---------------------------------------------------------------------------------------------------------

FAILS = """
import sys
sys.path[:0] = {path!r}
from test_distributed import *
from optimum_segquant.calibration.distributed import join_processes

rank, size = join_processes()
assert size == 2

def forward_loop(model):
    model(of_chain(0))
    if rank == 1:
        raise OSError("no such batch")

mtq.quantize(chain(), W4A4, forward_loop)
"""
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# With --cpu, and without GPUs by itself, accelerate starts a single process.
ACCELERATE = ["accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]


def launch(launcher: list[str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *launcher, *command], capture_output=True, text=True, check=False, timeout=400
    )


@pytest.mark.slow
def test_a_launch_ends_with_an_error_of_one_process(tmp_path: Path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS.format(path=[str(Path(__file__).parent), *sys.path]))
    result = launch(ACCELERATE, str(script))
    assert result.returncode != 0
    message = "ValueError: rank 1 of 2 failed: forward_loop raised OSError: no such batch; the model is unchanged"
    assert message in result.stderr
    assert "OSError: no such batch\n" in result.stderr, "the traceback of where it happened is missing"


@pytest.mark.slow
def test_the_example_gives_the_model_of_one_process():
    """On the shipped pipeline; three batches for two processes, each started by itself (sets have other orders)."""
    small = "--prompts 3 --batch-size 1 --steps 4 --calibration-steps 2 --config SEGQUANT_INT8_PER_TENSOR_CFG".split()
    result = launch(TORCHRUN, str(Path(__file__).parents[1] / "examples" / "distributed_calibration.py"), *small)
    assert result.returncode == 0, result.stderr
    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[:2] for row in table[2:]] == [["| 1", "6"], ["| 2", "4, 2"]]
    assert "1 different model(s) in 2 process(es).\n0 of " in result.stdout


# -- Parts -------------------------------------------------------------------------------------------------------------


def test_layers_are_dealt_by_cost():
    units = [(("a",), 1.0), (("b", "c"), 5.0), (("d",), 3.0), (("e",), 3.0), (("f",), 1.0)]
    assert deal(units, 2) == {"a": 0, "b": 0, "c": 0, "d": 1, "e": 1, "f": 0}
    assert set(deal(units, 1).values()) == {0}
    assert sorted(deal(units, 8).values()) == [0, 0, 1, 2, 3, 4]
    assert list(deal(units, 3)) == ["a", "b", "c", "d", "e", "f"]


def test_shares_are_every_item_once():
    assert list(share("abc")) == ["a", "b", "c"]
    assert in_processes(lambda: list(share("abcde")), size=2) == [["a", "c", "e"], ["b", "d"]]
    assert in_processes(lambda: list(share("a")), size=2) == [["a"], []]


def test_recorded_calls_are_split_by_batches():
    """Two calls of the model in each of three batches, and one in a fourth."""
    batches = [0, 0, 1, 1, 2, 2, 3]
    data = chain_data(5, calls=len(batches))
    trajectories = Trajectories(
        tuple(
            DenoiserCall({"x": x}, x, float(i), i, batch)
            for i, (x, batch) in enumerate(zip(data, batches, strict=True))
        )
    )
    shares = [split(trajectories, rank, 3) for rank in range(3)]
    assert [[call.batch for call in share] for share in shares] == [[0, 0, 3], [1, 1], [2, 2]]
    assert [len(share) for share in shares] == [3, 2, 2]
    assert shares[0].timesteps == (6.0, 1.0, 0.0)
    one = quantized(chain(), CHAIN_W4A4, trajectories.forward_loop)
    for state in in_processes(lambda: quantized(chain(), CHAIN_W4A4, split(trajectories).forward_loop)):
        assert_same(one, state)


def test_settings_are_shared_out_once():
    settings = CalibrationSettings(prompts=("a", "b", "c"), batch_size=1)
    assert join_processes() == (0, 1)
    assert own_share(settings) == settings
    first, second = in_processes(lambda: [own_share(settings), own_share(own_share(settings)), join_processes()])
    assert first == [settings.share(0, 2), settings.share(0, 2), (0, 2)]
    assert second == [settings.share(1, 2), settings.share(1, 2), (1, 2)]


def test_tensors_travel_as_they_are():
    value = {
        "half": torch.arange(3).to(torch.bfloat16),
        "strided": torch.arange(6.0).reshape(2, 3).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "rest": (None, "text", [1.5]),
    }

    def exchanged() -> Any:
        with distributed.Processes.meeting() as processes:
            from_zero = processes.broadcast(value if processes.rank == 0 else None, 0)
            if processes.rank == 1:
                processes.send(value, 0)
                return from_zero, value
            return from_zero, processes.receive(1)

    for results in in_processes(exchanged):
        for found in results:
            assert found["rest"] == value["rest"]
            for name in ("half", "strided", "scalar", "bytes", "empty"):
                assert found[name].dtype == value[name].dtype
                assert torch.equal(found[name], value[name])
