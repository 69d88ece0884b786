"""A walk through SegQuant on a trained pipeline: how a plan is found, and what DualScale does.

    python examples/walk_through.py

runs from top to bottom as a script and writes its plots to ``out/walk_through``; cells begin with ``# %%``, so that VS
Code, PyCharm and Jupyter (with Jupytext) run it like a notebook.
"""

# %% Settings
from __future__ import annotations

import argparse
import copy
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import score_shapes
import torch
from matplotlib.figure import Figure
from pictures import difference, draw_strips
from shapes_sampling import PIPELINE, load_pipeline, matching, sampling
from torch import Tensor, nn

import modelopt_ext
from modelopt_ext import SegmentPlan
from modelopt_ext.calibrate.polarity import shift_of
from modelopt_ext.dataflow import record
from modelopt_ext.formats import QuantFormat, quantize_dequantize
from optimum_segquant.evaluation import compare, denoiser_of, generate_images, sample_trajectories, sqnr_db
from optimum_segquant.report import draw_plan
from optimum_segquant.report.style import BLUE, GREEN, GREY, GRID, MUTED, ORANGE, PURPLE, TEXT

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("out/walk_through"))
parser.add_argument("--steps", type=int, default=14, help="denoising steps")
parser.add_argument("--kept-steps", type=int, default=7, help="how many of them are recorded")
parser.add_argument("--prompts", type=int, default=8, help="for calibration, and as many others for measuring")
parser.add_argument("--images", type=int, default=4)
parser.add_argument(
    "--rows", nargs="+", default=["*"], help="of the whole model, only configs that match these patterns"
)
options, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
options.out.mkdir(parents=True, exist_ok=True)

INT8 = QuantFormat(8)


def save(figure: Figure, name: str) -> None:
    """Write a plot."""
    path = options.out / name
    figure.savefig(path, dpi=120)
    print(f"-> {path}")


