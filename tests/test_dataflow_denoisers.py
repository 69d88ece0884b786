"""Plans of diffusers' denoisers and ControlNets: expected cuts by family, a sweep over all, and numeric oracles.

The expectations are read off the models' code (chunk, split, unbind, cat and activations in their forwards), not off
the recorder. The oracles look at numbers: they change or compare values and know nothing of strides.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import denoisers
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from modelopt_ext.dataflow import record
from modelopt_ext.plan import LinearPlan, SegmentPlan

# -- expected cuts -----------------------------------------------------------------------------------------------------
# Patterns of names to "in -> out", as LinearPlan prints itself; every Linear that no pattern names must be plain.

TIMESTEP = {  # get_timestep_embedding: cat of sin and cos; TimestepEmbedding: Linear, SiLU, Linear
    "*timestep_embedder.linear_1": "2 x 128 -> 32",
    "*timestep_embedder.linear_2": "32:silu -> 32",
}
TEXT = {"*text_embedder.linear_2": "32:silu -> 32"}  # PixArtAlphaTextProjection with SiLU
GUIDANCE = {"*guidance_embedder.linear_1": "2 x 128 -> 32", "*guidance_embedder.linear_2": "32:silu -> 32"}
NORM_OUT = {"norm_out.linear": "32:silu -> 2 x 32"}  # AdaLayerNormContinuous
FF = {"*.ff.net.2": "128:gelu -> 32"}
GELU_FF = {**FF, "*.ff_context.net.2": "128:gelu -> 32"}
MMDIT = {"transformer_blocks.*.norm1.linear": "32:silu -> 6 x 32"}  # AdaLayerNormZero
MMDIT_CONTEXT = {"transformer_blocks.*.norm1_context.linear": "32:silu -> 6 x 32"}
FLUX_SINGLE = {  # AdaLayerNormZeroSingle; proj_out reads cat([attention, gelu(proj_mlp)])
    "single_transformer_blocks.*.norm.linear": "32:silu -> 3 x 32",
    "single_transformer_blocks.*.proj_out": "32 + 128:gelu -> 32",
}
WAN = {
    "condition_embedder.time_embedder.linear_1": "2 x 8 -> 48",
    "condition_embedder.time_embedder.linear_2": "48:silu -> 48",
    "condition_embedder.time_proj": "48:silu -> 6 x 48",  # unflatten(1, (6, -1)), then (table + it).chunk(6, dim=1)
    "condition_embedder.text_embedder.linear_2": "48:gelu -> 48",
    "blocks.*.ffn.net.2": "64:gelu -> 48",
}
ADALN_SINGLE = {  # PixArt: one Linear for all blocks, (scale_shift_table + reshape(B, 6, -1)).chunk(6, dim=1)
    "*.timestep_embedder.linear_1": "2 x 128 -> 32",
    "*.timestep_embedder.linear_2": "32:silu -> 32",
    "caption_projection.linear_2": "32:gelu -> 32",
}
UNET = {  # tiny UNets of 16 and 32 channels, a time embedding of 64
    "time_embedding.linear_1": "2 x 8 -> 64",
    "time_embedding.linear_2": "64:silu -> 64",
    "down_blocks.0.*.time_emb_proj": "64:silu -> 16",
    "down_blocks.1.*.time_emb_proj": "64:silu -> 32",
    "mid_block.*.time_emb_proj": "64:silu -> 32",
    "mid_block.*.ff.net.0.proj": "32 -> 2 x 128",  # GEGLU
    "mid_block.*.ff.net.2": "128:gated -> 32",
    "*.ff.net.0.proj": "16 -> 2 x 64",
    "*.ff.net.2": "64:gated -> 16",
}
UNET_UP = {"up_blocks.0.*.time_emb_proj": "64:silu -> 32", "up_blocks.1.*.time_emb_proj": "64:silu -> 16"}
SDXL = {
    "add_embedding.linear_1": "20 + 48 -> 64",
    "add_embedding.linear_2": "64:silu -> 64",
}  # cat of text, 6 * time_ids

EXPECTED: dict[str, dict[str, str]] = {
    "SD3Transformer2DModel": {
        **TIMESTEP, **TEXT, **MMDIT, **GELU_FF, **NORM_OUT,
        "transformer_blocks.2.norm1_context.linear": "32:silu -> 2 x 32",  # the last block drops the text
        **MMDIT_CONTEXT,
    },
    "SD3Transformer2DModel-3.5": {
        **TIMESTEP, **TEXT, **GELU_FF, **NORM_OUT,
        "transformer_blocks.[01].norm1.linear": "32:silu -> 9 x 32",  # SD35AdaLayerNormZeroX in dual-attention blocks
        "transformer_blocks.2.norm1.linear": "32:silu -> 6 x 32",
        "transformer_blocks.2.norm1_context.linear": "32:silu -> 2 x 32",
        **MMDIT_CONTEXT,
    },
    "SD3ControlNetModel": {**TIMESTEP, **TEXT, **MMDIT, **MMDIT_CONTEXT, **GELU_FF},
    "FluxTransformer2DModel": {
        **TIMESTEP, **TEXT, **GUIDANCE, **MMDIT, **MMDIT_CONTEXT, **GELU_FF, **FLUX_SINGLE, **NORM_OUT
    },
    "FluxControlNetModel": {**TIMESTEP, **TEXT, **MMDIT, **MMDIT_CONTEXT, **GELU_FF, **FLUX_SINGLE},
    "Flux2Transformer2DModel": {
        "*_embedder.linear_1": "2 x 8 -> 32",
        "*_embedder.linear_2": "32:silu -> 32",
        "double_stream_modulation_*.linear": "32:silu -> 6 x 32",
        "single_stream_modulation.linear": "32:silu -> 3 x 32",
        "*.linear_in": "32 -> 2 x 96",  # SwiGLU
        "*.linear_out": "96:gated -> 32",
        "*.attn.to_qkv_mlp_proj": "32 -> 3 x 32 + 2 x 96",  # [D, D, D, 3D, 3D]: split, then qkv.chunk(3), SwiGLU
        "*.attn.to_out": "32 + 96:gated -> 32",
        **NORM_OUT,
    },
    "UNet2DConditionModel-sdxl": {**UNET, **UNET_UP, **SDXL},
    "UNet2DConditionModel-sd15": {**UNET, **UNET_UP},
    "ControlNetModel": UNET,
    "ControlNetModel-sdxl": {**UNET, **SDXL},
    "PixArtTransformer2DModel": {**ADALN_SINGLE, **FF, "adaln_single.linear": "32:silu -> 6 x 32"},
    "SanaTransformer2DModel": {**ADALN_SINGLE, "time_embed.linear": "32:silu -> 6 x 32"},
    "LTXVideoTransformer3DModel": {**ADALN_SINGLE, **FF, "time_embed.linear": "32:silu -> 6 x 32"},
    "WanTransformer3DModel": WAN,
    "WanTransformer3DModel-i2v": {**WAN, "condition_embedder.image_embedder.ff.net.2": "16:gelu -> 48"},
    "QwenImageTransformer2DModel": {
        **TIMESTEP,
        "*.img_mod.1": "32:silu -> 6 x 32",  # chunk(2), each chunk(3)
        "*.txt_mod.1": "32:silu -> 6 x 32",
        "*_mlp.net.2": "128:gelu -> 32",
        **NORM_OUT,
    },
    "HunyuanVideoTransformer3DModel": {
        **TIMESTEP, **TEXT, **GUIDANCE, **MMDIT, **MMDIT_CONTEXT, **FLUX_SINGLE, **NORM_OUT,
        "context_embedder.*.norm_out.linear": "32:silu -> 2 x 32",
        "context_embedder.*.ff.net.2": "128:silu -> 32",  # linear-silu
        **GELU_FF,
    },
    "CogVideoXTransformer3DModel": {
        "time_embedding.linear_1": "2 x 16 -> 16",
        "time_embedding.linear_2": "16:silu -> 16",
        "*.norm[12].linear": "16:silu -> 6 x 32",  # CogVideoXLayerNormZero
        "norm_out.linear": "16:silu -> 2 x 32",
        **FF,
    },
    "DiTTransformer2DModel": {**TIMESTEP, **MMDIT, **FF, "proj_out_1": "32:silu -> 2 x 32"},
    "AuraFlowTransformer2DModel": {
        "time_step_proj.linear_1": "2 x 128 -> 32",
        "time_step_proj.linear_2": "32:silu -> 32",
        "*.norm1.linear": "32:silu -> 6 x 32",
        "*.norm1_context.linear": "32:silu -> 6 x 32",
        "*.out_projection": "256:gated -> 32",  # silu(linear_1) * linear_2
        "norm_out.linear": "32:silu -> 2 x 32",
    },
}  # fmt: skip


def recorded(name: str) -> tuple[nn.Module, dict[str, Any], SegmentPlan]:
    model, inputs = denoisers.build(name)
    with torch.no_grad():
        return model, inputs, record(model, lambda: model(**inputs))


@pytest.mark.parametrize("name", EXPECTED)
def test_expected_cuts(name):
    if name not in denoisers.names():
        pytest.skip(f"the installed diffusers has no {name}")
    _, _, plan = recorded(name)
    used = set()
    for linear, found in plan.linears.items():
        pattern = next((pattern for pattern in EXPECTED[name] if fnmatchcase(linear, pattern)), None)
        used.add(pattern)
        if pattern is None:
            assert found.is_trivial, (linear, str(found))
        else:
            assert str(found) == EXPECTED[name][pattern], linear
    assert used >= set(EXPECTED[name]), "patterns that name nothing"
    assert plan.uncalled == ()


def test_skip_connections_of_a_unet():
    _, _, plan = recorded("UNet2DConditionModel-sd15")
    sizes = {"up_blocks.0.resnets.0": (32, 32), "up_blocks.0.resnets.1": (32, 16)}
    sizes |= {"up_blocks.1.resnets.0": (32, 16), "up_blocks.1.resnets.1": (16, 16)}
    assert plan.convs == {f"{name}.{conv}": cut for name, cut in sizes.items() for conv in ("conv1", "conv_shortcut")}


def test_shared_inputs_of_attention():
    _, _, plan = recorded("FluxTransformer2DModel")
    block, single = "transformer_blocks.0.attn", "single_transformer_blocks.1"
    assert tuple(f"{block}.{name}" for name in ("to_k", "to_q", "to_v")) in plan.shared_inputs
    assert tuple(f"{block}.add_{name}_proj" for name in "kqv") in plan.shared_inputs
    mlp = tuple(f"{single}.{name}" for name in ("attn.to_k", "attn.to_q", "attn.to_v", "proj_mlp"))
    assert mlp in plan.shared_inputs
    assert len(plan.shared_inputs) == 6

    _, _, plan = recorded("UNet2DConditionModel-sd15")
    cross = "mid_block.attentions.0.transformer_blocks.0.attn2"
    # Every cross attention reads the text: keys and values of all of them form one group.
    group = next(group for group in plan.shared_inputs if f"{cross}.to_k" in group)
    assert len(group) == 8
    assert f"{cross}.to_q" not in group


def test_fused_projections_are_cut():
    model, inputs = denoisers.build("FluxTransformer2DModel")
    model.fuse_qkv_projections()
    with torch.no_grad():
        plan = record(model, lambda: model(**inputs))
    assert str(plan.linears["transformer_blocks.0.attn.to_qkv"]) == "32 -> 3 x 32"
    assert str(plan.linears["transformer_blocks.0.attn.to_added_qkv"]) == "32 -> 3 x 32"


def test_rotary_embeddings_are_noted_and_not_cut():
    _, _, plan = recorded("FluxTransformer2DModel")
    noted = {name for name, reason in plan.notes.items() if "rotary" in reason}
    assert noted == {name for name in plan.linears if name.endswith(("to_q", "to_k", "add_q_proj", "add_k_proj"))}


# -- all denoisers -----------------------------------------------------------------------------------------------------

WITHOUT_OUTPUT_CUTS = {
    "ChromaTransformer2DModel",  # its modulation comes from one table for all blocks, cut by tokens
    "HunyuanDiT2DControlNetModel",
    "PriorTransformer",
    "UNet1DModel",
    "UNet1DModel-policy",
}


def test_there_are_enough_of_them():
    classes = {name.partition("-")[0] for name in denoisers.names()}
    assert len(classes) >= 60


@pytest.mark.parametrize("name", denoisers.names())
def test_every_denoiser(name):
    model, inputs = denoisers.build(name)
    outputs: list[Any] = []

    def forward() -> None:
        torch.manual_seed(1)
        outputs.append(model(**inputs))

    before = {key: set(vars(module)) for key, module in model.named_modules()}
    with torch.no_grad():
        forward()
        plan = record(model, forward)
        forward()

    first, during, after = (list(_tensors(output)) for output in outputs)
    assert first
    for a, b, c in zip(first, during, after, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)

    assert _get_current_dispatch_mode_stack() == []
    assert {key: set(vars(module)) for key, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    plan.check(model)  # sizes add up to the features
    assert SegmentPlan.from_json(plan.to_json()) == plan
    linears = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {*plan.linears, *plan.uncalled} == linears
    cut = sum(len(linear.out_segments) > 1 for linear in plan.linears.values())
    assert (cut == 0) == (name in WITHOUT_OUTPUT_CUTS), plan.summary()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


# -- oracles -----------------------------------------------------------------------------------------------------------

LOWEST = {"silu": -0.2785, "gelu": -0.1701}
"""Minimum of x * sigmoid(x) at x = -1.278, of the GELUs (exact, tanh, sigmoid) at x = -0.75."""


@pytest.mark.parametrize("name", denoisers.names())
def test_tags_agree_with_real_values(name):
    """SiLU and GELU have a lowest value; an input that has it, and goes far above, is tagged."""
    model, inputs, plan = recorded(name)
    lowest, highest = _input_ranges(model, inputs)
    for linear in lowest:
        found = plan.linears[linear]
        for part, tag in zip(found.in_slices, found.activations, strict=True):
            low, high = lowest[linear][part].min().item(), highest[linear][part].max().item()
            if tag in LOWEST:
                assert low >= LOWEST[tag], (linear, tag)
            elif not tag:
                assert not (-0.2785 < low < -0.16 and high > 1.0001), (linear, low, high)  # not even cosines reach 1


def _input_ranges(model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per Linear the lowest and the highest value of every input channel."""
    lowest: dict[str, Tensor] = {}
    highest: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            rows = (args[0] if args else kwargs["input"]).flatten(0, -2)
            if not len(rows):
                return
            lowest[name] = torch.minimum(lowest.get(name, rows[0]), rows.amin(0))
            highest[name] = torch.maximum(highest.get(name, rows[0]), rows.amax(0))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return lowest, highest


