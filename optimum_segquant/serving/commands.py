"""The commands that build and serve a deployment, as data and as the README in its directory.

Only flags that the tools document are used: ``trtexec`` (TensorRT), ``tritonserver`` and its container (Triton user
guide, quickstart), ``vllm serve --omni`` (vLLM-Omni, "ModelOpt Quantization").
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelopt_ext.export.trtexec import trtexec_command

from .sizes import AxisRange

__all__ = ["Command", "engine_commands", "triton_commands", "vllm_omni_commands"]

TRITON_IMAGE = "nvcr.io/nvidia/tritonserver:<xx.yy>-py3"
"""``<xx.yy>`` is the release; the TensorRT in it must be the one that builds the engines."""


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        name: short, to find it by.
        purpose: what it does, a clause.
        text: to be run in the deployment's directory.
    """

    name: str
    purpose: str
    text: str


def engine_commands(
    repository: Path, engines: Mapping[str, Path], sizes: Mapping[str, Mapping[str, AxisRange]]
) -> tuple[Command, ...]:
    """``trtexec`` for every engine of a repository.

    Args:
        repository: its directory, in which the commands are run.
        engines: by model, the directory of the version: ``model.onnx`` there becomes ``model.plan``.
        sizes: by model, the range of each dynamic axis.
    """
    return tuple(
        Command(
            f"build {name}",
            f"builds the engine of {name}; on the kind of GPU that will run it",
            trtexec_command(
                version / "model.onnx",
                {axis: tuple(size) for axis, size in sizes[name].items()},
                engine=version / "model.plan",
                extra=("--skipInference",),
                relative_to=repository,
            ),
        )
        for name, version in engines.items()
    )


def triton_commands(*, gpu: bool, python: bool, vnni: bool = False) -> tuple[Command, ...]:
    """Start Triton Inference Server on a repository.

    Args:
        gpu: whether any model runs on a GPU.
        python: whether the repository holds a model of the Python back end, which needs this package in the server.
        vnni: whether a model runs on a CPU and gives wrong sums on those without VNNI and AMX.
    """
    where = ", on a CPU with VNNI or AMX: on others sums saturate" if vnni else ""
    image = "segquant-triton" if python else TRITON_IMAGE
    devices = ["--gpus=all"] if gpu else []
    shared_memory = ["--shm-size=1g"] if python else []
    ports = ["-p8000:8000", "-p8001:8001", "-p8002:8002"]
    run = ["docker", "run", *devices, "--rm", *shared_memory, *ports]
    commands = [
        Command(
            "tritonserver",
            f"serves the models, where Triton is installed{where}",
            'tritonserver --model-repository="$PWD"',
        ),
        Command(
            "docker",
            f"serves the models in Triton's container{where}",
            f'{shlex.join(run)} -v"$PWD":/models {_image(image)} tritonserver --model-repository=/models',
        ),
        Command("ready", "says whether all models are loaded", "curl -v localhost:8000/v2/health/ready"),
    ]
    if python:
        build = Command(
            "image",
            "adds this package to Triton's container, for the model that runs the whole pipeline",
            f"printf 'FROM {TRITON_IMAGE}\\nRUN pip install \"optimum-segquant[onnx]\"\\n' | docker build -t {image} -",
        )
        commands.insert(0, build)
    return tuple(commands)


def _image(name: str) -> str:
    return f"'{name}'" if "<" in name else name


def vllm_omni_commands(directory: str | os.PathLike[str] = ".") -> tuple[Command, ...]:
    """Serve a pipeline in stock keys with vLLM-Omni, which finds the format in the checkpoint itself."""
    path = shlex.quote(os.fspath(directory))
    request = '{"messages": [{"role": "user", "content": "a red circle"}], "extra_body": {"seed": 0}}'
    return (
        Command(
            "vllm-omni",
            "serves the pipeline; --quantization must not be given, the checkpoint says its format",
            f"vllm serve {path} --omni --port 8091",
        ),
        Command(
            "request",
            "asks for an image, which comes as a data URL",
            "curl -s http://localhost:8091/v1/chat/completions -H 'Content-Type: application/json' "
            f"-d {shlex.quote(request)}",
        ),
    )


def render(commands: Sequence[Command]) -> str:
    """Commands as Markdown: the purpose, then the line."""
    return "\n\n".join(f"`{command.name}` {command.purpose}:\n\n```\n{command.text}\n```" for command in commands)