def panels(columns: int, width: float, height: float, title: str) -> tuple[Figure, list[Any]]:
    """A figure with axes side by side, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11, color=TEXT)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color(GRID)
        one.tick_params(length=0, labelcolor=MUTED, labelsize=9)
        one.grid(axis="y", color=GRID, linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes


def bars(axes: Any, groups: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> None:
    """Groups of bars with their values on top, dB."""
    for index, (name, colour) in enumerate(colours.items()):
        places = [group + (index - (len(colours) - 1) / 2) * 0.8 / len(colours) for group in range(len(groups))]
        values = [group[name] for group in groups.values()]
        drawn = axes.bar(places, values, 0.8 / len(colours), color=colour, label=name)
        axes.bar_label(drawn, [f"{value:.0f}" for value in values], fontsize=8, color=MUTED, padding=1)
    axes.set_xticks(range(len(groups)), list(groups))


# %% The pipeline, and what its transformer reads while it makes images
pipeline = load_pipeline(PIPELINE)
transformer = denoiser_of(pipeline)
call = sampling(pipeline, options.steps, batch_size=4)


def sample(seed: int) -> Any:
    """Recorded calls of the transformer for prompts of its own."""
    prompts = score_shapes.unseen_prompts(options.prompts, seed=seed)
    return sample_trajectories(pipeline, prompts, seeds=seed, steps=options.kept_steps, **call)


calibration, unseen = sample(1_000), sample(2_000)
print(f"{len(calibration)} calls to calibrate on, {len(unseen)} to measure on, timesteps {calibration.timesteps}")

# %% How the plan is found
# One ordinary forward runs under a recorder. It follows the channels of every tensor from operator to operator: which
# Linear's output is chunked, split or sliced, which Linear's input was concatenated, and what went through SiLU or
# GELU. No list of layer names, no model classes.
plan: SegmentPlan = record(transformer, lambda: transformer(**calibration[0].inputs))
print(plan)
save(draw_plan(plan), "1_plan.png")

# %% What lies behind SiLU and GELU
# Two Linears that the plan has tagged: AdaLN, which turns the timestep into shifts, scales and gates (SiLU), and the
# second half of a feed-forward (GELU).
LAYERS = {"SiLU": "transformer_blocks.1.norm1.linear", "GELU": "transformer_blocks.3.ff.net.2"}
for activation, name in LAYERS.items():
    assert activation.lower() in plan.linears[name].activations, f"{name} is not behind {activation}"


def inputs_of(trajectories: Any) -> dict[str, list[Tensor]]:
    """What each of ``LAYERS`` reads: (rows, channels) float32 of every recorded call."""
    found: dict[str, list[Tensor]] = {name: [] for name in LAYERS.values()}
    handles = [
        transformer.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kept=kept: kept.append(args[0].detach().flatten(0, -2).float())
        )
        for name, kept in found.items()
    ]
    trajectories.forward_loop(transformer)
    for handle in handles:
        handle.remove()
    return found


calls_of = inputs_of(calibration)
rows_calibration = {name: torch.cat(calls) for name, calls in calls_of.items()}
rows_unseen = {name: torch.cat(calls) for name, calls in inputs_of(unseen).items()}

figure, axes = panels(2, 11, 3.6, "Inputs of a Linear behind SiLU and of one behind GELU")
for one, (activation, name) in zip(axes, LAYERS.items(), strict=True):
    values = rows_calibration[name].flatten()
    one.hist(values[values < 0].numpy(), bins=40, color=ORANGE, label="negative")
    one.hist(values[values >= 0].numpy(), bins=120, color=BLUE, label="positive")
    one.set_yscale("log")
    negative = float((values < 0).float().mean())
    one.set_title(
        f"{name}\n{negative:.0%} of all values are negative, down to {values.min():.2f}; the others reach "
        f"{values.max():.2f}",
        fontsize=9,
        color=TEXT,
    )
    one.set(xlabel=f"value after {activation}", ylabel="how many (log scale)")
    one.legend(frameon=False, fontsize=9)
save(figure, "2_activations.png")

# %% What codes make of them
# 256 codes, four ways to lay them out. The scale of the symmetric codes is set by the largest positive value, so that a
# handful of codes is left for all negatives, which are most of the values.


def rounded(x: Tensor, treatment: str, known: Tensor, *, shift_per_channel: bool = True) -> Tensor:
    """Round activations to INT8 and back.

    Args:
        x: (rows, channels) float32.
        treatment: ``symmetric``, ``shift``, ``dual`` or ``dual8``, see ``modelopt_ext/calibrate/polarity.py``.
        known: (rows, channels), what the scales are taken from.
        shift_per_channel: for ``shift``: whether each channel has its own.
    """
    if treatment == "symmetric":
        return quantize_dequantize(x, known.abs().amax(), INT8)
    if treatment == "shift":
        centre = shift_of(known.amax(0), known.amin(0), shift_per_channel)
        return quantize_dequantize(x - centre, (known - centre).abs().amax(), INT8) + centre
    codes = INT8.as_unsigned() if treatment == "dual8" else INT8
    positive = quantize_dequantize(x.clamp(min=0), known.clamp(min=0).amax(), codes)
    return positive - quantize_dequantize((-x).clamp(min=0), (-known).clamp(min=0).amax(), codes)


TREATMENTS = {"symmetric": GREY, "shift": GREEN, "dual": ORANGE, "dual8": PURPLE}
gelu = LAYERS["GELU"]
known = rows_calibration[gelu].flatten()[:, None]  # one column: all channels share the codes that are drawn
lowest = float(known.min())
line = torch.linspace(1.15 * lowest, -1.3 * lowest, 4001)[:, None]
figure, axes = panels(4, 13, 3.4, f"What is left of a value of {gelu} near zero, INT8")
for one, (treatment, colour) in zip(axes, TREATMENTS.items(), strict=True):
    codes = rounded(line, treatment, known)
    one.axvspan(float(line[0]), 0, color=ORANGE, alpha=0.08, linewidth=0)
    one.plot(line[:, 0], line[:, 0], color=MUTED, linewidth=0.8, linestyle=":")
    one.plot(line[:, 0], codes[:, 0], color=TEXT if treatment == "symmetric" else colour, linewidth=1.4)
    kept = rounded(known, treatment, known)[(known < 0)].unique().numel()
    one.set_title(f"{treatment}: {kept} codes for negatives", fontsize=10, color=TEXT)
    one.set(xlabel="value", ylim=(float(line[0]), float(line[-1])), xlim=(float(line[0]), float(line[-1])))
axes[0].set_ylabel("after rounding")
save(figure, "3_codes.png")

# %% The same in decibels, on trajectories that the scales were not taken from
# Below: SQNR of the negative inputs, of the positive ones, of all, and of the layer's output. For the last one the real
# Linear is quantized by ModelOpt with SegQuant: `dual` and `dual8` multiply both signs apart, `shift` once. There
# `shift` is kept only where the output gains on other calls than it was found on. It moves most values away from zero,
# and larger values carry more of the weights' rounding: inputs can gain where the output loses.


def algorithm(config: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A preset with some fields of its algorithm replaced."""
    changed = copy.deepcopy(dict(config))
    changed["algorithm"] = {**changed["algorithm"], "progress": False, **fields}
    return changed


