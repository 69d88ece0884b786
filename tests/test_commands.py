"""``optimum-cli segquant``: every command through Optimum's own tool, and what it says when something is wrong."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.commands.optimum_cli import main
from PIL import Image
from setuptools import find_packages
from tiny_pipelines import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline

from modelopt_ext import SegmentPlan
from optimum_segquant.commands import base
from optimum_segquant.commands.segquant import SegQuantCommand
from optimum_segquant.serving import load_deployment

ROOT = Path(__file__).parent.parent
SHAPES = ROOT / "examples" / "pipelines" / "shapes-sd3"
SMALL = ["--call", "height=16", "width=16", "max_sequence_length=16"]
QUICK = ["--num-prompts", "2", "--steps", "2", "--kept-steps", "2", "--preset", "SEGQUANT_INT8_DYNAMIC_CFG", *SMALL]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, stdout and stderr of ``optimum-cli segquant ...``, run in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "segquant", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def succeeded(outcome: tuple[int, str, str]) -> str:
    code, out, err = outcome
    assert code == 0, err
    return out


def refused(outcome: tuple[int, str, str]) -> str:
    """The one line of an error that is the user's, without its prefix."""
    code, out, err = outcome
    assert code == 2, (code, err)
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def sd3(work: Path) -> Path:
    tiny_sd3_pipeline().save_pretrained(work / "sd3")
    return work / "sd3"


