"""Whether TensorRT will take a quantized ONNX file as it is meant: a check that needs no TensorRT.

    violations = check_tensorrt("transformer/model.onnx")
    assert_tensorrt("transformer/model.onnx")      # raises with all of them

The rules and where they come from are in :mod:`modelopt_ext.export.tensorrt_rules`; the command line that builds the
engine is :func:`modelopt_ext.export.trtexec.trtexec_command`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from onnx import ModelProto

from .qdq_graph import QdqGraph
from .tensorrt_rules import RULES, Violation
from .trtexec import trtexec_command

__all__ = ["TensorRTRuleError", "Violation", "assert_tensorrt", "check_tensorrt", "trtexec_command"]

logger = logging.getLogger(__name__)

_SHOWN = 20
"""Violations of one rule that an error message spells out."""


class TensorRTRuleError(ValueError):
    """A graph breaks TensorRT's rules.

    Attributes:
        violations: all of them, those with severity ``"info"`` left out.
    """

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__(_message(self.violations))


def check_tensorrt(model: ModelProto | str | os.PathLike[str]) -> list[Violation]:
    """Check an ONNX graph against TensorRT's rules of explicit quantization.

    Args:
        model: the model, or the path of its file; data in other files stay there.

    Returns:
        What breaks a rule (severity ``"error"``) and what is worth knowing (``"info"``); empty for a graph without
        either.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an ONNX model.
    """
    graph = QdqGraph(model)
    return [violation for rule in RULES for violation in rule(graph)]


def assert_tensorrt(model: ModelProto | str | os.PathLike[str]) -> None:
    """As :func:`check_tensorrt`, but raise if a rule is broken; findings of severity ``"info"`` are logged.

    Raises:
        TensorRTRuleError: names every node that breaks a rule, with the remedy.
        FileNotFoundError: there is no such file.
        ValueError: the file is not an ONNX model.
    """
    violations = check_tensorrt(model)
    for violation in violations:
        if violation.severity == "info":
            logger.info("%s", violation)
    errors = [violation for violation in violations if violation.severity == "error"]
    if errors:
        raise TensorRTRuleError(errors)


def _message(violations: Sequence[Violation]) -> str:
    by_rule: dict[str, list[Violation]] = {}
    for violation in violations:
        by_rule.setdefault(violation.rule, []).append(violation)
    lines = [f"the graph breaks {len(by_rule)} of TensorRT's rules in {len(violations)} places:"]
    for rule, group in by_rule.items():
        lines += [f"  {violation}" for violation in group[:_SHOWN]]
        if len(group) > _SHOWN:
            lines.append(f"  [{rule}] and {len(group) - _SHOWN} more")
    return "\n".join(lines)
