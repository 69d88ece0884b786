"""For whom a graph is written, and what may be in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...nn.packed_spec import PackedSpec

Runtime = Literal["onnxruntime", "tensorrt"]
TargetName = Literal["onnxruntime", "onnxruntime-vnni", "tensorrt"]

LOWEST_OPSET = 19  # float8, and what TensorRT asks for
INT4_OPSET = 21  # int4 and scales of blocks
HIGHEST_OPSET = 21


@dataclass(frozen=True)
class Target:
    """What a runtime takes.

    Attributes:
        name: of the target.
        runtime: that reads the graph.
        default_opset: what is written where nothing asks for more.
        unsigned: whether codes of activations are stored as uint8: those of int8 plus 128, with a zero point of 128.
            TensorRT takes int8 with zero point 0 only.
        unsigned_weights: the same of 8-bit weights. On x86 CPUs without VNNI ONNX Runtime's products of unsigned by
            signed codes saturate at 16 bits (`vpmaddubsw`), those of unsigned by unsigned ones don't. On CPUs with VNNI
            or AMX the former are exact, and several times as fast.
        rows_first: whether every weight is stored (N, K) with scales on axis 0 and transposed in the graph. ONNX
            Runtime gets (K, N) where it has an integer kernel, which then needs no rewriting when loaded.
        int4_as_int8: whether int4 weights that meet integer activations are cast to int8 in the graph before they are
            scaled: the file has four bits a weight, ONNX Runtime casts once when it loads and uses its int8 kernels.
    """

    name: TargetName
    runtime: Runtime
    default_opset: int
    unsigned: bool
    unsigned_weights: bool
    rows_first: bool
    int4_as_int8: bool

    @property
    def needs_vnni(self) -> bool:
        """Whether ONNX Runtime's integer products of such graphs saturate on some CPUs; as floats they do nowhere."""
        return self.runtime == "onnxruntime" and not self.unsigned_weights


_ONNXRUNTIME = Target("onnxruntime", "onnxruntime", 20, True, True, rows_first=False, int4_as_int8=True)
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _ONNXRUNTIME,
        replace(_ONNXRUNTIME, name="onnxruntime-vnni", unsigned_weights=False),
        Target("tensorrt", "tensorrt", 19, False, False, rows_first=True, int4_as_int8=False),
    )
}


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TARGETS:
        raise ValueError(f"target {name!r} is unknown: use one of {', '.join(map(repr, TARGETS))}")
    return TARGETS[name]


def stores_int4(spec: PackedSpec, target: Target) -> bool:
    """Whether a layer's weight is written as int4. TensorRT multiplies int4 by 16-bit activations only."""
    return spec.weights == "int4" and (target.int4_as_int8 or spec.activations is None)


def required_opset(spec: PackedSpec, target: Target) -> int:
    """The lowest opset that has what a layer needs."""
    return INT4_OPSET if spec.group is not None or stores_int4(spec, target) else LOWEST_OPSET


def choose_opset(opset: int | None, specs: dict[str, PackedSpec], target: Target) -> int:
    """Check the opset that was asked for, or find one.

    Args:
        opset: as asked for, or None.
        specs: of the layers to export, by name.
        target: for whom.

    Raises:
        ValueError: the opset is not supported, or lacks what a layer needs.
    """
    needs = {name: required_opset(spec, target) for name, spec in specs.items()}
    highest = max(needs.values(), default=LOWEST_OPSET)
    if opset is None:
        return max(target.default_opset, highest)
    if not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise ValueError(
            f"opset {opset} is not supported: use {LOWEST_OPSET} to {HIGHEST_OPSET}, or leave it out "
            f"(for these layers {max(target.default_opset, highest)})"
        )
    if opset < highest:
        layers = [name for name, need in needs.items() if need > opset]
        raise ValueError(
            f"opset {opset} has neither int4 nor scales of blocks, which {len(layers)} layers need ({layers[0]}, ...): "
            f"use opset={highest}, or a preset with int8 or FP8 weights per channel"
        )
    return opset
