"""The product of two matrices of 8-bit codes, scaled on the way out: :func:`scaled_mm`.

:func:`reference` runs on every device and defines the numbers; :mod:`.cuda` has fast products for GPUs. Who traces or
compiles sees one node with a schema, the operator ``segquant::scaled_mm``, and not what is chosen behind it;
:mod:`.lowering` tells Inductor. Only E4M3 products of many rows are ``aten::_scaled_mm`` to everybody on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cuda
from .operands import Operands

# Sums of that many products of int8 codes stay below 2^24, where float32 counts in ones.
EXACT_CHANNELS = 1024
# Rows a group up to which one kernel, which is bound by reading the weight, makes the products of all groups.
FEW_ROWS = 64
# With E4M3 codes cuBLAS is faster once those do not fit in one tile.
FEW_ROWS_OF_E4M3 = 16


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    zero: int = 0,
    sum_b: Tensor | None = None,
    a2: Tensor | None = None,
    scale_a2: Tensor | None = None,
    sign: int = 1,
    groups: int = 1,
    segment: slice | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``(scale_a * ((a - zero) . b^T) + sign * scale_a2 * ((a2 - zero) . b^T)) * scale_b + bias``.

    Products are summed in int32 (integers) or float32 (E4M3). With G ``groups``, the N outputs are cut into G equal
    groups, each with activation codes of its own: a is (G M, K), group after group, and so are the other operands that
    have a's rows; G scales stand for one a group.

    Args:
        a: activations' codes, (M, K), int8 or float8_e4m3fn.
        b: weights' codes, (N, K), ``a``'s dtype.
        scale_a: float32, (1, 1), or (M, 1) for scales per token.
        scale_b: float32, (N,).
        bias: (N,), any float dtype, or None.
        zero: the code that means 0.0; -128 makes int8 hold the unsigned codes 0..255. Integers only.
        sum_b: int32 (N,), the sums of b's rows; needed with ``zero``.
        a2: a second matrix like ``a`` that is multiplied with the same ``b``, or None.
        scale_a2: its scale, of ``scale_a``'s shape.
        sign: 1 or -1, for its product.
        groups: G, which divides M and N.
        segment: the channels to multiply, from start to stop; all by default. Matrices that come whole need no copy of
            a part, and the compiler rounds all of a row at once. Give it, too, where weight and bias are parts,
            or Inductor takes such a bias for all of its tensor.
        out_dtype: float32 by default.

    Returns:
        (M, N) in ``out_dtype``, rounded once; E4M3 products on a GPU are rounded to bfloat16 before that.

    Raises:
        ValueError: operands that do not go together.
    """
    start, size = (0, a.shape[1]) if segment is None else (segment.start, segment.stop - segment.start)
    out_dtype = out_dtype or torch.float32
    if launches_directly() and not a.is_meta:
        # Operators are for those who look at them. By itself one costs more time than a launch.
        return _product(a, b, scale_a, scale_b, bias, zero, sum_b, a2, scale_a2, sign, groups, start, size, out_dtype)
    operands = Operands(a, b, scale_a, scale_b, bias, zero, sum_b, a2, scale_a2, sign, groups, start, size)
    if not a.is_cuda:
        return torch.ops.segquant.scaled_mm(*operands, out_dtype)
    many = operands.rows > few_rows(a.dtype)  # asked on GPUs only: whoever compiles is bound to the answer
    if many and groups == 1 and a.dtype != torch.int8 and a2 is None and cuda.compiles_fp8(a, b):
        if segment is None:
            return cuda.fp8_gemm(operands, out_dtype)
        # Copies of scales are made where the compiler can join them.
        operands = cuda.for_scaled_mm(operands, out_dtype)
    return torch.ops.segquant.scaled_mm(*operands, out_dtype, cuda.lowered(a))


def few_rows(codes: torch.dtype) -> int:
    """Rows a group up to which the kernel of few rows is the fastest."""
    return FEW_ROWS if codes == torch.int8 else FEW_ROWS_OF_E4M3


