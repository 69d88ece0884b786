"""From a calibrated model with simulated quantization to one that holds codes: ``compress(model)``."""

from __future__ import annotations

import importlib
import logging
from typing import Any, cast

import torch
from modelopt.torch.opt.conversion import ModeloptStateManager
from modelopt.torch.opt.dynamic import DynamicModule
from modelopt.torch.quantization.nn import QuantModule, SequentialQuantizer, SVDQuantLinear, TensorQuantizer
from torch import Tensor, nn
from tqdm import tqdm

from .formats import QuantFormat, step_size, to_codes
from .mode import plan_of
from .nn import InputBank, SegLayout, SegLinear, WeightBank, input_block, weight_block
from .nn.alike import make_alike
from .nn.gelu import lighten_gelu
from .nn.layout import SPLIT_BY_SIGN
from .nn.packed import PackedLinear
from .nn.packed_spec import FORMATS, CodeType, PackedSpec
from .nn.rotation import rotate
from .plan import slices

logger = logging.getLogger(__name__)

_LISTED = 8  # names in a message


def compress(model: nn.Module, *, progress: bool = False) -> nn.Module:
    """Replace every quantized Linear of a calibrated model by a :class:`PackedLinear`, in place.

    Codes are those of the simulation but for ties of rounding, sums run over integers, and the weights take one byte
    or half a byte each. Everything else that ModelOpt put into the model is taken out again: what remains are the
    model's own modules and packed Linears, for inference on any device. Layer by layer, so that the peak is the
    model's memory plus one layer.

    Args:
        model: quantized and calibrated by ``mtq.quantize``, with this package's algorithm or one of ModelOpt's that
            leaves plain scales ("max", "mse", "smoothquant").
        progress: show a bar that counts layers.

    Returns:
        ``model`` (or, if that is itself a quantized Linear, its replacement).

    Raises:
        ValueError: something in the model can't be packed: it is named, with what to do, and nothing was changed.
    """
    linears = _linears(model)
    plan = plan_of(model)
    # Quantizers do nothing where a weight is read without calling its Linear; such a Linear is plain again.
    outside = plan.read_outside if plan is not None else frozenset()
    packable = {name: module for name, module in linears.items() if name not in outside}
    problems = [f"{name}: {problem}" for name, module in packable.items() if (problem := _problem(module))]
    problems += _others(model, set(linears))
    if not any(_is_rounded(module) for module in packable.values()):
        problems.append("no Linear is quantized and calibrated; call mtq.quantize with a forward_loop first")
    if problems:
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError("compress can't pack this model:\n  " + "\n  ".join(problems[:_LISTED]) + more)
    wanted = {id(module) for module in packable.values() if _is_rounded(module)}
    packed: dict[int, nn.Module] = {}
    with tqdm(total=len(wanted), desc="Packing", unit="layer", disable=not progress) as bar:
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if id(child) in wanted:
                    if id(child) not in packed:
                        packed[id(child)] = pack(child)
                        bar.update()
                    setattr(parent, name, packed[id(child)])
    if isinstance(model, nn.Linear) and isinstance(model, QuantModule):
        return pack(model)
    make_alike(model)
    _take_out_modelopt(model)
    lighten_gelu(model)
    if ModeloptStateManager.is_converted(model):
        ModeloptStateManager.remove_state(model)
    if outside:
        logger.warning(
            "segquant: %s stay plain Linears: their weights are read without calling them", ", ".join(sorted(outside))
        )
    if hasattr(model, "save_pretrained"):
        # Without it Hugging Face's save_pretrained would write codes that nothing marks as such. It is the other half
        # of this distribution, and does no more than register itself.
        importlib.import_module("optimum_segquant")
    return model


def _take_out_modelopt(model: nn.Module) -> None:
    """Give every other module its own class back, without quantizers (all are disabled)."""
    for module in list(model.modules()):
        while isinstance(module, DynamicModule):
            module.export()
        for name, child in list(module.named_children()):
            if isinstance(child, TensorQuantizer | SequentialQuantizer):
                delattr(module, name)


def _linears(model: nn.Module) -> dict[str, QuantModule]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantModule) and isinstance(module, nn.Linear)
    }


def _is_rounded(module: Any) -> bool:
    """Whether the weight has codes. The others go back to being plain Linears."""
    return isinstance(module.weight_quantizer, SequentialQuantizer) or module.weight_quantizer.is_enabled


