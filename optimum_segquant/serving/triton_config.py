"""From a model's signature to its ``config.pbtxt``.

The rules are those of Triton's documentation (user guide, "Model Configuration") and of its back ends:

- Triton joins requests along a first axis that all inputs and outputs have. Such a model gets ``max_batch_size`` >= 1,
  and its ``dims`` leave that axis out; any other model gets 0, and its ``dims`` are the whole shape.
- ``dims`` may not be empty. A tensor that has nothing but the batch axis is sent as (rows, 1) and reshaped to (rows,).
- With ``max_batch_size`` 0 the ONNX Runtime back end takes ``dims: [1]`` for a tensor without axes, TensorRT's not.
- ONNX Runtime's back end has no bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .model_config import DATA_TYPES, new_config
from .signature import ModelSignature, TensorSignature

__all__ = ["BACKENDS", "Backend", "Device", "ServingOptions", "build_config"]

Backend = Literal["onnxruntime", "tensorrt"]
Device = Literal["gpu", "cpu"]

PLATFORMS: Mapping[str, str] = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
FILES: Mapping[str, str] = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
BACKENDS = get_args(Backend)


@dataclass(frozen=True)
class ServingOptions:
    """How a model is served.

    Attributes:
        device: where its instances run.
        instances: how many, on each GPU or on the CPU.
        gpus: numbers of the GPUs to use; all by default.
        max_queue_delay_us: microseconds that a request may wait for others to share its batch.
        accelerator: an execution provider for ONNX Runtime in front of its own: ``"tensorrt"`` on a GPU, ``"openvino"``
            on a CPU.
        accelerator_parameters: of it, as Triton's ONNX Runtime back end names them.
        graph_level: ONNX Runtime's optimization: 0 all, 1 extended, -1 basic, 2 none.
        parameters: further parameters of the back end, e.g. ``{"intra_op_thread_count": "4"}``.

    Raises:
        ValueError: a value, or a combination, that Triton refuses.
    """

    device: Device = "gpu"
    instances: int = 1
    gpus: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    accelerator: Literal["tensorrt", "openvino"] | None = None
    accelerator_parameters: Mapping[str, str] = field(default_factory=dict)
    graph_level: int = 0
    parameters: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device not in get_args(Device):
            raise ValueError(f"device is {self.device!r}: write one of {', '.join(get_args(Device))}")
        if self.instances < 1:
            raise ValueError(f"instances is {self.instances}: at least one instance must run")
        if self.gpus and self.device == "cpu":
            raise ValueError("instances on the CPU take no gpus: leave them out, or write device='gpu'")
        if self.max_queue_delay_us < 0:
            raise ValueError(f"max_queue_delay_us is {self.max_queue_delay_us}: write microseconds, 0 for no waiting")
        if self.graph_level not in (-1, 0, 1, 2):
            raise ValueError(f"graph_level is {self.graph_level}: write 0 (all), 1 (extended), -1 (basic) or 2 (none)")
        needed = {"tensorrt": "gpu", "openvino": "cpu", None: self.device}
        if self.accelerator not in needed:
            raise ValueError(f"accelerator is {self.accelerator!r}: write 'tensorrt', 'openvino' or None")
        if needed[self.accelerator] != self.device:
            raise ValueError(f"the accelerator {self.accelerator} runs on device={needed[self.accelerator]!r} only")
        if self.accelerator_parameters and self.accelerator is None:
            raise ValueError("accelerator_parameters need an accelerator")


def build_config(
    name: str, signature: ModelSignature, backend: Backend, max_batch_size: int, options: ServingOptions
) -> Any:
    """The model configuration for one ONNX file, or for the engine built from it.

    Args:
        name: of the model and of its directory.
        signature: of the ONNX file.
        backend: what runs it.
        max_batch_size: rows of one execution; only for a model whose requests can be joined.
        options: how it is served.

    Returns:
        A ``ModelConfig`` message.

    Raises:
        ValueError: the back end does not take the model, or Triton the options.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: write one of {', '.join(BACKENDS)}")
    if max_batch_size < 1:
        raise ValueError(f"max_batch_size of {name} is {max_batch_size}: at least one row must fit")
    if backend == "tensorrt" and options.device == "cpu":
        raise ValueError(f"{name}: TensorRT runs on a GPU: write device='gpu', or backend='onnxruntime'")
    if backend == "tensorrt" and options.accelerator is not None:
        raise ValueError(f"{name}: accelerators are ONNX Runtime's: leave it out, or write backend='onnxruntime'")
    batched = bool(signature.batch_axes)
    config = new_config(
        name=name,
        platform=PLATFORMS[backend],
        backend=backend,
        default_model_filename=FILES[backend],
        max_batch_size=max_batch_size if batched else 0,
    )
    for tensor in signature.inputs:
        _add_tensor(config.input.add(), tensor, batched, backend)
    for tensor in signature.outputs:
        _add_tensor(config.output.add(), tensor, batched, backend)
    _add_instances(config, options)
    if batched and max_batch_size > 1:
        config.dynamic_batching.SetInParent()
        if options.max_queue_delay_us:
            config.dynamic_batching.max_queue_delay_microseconds = options.max_queue_delay_us
    if backend == "onnxruntime":
        _add_runtime(config, options)
    for key, value in sorted(options.parameters.items()):
        config.parameters[key].string_value = value
    return config


def _add_tensor(entry: Any, tensor: TensorSignature, batched: bool, backend: Backend) -> None:
    if backend == "onnxruntime" and tensor.data_type == "TYPE_BF16":
        raise ValueError(
            f"{tensor.name} is bfloat16, which Triton's ONNX Runtime back end has not: export the model in float32 or "
            "float16, or use backend='tensorrt'"
        )
    if backend == "tensorrt" and not tensor.shape:
        raise ValueError(f"{tensor.name} has no axes, which Triton's TensorRT back end does not take")
    entry.name = tensor.name
    entry.data_type = DATA_TYPES[tensor.data_type]
    dims = tensor.dims[1:] if batched else tensor.dims
    if dims:
        entry.dims.extend(dims)
        return
    entry.dims.append(1)
    if batched:
        entry.reshape.SetInParent()


def _add_instances(config: Any, options: ServingOptions) -> None:
    group = config.instance_group.add(count=options.instances)
    group.kind = {"gpu": 1, "cpu": 2}[options.device]
    group.gpus.extend(options.gpus)


def _add_runtime(config: Any, options: ServingOptions) -> None:
    if options.graph_level:
        config.optimization.graph.level = options.graph_level
    if options.accelerator is not None:
        accelerators = config.optimization.execution_accelerators
        group = (
            accelerators.gpu_execution_accelerator
            if options.device == "gpu"
            else accelerators.cpu_execution_accelerator
        )
        accelerator = group.add(name=options.accelerator)
        for key, value in sorted(options.accelerator_parameters.items()):
            accelerator.parameters[key] = value
