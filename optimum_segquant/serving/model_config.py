"""``config.pbtxt``: the messages of Triton's model configuration, read and written by the protobuf library.

The messages are declared here, by their published names and field numbers (``model_config.proto`` of
triton-inference-server/common), so that reading and writing text format needs nothing but ``protobuf``. Left out are
the fields that no repository of ours has: sequence batching, ensembles, batch inputs and outputs, metrics, custom
operators. A file with one of those, or with a misspelt field, is refused with the line.

>>> print(format_config(parse_config('name: "vae" max_batch_size: 4')).strip())
name: "vae"
max_batch_size: 4
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

__all__ = ["CONFIG_FILE", "DATA_TYPES", "ConfigError", "format_config", "new_config", "parse_config", "read_config"]

CONFIG_FILE = "config.pbtxt"

_PACKAGE = "inference"

DATA_TYPES: Mapping[str, int] = {
    f"TYPE_{name}": number
    for number, name in enumerate(
        "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16".split()
    )
}
"""Names and numbers of Triton's tensor types."""

_ENUMS: Mapping[str, Mapping[str, int]] = {
    "DataType": DATA_TYPES,
    "ModelInput.Format": {"FORMAT_NONE": 0, "FORMAT_NHWC": 1, "FORMAT_NCHW": 2},
    "ModelInstanceGroup.Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2, "KIND_MODEL": 3},
    "ModelOptimizationPolicy.ModelPriority": {"PRIORITY_DEFAULT": 0, "PRIORITY_MAX": 1, "PRIORITY_MIN": 2},
    "ModelQueuePolicy.TimeoutAction": {"REJECT": 0, "DELAY": 1},
}

_SCALARS = {
    "bool": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
    "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
    "uint32": descriptor_pb2.FieldDescriptorProto.TYPE_UINT32,
    "uint64": descriptor_pb2.FieldDescriptorProto.TYPE_UINT64,
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
}

_MESSAGES: Mapping[str, Mapping[str, tuple[int, str]]] = {
    # name: (number, type); "[]" repeats, "{}" is a map from strings.
    "ModelTensorReshape": {"shape": (1, "int64[]")},
    "ModelInput": {
        "name": (1, "string"),
        "data_type": (2, "DataType"),
        "format": (3, "ModelInput.Format"),
        "dims": (4, "int64[]"),
        "reshape": (5, "ModelTensorReshape"),
        "is_shape_tensor": (6, "bool"),
        "allow_ragged_batch": (7, "bool"),
        "optional": (8, "bool"),
        "is_non_linear_format_io": (9, "bool"),
    },
    "ModelOutput": {
        "name": (1, "string"),
        "data_type": (2, "DataType"),
        "dims": (3, "int64[]"),
        "label_filename": (4, "string"),
        "reshape": (5, "ModelTensorReshape"),
        "is_shape_tensor": (6, "bool"),
        "is_non_linear_format_io": (7, "bool"),
    },
    "ModelRateLimiter.Resource": {"name": (1, "string"), "global": (2, "bool"), "count": (3, "uint32")},
    "ModelRateLimiter": {"resources": (1, "ModelRateLimiter.Resource[]"), "priority": (2, "uint32")},
    "ModelInstanceGroup": {
        "name": (1, "string"),
        "count": (2, "int32"),
        "gpus": (3, "int32[]"),
        "kind": (4, "ModelInstanceGroup.Kind"),
        "profile": (5, "string[]"),
        "rate_limiter": (6, "ModelRateLimiter"),
        "passive": (7, "bool"),
        "host_policy": (9, "string"),
    },
    "ModelVersionPolicy.Latest": {"num_versions": (1, "uint32")},
    "ModelVersionPolicy.All": {},
    "ModelVersionPolicy.Specific": {"versions": (1, "int64[]")},
    "ModelVersionPolicy": {
        "latest": (1, "ModelVersionPolicy.Latest"),
        "all": (2, "ModelVersionPolicy.All"),
        "specific": (3, "ModelVersionPolicy.Specific"),
    },
    "ModelOptimizationPolicy.Graph": {"level": (1, "int32")},
    "ModelOptimizationPolicy.Cuda": {
        "graphs": (1, "bool"),
        "busy_wait_events": (2, "bool"),
        "output_copy_stream": (4, "bool"),
    },
    "ModelOptimizationPolicy.ExecutionAccelerators.Accelerator": {"name": (1, "string"), "parameters": (2, "string{}")},
    "ModelOptimizationPolicy.ExecutionAccelerators": {
        "gpu_execution_accelerator": (1, "ModelOptimizationPolicy.ExecutionAccelerators.Accelerator[]"),
        "cpu_execution_accelerator": (2, "ModelOptimizationPolicy.ExecutionAccelerators.Accelerator[]"),
    },
    "ModelOptimizationPolicy.PinnedMemoryBuffer": {"enable": (1, "bool")},
    "ModelOptimizationPolicy": {
        "graph": (1, "ModelOptimizationPolicy.Graph"),
        "priority": (2, "ModelOptimizationPolicy.ModelPriority"),
        "cuda": (3, "ModelOptimizationPolicy.Cuda"),
        "execution_accelerators": (4, "ModelOptimizationPolicy.ExecutionAccelerators"),
        "input_pinned_memory": (5, "ModelOptimizationPolicy.PinnedMemoryBuffer"),
        "output_pinned_memory": (6, "ModelOptimizationPolicy.PinnedMemoryBuffer"),
        "gather_kernel_buffer_threshold": (7, "uint32"),
        "eager_batching": (8, "bool"),
    },
    "ModelQueuePolicy": {
        "timeout_action": (1, "ModelQueuePolicy.TimeoutAction"),
        "default_timeout_microseconds": (2, "uint64"),
        "allow_timeout_override": (3, "bool"),
        "max_queue_size": (4, "uint32"),
    },
    "ModelDynamicBatching": {
        "preferred_batch_size": (1, "int32[]"),
        "max_queue_delay_microseconds": (2, "uint64"),
        "preserve_ordering": (3, "bool"),
        "priority_levels": (4, "uint64"),
        "default_priority_level": (5, "uint64"),
        "default_queue_policy": (6, "ModelQueuePolicy"),
    },
    "ModelParameter": {"string_value": (1, "string")},
    "ModelWarmup.Input": {
        "data_type": (1, "DataType"),
        "dims": (2, "int64[]"),
        "zero_data": (3, "bool"),
        "random_data": (4, "bool"),
        "input_data_file": (5, "string"),
    },
    "ModelWarmup": {
        "name": (1, "string"),
        "batch_size": (2, "uint32"),
        "inputs": (3, "ModelWarmup.Input{}"),
        "count": (4, "uint32"),
    },
    "ModelTransactionPolicy": {"decoupled": (1, "bool")},
    "ModelRepositoryAgents.Agent": {"name": (1, "string"), "parameters": (2, "string{}")},
    "ModelRepositoryAgents": {"agents": (1, "ModelRepositoryAgents.Agent[]")},
    "ModelResponseCache": {"enable": (1, "bool")},
    "ModelConfig": {
        "name": (1, "string"),
        "platform": (2, "string"),
        "version_policy": (3, "ModelVersionPolicy"),
        "max_batch_size": (4, "int32"),
        "input": (5, "ModelInput[]"),
        "output": (6, "ModelOutput[]"),
        "instance_group": (7, "ModelInstanceGroup[]"),
        "default_model_filename": (8, "string"),
        "cc_model_filenames": (9, "string{}"),
        "metric_tags": (10, "string{}"),
        "dynamic_batching": (11, "ModelDynamicBatching"),
        "optimization": (12, "ModelOptimizationPolicy"),
        "parameters": (14, "ModelParameter{}"),
        "model_warmup": (16, "ModelWarmup[]"),
        "backend": (17, "string"),
        "model_transaction_policy": (19, "ModelTransactionPolicy"),
        "model_repository_agents": (23, "ModelRepositoryAgents"),
        "response_cache": (24, "ModelResponseCache"),
        "runtime": (25, "string"),
    },
}

