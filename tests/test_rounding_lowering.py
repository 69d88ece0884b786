"""Rounding that Inductor sees as one operator is compiled to what its operations are compiled to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from modelopt_ext.formats import QuantFormat
from modelopt_ext.kernels import rounding, rounding_lowering
from modelopt_ext.kernels.rounding import _as_operator, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES: list[tuple[QuantFormat, Sequence[int], Sequence[str], int]] = [
    (QuantFormat(8), (64,), ("none",), 1),
    (QuantFormat(4), (32, 32), ("none", "none"), 2),
    (QuantFormat((4, 3)), (8,) * 8, ("none",) * 8, 1),
    (QuantFormat(8), (24, 40), ("dual8", "none"), 2),
    (QuantFormat((4, 3)), (64,), ("dual",), 1),
]


def operands(case: int) -> list[Tensor]:
    _, segments, _, groups = CASES[case]
    generator = torch.Generator().manual_seed(case)
    shift, smoothing = torch.rand(64, generator=generator), 0.5 + torch.rand(groups, 64, generator=generator)
    scales = (0.01 + 0.02 * torch.rand(2, groups, len(segments), generator=generator)).unbind()
    x = torch.randn(7, 64, generator=generator)
    return [tensor.to(DEVICE) for tensor in (x, shift, smoothing, *scales)]


def rounded(run: Any, tensors: Sequence[Sequence[Tensor]], **more: Any) -> list[list[Tensor]]:
    found = []
    for (fmt, segments, polarity, _), (x, *rest) in zip(CASES, tensors, strict=True):
        result = run(torch.tanh(2 * x), fmt, segments, polarity, *rest, **more)
        codes = [result.codes] if result.negative is None else [result.codes, result.negative]
        negative = zip(result.negative_scales or [], polarity, strict=False)
        scales = [*result.scales, *(scale for scale, sign in negative if sign != "none")]  # nobody reads the others
        found.append([code.view(torch.int8) for code in codes] + scales)
    return found


def test_the_same_code_and_the_same_bits() -> None:
    rounding_lowering.register()
    tensors = [operands(case) for case in range(len(CASES))]
    torch._dynamo.reset()
    with torch.no_grad():
        as_operator = torch.compile(lambda *given: rounded(_as_operator, given, lowered="test"), fullgraph=True)
        found, codes = run_and_get_code(as_operator, *tensors)
        plain = torch.compile(lambda *given: rounded(reference, given), fullgraph=True)
        expected, plain_codes = run_and_get_code(plain, *tensors)
    assert not re.search(r"segquant\.\w+\.default\(", "".join(codes))  # nothing is left to call
    kernels = [code.count("async_compile.") for code in ("".join(codes), "".join(plain_codes))]
    assert kernels[0] == kernels[1]
    for some, others in zip(found, expected, strict=True):
        for one, other in zip(some, others, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_operator_by_itself(case: int) -> None:
    fmt, segments, polarity, _ = CASES[case]
    tensors = operands(case)
    x, shift, smoothing, scale, negative = tensors
    bits = [fmt.num_bits] if isinstance(fmt.num_bits, int) else list(fmt.num_bits)
    if set(polarity) == {"none"}:
        arguments: tuple[Any, ...] = (x, shift, smoothing, scale, list(segments), bits, "")
        operator = torch.ops.segquant.codes.default
    else:
        arguments = (x, shift, smoothing, scale, negative, list(segments), list(polarity), bits, "")
        operator = torch.ops.segquant.codes_of_signs.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    expected = reference(x, fmt, segments, polarity, shift, smoothing, scale, negative)
    found = operator(*arguments)
    codes, *rest = found if isinstance(found, tuple) else (found,)
    assert torch.equal(codes.view(torch.int8), expected.codes.view(torch.int8))
    for other in rest:
        assert expected.negative is not None
        assert torch.equal(other.view(torch.int8), expected.negative.view(torch.int8))


def test_who_can_not_compile_it_gets_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding.cuda, "lowered", lambda _: "")
    x, _, _, scale, _ = operands(0)
    found = rounding.quantize(x, QuantFormat(8), (64,), ("none",), scale=scale, compiled=True)
    assert torch.equal(found.codes, reference(x, QuantFormat(8), (64,), ("none",), scale=scale).codes)