class CutLog(TorchFunctionMode):
    """Logs the pieces that chunk, split, unbind and runs of slices made, in order, and the operands of cat."""

    def __init__(self) -> None:
        super().__init__()
        self.cuts: list[tuple[Tensor, ...]] = []
        self.joined: list[Tensor] = []
        self._sliced: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("chunk", "split", "unbind"):
            self.cuts.append(tuple(result))
        elif name == "__getitem__" and args[0] is self._sliced:
            self.cuts[-1] = (*self.cuts[-1], result)
        elif name == "__getitem__":
            self.cuts.append((result,))
        elif name in ("cat", "concat"):
            self.joined.extend(args[0] if args else kwargs["tensors"])
        if name in ("chunk", "split", "unbind", "__getitem__"):
            self._sliced = args[0] if name == "__getitem__" else None
        return result


ORACLE_MODELS = [
    "SD3Transformer2DModel-3.5",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "PixArtTransformer2DModel",
    "WanTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "UNet2DConditionModel-sdxl",
    "MochiTransformer3DModel",
    "JoyImageEditTransformer3DModel",
    "AuraFlowTransformer2DModel",
]


@pytest.mark.parametrize("name", ORACLE_MODELS)
def test_changing_a_channel_changes_the_piece_of_its_segment(name):
    """Add noise to one output channel; of the pieces of the first cut that notices, exactly that segment's change.

    Both ends of every segment are tried. Where a cut of a cut makes the segments, the finest piece decides.
    """
    if name not in denoisers.names():
        pytest.skip(f"the installed diffusers has no {name}")
    model, inputs, plan = recorded(name)
    reference = _cuts_with(model, inputs)
    tried = 0
    done = set()
    for linear, found in plan.linears.items():
        kind = "".join(c for c in linear if not c.isdigit()), found
        if len(found.out_segments) == 1 or kind in done:
            continue
        done.add(kind)
        for index, part in enumerate(found.out_slices):
            for channel in {part.start, part.stop - 1}:
                assert _piece_that_changes(model, inputs, reference, linear, channel) == index, (linear, channel)
                tried += 1
    assert tried >= 8


