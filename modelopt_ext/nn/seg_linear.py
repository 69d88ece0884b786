"""SegLinear: a quantized Linear whose blocks have their own scales.

For output groups o and input segments t (arXiv 2507.14811, SegLinear and DualScale; the shift and the wide polarity
are ours), with R = W - L and a low-rank L in 16 bits:

    y[o] = sum_t  Q((x[t] - c[t]) / s[o,t] H[t]) . Q(R[o,t] * s[o,t] H[t])^T  +  x L[o]^T  +  R[o] c  +  b[o]

where Q of a segment split by sign is Q(x+) + Q(x-), each sign with its own scale and the weight shared. The weight that
the module holds is in the model's own domain: smoothing, rotation and rounding happen on the way, so a checkpoint's
``weight`` keeps its meaning and LoRA adapters can be fused into it. It is the model's own weight unless GPTQ ran, which
chooses a weight that rounds to better codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from modelopt.torch.opt.dynamic import _DMRegistryCls
from modelopt.torch.quantization.nn import QuantModule
from torch import Tensor, nn

from .banks import InputBank, WeightBank
from .layout import SegLayout
from .seg_module import SegModule


class SegLinear(SegModule):
    """Mixed into a Linear's quantized class: the result is still an ``nn.Linear`` with one ``weight`` and one ``bias``.

    Made by :func:`to_seg_linear`, never constructed. ``input_quantizer`` is an :class:`InputBank`,
    ``weight_quantizer`` a :class:`WeightBank`.
    """

    input_quantizer: InputBank
    weight_quantizer: WeightBank

    def forward(self, input: Tensor) -> Tensor:
        """Evaluate the equation above with fake quantization.

        Args:
            input: (..., K), any float dtype.

        Returns:
            (..., N), in the dtype that ``F.linear`` gives (the autocast dtype under autocast).
        """
        weight = self.plain_weight
        if self._is_transparent():
            return self.output_quantizer(F.linear(input, weight, self.bias))
        bias = self._effective_bias(weight)
        rounded = self.weight_quantizer(weight)
        outputs = [
            F.linear(self.input_quantizer(input, group), rounded[rows], None if bias is None else bias[rows])
            for group, rows in enumerate(self.layout.out_slices)
        ]
        if self.weight_quantizer.down is not None:
            # Under autocast outputs may have another dtype than the input.
            outputs = [
                output + self.weight_quantizer(input, "branch", group).to(output.dtype)
                for group, output in enumerate(outputs)
            ]
        return self.output_quantizer(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1))

    def _effective_bias(self, weight: Tensor) -> Tensor | None:
        """b + R c, (N,). With R in full precision: what the shift takes out of the codes comes back without error."""
        if not self.input_quantizer.has_bias:
            return self.bias
        offset = self.input_quantizer(self.weight_quantizer(weight, "residual"), group=None)
        return (offset if self.bias is None else self.bias + offset).to(weight.dtype)

    def _before_folding(self) -> None:
        if self.input_quantizer.has_bias:
            residual = self.weight_quantizer(self.plain_weight, "residual")
            self.input_quantizer.set_buffer("_offset", self.input_quantizer(residual, group=None))


# Quantized Linear class -> its segmented class, filled as classes are met (nn.Linear subclasses each have their own).
SegLinearRegistry = _DMRegistryCls("Seg", QuantModule)


def to_seg_linear(module: nn.Module, layout: SegLayout, version: str | None = None) -> SegLinear:
    """Lay a quantized Linear out as ``layout``, in place; its quantizers become banks with blocks not calibrated.

    Args:
        module: a ModelOpt QuantLinear, or a SegLinear whose layout changes.
        layout: must have the module's numbers of features.
        version: unused; ModelOpt's registries pass the version of a checkpoint here.

    Raises:
        ValueError: the layout is for another size.
    """
    if (layout.in_features, layout.out_features) != (module.in_features, module.out_features):
        raise ValueError(
            f"the layout is for {layout.in_features} -> {layout.out_features} features, "
            f"the Linear has {module.in_features} -> {module.out_features}"
        )
    if not isinstance(module, SegLinear):
        if type(module) not in SegLinearRegistry:
            SegLinearRegistry.register({type(module): type(module).__name__})(SegLinear)
        SegLinearRegistry.convert(module)  # in place
    assert isinstance(module, SegLinear)
    InputBank.adopt(module.input_quantizer, layout)
    WeightBank.adopt(module.weight_quantizer, layout)
    return module
