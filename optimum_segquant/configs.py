"""Quantization configs by name, from a file or as they are, validated before anything is run.

Three forms of a file or dict are taken:

    preset: SEGQUANT_W4A8_CFG            # a preset, with some fields of its algorithm changed
    algorithm: {exclude: [proj_out]}

    quant_cfg: [...]                     # ModelOpt's own form, in full
    algorithm: {method: segquant}

    metadata: {recipe_type: ptq}         # a ModelOpt recipe, as those in modelopt_ext/recipes
    quantize: {quant_cfg: [...], algorithm: ...}
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import modelopt.torch.quantization as mtq
import yaml
from modelopt.recipe import load_recipe
from modelopt.torch.quantization.config import QuantizeConfig, QuantizerAttributeConfig, QuantizerCfgEntry
from modelopt.torch.quantization.mode import CalibrateModeRegistry, get_modelike_from_algo_cfg
from pydantic import ValidationError

from modelopt_ext import SegQuantCalibConfig
from modelopt_ext.export.native import NativeFormat, native_config

__all__ = ["NamedConfig", "algorithm_of", "is_segquant", "preset_names", "resolve_config", "with_algorithm"]

_FORM = "a config holds quant_cfg and algorithm, or a preset and changes to its algorithm"
_FILE_KINDS = (".yaml", ".yml")
_NATIVE = "NATIVE_"
"""Names of the configs for native checkpoints begin with this: ``NATIVE_FP8_CFG``, also ``native_fp8``."""


@dataclasses.dataclass(frozen=True)
class NamedConfig:
    """A ModelOpt config.

    Attributes:
        name: of the preset or file; ``custom`` for a dict.
        config: ``{"quant_cfg": [...], "algorithm": ...}``, a copy of the original.
    """

    name: str
    config: dict[str, Any]


def preset_names() -> tuple[str, ...]:
    """What :func:`resolve_config` takes as a name: SegQuant's presets, those of native checkpoints, ModelOpt's."""
    groups = ("SEGQUANT_", _NATIVE)
    names = {*mtq.config.choices, *(f"{_NATIVE}{format.upper()}_CFG" for format in get_args(NativeFormat))}
    return tuple(sorted(names, key=lambda name: (not name.startswith(groups[0]), not name.startswith(groups[1]), name)))


def resolve_config(source: str | os.PathLike[str] | Mapping[str, Any] | NamedConfig) -> NamedConfig:
    """Find and check a config.

    Args:
        source: name of a preset (``SEGQUANT_W4A8_CFG``, also ``segquant_w4a8``), path of a YAML file, or a dict; see
            the module's docstring for their forms.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no such preset, or a wrong key or value; it is named, in one line.
    """
    if isinstance(source, NamedConfig):
        return source
    if isinstance(source, Mapping):
        return NamedConfig("custom", _checked(source, "the config"))
    path = Path(source).expanduser()
    if path.suffix.lower() in _FILE_KINDS or isinstance(source, os.PathLike) or path.is_file():
        return NamedConfig(path.name, _read(path))
    return _preset(str(source))


def is_segquant(config: Mapping[str, Any]) -> bool:
    """Whether a config's algorithm is this package's."""
    algorithm = config.get("algorithm")
    return isinstance(algorithm, Mapping) and algorithm.get("method") == "segquant"


def algorithm_of(config: Mapping[str, Any]) -> SegQuantCalibConfig:
    """The settings of a config whose algorithm is ``segquant``."""
    return SegQuantCalibConfig.model_validate(dict(config["algorithm"]))


def with_algorithm(config: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A copy of a config with some fields of its algorithm replaced."""
    changed = copy.deepcopy(dict(config))
    changed["algorithm"] = {**changed["algorithm"], **fields}
    return changed


