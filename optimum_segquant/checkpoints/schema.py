"""Checking a checkpoint's ``quantization_config`` against the JSON schema that ships with the package.

The schema uses a small part of JSON Schema (types, constants, enumerations, required and additional properties, items,
lower bounds); :func:`violations` knows that part and refuses a schema that uses more: nothing is left unchecked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

SCHEMA_FILE = "segquant.schema.json"

_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "null": lambda value: value is None,
}
_ANNOTATIONS = {"$schema", "title", "description"}
_KNOWN = {
    *_ANNOTATIONS,
    "type",
    "const",
    "enum",
    "required",
    "properties",
    "additionalProperties",
    "items",
    "minItems",
    "minimum",
}


@cache
def schema() -> dict[str, Any]:
    """The schema of ``quantization_config``."""
    return json.loads(files(__package__).joinpath(SCHEMA_FILE).read_text())


def violations(value: Any, rules: Mapping[str, Any], where: str = "quantization_config") -> list[str]:
    """What is wrong with ``value``, one sentence each; empty if nothing is.

    Args:
        value: decoded JSON.
        rules: a JSON schema.
        where: what to call ``value``.

    Raises:
        NotImplementedError: the schema uses a rule that is not known here.
    """
    if unknown := set(rules) - _KNOWN:
        raise NotImplementedError(f"the schema uses {sorted(unknown)}, which this validator does not know")
    found = _value_violations(value, rules, where)
    if found:
        return found
    if isinstance(value, dict):
        found += _object_violations(value, rules, where)
    if isinstance(value, list):
        if len(value) < rules.get("minItems", 0):
            found.append(f"{where} has {len(value)} entries, needs {rules['minItems']}")
        for index, item in enumerate(value):
            found += violations(item, rules.get("items", {}), f"{where}[{index}]")
    return found


def _value_violations(value: Any, rules: Mapping[str, Any], where: str) -> list[str]:
    if "type" in rules:
        allowed = [rules["type"]] if isinstance(rules["type"], str) else rules["type"]
        if not any(_TYPES[name](value) for name in allowed):
            return [f"{where} is {value!r}, not of type {' or '.join(allowed)}"]
    choices = [rules["const"]] if "const" in rules else rules.get("enum")
    if choices is not None and not any(value == choice and type(value) is type(choice) for choice in choices):
        return [f"{where} is {value!r}, not {' or '.join(map(repr, choices))}"]
    if "minimum" in rules and value is not None and value < rules["minimum"]:
        return [f"{where} is {value}, below {rules['minimum']}"]
    return []


def _object_violations(value: Mapping[str, Any], rules: Mapping[str, Any], where: str) -> list[str]:
    properties = rules.get("properties", {})
    found = [f"{where} has no {key!r}" for key in rules.get("required", ()) if key not in value]
    for key, item in value.items():
        if key in properties:
            found += violations(item, properties[key], f"{where}.{key}")
        elif rules.get("additionalProperties", True) is False:
            found.append(f"{where} has an unknown key {key!r}")
    return found
