"""What Inductor makes of ``segquant::scaled_mm``: launches, where an operator in Python costs the host 60 us a call.

A ``triton_op`` would do the same for the kernel of int8 codes, but PyTorch looks into such a kernel four times for each
call in a model, 0.07 s each. Here it does so once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor, fx
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.virtualized import V

from . import cuda, triton_gemm
from .operands import Operands
from .scaled_mm import few_rows

aten = torch.ops.aten

OUTPUT = "out_ptr"  # of both kernels
FINDS_WRITTEN = "identify_mutated_tensors"


def register(operator: torch._ops.OpOverload) -> None:
    """Teach Inductor an operator that takes :class:`Operands`, the output's dtype, and what is of no use here."""
    fallback, count = fallback_handler(operator), len(Operands._fields)

    @register_lowering(operator, type_promotion_kind=None)
    def _(*arguments: Any) -> Any:
        boxes, out_dtype = Operands(*arguments[:count]), arguments[count]
        # The tensors that stand for them in the graph know their sizes and strides.
        values = Operands(*map(_value, V.graph.current_node.args[:count]))
        launch = _launch_of(values, out_dtype)
        return fallback(*arguments) if launch is None else launch(boxes, values, out_dtype)


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _launch_of(values: Operands, out_dtype: torch.dtype) -> Callable[..., Any] | None:
    """What makes the launch of a product, or None where its operator has to be called."""
    a, rows, columns, sizes = values.a, _size(values.rows), values.b.shape[0], V.graph.sizevars
    if not a.is_cuda or not cuda.multiplies(a, values.b):
        return None
    if sizes.statically_known_leq(rows, few_rows(a.dtype)):
        group = columns // values.groups
        return _few if group == columns or group % cuda.NARROWEST_TILE == 0 else None
    if values.groups > 1 or not sizes.statically_known_gt(rows, few_rows(a.dtype)):
        return None
    if a.dtype == torch.int8:
        return _tiles
    return _row_wise if _fits_cublas(values, out_dtype) else None


def _fits_cublas(values: Operands, out_dtype: torch.dtype) -> bool:
    """Whether one ``torch._scaled_mm`` of parts that lie where they are does it all."""
    a, b, bias = values.a, values.b, values.bias
    numbers = values.start, values.channels.stop, a.stride(0), b.stride(0)
    return (
        not values.is_dual
        and out_dtype == torch.bfloat16
        and (bias is None or bias.dtype == out_dtype)
        and all(isinstance(number, int) and number % cuda.FP8_MULTIPLE == 0 for number in numbers)
        and a.stride(1) == b.stride(1) == 1
    )


def _row_wise(boxes: Operands, values: Operands, out_dtype: torch.dtype) -> Any:
    """The extern kernel of ``aten::_scaled_mm``."""

    def part(box: Any, value: Tensor) -> Any:
        whole = ir.ExternKernel.require_exact_strides(box, value.stride())
        return lowerings[aten.slice.Tensor](whole, 1, values.start, values.channels.stop)

    columns = lowerings[aten.permute.default](part(boxes.b, values.b), [1, 0])
    scale_b = lowerings[aten.view.default](boxes.scale_b, [1, values.b.shape[0]])
    rows, scale_a = part(boxes.a, values.a), boxes.scale_a
    bias = boxes.bias
    if bias is not None and isinstance(bias.data, ir.BaseView):
        # Inductor takes it for all of the tensor that it is a part of.
        bias = ir.ExternKernel.copy_input(bias)
    return lowerings[aten._scaled_mm.default](rows, columns, scale_a, scale_b, bias, None, out_dtype, True)


def _tiles(boxes: Operands, values: Operands, out_dtype: torch.dtype) -> Any:
    """A launch of the Triton kernel of many rows."""
    values = Operands(*map(_as_read, values))
    # How many there are decides for tiles alone, which are right for any number.
    counted = values.rows if isinstance(values.rows, int) else values.rows.node.hint
    tma = triton_gemm.fits_descriptors(values, out_dtype)
    processors = triton_gemm.processor_count(values.a.device)
    tiles = triton_gemm.fitting_tiles(counted, values.b.shape[0], processors, tma, values.is_dual)
    grid, constants = triton_gemm.tiles_grid(values, tma)
    kernel = _over(triton_gemm._tiles.fn, tiles)
    return _triton(boxes, values, out_dtype, kernel, grid, triton_gemm.numbers_of(values), constants)


def _few(boxes: Operands, values: Operands, out_dtype: torch.dtype) -> Any:
    """A launch of the Triton kernel of few."""
    values = Operands(*map(_as_read, values))
    columns, channels = values.b.shape
    group = columns // values.groups
    tile = triton_gemm.few_rows_tile(columns, channels, group, triton_gemm.processor_count(values.a.device))
    kernel = _over(triton_gemm._few_rows, [tile])
    grid, constants = triton_gemm.few_rows_grid(values)
    return _triton(boxes, values, out_dtype, kernel, grid, (*triton_gemm.numbers_of(values), group), constants)


def _over(kernel: Any, tiles: list[triton.Config]) -> Any:
    """A kernel with tiles to choose from."""
    return triton.autotune(configs=tiles, key=[])(kernel)


def _triton(
    boxes: Operands,
    values: Operands,
    out_dtype: torch.dtype,
    kernel: Any,
    grid: triton_gemm.Grid,
    numbers: tuple[Any, ...],
    constants: dict[str, Any],
) -> Any:
    """A launch of a tuned kernel on operands as it reads them; ``numbers`` follow the tensors, and are no constants."""
    given: dict[str, Any] = boxes._asdict()
    read: dict[str, Any] = {
        name: ir.ExternKernel.require_exact_strides(given[name], value.stride())
        for name, value in values._asdict().items()
        if isinstance(value, Tensor)
    }
    size = [_size(values.rows), values.b.shape[0]]
    out = lowerings[aten.empty_strided.default](size, [size[1], 1], dtype=out_dtype, device=values.a.device)
    tensors = triton_gemm.with_stand_ins(boxes._replace(**read), out)
    with _known_to_write(OUTPUT):
        ir.UserDefinedTritonKernel(
            kernel_idx=triton_kernel_wrap.kernel_side_table.add_kernel(kernel),
            grid=[tuple(map(_size, grid(config.kwargs))) for config in kernel.configs],
            tma_descriptor_metadata={},
            kernel_args=dict(zip(kernel.arg_names, (*tensors, *map(_size, numbers)), strict=False)) | constants,
        )
    return out


@contextmanager
def _known_to_write(name: str) -> Iterator[None]:
    """Tell Inductor which argument a kernel writes; to find out, it translates the kernel anew for each launch.

    Compilations have a lock, so nobody else asks meanwhile. PyTorch after 2.11 asks another function for more.
    """
    if not hasattr(triton_kernel_wrap, FINDS_WRITTEN):
        yield
        return
    with patch.object(triton_kernel_wrap, FINDS_WRITTEN, lambda *_: [name]):
        yield


def _as_read(value: Any) -> Any:
    """What stands for an operand as the kernel reads it: rows or vectors in one piece."""
    if not isinstance(value, Tensor) or (value.dim() == 2 and value.stride(1) == 1):
        return value
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _size(number: Any) -> Any:
    """As Inductor takes it."""
    return number.node.expr if isinstance(number, torch.SymInt) else number
