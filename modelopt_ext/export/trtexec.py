"""The trtexec command line that builds a TensorRT engine from an exported ONNX file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .graph_index import GraphIndex

Sizes = int | tuple[int, int, int]
"""A size, or the smallest, the usual and the largest one."""


def trtexec_command(
    path: str | os.PathLike[str],
    sizes: Mapping[str, Sizes],
    *,
    engine: str | os.PathLike[str] | None = None,
    extra: Sequence[str] = (),
    relative_to: str | os.PathLike[str] | None = None,
) -> str:
    """Compose the command line that builds an engine from an ONNX file with dynamic axes.

        trtexec_command("transformer/model.onnx", {"batch_size": (1, 2, 4), "height": 128, "width": 128})

    Args:
        path: the ONNX file.
        sizes: for every dynamic axis of the inputs one size, or the smallest, the usual and the largest: the range
            that the engine accepts. Keys are the names of the axes; an axis without a name has the key
            ``"<input>:<axis>"``, e.g. ``"timestep:0"``.
        engine: file to write; the ONNX file's name with ``.plan`` by default.
        extra: further arguments, e.g. ``("--skipInference",)``.
        relative_to: directory that the command is run in: its paths are relative to that one. By default they are as
            given.

    Returns:
        A shell command. The types are those of the file (``--stronglyTyped``), so flags such as ``--int8`` or
        ``--fp16`` must not be added.

    Raises:
        ValueError: an axis without sizes, sizes of an unknown axis, or sizes that are not 1 <= min <= opt <= max.
        FileNotFoundError: there is no such file.
    """
    refused = [
        flag for flag in extra if flag.split("=")[0] in ("--int8", "--fp8", "--fp16", "--bf16", "--int4", "--best")
    ]
    if refused:
        raise ValueError(f"{', '.join(refused)} contradict --stronglyTyped: the file says every type; leave them out")
    graph = GraphIndex(path)
    ranges = {key: _range(key, value) for key, value in sizes.items()}
    inputs = {
        value.name: tuple(_axes(graph, value.name))
        for value in graph.model.graph.input
        if value.name not in graph.initializers
    }
    named = {axis for axes in inputs.values() for axis in axes if isinstance(axis, str)}
    if missing := sorted(named - set(ranges)):
        raise ValueError(f"{path} has dynamic axes without sizes: {', '.join(missing)}; give (min, opt, max) for each")
    if unknown := sorted(set(ranges) - named):
        raise ValueError(f"{path} has no axes {', '.join(unknown)}; its dynamic axes are {', '.join(sorted(named))}")
    target = Path(engine) if engine is not None else Path(path).with_suffix(".plan")
    source, saved = (
        os.fspath(file) if relative_to is None else os.path.relpath(file, relative_to) for file in (path, target)
    )
    command = ["trtexec", f"--onnx={source}", f"--saveEngine={saved}", "--stronglyTyped"]
    for flag, shapes in zip(
        ("--minShapes", "--optShapes", "--maxShapes"), profile_shapes(inputs, ranges), strict=False
    ):
        command.append(f"{flag}={shapes}")
    return shlex.join([*command, *extra])


def profile_shapes(
    inputs: Mapping[str, tuple[int | str, ...]], ranges: Mapping[str, tuple[int, int, int]]
) -> tuple[str, ...]:
    """Smallest, usual and largest shapes of all dynamic inputs, as TensorRT's tools write them: ``"x:1x4,y:1x8"``.

    Args:
        inputs: sizes and names of axes by input.
        ranges: smallest, usual and largest size by axis.

    Returns:
        Three texts, none if every size is fixed.
    """
    dynamic = {name: axes for name, axes in inputs.items() if any(isinstance(axis, str) for axis in axes)}
    if not dynamic:
        return ()
    return tuple(
        ",".join(f"{name}:{_shape(axes, ranges, position)}" for name, axes in dynamic.items()) for position in range(3)
    )


def _axes(graph: GraphIndex, name: str) -> Iterator[int | str]:
    shape = graph.shape(name)
    if shape is None:
        raise ValueError(f"the input {name} has no shape; export it with its axes")
    for index, size in enumerate(shape):
        yield size if size else f"{name}:{index}"


def _range(key: str, value: Sizes) -> tuple[int, int, int]:
    sizes = (value, value, value) if isinstance(value, int) else tuple(value)
    if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
        raise ValueError(f"sizes of {key} must be a number or 1 <= min <= opt <= max, got {value}")
    return sizes


def _shape(axes: tuple[int | str, ...], ranges: Mapping[str, tuple[int, int, int]], position: int) -> str:
    # trtexec has no form for the shape of a scalar; such an input is static and never comes here.
    return "x".join(str(axis if isinstance(axis, int) else ranges[axis][position]) for axis in axes)