def quantized_layer(name: str, preset: Mapping[str, Any], **fields: Any) -> nn.Module:
    """One Linear of the transformer by itself, quantized on its recorded inputs, without smoothing and clipping."""
    layer = nn.Sequential(OrderedDict(linear=copy.deepcopy(transformer.get_submodule(name))))
    own_plan = SegmentPlan({"linear": plan.linears[name]}).to_dict()
    fields = {"alpha": None, "clip_grid": (1.0,), "embedders": "as_configured", "plan": own_plan, **fields}
    config = algorithm(preset, **fields)

    def loop(model: nn.Module) -> None:
        for rows in calls_of[name]:  # call by call: what is chosen is chosen on other calls than scales are taken from
            model(rows)

    return mtq.quantize(layer, config, loop)


def sqnr(exact: Tensor, rough: Tensor) -> float:
    """Energy of a signal over that of its error, dB."""
    return sqnr_db(float(exact.double().square().sum()), float((exact - rough).double().square().sum()))


@torch.no_grad()
def output_sqnr(name: str, layer: nn.Module) -> float:
    """Of a quantized layer's output on unseen inputs, dB."""
    return sqnr(transformer.get_submodule(name)(rows_unseen[name]), layer(rows_unseen[name]))


POLARITY = {"symmetric": "none", "shift": "shift", "dual": "dual", "dual8": "dual8"}
groups_by_layer = {}
figure, axes = panels(2, 13, 3.8, "SQNR by treatment, dB: 6 dB are one bit")
for one, (activation, name) in zip(axes, LAYERS.items(), strict=True):
    x = rows_unseen[name]
    groups: dict[str, dict[str, float]] = {part: {} for part in ("negatives", "positives", "all inputs", "output")}
    for treatment, polarity in POLARITY.items():
        y = rounded(x, treatment, rows_calibration[name])
        layer = quantized_layer(name, modelopt_ext.SEGQUANT_CFG, polarity=polarity, segments=False)
        found = (sqnr(x[x < 0], y[x < 0]), sqnr(x[x >= 0], y[x >= 0]), sqnr(x, y), output_sqnr(name, layer))
        for by_treatment, value in zip(groups.values(), found, strict=True):
            by_treatment[treatment] = value
    groups_by_layer[name] = groups
    bars(one, groups, TREATMENTS)
    one.set_title(f"behind {activation}: {name}", fontsize=10, color=TEXT)
    one.set_ylim(0, 1.08 * max(max(part.values()) for part in groups.values()))
    for part, by_treatment in groups.items():
        print(f"{name}, {part}: " + ", ".join(f"{treatment} {value:.1f}" for treatment, value in by_treatment.items()))
axes[0].set_ylabel("dB")
axes[1].legend(frameon=False, ncols=4, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.1))
save(figure, "4_sqnr_by_sign.png")

# %% What segments do
# AdaLN's output is cut into shifts, scales and gates, whose weights differ in size. With one scale for the whole weight
# the largest of them decides for all. (With a scale for every output channel there is nothing left to gain here.)
adaln = LAYERS["SiLU"]
cuts = plan.linears[adaln].out_slices
with torch.no_grad():
    exact = transformer.get_submodule(adaln)(rows_unseen[adaln])
    outputs = {
        label: quantized_layer(adaln, modelopt_ext.SEGQUANT_INT8_PER_TENSOR_CFG, polarity="dual8", segments=segments)(
            rows_unseen[adaln]
        )
        for label, segments in (("one weight scale", False), ("a scale for each segment", True))
    }
