"""``optimum-cli segquant inspect``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from .base import Result, SegQuantSubcommand
from .models import CALL, LOADING, call_of, load
from .options import Option

__all__ = ["InspectCommand"]


class InspectCommand(SegQuantSubcommand):
    """The segment plan of a model."""

    DESCRIPTION = (
        "Watch one forward of a model and show which channels of its Linears belong together: a table, a picture, and "
        "a file that SegQuant's configs take as their plan."
    )
    OPTIONS = (
        Option("model", "the directory of a pipeline or model, or a hub name", positional=True, required=True),
        Option("component", "of a pipeline to look at; by default its denoiser"),
        Option(
            "inputs",
            "of the forward: a real call of the pipeline, or shapes made from the model's config (computes nothing)",
            choices=("real", "generated"),
            default="generated",
        ),
        Option("all", "list Linears without segments, too", kind="flag"),
        Option("merge_heads", "cut at attention heads, too", kind="flag"),
        Option("plot", "draw the plan into this file (.png, .svg, .pdf)", metavar="FILE"),
        Option("output", "write the plan as JSON", metavar="FILE"),
        *(option for option in CALL if option.name in ("seed", "call")),
        *LOADING,
    )
    EXAMPLES = (
        "inspect stabilityai/stable-diffusion-3.5-medium --plot plan.png",
        "inspect MODEL --component text_encoder --all",
        "inspect MODEL --inputs real --call height=512 width=512 --output plan.json",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options."""
        InspectCommand.add_to(parser)

    @staticmethod
    def work(values: Namespace) -> Result:
        """Record, print, draw."""
        from optimum_segquant.files import check_writable, replaced_file

        if values.output is not None:
            check_writable(values.output, example="plan.json")
        if values.plot is not None:
            from matplotlib.backend_bases import FigureCanvasBase

            from optimum_segquant.report import draw_plan  # raises if matplotlib is missing

            kinds = [f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes()]
            check_writable(values.plot, example="plan.png", endings=kinds)
        name, model, plan = _plan(values)
        lines = [f"{name} ({type(model).__name__}): {plan.summary()}", "", plan.table(trivial=values.all)]
        if values.output is not None:
            path = Path(values.output).expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            plan.save(path)
            lines.append(f"\nplan: {values.output}")
        if values.plot is not None:
            path = Path(values.plot).expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            figure = draw_plan(plan, trivial=values.all)
            with replaced_file(path) as partial:
                figure.savefig(partial, dpi=150, format=path.suffix.removeprefix("."))
            lines.append(f"\npicture: {values.plot}")
        data = {"component": name, "model": type(model).__name__, "summary": plan.summary(), "plan": plan.to_dict()}
        return Result(data, "\n".join(lines))


def _plan(values: Namespace) -> tuple[str, Any, Any]:
    """Component, model and its plan."""
    from modelopt_ext.dataflow import record
    from modelopt_ext.sensitivity import quantized_layers
    from optimum_segquant.components import choose_components
    from optimum_segquant.quantizers.denoiser_inputs import forward_once

    loaded = load(values.model, values)
    is_pipeline = isinstance(getattr(loaded, "components", None), dict)
    if is_pipeline:
        name, model = next(iter(choose_components(loaded, values.component).items()))
    elif values.component is not None:
        raise ValueError(f"{values.model} is one model, without components: leave out --component")
    else:
        name, model = "model", loaded
    if quantized_layers(model):
        raise ValueError(
            f"{name} is quantized already, and its layers are what the plan made of them: inspect the original model"
        )
    if values.inputs == "generated":
        model.to("meta")  # only shapes matter
        try:
            return name, model, record(model, forward_once(model), merge_heads=values.merge_heads)
        except Exception as error:  # inputs that do not fit fail wherever the model first notices
            raise ValueError(
                f"no inputs are known for a forward of {type(model).__name__} ({type(error).__name__}: {error}): use "
                "--inputs real with its pipeline, or modelopt_ext.dataflow.record with a forward of your own"
            ) from error
    if not is_pipeline:
        raise ValueError("real inputs come from a pipeline: give its directory, or --inputs generated")
    return name, model, record(model, _real_call(loaded, values), merge_heads=values.merge_heads)


def _real_call(pipeline: Any, values: Namespace) -> Any:
    from optimum_segquant.calibration import default_prompts
    from optimum_segquant.evaluation.sampling import run_pipeline

    def call() -> None:
        arguments = {"num_inference_steps": 2, **call_of(values, pipeline)}
        run_pipeline(pipeline, default_prompts(1), seeds=values.seed, batch_size=1, output_type="latent", **arguments)

    return call