def _cuts_with(
    model: nn.Module, inputs: dict[str, Any], linear: str = "", channel: int = 0
) -> list[tuple[Tensor, ...]]:
    """The cuts of one forward, with noise on one output channel of a Linear."""

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rows = 1.0 + torch.arange(output.numel() // output.shape[-1]).reshape(*output.shape[:-1], 1)
        return output + rows * nn.functional.one_hot(torch.tensor(channel), output.shape[-1])

    handle = model.get_submodule(linear).register_forward_hook(disturb) if linear else None
    with torch.no_grad(), CutLog() as log:
        model(**inputs)
    if handle:
        handle.remove()
    return log.cuts


def _piece_that_changes(
    model: nn.Module, inputs: dict[str, Any], reference: list[tuple[Tensor, ...]], linear: str, channel: int
) -> int:
    """Order of the changed piece among all pieces that the Linear's output is cut into, counting cuts of cuts."""
    disturbed = _cuts_with(model, inputs, linear, channel)
    changes = [
        [i for i, pair in enumerate(zip(before, after, strict=True)) if not torch.equal(*pair)]
        for before, after in zip(reference, disturbed, strict=True)
    ]
    at = next(at for at, changed in enumerate(changes) if changed and len(changed) < len(reference[at]))
    changed = changes[at]
    assert len(changed) == 1
    first, order = reference[at], 0
    for i, piece in enumerate(first[: changed[0] + 1]):
        inner = _cut_of(piece, reference[at + 1 :])
        if i < changed[0]:
            order += len(inner) or 1
        elif inner:
            position = next(j for j, cut in enumerate(reference) if cut is inner)
            assert len(changes[position]) == 1
            order += changes[position][0]
    return order


def _cut_of(piece: Tensor, cuts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The later cut of this very piece along its last dim, if there is one."""
    for cut in cuts:
        same = cut[0].untyped_storage().data_ptr() == piece.untyped_storage().data_ptr()
        if same and sum(part.numel() for part in cut) == piece.numel() and torch.equal(torch.cat(cut, -1), piece):
            return cut
    return ()


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("FluxTransformer2DModel", "single_transformer_blocks.0.proj_out"),
        ("Flux2Transformer2DModel", "single_transformer_blocks.0.attn.to_out"),
        ("UNet2DConditionModel-sdxl", "add_embedding.linear_1"),
        ("HunyuanDiT2DModel", "time_extra_emb.extra_embedder.linear_1"),
        ("UVit2DModel", "cond_embed.linear_1"),
        ("StableCascadeUNet", "down_blocks.0.1.mapper"),
    ],
)
def test_input_segments_are_tensors_that_were_joined(name, linear):
    model, inputs, plan = recorded(name)
    found = plan.linears[linear]
    assert len(found.in_segments) > 1
    seen: list[Tensor] = []
    handle = model.get_submodule(linear).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), CutLog() as log:
        model(**inputs)
    handle.remove()
    for part in found.in_slices:
        values = seen[0][..., part].flatten()
        assert any(joined.numel() == values.numel() and torch.equal(joined.flatten(), values) for joined in log.joined)


def test_segments_compute_the_same_product():
    """y[o] = sum_t x[t] W[o,t]^T + b[o] with the segments of a plan is the Linear itself."""
    model, _, plan = recorded("Flux2Transformer2DModel")
    linear = "single_transformer_blocks.0.attn.to_out"
    module, found = model.get_submodule(linear), plan.linears[linear]
    assert isinstance(module, nn.Linear)
    assert found == LinearPlan((32, 96), (32,), ("", "gated"))
    x = torch.randn(3, module.in_features, dtype=torch.float64)
    weight = module.weight.double()
    y = torch.cat([sum(x[:, t] @ weight[o, t].T for t in found.in_slices) for o in found.out_slices], dim=-1)
    torch.testing.assert_close(y, x @ weight.T)