groups = {
    f"{index}": {label: sqnr(exact[:, cut], rough[:, cut]) for label, rough in outputs.items()}
    for index, cut in enumerate(cuts)
}
weight = transformer.get_parameter(f"{adaln}.weight").detach()
figure, axes = panels(2, 13, 3.6, f"{adaln} and its {len(cuts)} output segments, W8A8")
axes[0].bar(range(len(cuts)), [float(weight[cut].abs().max()) for cut in cuts], 0.6, color=BLUE)
axes[0].set_title("largest weight of each segment", fontsize=10, color=TEXT)
axes[0].set_xticks(range(len(cuts)))
bars(axes[1], groups, {"one weight scale": GREY, "a scale for each segment": BLUE})
axes[1].set_title("SQNR of each segment's output, dB", fontsize=10, color=TEXT)
axes[1].set_ylim(0, 1.25 * max(max(values.values()) for values in groups.values()))
axes[1].legend(frameon=False, ncols=2, fontsize=9, loc="upper right")
for one in axes:
    one.set_xlabel("output segment")
save(figure, "5_segments.png")

# %% The whole model
# The same parts added one by one, with one scale a weight as in the paper, then the two presets. Velocity SQNR is that
# of the transformer's output on unseen trajectories.
PER_TENSOR = modelopt_ext.SEGQUANT_INT8_PER_TENSOR_CFG
PLAIN = {"segments": False, "polarity": "none", "alpha": None, "clip_grid": (1.0,)}
CONFIGS = {
    "plain": algorithm(PER_TENSOR, **PLAIN),
    "+ segments": algorithm(PER_TENSOR, **{**PLAIN, "segments": True}),
    "+ segments, dual": algorithm(PER_TENSOR, **{**PLAIN, "segments": True, "polarity": "dual"}),
    "SEGQUANT_INT8_PER_TENSOR_CFG": algorithm(PER_TENSOR),
    "SEGQUANT_CFG": algorithm(modelopt_ext.SEGQUANT_CFG),
}
image_prompts = score_shapes.unseen_prompts(options.images, seed=3_000)
pictures = {"prompts": image_prompts, "seeds": 3_000, **call}
reference = generate_images(pipeline, **pictures)
results = {}
for label in matching(CONFIGS, options.rows):
    results[label] = compare(
        pipeline, CONFIGS[label], calibration=calibration, unseen=unseen, reference=reference, **pictures
    )
    print(f"{label}: {results[label].sqnr.overall:.1f} dB", flush=True)

figure, axes = panels(2, 13, 3.8, "Velocity SQNR of the whole transformer, W8A8")
shades = dict(zip(CONFIGS, (GREY, BLUE, ORANGE, PURPLE, GREEN), strict=True))
drawn = axes[0].barh(list(results), [row.sqnr.overall for row in results.values()], color=[shades[n] for n in results])
axes[0].bar_label(drawn, fmt="%.1f", fontsize=9, color=MUTED, padding=3)
axes[0].invert_yaxis()
axes[0].grid(visible=False)
axes[0].set_xlabel("dB, over all timesteps")
for label, row in results.items():
    axes[1].plot(list(row.sqnr.per_timestep), list(row.sqnr.per_timestep.values()), color=shades[label], marker="o")
axes[1].invert_xaxis()
axes[1].set(xlabel="timestep, from noise to image; colours as on the left", ylabel="dB")
save(figure, "6_model.png")

# %% And the images
strips = [("full precision", reference)]
for label in [name for name in ("plain", "SEGQUANT_CFG") if name in results]:
    row = results[label]
    assert row.images is not None
    strips += [(f"{label}\n{row.sqnr.overall:.1f} dB", row.images), difference(row.images, reference)]
draw_strips(strips, image_prompts).save(options.out / "7_images.png", optimize=True)
print(f"-> {options.out / '7_images.png'}")
