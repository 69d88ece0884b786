"""The presets as ModelOpt recipes: YAML files that ``modelopt.recipe.load_recipe`` reads.

    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe
    from modelopt_ext import recipes

    recipe = load_recipe(recipes.path("segquant_int8"))
    mtq.quantize(model, recipe.quantize, forward_loop)

A recipe gives bit for bit what its preset gives. Copy one to start a configuration of your own; it may lie anywhere,
and ``load_recipe(path, overrides=["quantize.algorithm.seed=1"])`` changes single fields.

The files are generated from :mod:`modelopt_ext.presets`: after changing a preset run
``python -m modelopt_ext.recipes``.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import logging
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .. import presets
from ..config import SegQuantCalibConfig

__all__ = ["FOLDER", "file_name", "names", "path", "render", "rendered", "write"]

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
"""Where the recipes of the package lie."""

HEADER = """\
# The preset modelopt_ext.{name} as a ModelOpt recipe, written by `python -m modelopt_ext.recipes`.
# Load it with modelopt.recipe.load_recipe after `import modelopt_ext`, which registers the algorithm.

"""
LINE_LENGTH = 110  # characters
FLOAT_FORMAT_KEYS = ("num_bits", "scale_bits")
"""Keys whose pairs (exponent bits, mantissa bits) ModelOpt's loader reads as ``e4m3``."""


def file_name(preset: str) -> str:
    """Return the file name of a preset's recipe: ``SEGQUANT_INT8_CFG`` is ``segquant_int8.yaml``."""
    return preset.removesuffix("_CFG").lower() + ".yaml"


def names() -> tuple[str, ...]:
    """Return the names :func:`path` takes, in the order of the presets."""
    return tuple(file_name(preset).removesuffix(".yaml") for preset in presets.PRESETS)


def path(name: str) -> Path:
    """Return the file of a recipe of this package, for ``load_recipe``.

    Args:
        name: one of :func:`names`, for example ``"segquant_int8"``.

    Raises:
        ValueError: no preset has this name, or its file has not been written.
    """
    if name not in names():
        raise ValueError(f"no recipe {name!r}: there are {', '.join(names())}")
    found = FOLDER / f"{name}.yaml"
    if not found.is_file():
        raise ValueError(f"{found} is missing: write the recipes with python -m modelopt_ext.recipes")
    return found


def rendered() -> dict[str, str]:
    """Return the text of every recipe by file name."""
    purposes = _docstrings()
    items = presets.PRESETS.items()
    return {file_name(name): HEADER.format(name=name) + render(config, purposes[name]) for name, config in items}


def render(config: Mapping[str, Any], purpose: str) -> str:
    """Return a ModelOpt config as the text of a PTQ recipe, with a comment for each field of the algorithm.

    Args:
        config: ``{"quant_cfg": [...], "algorithm": ...}`` of plain types.
        purpose: what it is for, one paragraph; it becomes the recipe's description.

    Raises:
        ValueError: a value that YAML cannot hold, with its place in the config.
    """
    unknown = set(config) - {"quant_cfg", "algorithm"}
    if unknown:
        raise ValueError(f"a recipe holds quant_cfg and algorithm, not {', '.join(sorted(map(str, unknown)))}")
    lines = [_dump({"metadata": {"recipe_type": "ptq", "description": purpose}}), "", "quantize:"]
    lines += _indent(_algorithm_lines(config.get("algorithm")), 2)
    lines += ["", "  # Later entries win; a pattern of your own with `enable: false` at the end excludes layers."]
    lines.append("  quant_cfg:")
    for position, entry in enumerate(config["quant_cfg"]):
        block = _dump(_plain(entry, f"quant_cfg[{position}]")).splitlines()
        lines += _indent(["- " + block[0], *_indent(block[1:], 2)], 4)
    return "\n".join(lines) + "\n"


def write(folder: Path = FOLDER) -> list[Path]:
    """Write the recipes of all presets and remove those of presets that are gone.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = rendered()
    for stale in sorted(set(folder.glob("*.yaml")) - {folder / name for name in texts}):
        logger.info("removing %s: it belongs to no preset", stale)
        stale.unlink()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _algorithm_lines(algorithm: Any) -> list[str]:
    """The ``algorithm`` section; SegQuant's fields are commented with their titles."""
    value = _plain(algorithm, "algorithm")
    if not isinstance(value, dict) or value.get("method") != SegQuantCalibConfig.model_fields["method"].default:
        return _dump({"algorithm": value}).splitlines()
    lines = ["# What is not set here has the default of modelopt_ext.SegQuantCalibConfig.", "algorithm:"]
    for key, item in value.items():
        title = SegQuantCalibConfig.model_fields[key].title if key in SegQuantCalibConfig.model_fields else None
        if title:
            lines += _indent(_comment(title), 2)
        lines += _indent(_dump({key: item}).splitlines(), 2)
    return lines


def _plain(value: Any, where: str, key: Any = None) -> Any:
    """Return ``value`` in YAML's own types, float formats spelled as ModelOpt's loader reads them."""
    if key in FLOAT_FORMAT_KEYS and isinstance(value, (tuple, list)):
        exponent, mantissa = value
        return f"e{exponent}m{mantissa}"
    if isinstance(value, Mapping):
        return {k: _plain(item, f"{where}[{k!r}]", k) for k, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}: a recipe holds numbers, strings, lists and mappings only")


def _dump(mapping: Mapping[str, Any]) -> str:
    """YAML with one line a key; lists and quantizer attributes (``cfg``) in braces."""
    lines = []
    for key, item in mapping.items():
        if isinstance(item, list) or key == "cfg":
            inline = yaml.safe_dump(item, default_flow_style=True, sort_keys=False, width=LINE_LENGTH)
            lines.append(f"{key}: {inline.strip()}")
        else:
            lines.append(yaml.safe_dump({key: item}, default_flow_style=False, sort_keys=False, width=LINE_LENGTH))
    return "\n".join(line.rstrip("\n") for line in lines)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, LINE_LENGTH)]


def _indent(lines: list[str], width: int) -> list[str]:
    return [" " * width + line if line else line for line in lines]


def _docstrings() -> dict[str, str]:
    """Return what :mod:`modelopt_ext.presets` says below each preset, by preset.

    Raises:
        ValueError: a preset without a docstring that is not another preset's second name.
    """
    body = ast.parse(inspect.getsource(presets)).body
    found: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        if (
            isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            text = " ".join(following.value.value.split())
            found.update({target.id: text for target in targets if isinstance(target, ast.Name)})
    for name, config in presets.PRESETS.items():
        if name in found:
            continue
        twin = next((other for other, same in presets.PRESETS.items() if same is config and other in found), None)
        if twin is None:
            raise ValueError(f"preset {name} has no docstring: say below its definition what it is for")
        found[name] = f"The same as {file_name(twin).removesuffix('.yaml')}. {found[twin]}"
    return found