def _preset(name: str) -> NamedConfig:
    names = preset_names()
    wanted = name if name in names else name.upper().removesuffix("_CFG") + "_CFG"
    if wanted not in names:
        raise ValueError(
            f"there is no preset and no file {name!r}{_meant(wanted, names)}; SegQuant's presets are "
            f"{', '.join(n for n in names if n.startswith('SEGQUANT'))}"
        )
    if wanted.startswith(_NATIVE):
        return NamedConfig(
            wanted, native_config(cast(NativeFormat, wanted.removeprefix(_NATIVE).removesuffix("_CFG").lower()))
        )
    return NamedConfig(wanted, copy.deepcopy(dict(getattr(mtq, wanted))))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}: check the path (it is relative to {Path.cwd()})")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {_one_line(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is no config: {_FORM}")
    if not {"metadata", "quantize"} & set(content):
        return _checked(content, str(path))
    for section in ("metadata", "quantize"):
        if section not in content:
            near = next((f"; {key!r} is unknown" for key in content if _meant(str(key), (section,))), "")
            raise ValueError(f"{path} has no section {section!r}{near}: a recipe has metadata and quantize")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # load_recipe prints what it loads
            recipe: Any = load_recipe(path)
    except ValueError as error:
        raise ValueError(f"{path}: {_problem(error)}") from error
    if not isinstance(recipe.quantize, QuantizeConfig):
        raise ValueError(f"{path} is a recipe for something else: give one with recipe_type: ptq")
    return _checked(recipe.quantize.model_dump(exclude_unset=True), str(path))


def _checked(source: Mapping[str, Any], where: str) -> dict[str, Any]:
    config = copy.deepcopy(dict(source))
    if "preset" in config:
        config = _from_preset(config, where)
    if "quant_cfg" not in config:
        unknown = next((key for key in config if key != "algorithm"), None)
        hint = "" if unknown is None else f", {unknown!r} is unknown{_meant(str(unknown), _known())}"
        raise ValueError(f"{where} has no quant_cfg{hint}: {_FORM}")
    try:
        QuantizeConfig.model_validate(config)
        _check_algorithm(config.get("algorithm", "max"))
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {_problem(error)}") from error
    return config


def _check_algorithm(algorithm: Any) -> None:
    for step in algorithm if isinstance(algorithm, list) else [algorithm]:
        method = step.get("method") if isinstance(step, Mapping) else step
        methods = sorted(name.removesuffix("_calibrate") for name in CalibrateModeRegistry._name2descriptor)
        if method is not None and method not in methods:
            raise ValueError(f"there is no algorithm {method!r}{_meant(str(method), methods)}")
    for mode, fields in get_modelike_from_algo_cfg(algorithm):
        descriptor: Any = CalibrateModeRegistry[str(mode)]
        descriptor.config_class.model_validate(fields)


def _from_preset(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in config:
        if key not in ("preset", "algorithm"):
            raise ValueError(f"{where}: {key!r} is unknown beside a preset{_meant(str(key), ('algorithm',))}; {_FORM}")
    base, changes = _preset(str(config["preset"])).config, config.get("algorithm") or {}
    if not isinstance(changes, Mapping):
        raise ValueError(f"{where}: algorithm must be a mapping of fields to change, not {changes!r}")
    if changes and not isinstance(base["algorithm"], Mapping):
        base["algorithm"] = {"method": base["algorithm"]}
    return with_algorithm(base, **changes) if changes else base


def _problem(error: BaseException) -> str:
    """One line about what is wrong, with the name that was probably meant."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, ValidationError):
        found = found.__cause__
    if found is None:
        return _one_line(error)
    first = found.errors(include_url=False)[0]
    # Pydantic names the branches of its unions between the keys.
    keys = [str(part) for part in first["loc"] if not any(mark in str(part) for mark in "[(")]
    where = ".".join(keys)
    if first["type"] == "extra_forbidden":
        return f"{where} is unknown{_meant(keys[-1], _known())}"
    return f"{where}: {first['msg']}, got {first['input']!r}" if where else str(first["msg"])


def _known() -> list[str]:
    """Every key that a config may have."""
    models = (QuantizeConfig, QuantizerCfgEntry, QuantizerAttributeConfig, SegQuantCalibConfig)
    return ["preset", *(name for model in models for name in getattr(model, "model_fields", {}))]


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", is {close[0]!r} meant?" if close else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
