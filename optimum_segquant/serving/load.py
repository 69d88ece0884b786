"""The pipeline of a deployment, run here or by a server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .client import TritonClient
from .deployment import load_deployment
from .local import LocalModels
from .pipeline import load_pipeline
from .served import RequestError

__all__ = ["served_pipeline"]


def served_pipeline(repository: str | os.PathLike[str], url: str | None = None, *, threads: int | None = None) -> Any:
    """Load the pipeline of a model repository.

    Args:
        repository: that :func:`~optimum_segquant.serving.write_model_repository` wrote; its checksums are verified.
        url: of a Triton server that serves it, e.g. ``"http://localhost:8000"``; None runs the ONNX files in this
            process, under the server's rules.
        threads: of ONNX Runtime in this process.

    Returns:
        An Optimum pipeline; call it like any diffusers pipeline.

    Raises:
        DamagedFilesError: a file is missing, truncated or altered.
        ValueError: the repository holds a single model.
        RequestError: no server answers at ``url``, or it is not ready.
    """
    deployment = load_deployment(repository)
    if deployment.pipeline is None:
        raise ValueError(f"{repository} holds single models, no pipeline: use LocalModels or TritonClient for them")
    if url is None:
        return load_pipeline(Path(repository) / deployment.pipeline, LocalModels(repository, threads).infer)
    client = TritonClient(url)
    if not client.ready():
        raise RequestError(f"no server is ready at {url}: start it with a command of {repository}/README.md")
    return load_pipeline(Path(repository) / deployment.pipeline, client.infer)
