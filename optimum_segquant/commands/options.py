"""The options of a command: for the command line, for a YAML file, and checked the same way for both.

    model: stabilityai/stable-diffusion-3.5-medium      # optimum-cli segquant quantize --config job.yaml
    preset: SEGQUANT_W4A8_CFG
    call: {guidance_scale: 4.5, height: 1024, width: 1024}

What is given on the command line wins over the file.
"""

from __future__ import annotations

import difflib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

__all__ = ["COMMON", "Option", "add_options", "nearest", "read_options"]

Kind = Literal["text", "integer", "number", "flag", "list", "mapping"]


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: in Python and YAML; on the command line with ``-`` for ``_``.
        help: a clause.
        kind: what it holds; a ``list`` takes several words, a ``mapping`` several ``KEY=VALUE``.
        default: if it is given neither here nor there.
        choices: the values allowed.
        positional: written without a name on the command line.
        required: whether it must be given.
        metavar: name of its value in the help.
        check: turns the value into what the command needs, raises ValueError for a wrong one.
    """

    name: str
    help: str
    kind: Kind = "text"
    default: Any = None
    choices: tuple[str, ...] = ()
    positional: bool = False
    required: bool = False
    metavar: str | None = None
    check: Callable[[Any], Any] | None = None

    @property
    def flag(self) -> str:
        """As on the command line."""
        return self.name.upper() if self.positional else f"--{self.name.replace('_', '-')}"


COMMON = (
    Option("config", "YAML file with any of these options; the command line wins over it", metavar="FILE"),
    Option("json", "print the result as JSON, and nothing else, on stdout", kind="flag"),
    Option("quiet", "show no progress bars", kind="flag"),
    Option("debug", "show logs and warnings, and tracebacks of errors (also -v)", kind="flag"),
)
"""Options of every command."""


def add_options(parser: ArgumentParser, options: Sequence[Option]) -> None:
    """Add options to a parser; none has a default there, so that what was given can be told from what was not."""
    for option in (*options, *COMMON):
        text = option.help if option.default in (None, False, (), {}) else f"{option.help} (default: {_shown(option)})"
        arguments: dict[str, Any] = {"help": text.replace("%", "%%"), "default": None}
        if option.kind == "flag":
            names = [option.flag, "-v"] if option.name == "debug" else [option.flag]
            parser.add_argument(*names, dest=option.name, action="store_true", **arguments)
            continue
        arguments["metavar"] = option.metavar or ("|".join(option.choices) if option.choices else option.name.upper())
        if option.kind in ("list", "mapping"):
            arguments |= {"nargs": "+", "action": "extend"}  # given twice, both count
        if option.kind == "mapping":
            arguments["metavar"] = option.metavar or "KEY=VALUE"
        if option.positional:
            parser.add_argument(option.name, nargs="?", **{k: v for k, v in arguments.items() if k != "nargs"})
        else:
            parser.add_argument(option.flag, dest=option.name, **arguments)


def read_options(arguments: Namespace, options: Sequence[Option]) -> dict[str, Any]:
    """Values of all options: from the command line, else from the file of ``--config``, else the defaults.

    Raises:
        ValueError: an unknown key, a wrong value or a missing one; it is named, with what to write instead.
        FileNotFoundError: there is no such file.
    """
    known = {option.name: option for option in (*options, *COMMON)}
    given = {name: value for name in known if (value := getattr(arguments, name, None)) is not None}
    filed = _read_file(given["config"], known) if "config" in given else {}
    values = {}
    for name, option in known.items():
        if name in given:
            values[name] = _value(option, _parsed(option, given[name]), option.flag)
        elif name in filed:
            values[name] = _value(option, filed[name], f"{given['config']}: {name}")
        else:
            values[name] = False if option.kind == "flag" and option.default is None else option.default
    missing = [option for option in known.values() if option.required and values[option.name] is None]
    if missing:
        raise ValueError(f"{missing[0].flag} is missing: give {missing[0].help}")
    return values


def nearest(word: str, words: Sequence[str]) -> str:
    """``, is 'steps' meant?`` for the most similar word, nothing if none is similar."""
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f", is {found[0]!r} meant?" if found else ""


def _read_file(path: str, known: Mapping[str, Option]) -> dict[str, Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no config file {file}: check the path (it is relative to {Path.cwd()})")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no options: write one a line, as in 'preset: SEGQUANT_CFG'")
    allowed = [name for name in known if name != "config"]
    found = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in allowed:
            raise ValueError(f"{file}: {key!r} is unknown{nearest(name, allowed)}; the keys are {', '.join(allowed)}")
        found[name] = value
    return {name: value for name, value in found.items() if value is not None}


def _parsed(option: Option, given: Any) -> Any:
    """A value of the command line, which is text, as YAML would have given it."""
    if option.kind == "flag":
        return given
    if option.kind == "mapping":
        return dict(_pair(option, text) for text in given)
    if option.kind in ("integer", "number"):
        try:
            return int(given) if option.kind == "integer" else float(given)
        except ValueError:
            return given  # refused below, with the name of the option
    return given


def _pair(option: Option, text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{option.flag} takes KEY=VALUE, got {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        return key, value


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "text": (lambda value: isinstance(value, str), "a text"),
    "integer": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "number": (lambda value: isinstance(value, (int, float)) and not isinstance(value, bool), "a number"),
    "flag": (lambda value: isinstance(value, bool), "true or false"),
    "list": (lambda value: isinstance(value, list), "a list"),
    "mapping": (lambda value: isinstance(value, dict), "a mapping of names to values"),
}


def _value(option: Option, value: Any, where: str) -> Any:
    if option.kind == "list" and not isinstance(value, list):
        value = [value]
    allowed, what = _CHECKS[option.kind]
    if option.kind == "text" and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    # A check of its own says what else an option takes, such as a mapping of presets.
    if not allowed(value) and not (option.kind == "text" and option.check is not None and isinstance(value, dict)):
        raise ValueError(f"{where} must be {what}, got {value!r}")
    for item in value if option.kind == "list" else [value]:
        if option.choices and item not in option.choices:
            raise ValueError(
                f"{where} must be one of {', '.join(option.choices)}, got {item!r}{nearest(str(item), option.choices)}"
            )
    if option.check is None:
        return value
    try:
        return option.check(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _shown(option: Option) -> str:
    value = option.default
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return str(value)
