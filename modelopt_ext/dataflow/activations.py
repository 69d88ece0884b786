"""Polarity: which pointwise ops make, keep or end a tag, and activations that are written out by hand.

A tag (:data:`modelopt_ext.plan.ACTIVATIONS`) says that values are polar: negatives small and many, positives large.
SiLU and GELU make it, a positive factor or a clamp keeps it, a product with another tensor turns it into ``"gated"``,
anything else ends it.

Models also write activations out: ``x * sigmoid(1.702 * x)`` (CLIP's quick GELU),
``0.5 * x * (1 + tanh(c * (x + a * x**3)))`` (T5's GELU). They share a form, *x times a non-negative function of x that
rises from 0 to 1*, found by following pointwise functions of one tensor, the *root*:

    form        values
    "id"        the root times a positive number; "root" itself if that number is 1
    "squash"    tanh or erf of a function of the root
    "gate"      sigmoid of a function of the root, or 1 + "squash", times a positive number
    "swish"     a "gate" that is exactly sigmoid(root)
    "function"  anything else that depends on the root alone
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

ACTIVATION_OPS = {"silu": "silu", "gelu": "gelu"}
"""Op name to the tag it makes."""

_KEEPS_TAG = {
    "clamp",
    "clamp_min",
    "clamp_max",
    "clip",
    "nan_to_num",
    "masked_fill",
    "copy",
    "native_dropout",
    "dropout",
}
"""Pointwise ops that leave the tag of their first tensor."""

_GATES = ("gate", "swish")
"""Kinds of non-negative values."""


FOLLOWED_OPS = {"mul", "div", "add", "pow", "tanh", "erf", "sigmoid"}
"""Ops of which activations are written out."""


class Form(NamedTuple):
    """A tensor as a function of one other tensor, see the table above."""

    root: int
    kind: str


def form_of(name: str, operands: Sequence[Form], numbers: Sequence[Any]) -> Form | None:
    """The form of a pointwise result.

    Args:
        name: the op without namespace, overload and trailing underscore.
        operands: the forms of its tensor operands.
        numbers: its number operands.

    Returns:
        None if the result depends on more than one root.
    """
    root = operands[0].root
    if any(form.root != root for form in operands[1:]):
        return None
    kind = operands[0].kind if len(operands) == 1 else "function"
    if len(operands) > 1:
        return Form(root, "function")
    if name == "sigmoid":
        return Form(root, "swish" if kind == "root" else "gate")
    if name in ("tanh", "erf"):
        return Form(root, "squash")
    if name == "add" and kind == "squash" and len(numbers) == 1 and numbers[0] == 1:
        return Form(root, "gate")
    if name in ("mul", "div") and kind != "function" and _is_positive(numbers):
        return Form(root, {"root": "id", "id": "id", "gate": "gate", "swish": "gate"}.get(kind, "function"))
    return Form(root, "function")


def self_gated(first: Form | None, second: Form | None) -> str:
    """The tag of ``first * second`` if that is an activation written out by hand, else ""."""
    if first is None or second is None or first.root != second.root:
        return ""
    kinds = {first.kind, second.kind}
    if not kinds & {"root", "id"}:
        return ""
    if "swish" in kinds:
        return "silu"
    return "gelu" if "gate" in kinds else ""


def is_gate(form: Form | None) -> bool:
    """Whether the values are known to be non-negative."""
    return form is not None and form.kind in _GATES


def tag_of(name: str, tags: Sequence[str], gates: Sequence[bool], numbers: Sequence[Any]) -> str:
    """The tag of a pointwise result.

    Args:
        name: the op without namespace, overload and trailing underscore.
        tags: one tag per tensor operand.
        gates: whether each tensor operand is known to be non-negative (:func:`is_gate`).
        numbers: its number operands.
    """
    if not any(tags):
        return ""
    if name in _KEEPS_TAG:
        return tags[0]
    if name == "mul" and len(tags) == 2:
        if gates[0] != gates[1]:
            return tags[0] or tags[1]
        return "gated"
    if name in ("mul", "div") and len(tags) == 1 and _is_positive(numbers):
        return tags[0]
    return ""


def _is_positive(numbers: Sequence[Any]) -> bool:
    return len(numbers) == 1 and isinstance(numbers[0], int | float) and numbers[0] > 0
