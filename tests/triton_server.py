"""A real Triton Inference Server for tests, where one is installed.

``TRITON_SERVER`` names the folder of NVIDIA's ``nvidia-pytriton`` package, unpacked: it holds the server and its Python
back end, but not that of ONNX Runtime. So every ONNX model gets a ``model.py`` that runs its file with onnxruntime; its
configuration stays as it was written but for the back end's name. The back end was built for NumPy 1:
``TRITON_PYTHON`` names an environment with one, without which texts arrive broken.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimum_segquant.serving import TritonClient, format_config, read_config

ONNX_MODEL = """
import json, pathlib
import onnxruntime
import torch
import triton_python_backend_utils as triton

class TritonPythonModel:
    def initialize(self, args):
        path = pathlib.Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        tensors = {name: triton.get_input_tensor_by_name(request, name) for name in self.inputs}
        arrays = {name: torch.from_dlpack(tensor.to_dlpack()).numpy() for name, tensor in tensors.items()}
        results = self.session.run(self.outputs, arrays)
        named = zip(self.outputs, map(torch.from_numpy, results))
        return triton.InferenceResponse([triton.Tensor.from_dlpack(name, value) for name, value in named])
"""


def server_folder() -> Path | None:
    folder = os.environ.get("TRITON_SERVER")
    return Path(folder) if folder else None


needs_server = pytest.mark.skipif(server_folder() is None, reason="TRITON_SERVER does not name an unpacked server")


@contextlib.contextmanager
def running(repository: Path, work: Path) -> Iterator[TritonClient]:
    """Serve a copy of a repository; the client talks to the server."""
    served = work / "served"
    shutil.copytree(repository, served)
    for path in served.glob("*/config.pbtxt"):
        config = read_config(path)
        if config.backend != "python":
            config.platform, config.backend, config.default_model_filename = "", "python", "model.py"
            config.ClearField("optimization")
            path.write_text(format_config(config))
            (path.parent / "1" / "model.py").write_text(ONNX_MODEL)
    log = work / "server.log"
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(command(served, work, port), stdout=output, stderr=output, env=environment())
        try:
            client = TritonClient(f"http://127.0.0.1:{port}", timeout=60)
            deadline = time.monotonic() + 120
            while not client.ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start:\n{log.read_text()[-8000:]}")
                time.sleep(0.5)
            yield client
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def command(repository: Path, work: Path, port: int) -> list[str]:
    folder = server_folder() / "pytriton" / "tritonserver"
    backends = work / "backends"
    shutil.copytree(folder / "backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = backends / "python" / "triton_python_backend_stub"
    shutil.copy(folder / "python_backend_stubs" / version / "triton_python_backend_stub", stub)
    stub.chmod(0o755)
    return [
        str(folder / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--http-port={port}",
        "--http-address=127.0.0.1",
        "--allow-grpc=false",
        "--exit-timeout-secs=1",
        "--allow-metrics=false",
    ]


def environment() -> dict[str, str]:
    """The back end's interpreter takes its packages from the environment of the first ``python3`` in PATH."""
    libraries = [str(server_folder() / "nvidia_pytriton.libs"), os.path.join(sys.base_prefix, "lib")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(libraries),
        "PATH": f"{os.path.join(os.environ.get('TRITON_PYTHON', sys.prefix), 'bin')}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