def _others(model: nn.Module, linears: set[str]) -> list[str]:
    """Quantizers that are not a Linear's."""
    problems = []
    for name, module in model.named_modules():
        if not isinstance(module, TensorQuantizer) or not module.is_enabled:
            continue
        if not any(name.startswith(f"{linear}." if linear else "") for linear in linears):
            problems.append(
                f"{name}: only Linears have a packed form; disable it (mtq.disable_quantizer), or keep the model as it "
                "is, with simulated quantization"
            )
    return problems


def _problem(module: Any) -> str | None:
    """Why a quantized Linear can't be packed; None if it can (or has nothing to pack)."""
    inputs, weights = module.input_quantizer, module.weight_quantizer
    if getattr(weights, "_folded", False):
        return "its weight was folded; compress the model as it was before fold_weight"
    if not _is_rounded(module):
        return (
            "its inputs are rounded but its weight is not; disable its input_quantizer" if inputs.is_enabled else None
        )
    if isinstance(module, SVDQuantLinear):
        return "it carries ModelOpt's SVDQuant branch, which has no packed form; use a preset with low_rank"
    if getattr(module, "_hf_hook", None) is not None:
        return "it is offloaded by accelerate; remove the hooks (accelerate.hooks.remove_hook_from_submodules) first"
    if module.output_quantizer.is_enabled:
        return "it has an output_quantizer; disable it, the next layer's input_quantizer rounds the same tensor"
    if getattr(module, "weight", None) is None or module._parameters["weight"].device.type == "meta":
        return "its weight is on the meta device; load the weights first"
    try:
        weight_format, input_format = QuantFormat.of(weights, "weight_quantizer"), _input_format(inputs)
        _code_type(weight_format)
        _code_type(input_format)
    except ValueError as error:
        return str(error)
    if input_format is not None and input_format.dynamic and not input_format.per_row:
        return "its inputs have one scale a call, found at run time; use scales per token, or static ones"
    blocks = [weights, inputs] if not isinstance(module, SegLinear) else _blocks(module)
    if any(block.is_enabled and not block._dynamic and not hasattr(block, "_amax") for block in blocks):
        return "it is not calibrated; call mtq.quantize with a forward_loop"
    return None


def _blocks(module: SegLinear) -> list[TensorQuantizer]:
    return [
        bank.block(name) for bank in (module.input_quantizer, module.weight_quantizer) for name in bank.block_names()
    ]


def _input_format(quantizer: TensorQuantizer) -> QuantFormat | None:
    return QuantFormat.of(quantizer, "input_quantizer")


def _code_type(fmt: QuantFormat | None) -> CodeType | None:
    """Name of the codes.

    Raises:
        ValueError: there is no packed form.
    """
    if fmt is None:
        return None
    if fmt.is_nvfp4:
        raise ValueError(
            "NVFP4 has no packed form here; export with ModelOpt (a preset without segments), or use SEGQUANT_W4A4_CFG"
        )
    if fmt.unsigned:
        raise ValueError("unsigned codes for a whole tensor have no packed form; set unsigned=False")
    for name, known in FORMATS.items():
        if known.num_bits == fmt.num_bits:
            return name
    raise ValueError(f"codes of {fmt.num_bits} bits have no packed form; use 8 or 4 bits, or FP8 E4M3")


def packed_spec(module: nn.Module) -> PackedSpec:
    """The formats of the packed form of one quantized Linear; no weight is read.

    Args:
        module: a SegLinear or a ModelOpt QuantLinear, calibrated.

    Raises:
        ValueError: it has no packed form.
    """
    problem = _problem(module)
    if problem:
        raise ValueError(f"this Linear can't be packed: {problem}")
    quantized = cast(Any, module)
    segmented = module if isinstance(module, SegLinear) else None
    weight_format = QuantFormat.of(quantized.weight_quantizer, "weight_quantizer")
    input_format = _input_format(quantized.input_quantizer)
    assert weight_format is not None
    weights = _code_type(weight_format)
    assert weights is not None
    up = segmented.weight_quantizer.up if segmented else None
    layout = segmented.layout if segmented else _whole(quantized)
    return PackedSpec(
        layout=SegLayout(layout.in_segments, layout.out_groups, layout.out_groups, layout.polarity, layout.rotation),
        weights=weights,
        group=weight_format.group,
        activations=_code_type(input_format),
        per_token=input_format is not None and input_format.dynamic,
        smoothing=_inverse_smoothing(quantized) is not None,
        shift=segmented is not None and segmented.input_quantizer.shift is not None,
        rank=0 if up is None else up.shape[1],
    )