@pytest.fixture(scope="module")
def quantized(sd3: Path, work: Path) -> Path:
    """Made by the command itself, in a process of its own: the tool as it is installed."""
    target = work / "quantized"
    command = [
        *tool(),
        "segquant",
        "quantize",
        str(sd3),
        "--output",
        str(target),
        "--report",
        str(work / "q.html"),
        *QUICK,
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["directory"] == str(target)
    part = result["report"]["components"][0]
    assert (part["name"], part["layers"]["quantized"], part["layers"]["linears"]) == ("transformer", 50, 50)
    assert (work / "q.html").read_text().startswith("<!doctype html>")
    return target


def tool() -> list[str]:
    return [str(Path(sys.executable).with_name("optimum-cli"))]


# -- the tool ---------------------------------------------------------------------------------------------------------


def test_the_tool_finds_the_commands() -> None:
    done = subprocess.run([*tool(), "segquant", "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("quantize", "export", "evaluate", "inspect", "benchmark", "serve"):
        assert f"\n    {name} " in done.stdout
    assert "examples:\n  optimum-cli segquant inspect MODEL --plot plan.png" in done.stdout


def test_starting_the_tool_loads_no_model_library() -> None:
    heavy = ("torch", "diffusers", "modelopt")
    code = f"import sys, optimum_segquant.commands; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("command", SegQuantCommand.SUBCOMMANDS, ids=lambda command: command.name)
def test_help_has_examples_that_parse(command: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = succeeded(run(command.name, "--help"))
    assert "exit codes: 0 done, 2 something given was wrong, 1 anything else" in out
    assert "--config FILE" in out
    seen: list[Any] = []

    def note(values: Any) -> base.Result:
        seen.append(values)
        return base.Result({}, "")

    monkeypatch.setattr(command.subcommand_class, "work", staticmethod(note))
    for example in command.subcommand_class.EXAMPLES:
        assert f"optimum-cli segquant {example}" in out
        if "--config" in example:
            continue
        words = example.partition("#")[0].replace("\\\n", " ").replace('"a red circle"', "circle").split()
        assert words[0] == command.name
        succeeded(run(*words))
    assert seen


def test_packages_in_setup_cfg_are_those_there_are() -> None:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    listed = settings["options"]["packages"].split()
    found = find_packages(str(ROOT), include=["modelopt_ext*", "optimum_segquant*"])
    assert sorted(listed) == sorted([*found, "optimum.commands.register"])


# -- commands ---------------------------------------------------------------------------------------------------------


def test_inspect_prints_draws_and_writes_the_plan(run: Run, sd3: Path, tmp_path: Path) -> None:
    out = succeeded(run("inspect", sd3, "--plot", tmp_path / "plan.png", "--output", tmp_path / "plan.json"))
    assert out.startswith("transformer (SD3Transformer2DModel): 50 Linears: 7 with output segments")
    assert "transformer_blocks.{1-2}.norm1.linear          2      32:silu   6 x 32" in out
    plan = SegmentPlan.load(tmp_path / "plan.json")
    assert plan.linears["norm_out.linear"].out_segments == (32, 32)
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.width > 800
    data = json.loads(succeeded(run("inspect", sd3, "--inputs", "real", *SMALL, "--json")))
    assert SegmentPlan.from_dict(data["plan"]) == plan
    assert data["model"] == "SD3Transformer2DModel"


@pytest.mark.parametrize(
    ("make", "row"),
    [(tiny_flux_pipeline, "single_transformer_blocks"), (tiny_sdxl_pipeline, "ff.net.0.proj")],
    ids=["flux", "sdxl"],
)
def test_inspect_other_architectures(make: Callable[[], Any], row: str, run: Run, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "pipeline")
    assert row in succeeded(run("inspect", tmp_path / "pipeline"))
    assert "q_proj" in succeeded(run("inspect", tmp_path / "pipeline", "--component", "text_encoder", "--all"))


def test_inspect_the_shipped_pipeline(run: Run) -> None:
    assert "SD3Transformer2DModel" in succeeded(run("inspect", SHAPES))


def test_quantize_from_a_yaml_file(run: Run, sd3: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na green square\n")
    (tmp_path / "job.yaml").write_text(
        f"model: {sd3}\noutput: {tmp_path / 'out'}\nprompts: {tmp_path / 'prompts.txt'}\n"
        "preset: {transformer: SEGQUANT_INT8_DYNAMIC_CFG, text_encoder: SEGQUANT_W8A16_CFG}\n"
        "components: [transformer, text_encoder]\nsteps: 2\nkept-steps: 2\nheld_out: 1\n"
        "call: {height: 16, width: 16, max_sequence_length: 16}\n"
    )
    out = succeeded(run("quantize", "--config", tmp_path / "job.yaml", "--seed", "5"))
    assert "SEGQUANT_INT8_DYNAMIC_CFG: 50 of 50 Linears quantized" in out
    assert "text_encoder (CLIPTextModelWithProjection), SEGQUANT_W8A16_CFG" in out
    assert "held-out SQNR" in out
    report = json.loads((tmp_path / "out" / "segquant_report.json").read_text())
    assert report["calibration"]["settings"]["seed"] == 5


def test_evaluate_writes_numbers_and_a_page(run: Run, sd3: Path, quantized: Path, tmp_path: Path) -> None:
    arguments = ["--num-prompts", "2", "--steps", "2", "--metrics", "psnr", "ssim", *SMALL]
    out = run("evaluate", sd3, quantized, "--output", tmp_path / "report.html", *arguments, "--json")
    data = json.loads(succeeded(out))
    assert len(data["prompts"]) == 2
    assert data["velocity"]["sqnr_db"] > 30
    assert data["metrics"]["psnr"]["value"] > 30
    assert data["quantized"]["form"] == "packed"
    assert "<img" in (tmp_path / "report.html").read_text()


def test_export_and_serve(
    run: Run, sd3: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx, repository = tmp_path / "onnx", tmp_path / "repository"
    with monkeypatch.context() as terminal:
        terminal.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        outcome = run("export", quantized, "--to", "onnx", "--output", onnx, "--no-verify", "--json")
    assert "ONNX: 100%" in outcome[2]
    data = json.loads(succeeded(outcome))
    assert data["files"]["transformer/model.onnx"] > 100_000
    assert data["bytes"] == sum(data["files"].values())

    message = refused(run("export", quantized, "--to", "onnx", "--output", tmp_path / "out", "--dtype", "bfloat16"))
    assert "can't be exported to ONNX in bfloat16: load it with torch_dtype=torch.float16" in message
    assert f"{onnx} holds ONNX files, which are run and served as they are" in refused(run("inspect", onnx))
    for command in (("export", quantized, "--to", "onnx"), ("serve", onnx)):
        source = command[1]
        before = sorted(source.rglob("*"))
        assert f"and {source} with it, which is read" in refused(run(*command, "--output", source))
        assert sorted(source.rglob("*")) == before

    sizes = ["--image-sizes", "16x16", "--max-images", "2", "--call", "max_sequence_length=16"]
    out = succeeded(run("serve", onnx, "--output", repository, "--device", "cpu", *sizes))
    assert "tritonserver --model-repository=" in out
    deployment = load_deployment(repository)
    assert deployment.sizes["transformer"]["height"].usual == 8
    assert succeeded(run("serve", repository)).startswith(f"{repository} is intact")
    checks = json.loads(succeeded(run("serve", repository, "--check", "--json")))["models"]
    assert [check["model"] for check in checks] == list(deployment.backends)

    image = tmp_path / "image.png"
    assert f"{repository} holds ONNX files" in refused(run("quantize", repository, "--output", tmp_path / "out"))
    assert "--steps must be at least 1, got 0" in refused(run("serve", repository, "--prompt", "a", "--steps", "0"))
    generate = ["--prompt", "a red circle", "--image", image, "--steps", "2", *SMALL]
    succeeded(run("serve", repository, *generate))
    with Image.open(image) as picture:
        assert picture.size == (16, 16)
    assert "takes no argument 'heigth'" in refused(run("serve", repository, *generate, "--call", "heigth=16"))
    message = refused(run("serve", repository, *generate, "--url", "http://127.0.0.1:9"))
    assert message.startswith("no server is ready at http://127.0.0.1:9: start it")

    arguments = ["--num-prompts", "2", "--steps", "2", "--metrics", "psnr", *SMALL, "--json"]
    evaluation = json.loads(succeeded(run("evaluate", sd3, repository, *arguments)))
    assert evaluation["quantized"]["form"] == "ONNX Runtime"
    assert evaluation["metrics"]["psnr"]["value"] > 30

    (repository / "transformer" / "1" / "model.onnx").write_bytes(b"other")
    assert "transformer/1/model.onnx is truncated" in refused(run("serve", repository, "--check"))


def test_native_checkpoint_for_vllm_omni(run: Run, sd3: Path, tmp_path: Path) -> None:
    target = tmp_path / "native"
    preset = ["--preset", "NATIVE_INT8_PER_TOKEN_CFG"]
    succeeded(run("quantize", sd3, "--output", target, "--export", "native", *QUICK, *preset))
    assert "vllm serve . --omni --port 8091" in succeeded(run("serve", target))
    assert succeeded(run("serve", target)).startswith(f"{target} is intact")


def test_benchmark_measures_three_forms(run: Run, sd3: Path) -> None:
    arguments = ["--preset", "SEGQUANT_INT8_DYNAMIC_CFG", "--repeats", "2", "--batch-size", "1", *SMALL]
    data = json.loads(succeeded(run("benchmark", sd3, *arguments, "--json")))
    forms = {form["form"]: form for form in data["forms"]}
    assert list(forms) == ["full", "simulated", "packed"]
    assert forms["packed"]["bytes"] < 0.6 * forms["full"]["bytes"] == 0.6 * forms["simulated"]["bytes"]
    assert all(0 < form["fastest"] <= form["seconds"] for form in forms.values())
    assert data["shape"] == [2, 4, 8, 8]
    out = succeeded(run("benchmark", sd3, *arguments, "--forms", "full"))
    assert "full" in out.splitlines()[-1]
    assert "packed" not in out


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "MODEL is missing: give the directory of a pipeline, or its name on the hub"),
        (("{sd3}",), "--output is missing: give the directory to write"),
        (("nowhere", "--output", "{out}"), "there is no directory nowhere"),
        (("{sd3}", "--output", "{out}", "--prompts", "missing.txt"), "there is no prompts file missing.txt"),
        (
            ("{sd3}", "--output", "{out}", "--preset", "SEGQUANT_W4A9_CFG"),
            "there is no preset and no file 'SEGQUANT_W4A9_CFG'",
        ),
        (("{sd3}", "--output", "{out}", "--components", "unet"), "StableDiffusion3Pipeline has no unet"),
        (
            ("{sd3}", "--output", "{out}", "--export", "onx"),
            "--export must be one of segquant, native, onnx, onnx-vnni, tensorrt, got 'onx', is 'onnx' meant?",
        ),
        (("{sd3}", "--output", "{out}", "--seed", "x"), "--seed must be a whole number, got 'x'"),
        (("{sd3}", "--output", "{out}", "--call", "height"), "--call takes KEY=VALUE, got 'height'"),
        (("{sd3}", "--output", "{out}", "--outputs", "x"), "there is no option --outputs, is '--output' meant?"),
        (("{sd3}", "more", "--output", "{out}"), "one thing too many: more"),
        (("{sd3}", "--output"), "argument --output: expected one argument; see optimum-cli segquant quantize --help"),
        (("{sd3}", "--output", "{out}", "--device", "cuda:77"), "there is no device cuda:77 here"),
        (
            ("{sd3}", "--output", "{out}", "--num-prompts", "1", "--call", "height=15"),
            "`height` and `width` have to be divisible",
        ),
        (("{sd3}", "--output", "{sd3}/transformer/config.json"), "is a file: give the name of a directory to save to"),
        (("{sd3}", "--output", "{out}", "--preset", "transformer=SEGQUANT_CFG,unet"), "--preset: write NAME=PRESET"),
        (("{sd3}", "--output", "{out}", "--preset", "a=x,a=y"), "--preset: a has two presets, x and y: keep one"),
        (
            ("{sd3}", "--output", "{out}", "--call", "heigth=1", "--call", "width=16"),
            "no argument 'heigth', is 'height'",
        ),
        (
            ("{sd3}", "--output", "{out}", "--dtype", "bfloat16", "--export", "onnx"),
            "transformer of the pipeline can't be exported to ONNX in bfloat16: load it with torch_dtype",
        ),
        (("{sd3}", "--output", "{out}", "--load", "torch_dtype=float16"), "--load torch_dtype: write --dtype float16"),
        (("{sd3}", "--output", "{sd3}"), "{sd3} would be replaced as a whole, and {sd3} with it"),
        (("{sd3}/transformer", "--output", "{sd3}"), "and {sd3}/transformer with it, which is read: give another"),
        (("--config", "missing.yaml"), "there is no config file missing.yaml"),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else value[:30],
)
def test_mistakes_are_one_line(run: Run, sd3: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    filled = [argument.format(sd3=sd3, out=tmp_path / "out") for argument in arguments]
    before = sorted(sd3.rglob("*"))
    assert message.format(sd3=sd3) in refused(run("quantize", *filled))
    assert list(tmp_path.iterdir()) == []
    assert sorted(sd3.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 4", "'stepps' is unknown, is 'steps' meant?; the keys are model, output"),
        ("steps: many", "steps must be a whole number, got 'many'"),
        ("overwrite: 1", "overwrite must be true or false, got 1"),
        ("preset: {transformer: [SEGQUANT_CFG]}", "transformer needs the name of a preset or a YAML file, got ['SEG"),
        ("call: [1]", "call must be a mapping of names to values, got [1]"),
        (
            "export: onx",
            "export must be one of segquant, native, onnx, onnx-vnni, tensorrt, got 'onx', is 'onnx' meant?",
        ),
        ("- a", "holds no options: write one a line"),
        ("a: [", "is no valid YAML"),
    ],
)
def test_wrong_yaml_names_the_key(run: Run, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    assert f"{tmp_path / 'job.yaml'}" in (line := refused(run("quantize", "--config", tmp_path / "job.yaml")))
    assert message in line


def test_wrong_key_of_a_quantization_config(run: Run, sd3: Path, tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text("preset: SEGQUANT_CFG\nalgorithm: {polarty: dual}\n")
    message = refused(run("quantize", sd3, "--output", tmp_path / "out", "--preset", tmp_path / "preset.yaml"))
    assert "polarty" in message
    assert "'polarity'" in message


def test_missing_component_is_named(run: Run, sd3: Path, tmp_path: Path) -> None:
    shutil.copytree(sd3, tmp_path / "sd3")
    shutil.rmtree(tmp_path / "sd3" / "vae")
    message = refused(run("quantize", tmp_path / "sd3", "--output", tmp_path / "out"))
    assert "has no folder vae" in message
    (tmp_path / "sd3" / "transformer" / "config.json").unlink()
    shutil.copytree(sd3 / "vae", tmp_path / "sd3" / "vae")
    refused(run("inspect", tmp_path / "sd3"))


def test_full_disk_loses_nothing(
    run: Run, sd3: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Path(shutil.copytree(quantized, tmp_path / "target"))
    before = {file: file.read_bytes() for file in target.rglob("*") if file.is_file()}

    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("optimum_segquant.exports.save_segquant", full)
    message = refused(run("quantize", sd3, "--output", target, *QUICK))
    assert "No space left on device" in message
    assert "save to another disk" in message
    assert {file: file.read_bytes() for file in target.rglob("*") if file.is_file()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_interrupted_download_says_to_try_again(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*arguments: Any, **keywords: Any) -> None:
        raise ConnectionError("Connection broken: IncompleteRead(10 bytes read, 90 more expected)")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", broken)
    message = refused(run("quantize", "organisation/model", "--output", tmp_path / "out"))
    assert "organisation/model" in message
    assert list(tmp_path.iterdir()) == []


def test_interrupt_and_internal_errors(run: Run, sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(values: Any) -> base.Result:
        raise KeyError("layout")

    command = SegQuantCommand.SUBCOMMANDS[3].subcommand_class
    monkeypatch.setattr(command, "work", staticmethod(fails))
    code, out, err = run("inspect", sd3)
    assert (code, out) == (1, "")
    assert err == "error: internal error: KeyError: 'layout'; --debug shows the traceback, please report it\n"
    code, _, err = run("inspect", sd3, "--debug")
    assert code == 1
    assert "Traceback (most recent call last)" in err
    assert "in fails" in err

    def stopped(values: Any) -> base.Result:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "work", staticmethod(stopped))
    assert run("inspect", sd3) == (130, "", "error: stopped; what was finished is kept\n")


def test_memory_that_runs_out_is_no_bug(run: Run, sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(values: Any) -> base.Result:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(SegQuantCommand.SUBCOMMANDS[3].subcommand_class, "work", staticmethod(full))
    message = refused(run("inspect", sd3))
    assert message == (
        "memory ran out, use smaller batches, sizes or dtypes: CUDA out of memory. Tried to allocate 2 GiB"
    )


def test_lists_in_messages_stay_readable() -> None:
    assert base.one_line(ValueError("can't pack:\n  a: no\n  b: no\n\nuse  c")) == "can't pack: a: no; b: no use c"
    assert base.one_line(ValueError()) == "ValueError"


def test_a_bug_in_torch_is_no_mistake_of_the_user() -> None:
    with pytest.raises(ValueError, match="Expected input batch_size") as caught:
        torch.nn.functional.cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    assert not base.is_user_error(caught.value)


def test_quantized_models_are_not_inspected_or_quantized_again(run: Run, quantized: Path, tmp_path: Path) -> None:
    assert "transformer is quantized already" in refused(run("inspect", quantized))
    assert "is quantized already" in refused(run("quantize", quantized, "--output", tmp_path / "out", *QUICK))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "there is no directory nowhere"),
        (("{sd3}",), "has a format that vLLM-Omni reads"),
        (("{sd3}", "--output", "{out}"), "holds no exported pipeline"),
        (("{sd3}", "--check"), "holds no deployment: write one with"),
        (("{sd3}", "--check", "--seal"), "--check and --seal: one at a time"),
        (("{sd3}", "--output", "{out}", "--image-sizes", "16x0"), "'16x0' is no image size: write HEIGHTxWIDTH"),
        (("{sd3}", "--output", "{out}", "--image-sizes", "1024"), "'1024' is no image size: write HEIGHTxWIDTH"),
        (("{sd3}", "--output", "{out}", "--backend", "torch"), "--backend must be one of onnxruntime, tensorrt"),
    ],
)
def test_mistakes_of_serve(run: Run, sd3: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    filled = [argument.format(sd3=sd3, out=tmp_path / "out") for argument in arguments]
    assert message in refused(run("serve", *filled))
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_of_the_pipeline(run: Run, sd3: Path, tmp_path: Path) -> None:
    sampling = [("quantize", sd3, "--output", tmp_path / "out"), ("evaluate", sd3, sd3, "--metrics", "psnr")]
    single = [("benchmark", sd3), ("inspect", sd3, "--inputs", "real")]
    for commands, argument, message in (
        (sampling, "num_inference_steps=4", "--call num_inference_steps: write --steps instead"),
        (sampling, "prompt=a", "--call prompt: write --prompts instead"),
        (sampling + single, "output_type=pt", "--call output_type: leave it out"),
        (sampling + single, "seeds=3", "StableDiffusion3Pipeline takes no argument 'seeds'"),
        (sampling + single, "heigth=16", "StableDiffusion3Pipeline takes no argument 'heigth', is 'height' meant?"),
    ):
        for command in commands:
            assert message in refused(run(*command, "--call", argument))
    assert list(tmp_path.iterdir()) == []


def test_files_are_looked_at_before_the_work(
    run: Run, sd3: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("optimum_segquant.pretrained.load_pretrained", None)
        assert "is a directory" in refused(run("quantize", sd3, "--output", out, "--report", tmp_path, *QUICK))
        assert "is a directory" in refused(run("evaluate", sd3, quantized, "--output", tmp_path, "--metrics", "psnr"))
        assert "x.xyz must end in " in refused(run("inspect", sd3, "--plot", tmp_path / "x.xyz"))
        assert "is a directory" in refused(run("inspect", sd3, "--output", tmp_path))
        assert "x.xyz must end in " in refused(run("serve", sd3, "--prompt", "a", "--image", tmp_path / "x.xyz"))
    assert list(tmp_path.iterdir()) == []
    succeeded(run("inspect", sd3, "--output", tmp_path / "new" / "plan.json"))
    assert (tmp_path / "new" / "plan.json").is_file()


def test_other_mistakes(run: Run, sd3: Path, quantized: Path, tmp_path: Path) -> None:
    assert "invalid choice: 'quantise'" in refused(run("quantise"))
    assert "no component" in refused(run("export", sd3, "--to", "native", "--output", tmp_path / "out"))
    assert "no Linear of the pipeline is quantized" in refused(
        run("export", sd3, "--to", "onnx", "--output", tmp_path / "out")
    )
    assert "psnrr" in refused(run("evaluate", sd3, sd3, "--metrics", "psnrr"))
    assert "0 were asked for" in refused(run("evaluate", sd3, sd3, "--metrics", "psnr", "--num-prompts", "0"))
    (tmp_path / "p.csv").write_text("id,words\n1,a red circle\n")
    wrong = ["--metrics", "psnr", "--prompts", tmp_path / "p.csv", "--column", "word"]
    assert "has no column 'word'; it has id, words" in refused(run("evaluate", sd3, sd3, *wrong))
    one = ["--preset", "SEGQUANT_INT8_DYNAMIC_CFG", "--prompts", tmp_path / "p.csv", "--column", "words"]
    message = refused(run("quantize", sd3 / "transformer", "--output", tmp_path / "out", *one))
    assert message.startswith("prompts need a pipeline to run, this is a single model")
    assert "is quantized already" in refused(run("benchmark", quantized, "--repeats", "1", *SMALL))
    assert "no inputs are known for a forward of AutoencoderKL" in refused(run("inspect", sd3, "--component", "vae"))
    (tmp_path / "p.csv").unlink()
    assert "--forms must be one of full, simulated, packed, got 'fast'" in refused(
        run("benchmark", sd3, "--forms", "fast")
    )
    assert list(tmp_path.iterdir()) == []
