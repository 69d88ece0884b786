"""The configuration of the ``segquant`` algorithm, as it stands under ``"algorithm"`` in a ModelOpt config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from modelopt.torch.opt.config import ModeloptField
from modelopt.torch.quantization.config import QuantizeAlgorithmConfig
from pydantic import Field, field_validator, model_validator

from .plan import SegmentPlan


class SegQuantCalibConfig(QuantizeAlgorithmConfig):
    """SegQuant (arXiv 2507.14811): segments found from the dataflow, polarity-aware scales, smoothing per block.

    Bits, axes and static or dynamic scales are ModelOpt's business: they come from ``quant_cfg``, and every block of a
    Linear gets the format of its layer.
    """

    method: Literal["segquant"] = ModeloptField("segquant", title="Name of the algorithm.")

    segments: bool = ModeloptField(
        default=True,
        title="Cut Linears into segments.",
        description="Give each semantic segment of a Linear's input and output its own scales, smoothing included.",
    )
    merge_heads: bool = ModeloptField(
        default=False,
        title="Cut at attention heads.",
        description="Also treat the heads that are merged before a Linear as input segments; many small blocks.",
    )
    polarity: Literal["none", "shift", "dual", "dual8", "auto"] = ModeloptField(
        default="auto",
        title="Treatment of lopsided activations.",
        description=(
            "'dual': the paper's DualScale on segments after SiLU, GELU and gated products. 'dual8': the same with all "
            "codes on one side for each sign (integers only). 'shift': subtract the middle of the range before "
            "rounding where that lowers the output error; free, on any segment. 'auto': 'shift' anywhere and 'dual8' "
            "within `second_product_budget`, whichever has the lowest output error. "
            "'none': one symmetric scale."
        ),
    )
    shift_granularity: Literal["tensor", "channel"] = ModeloptField(
        default="channel",
        title="Granularity of the shift.",
        description="One shift for a whole segment, or one for each of its channels.",
    )
    alpha: float | Literal["search"] | None = ModeloptField(
        default="search",
        title="SmoothQuant's migration strength.",
        description=(
            "A number in [0, 1]; 'search' tries `alpha_grid` and no smoothing for each block and takes what gives the "
            "lowest output error; None does no smoothing."
        ),
    )
    alpha_grid: tuple[float, ...] = ModeloptField(
        default=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        title="Migration strengths that alpha='search' tries.",
        description="At least one number, each in [0, 1].",
    )
    clip_grid: tuple[float, ...] = ModeloptField(
        default=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
        title="Clipping ratios of static activation scales to try.",
        description=(
            "Shares of the calibrated range, each in (0, 1]; rare large values are clipped where that lowers the "
            "output error. (1.0,) takes the maximum as it is."
        ),
    )
    embedders: Literal["as_configured", "per_token", "none"] = ModeloptField(
        default="as_configured",
        title="Activations of the embedders.",
        description=(
            "Embedders are the Linears outside the model's repeated blocks (its ModuleLists) that run before the first "
            "block: time, text, patch and guidance embedders. 'as_configured': like every layer. 'per_token': dynamic "
            "scales, one a token. 'none': their weights and activations stay in full precision."
        ),
    )
    second_product_budget: float = ModeloptField(
        default=0.03,
        ge=0.0,
        le=1.0,
        title="Extra multiply-adds that polarity='auto' may spend on splitting by sign.",
        description=(
            "A share of the multiply-adds of all quantized Linears over the calibration data. It goes to the smallest "
            "Linears first: AdaLN, embedders and the last projection, where splitting helps most and costs least."
        ),
    )
    samples: int = ModeloptField(
        default=512,
        ge=1,
        title="Input rows kept of each Linear.",
        description="A uniform sample of all calibration rows, on the CPU in 16 bits, on which blocks are chosen.",
    )
    seed: int = ModeloptField(default=0, ge=0, title="Seed of the row samples.")
    plan: dict[str, Any] | None = ModeloptField(
        default=None,
        title="Segment plan to use instead of recording one.",
        description="What `SegmentPlan.to_dict()` gives; a SegmentPlan itself is taken too.",
    )
    overrides: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict,
        title="Changes to the plan, by module name or pattern.",
        description="E.g. {'*.norm1.linear': {'out_segments': [64, 64]}}; None leaves the matched Linears uncut.",
    )
    progress: bool = ModeloptField(default=True, title="Show a progress bar that counts layers.")

    @field_validator("alpha")
    @classmethod
    def _alpha_in_range(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and not 0 <= value <= 1:
            raise ValueError(f"alpha is a number in [0, 1], 'search' or None, got {value}")
        return value

    @field_validator("alpha_grid")
    @classmethod
    def _grid_in_range(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(not 0 <= alpha <= 1 for alpha in value):
            raise ValueError(f"alpha_grid needs at least one number, each in [0, 1], got {value}")
        return value

    @field_validator("clip_grid")
    @classmethod
    def _clips_in_range(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(not 0 < clip <= 1 for clip in value):
            raise ValueError(f"clip_grid needs at least one number, each in (0, 1], got {value}")
        return value

    @field_validator("plan", mode="before")
    @classmethod
    def _plain_plan(cls, value: Any) -> Any:
        if isinstance(value, SegmentPlan):
            return value.to_dict()
        if isinstance(value, Mapping):
            SegmentPlan.from_dict(value)  # validates
        return value

    @model_validator(mode="after")
    def _no_layerwise(self) -> SegQuantCalibConfig:
        if self.layerwise.enable:
            raise ValueError(
                "segquant makes one pass over the whole model: leave layerwise.enable=False; "
                "memory is bounded by `samples`, and accelerate's offloading works during calibration"
            )
        return self

    @property
    def needs_statistics(self) -> bool:
        """Whether these settings need calibration data even if all activations are dynamic."""
        return self.alpha is not None or self.polarity == "shift"