def launches_directly() -> bool:
    """Whether nothing traces or compiles what runs."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return torch._C._len_torch_dispatch_stack() == 0


def _product_of(operands: Operands, out_dtype: torch.dtype) -> Tensor:
    a, b, groups = operands.a, operands.b, operands.groups
    if not a.is_cuda or not cuda.multiplies(a, b):
        return reference(*operands).to(out_dtype)
    few = operands.rows <= few_rows(a.dtype) and cuda.has_triton()
    if groups > 1 and not (few and (b.shape[0] // groups) % cuda.NARROWEST_TILE == 0):
        return torch.cat([_product_of(part, out_dtype) for part in operands.by_group()], dim=1)
    if a.dtype == torch.int8 or few:
        return cuda.code_gemm(operands, out_dtype)
    return cuda.fp8_gemm(operands, out_dtype)


def _product(*arguments: Any) -> Tensor:
    operands, out_dtype = _checked(*arguments)
    return _product_of(operands, out_dtype)


def _checked(*arguments: Any) -> tuple[Operands, torch.dtype]:
    """The operator's arguments; how it is compiled changes nothing here."""
    values = arguments[: len(Operands._fields)]
    operands = Operands(*values)
    check(operands)
    return operands, arguments[len(values)]


# Any layout will do: the compiler would copy what it computes for every operator that asks for one.
torch.library.define(
    "segquant::scaled_mm",
    "(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, int zero, Tensor? sum_b, Tensor? a2, "
    "Tensor? scale_a2, int sign, int groups, int start, int size, ScalarType out_dtype, str lowered='') -> Tensor",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)
torch.library.impl("segquant::scaled_mm", "CompositeExplicitAutograd", _product)


@torch.library.register_fake("segquant::scaled_mm")
def _(*arguments: Any) -> Tensor:
    operands, out_dtype = _checked(*arguments)
    return operands.a.new_empty((operands.rows, operands.b.shape[0]), dtype=out_dtype)


def reference(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    zero: int = 0,
    sum_b: Tensor | None = None,
    a2: Tensor | None = None,
    scale_a2: Tensor | None = None,
    sign: int = 1,
    groups: int = 1,
    start: int = 0,
    size: int = -1,
) -> Tensor:
    """:func:`scaled_mm` in plain torch, float32, over ``size`` channels (-1: all that follow) from ``start`` on."""
    channels = slice(start, start + size if size >= 0 else None)
    b = b[:, channels]

    def scaled(codes: Tensor, scale: Tensor) -> Tensor:
        return _group_products(codes[:, channels], b, zero, sum_b, groups) * _by_group(scale, groups)

    with torch.autocast(a.device.type, enabled=False):  # it would round sums of codes to 16 bits
        total = scaled(a, scale_a)
        if a2 is not None and scale_a2 is not None:
            total = total + sign * scaled(a2, scale_a2)
    # (G, M, N / G) to (M, N).
    total = total.transpose(0, 1).flatten(1) * scale_b
    return total if bias is None else total + bias


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """(G M, n) to (G, M, n)."""
    return rows.unflatten(0, (groups, -1))


def _group_products(a: Tensor, b: Tensor, zero: int, sum_b: Tensor | None, groups: int) -> Tensor:
    """``(a - zero) . b^T`` of each group, (G, M, N / G) float32."""
    a, b = _by_group(a, groups), _by_group(b, groups)
    if a.dtype != torch.int8:
        return a.float() @ b.float().mT
    product = _integer_product(a, b)
    if zero and sum_b is not None:
        product = product - zero * sum_b.reshape(groups, 1, -1)
    return product.float()


def _integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a . b^T of int8 matrices (G, M, K) and (G, n, K) in int32, exact, by float32 products.

    Float products are what CPUs without 8-bit instructions are fast at (``torch._int_mm`` is 30 times slower there),
    and GPUs have no int8 product for every size.
    """
    total = torch.zeros(*a.shape[:2], b.shape[1], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[2], EXACT_CHANNELS):
        chunk = slice(start, start + EXACT_CHANNELS)
        total += (a[..., chunk].float() @ b[..., chunk].float().mT).to(torch.int32)
    return total


def check(operands: Operands) -> None:
    """Raise ValueError for operands that do not go together."""
    a, b, a2, groups = operands.a, operands.b, operands.a2, operands.groups
    if a.dtype != b.dtype or a.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"scaled_mm multiplies int8 by int8 or float8_e4m3fn by the same, got {a.dtype} by {b.dtype}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"scaled_mm: codes of {a.shape[1]} channels do not go with a weight of {b.shape[1]}")
    if operands.zero and (a.dtype != torch.int8 or operands.sum_b is None):
        raise ValueError("scaled_mm: only integer codes have a zero point, and it needs sum_b")
    if (a2 is None) != (operands.scale_a2 is None) or (a2 is not None and (a2.dtype != a.dtype or a2.shape != a.shape)):
        raise ValueError("scaled_mm: a2 needs a's dtype and shape, and scale_a2")
    if groups < 1 or a.shape[0] % groups or b.shape[0] % groups:
        raise ValueError(f"scaled_mm: {groups} groups do not divide {a.shape[0]} rows and {b.shape[0]} outputs")
