"""Layer by layer: does ONNX Runtime round the same activations to the same codes as simulated quantization?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from modelopt_ext.export.onnx import OnnxActivation, Target, export_module, lowered, target_named
from modelopt_ext.export.onnx.lowering import quantized_linears
from modelopt_ext.formats import QuantFormat, step_size
from modelopt_ext.nn import QuantizerBank, input_block
from modelopt_ext.nn.packed import PackedLinear

from .compare import run, session
from .cpu import runs_optimized


@dataclass(frozen=True)
class LayerParity:
    """One layer on one input.

    Attributes:
        codes: activation codes compared, over all blocks and signs.
        differing: those that differ.
        largest: the largest difference, in codes (for FP8: 1 for the neighbouring number).
        output: energy of the difference of the outputs over that of the output.
    """

    codes: int
    differing: int
    largest: int
    output: float


def layer_parity(model: nn.Module, call: Callable[[], Any], target: str = "onnxruntime") -> dict[str, LayerParity]:
    """Compare every quantized Linear that ``call`` runs, each on the input that simulated quantization gives it.

    Args:
        model: calibrated by ``mtq.quantize``, not compressed: its simulated quantizers are the reference.
        call: runs the model, e.g. ``lambda: model(**trajectories[0].inputs)``. A layer's first call counts.
        target: as in :func:`export_onnx`.

    Returns:
        A result for every layer with rounded activations, by name.

    Raises:
        ValueError: the model holds packed Linears, or nothing is quantized.
    """
    layers = quantized_linears(model)
    if not layers or any(isinstance(layer, PackedLinear) for layer in layers.values()):
        raise ValueError("layer_parity compares with simulated quantization: give the model before compress()")
    chosen = target_named(target)
    optimize = runs_optimized(chosen)
    inputs = _first_inputs(layers, call)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, x in inputs.items():
            parity = _compare(layers[name], x, Path(folder) / "layer.onnx", chosen, optimize)
            if parity is not None:
                found[name] = parity
    return found


@torch.no_grad()
def _first_inputs(layers: Mapping[str, nn.Module], call: Callable[[], Any]) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs.setdefault(name, arguments[0].detach().clone())

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return inputs


@torch.no_grad()
def _compare(layer: nn.Module, x: Tensor, path: Path, target: Target, optimize: bool) -> LayerParity | None:
    with _recorded_codes(layer) as reference:
        output = layer(x)
    if not reference:
        return None
    wrapped = nn.Sequential(layer)  # the exporter replaces Linears in their parents
    with lowered(wrapped, target) as replacements:
        activations = next(iter(replacements.values())).activations()
    export_module(wrapped, path, {"input": x}, target=target.name)
    exported = run(session(path, optimize=optimize), {"input": x})["output"]
    names = _expose_rounded(path, activations)
    rounded = run(session(path, optimize=optimize), {"input": x})
    total, differing, largest = 0, 0, 0
    for block, expected in reference.items():
        activation = activations[block]
        found = _ordinal(rounded[names[block]] / activation.scale, activation) + activation.offset
        # Simulation rounds the magnitude of a negative half with one-sided codes.
        sign = -1 if activation.part == "negative" and activation.unsigned else 1
        difference = (found.reshape(expected.shape) - sign * _ordinal(expected, activation)).abs()
        total += difference.numel()
        differing += int((difference > 0).sum())
        largest = max(largest, int(difference.max()))
    error = exported.double() - output.double()
    return LayerParity(total, differing, largest, float(error.square().sum() / output.double().square().sum()))


@contextmanager
def _recorded_codes(layer: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What the simulated quantizers of a layer's input round to, as multiples of their scales, by block name."""
    bank: Any = layer.input_quantizer
    codes: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(quantizer: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
            fmt = QuantFormat.of(quantizer, "input_quantizer")
            assert fmt is not None
            values = arguments[0].float()
            if quantizer.pre_quant_scale is not None:
                values = values * quantizer.pre_quant_scale.float()
            amax = values.abs().amax(dim=-1, keepdim=True) if fmt.dynamic else quantizer.amax
            codes[name] = output.float() / step_size(amax, fmt)

        return hook

    blocks = (
        {name: bank.block(name) for name in bank.block_names()}
        if isinstance(bank, QuantizerBank)
        else {input_block(0, 0): bank}
    )
    handles = [block.register_forward_hook(keep(name)) for name, block in blocks.items() if block.is_enabled]
    try:
        yield codes
    finally:
        for handle in handles:
            handle.remove()


def _expose_rounded(path: Path, activations: Mapping[str, OnnxActivation]) -> dict[str, str]:
    """Make the rounded activations outputs of the graph; their names by block."""
    model = onnx.load(path)
    made = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    single = len(activations) == 1
    names = {
        block: f"/0/input_quantizer/{'' if single else block + '/'}DequantizeLinear_output_0" for block in activations
    }
    for name in names.values():
        assert name in made, f"{name} is not in the graph"
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(model, path)
    return names


def _ordinal(codes: Tensor, activation: OnnxActivation) -> Tensor:
    """Which code: the integer, or the place of an E4M3 number among all of them."""
    if activation.zero_point.dtype != torch.float8_e4m3fn:
        return codes.double().round()
    bits = codes.float().to(torch.float8_e4m3fn).view(torch.int8).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7F), bits).double()
