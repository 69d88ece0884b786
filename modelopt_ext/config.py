"""The configuration of the ``segquant`` algorithm, as it stands under ``"algorithm"`` in a ModelOpt config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from modelopt.torch.opt.config import ModeloptBaseConfig, ModeloptField
from modelopt.torch.quantization.config import QuantizeAlgorithmConfig
from pydantic import Field, field_validator, model_validator

from .plan import SegmentPlan

LAYER_FIELDS = frozenset(
    "polarity shift_granularity second_product alpha alpha_grid activation_ranges clip_grid weight_clip_grid rotate "
    "low_rank gptq correct_activations bias_correction".split()
)
"""What ``layers`` can set for some Linears."""


class LowRankConfig(ModeloptBaseConfig):
    """The 16-bit branch beside the quantized weight (SVDQuant, arXiv 2411.05007), one for each block."""

    rank: int | Literal["auto"] = ModeloptField(
        default=32,
        title="Rank of every block's branch.",
        description="'auto' starts at 8 and doubles it while the output error falls by a tenth, up to `max_rank`.",
    )
    max_rank: int = ModeloptField(default=64, ge=1, title="Largest rank that rank='auto' tries.")
    max_share: float = ModeloptField(
        default=1.0, gt=0.0, le=1.0, title="Bound on the rank as a share of the block's smaller side."
    )
    over: Literal["cap", "refuse"] = ModeloptField(
        default="cap",
        title="A rank above a block's size.",
        description="'cap' takes the largest possible one, 'refuse' raises a ValueError that names the layer.",
    )
    refits: int = ModeloptField(
        default=1,
        ge=0,
        title="Times the branch is fitted to the error that the codes left.",
        description="Weighted by the activations (QERA, arXiv 2410.06040); the codes are then chosen again.",
    )

    @field_validator("rank")
    @classmethod
    def _positive_rank(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"rank is at least 1 or 'auto', got {value}; low_rank=None leaves the branch out")
        return value


class GPTQConfig(ModeloptBaseConfig):
    """GPTQ (arXiv 2210.17323) on the activations as quantized."""

    damping: float = ModeloptField(
        default=0.01, ge=0.0, le=1.0, title="Share of the mean diagonal added to the Hessian's diagonal."
    )
    block_size: int = ModeloptField(default=128, ge=1, title="Columns between two updates of all later columns.")
    activation_order: bool = ModeloptField(
        default=True, title="Round the columns with the largest Hessian diagonal first."
    )
    hessian: Literal["rows", "accumulated"] = ModeloptField(
        default="rows",
        title="Where the Hessian comes from.",
        description=(
            "'rows': the sampled rows (`samples`). 'accumulated': all rows of the calibration data, added up on the "
            "CPU, 4 K^2 bytes for a Linear with K inputs; for wide Linears, whose Hessian a sample knows badly."
        ),
    )
    hessian_memory: float = ModeloptField(
        default=16.0,
        gt=0.0,
        title="GiB of CPU memory that all accumulated Hessians may take together.",
        description=(
            "Given away in the order of the layers' first calls; a warning names the layers that it is too little for, "
            "and their Hessians come from the sampled rows. With `sequential` it is the bound for one block at a time. "
            "Each of several processes may take as much."
        ),
    )


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
    share_inputs: bool = ModeloptField(
        default=False,
        title="One treatment for Linears that read one tensor.",
        description=(
            "q, k and v of an attention get the same smoothing, shift and input scales, as engines need that fuse them "
            "into one product. They are solved as that one Linear, with one output segment."
        ),
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
    activation_ranges: tuple[str, ...] = ModeloptField(
        default=("max",),
        title="Kinds of activation ranges to try.",
        description=(
            "Ranges set smoothing, shift and static scales: 'max'; 'mean' of the maxima of each call, that is of each "
            "timestep; 'p99.9' and the like, percentiles over the sampled rows. Of several the one with the lowest "
            "output error on held-out data is taken."
        ),
    )
    clip_grid: tuple[float, ...] = ModeloptField(
        default=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
        title="Clipping ratios of static activation scales to try.",
        description=(
            "Shares of the calibrated range, each in (0, 1]; rare large values are clipped where that lowers the "
            "output error. (1.0,) takes the maximum as it is."
        ),
    )
    embedders: Literal["as_configured", "per_token", "eight_bit", "none"] = ModeloptField(
        default="as_configured",
        title="Formats of the embedders.",
        description=(
            "Embedders are the Linears outside the model's repeated blocks (its ModuleLists) that run before the first "
            "block: time, text, patch and guidance embedders. 'as_configured': like every layer. 'per_token': dynamic "
            "scales, one a token. 'eight_bit': 8-bit weights and activations, per channel and per token, INT8 or, "
            "where the layer has floating-point codes, FP8. 'none': they stay in full precision."
        ),
    )
    last_layers: Literal["as_configured", "per_token", "eight_bit", "none"] = ModeloptField(
        default="as_configured",
        title="Formats of the Linears outside the repeated blocks that run after the last block.",
        description="The last modulation and projection; the choices are those of `embedders`.",
    )
    second_product_budget: float = ModeloptField(
        default=0.03,
        ge=0.0,
        le=1.0,
        title="Extra multiply-adds that polarity='auto' may spend on splitting by sign.",
        description=(
            "A share of the multiply-adds of all quantized Linears over the calibration data. It goes to the smallest "
            "Linears first: AdaLN, embedders and the last projection, where splitting helps most and costs least. "
            "Linears at one place of repeated blocks get it together, or none does."
        ),
    )
    rotate: bool | Literal["search"] = ModeloptField(
        default=False,
        title="Hadamard rotation of every block.",
        description=(
            "Mixes runs of channels before rounding, so that outliers spread; for 4-bit activations. Needs dynamic "
            "activation scales. 'search' rotates where that lowers the output error. A quantizer's own `rotate` "
            "attribute, ModelOpt's, asks for the same."
        ),
    )
    low_rank: LowRankConfig | None = ModeloptField(
        default=None, title="Settings of the low-rank branch; None for no branch."
    )
    gptq: GPTQConfig | bool | None = ModeloptField(
        default=None,
        title="Settings of GPTQ; True takes its defaults, None rounds weights to nearest.",
        description="Replaces the stored weights by ones that round to the chosen codes.",
    )
    correct_activations: bool = ModeloptField(
        default=False,
        title="Let the weights make up for the rounding of the activations.",
        description="Ridge regression of the exact output on the rounded input. Replaces the stored weights, as GPTQ.",
    )
    weight_clip_grid: tuple[float, ...] = ModeloptField(
        default=(1.0,),
        title="Clipping ratios of weight scales to try.",
        description="Shares of each weight scale's range, each in (0, 1], tried by squared error at the output.",
    )
    bias_correction: bool = ModeloptField(
        default=False, title="Add minus the mean output error of every Linear to its bias."
    )
    second_product: bool | Literal["polar"] | None = ModeloptField(
        default=None,
        title="Whether polarity='auto' may split by sign.",
        description=(
            "None lets `second_product_budget` decide. 'polar' allows it on every segment after SiLU, GELU and gated "
            "products, as DualScale does, and within the budget elsewhere; for few bits."
        ),
    )
    exclude: list[str] = Field(
        default_factory=list,
        title="Linears to leave in full precision, by module name or pattern.",
        description="E.g. ['proj_out', '*.ff.net.2'].",
    )
    layers: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        title="Other settings for some Linears, by module name or pattern; later entries win.",
        description="E.g. {'*.ff.net.2': {'polarity': 'dual8', 'gptq': True}}; see LAYER_FIELDS for what can be set.",
    )
    samples: int | None = ModeloptField(
        default=None,
        ge=1,
        title="Input rows kept of each Linear.",
        description=(
            "A uniform sample of all calibration rows, on the CPU in 16 bits, on which blocks are chosen. None takes "
            "512, or 4096 where weights are fitted to them (gptq, low_rank, correct_activations, bias_correction)."
        ),
    )
    seed: int = ModeloptField(default=0, ge=0, title="Seed of the row samples.")
    sequential: bool = ModeloptField(
        default=False,
        title="Solve block after block, each on what the quantized blocks before it give.",
        description=(
            "Blocks are the items of the model's outermost ModuleLists; the Linears of a block are solved together. "
            "Costs about half a pass over the calibration data more for every block. The same as ModelOpt's "
            "layerwise={'enable': True, 'get_qdq_activations_from_prev_layer': True}. With layerwise={'enable': True} "
            "alone every block is solved on full-precision inputs, as without. layerwise's 'checkpoint_dir' keeps the "
            "solutions of finished blocks: a run that was killed goes on from there when started again."
        ),
    )
    device: str | None = ModeloptField(
        default=None,
        title="Device to solve layers on, e.g. 'cuda'.",
        description=(
            "None takes the one where each layer runs. For models on the CPU: each weight and its row sample go to "
            "this device, one layer at a time, and what is found comes back. Where the model runs is up to the model "
            "and accelerate (`device_map`, `enable_sequential_cpu_offload`, `cpu_offload`)."
        ),
    )
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
    distributed_sync: bool = ModeloptField(
        default=True,
        title="Calibrate together with the other processes of the default process group, where one is initialized.",
        description=(
            "Each process runs its share of the calibration data (`modelopt_ext.distributed.share`) through its own "
            "copy of the model; what they saw is merged, the layers are dealt out, and all end with the same model. "
            "False calibrates in this process alone."
        ),
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

    @field_validator("activation_ranges")
    @classmethod
    def _known_ranges(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for kind in value:
            percentile = re.fullmatch(r"p(\d+(?:\.\d+)?)", kind)
            if kind not in ("max", "mean") and not (percentile and 50 < float(percentile[1]) <= 100):
                raise ValueError(f"activation_ranges holds 'max', 'mean' or percentiles like 'p99.9', not {kind!r}")
        if not value:
            raise ValueError("activation_ranges needs at least one kind, e.g. ('max',)")
        return value

    @field_validator("clip_grid", "weight_clip_grid")
    @classmethod
    def _clips_in_range(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(not 0 < clip <= 1 for clip in value):
            raise ValueError(f"a clip grid needs at least one number, each in (0, 1], got {value}")
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
    def _layerwise_as_we_do_it(self) -> SegQuantCalibConfig:
        if self.layerwise.enable and self.layerwise.save_every != 1:
            raise ValueError("segquant saves every stage, whose file is small: leave layerwise.save_every=1")
        return self

    @model_validator(mode="after")
    def _valid_layers(self) -> SegQuantCalibConfig:
        for pattern, changes in self.layers.items():
            unknown = set(changes) - LAYER_FIELDS
            if unknown:
                raise ValueError(
                    f"layers[{pattern!r}] sets {sorted(unknown)}, but only {sorted(LAYER_FIELDS)} can differ by layer"
                )
            self._changed(changes)
        return self

    def _changed(self, changes: Mapping[str, Any]) -> SegQuantCalibConfig:
        return SegQuantCalibConfig.model_validate({**self.model_dump(), "layers": {}, **changes})

    def for_layer(self, name: str) -> SegQuantCalibConfig:
        """The settings of one Linear: this config with every matching entry of ``layers`` applied in order."""
        changes: dict[str, Any] = {}
        for pattern, fields in self.layers.items():
            if fnmatchcase(name, pattern):
                changes |= fields
        return self._changed(changes) if changes else self

    @property
    def by_blocks(self) -> bool:
        """Whether blocks are solved one after the other."""
        return self.sequential or self.layerwise.enable

    @property
    def is_sequential(self) -> bool:
        """Whether blocks read what the quantized blocks before them give."""
        return self.sequential or (self.layerwise.enable and self.layerwise.get_qdq_activations_from_prev_layer)

    @property
    def fits_weights(self) -> bool:
        """Whether weights are fitted to the sampled rows, for any Linear."""
        return any(
            config.gptq
            or config.low_rank is not None
            or config.correct_activations
            or config.bias_correction
            or config.weight_clip_grid != (1.0,)
            for config in (self, *(self._changed(fields) for fields in self.layers.values()))
        )

    @property
    def gptq_config(self) -> GPTQConfig | None:
        """Settings of GPTQ; None without it."""
        return GPTQConfig() if self.gptq is True else self.gptq or None

    @property
    def accumulated_memory(self) -> float | None:
        """GiB that accumulated Hessians may take; None where Hessians come from the sampled rows."""
        gptq = self.gptq_config
        return None if gptq is None or gptq.hessian == "rows" else gptq.hessian_memory

    @property
    def needs_statistics(self) -> bool:
        """Whether these settings need calibration data even if all activations are dynamic."""
        return self.alpha is not None or self.polarity == "shift" or self.fits_weights

    @property
    def rows_to_keep(self) -> int:
        """``samples``, or its default."""
        return self.samples or (4096 if self.fits_weights else 512)