_ONE_OF: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "ModelVersionPolicy": {"policy_choice": ("latest", "all", "specific")},
    "ModelWarmup.Input": {"input_data_type": ("zero_data", "random_data", "input_data_file")},
}


class ConfigError(ValueError):
    """A ``config.pbtxt`` that Triton would not read, or that does not say what its model's files say."""


def new_config(**fields: Any) -> Any:
    """A ``ModelConfig`` message with these fields, e.g. ``new_config(name="vae", max_batch_size=4)``."""
    return _message_class()(**fields)


def parse_config(text: str) -> Any:
    """Read text format.

    Raises:
        ConfigError: says in which line and column it is not a model configuration.
    """
    try:
        return text_format.Parse(text, new_config())
    except text_format.ParseError as error:
        raise ConfigError(f"not a Triton model configuration: line {str(error).replace(' : ', ': ')}") from error


def read_config(path: str | os.PathLike[str]) -> Any:
    """Read a ``config.pbtxt``.

    Raises:
        ConfigError: there is no such file, or :func:`parse_config` refuses it; the message names the file.
    """
    try:
        return parse_config(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: write the model repository again") from error
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def format_config(config: Any) -> str:
    """The message in text format, as ``config.pbtxt`` holds it."""
    return text_format.MessageToString(config)


@lru_cache(maxsize=1)
def _message_class() -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.ModelConfig"))


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package=_PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for name in sorted(_MESSAGES, key=lambda name: name.count(".")):  # a message before those nested in it
        outer, _, short = name.rpartition(".")
        made[name] = (made[outer].nested_type if outer else file.message_type).add(name=short)
    for name, values in _ENUMS.items():
        outer, _, short = name.rpartition(".")
        enum = (made[outer] if outer else file).enum_type.add(name=short)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        choices = {field: index for index, names in enumerate(_ONE_OF.get(name, {}).values()) for field in names}
        for choice in _ONE_OF.get(name, {}):
            made[name].oneof_decl.add(name=choice)
        for field, (number, kind) in fields.items():
            _add_field(made[name], name, field, number, kind)
            if field in choices:
                made[name].field[-1].oneof_index = choices[field]
    return file


def _add_field(message: Any, owner: str, field: str, number: int, kind: str) -> None:
    if kind.endswith("{}"):
        # A map is a repeated message of keys and values.
        entry = "".join(part.capitalize() for part in field.split("_")) + "Entry"
        nested = message.nested_type.add(name=entry)
        nested.options.map_entry = True
        _add_field(nested, f"{owner}.{entry}", "key", 1, "string")
        _add_field(nested, f"{owner}.{entry}", "value", 2, kind[:-2])
        kind = f"{owner}.{entry}[]"
    proto = descriptor_pb2.FieldDescriptorProto
    label = proto.LABEL_REPEATED if kind.endswith("[]") else proto.LABEL_OPTIONAL
    kind = kind.removesuffix("[]")
    added = message.field.add(name=field, number=number, label=label)
    if kind in _SCALARS:
        added.type = _SCALARS[kind]
    else:
        added.type = proto.TYPE_ENUM if kind in _ENUMS else proto.TYPE_MESSAGE
        added.type_name = f".{_PACKAGE}.{kind}"