@torch.no_grad()
def pack(module: nn.Module) -> PackedLinear:
    """The packed form of one quantized Linear; the module itself stays as it is.

    Args:
        module: a SegLinear or a ModelOpt QuantLinear, calibrated.

    Raises:
        ValueError: it has no packed form.
    """
    spec = packed_spec(module)
    quantized = cast(Any, module)
    weight = quantized._parameters["weight"]
    segmented = module if isinstance(module, SegLinear) else None
    weight_format = QuantFormat.of(quantized.weight_quantizer, "weight_quantizer")
    assert weight_format is not None
    inverse, shift = _inverse_smoothing(quantized), segmented.input_quantizer.shift if segmented else None
    down, up = (segmented.weight_quantizer.down, segmented.weight_quantizer.up) if segmented else (None, None)
    bias = segmented._effective_bias(weight) if segmented else quantized.bias
    layout = segmented.layout if segmented else _whole(quantized)
    packed = PackedLinear(spec, bias is not None, weight.dtype, weight.device)
    packed.train(module.training)
    packed.set_codes(_encode(quantized, weight, packed.weight_scale, layout, weight_format))
    if packed.bias is not None and bias is not None:
        packed.bias.copy_(bias)
    if packed.input_scale is not None:
        _static_scales(quantized, packed)
    tensors = {"inverse_smoothing": inverse, "shift": shift, "low_rank_down": down, "low_rank_up": up}
    for name, value in tensors.items():
        if value is not None:
            getattr(packed, name).copy_(value)
    return packed


def _whole(module: Any) -> SegLayout:
    """The layout of a Linear that is not cut."""
    inputs, outputs = (module.in_features,), (module.out_features,)
    return SegLayout(inputs, outputs, outputs, ("none",))


def _inverse_smoothing(module: Any) -> Tensor | None:
    """What activations are multiplied by, (G, K) float32."""
    if isinstance(module, SegLinear):
        smoothing = module.input_quantizer.smoothing
        return None if smoothing is None else smoothing.reciprocal()
    scale = module.input_quantizer.pre_quant_scale
    return None if scale is None else scale.float().reshape(1, -1)


def _encode(module: Any, weight: Tensor, scales: Tensor, layout: SegLayout, fmt: QuantFormat) -> Tensor:
    """The weight's codes, (N, K) float32; fills ``scales`` (N, S)."""
    if not isinstance(module, SegLinear):
        # ModelOpt's smoothing is in the weight already.
        return _encode_block(weight.float(), module.weight_quantizer, fmt, scales)
    bank: WeightBank = module.weight_quantizer
    residual = bank(weight, "residual").float()
    codes = torch.empty_like(residual)
    for index, rows in enumerate(slices(layout.weight_segments)):
        part = residual[rows]
        if bank.smoothing is not None:
            part = part * bank.smoothing[layout.group_of(index)]
        for segment, columns in enumerate(layout.in_slices):
            own = (
                slice(segment, segment + 1)
                if fmt.group is None
                else slice(columns.start // fmt.group, columns.stop // fmt.group)
            )
            block = scales[rows, own]
            values = rotate(part[:, columns], layout.rotation[segment])
            codes[rows, columns] = _encode_block(values, bank.block(weight_block(index, segment)), fmt, block)
    return codes


def _encode_block(values: Tensor, quantizer: TensorQuantizer, fmt: QuantFormat, scales: Tensor) -> Tensor:
    """Codes (n, k) of a block; ``scales``, a view (n, 1) or (n, groups), is filled."""
    step = step_size(quantizer.amax, fmt)
    scales.copy_(step.reshape(scales.shape) if step.numel() > 1 else step.reshape(1, 1).expand_as(scales))
    return to_codes(values, scales if fmt.group is None else scales.repeat_interleave(fmt.group, dim=1), fmt)


def _static_scales(module: Any, packed: PackedLinear) -> None:
    """Fill the scales of the activations."""
    activations = packed.spec.activations
    assert activations is not None
    assert packed.input_scale is not None
    fmt, layout = FORMATS[activations], packed.spec.layout
    if not isinstance(module, SegLinear):
        packed.input_scale.copy_(step_size(module.input_quantizer.amax, fmt).reshape(1, 1))
        return
    bank: InputBank = module.input_quantizer
    for group in range(len(layout.out_groups)):
        for segment, polarity in enumerate(layout.polarity):
            own = fmt.as_unsigned() if polarity == "dual8" else fmt
            positive = bank.block(input_block(group, segment))
            packed.input_scale[group, segment] = step_size(positive.amax, own)
            if packed.input_scale_negative is not None:
                # A segment that is not split has one scale; the second place repeats it.
                split = polarity in SPLIT_BY_SIGN
                other = bank.block(input_block(group, segment, negative=True)) if split else positive
                packed.input_scale_negative[group, segment] = step_size(other.amax, own)
