"""Fast products of codes on CUDA devices, and what they need.

Int8 codes go to Triton kernels, E4M3 codes to ``torch._scaled_mm`` (few rows: to Triton, too). What a device or a size
lacks is found out by trying, by the operands or by the compute capability, never by the GPU's name, and falls back to
the reference, which a log line says once.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import _disable_current_modes

from .operands import Operands

logger = logging.getLogger(__name__)

# cuBLAS takes E4M3 matrices with sizes that are multiples of this.
FP8_MULTIPLE = 16
# Tiles of few rows lie in one group of columns each; the narrowest has this many.
NARROWEST_TILE = 16
# Triton compiles no int8 product for older ones: asked, because a failed compilation prints the whole kernel.
OLDEST_CAPABILITY = (8, 0)


@cache
def has_triton() -> bool:
    """Whether the Triton kernels can be used."""
    try:
        from . import triton_gemm  # noqa: F401
    except ImportError:
        logger.warning("segquant: Triton is not installed (pip install triton); using the slow reference product")
        return False
    return True


@cache
def multiplies_int8(device: int) -> bool:
    """Whether the Triton kernels multiply int8 codes on that device."""
    if not has_triton():
        return False
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        logger.warning(
            "segquant: no int8 products on compute capability %d.%d (needs %d.%d); using the slow reference product",
            *capability,
            *OLDEST_CAPABILITY,
        )
    return capability >= OLDEST_CAPABILITY


@cache
def fp8_fits(device: int, rows: int, channels: int) -> bool:
    """Whether ``torch._scaled_mm`` multiplies by a weight (rows, channels) of E4M3 codes on that device."""
    if rows % FP8_MULTIPLE or channels % FP8_MULTIPLE:
        logger.warning(
            "segquant: a %d x %d E4M3 weight is no multiple of %d; using the slow reference product",
            rows,
            channels,
            FP8_MULTIPLE,
        )
        return False
    return multiplies_fp8(device)


@cache
def multiplies_fp8(device: int) -> bool:
    """Whether a device has E4M3 products; one without has no conversions to E4M3 in Triton, either."""
    with _disable_current_modes():  # the device is asked, not what a compiler has in its place
        # Dtypes are said: users set the default one to bfloat16.
        ones = torch.ones(FP8_MULTIPLE, 1, dtype=torch.float32, device=f"cuda:{device}")
        codes = torch.zeros(FP8_MULTIPLE, FP8_MULTIPLE, device=f"cuda:{device}").to(torch.float8_e4m3fn)
        try:
            torch._scaled_mm(codes, codes.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16)
        except (RuntimeError, ValueError) as error:
            logger.warning("segquant: no E4M3 products here (%s); using the slow reference product", error)
            return False
    return True


def multiplies(a: Tensor, b: Tensor) -> bool:
    """Whether a GPU has a fast product of these codes."""
    device = a.device.index or 0
    return multiplies_int8(device) if a.dtype == torch.int8 else fp8_fits(device, *b.shape)


@cache
def _lowered(device: int) -> str:
    """Tell Inductor what to make of the operators. Returns what its cached code depends on: a version of them."""
    if not multiplies_int8(device):
        return ""
    try:
        from . import lowering, rounding_lowering
    except ImportError as error:  # Inductor's own parts move
        logger.warning("segquant: compiled models call operators, which takes more of the host (%s)", error)
        return ""
    lowering.register(torch.ops.segquant.scaled_mm.default)
    rounding_lowering.register()
    names = "lowering.py", "triton_gemm.py", "rounding_lowering.py", "rounding.py"
    files = (Path(__file__).with_name(name) for name in names)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# Who compiles can't look into what is cached, but may take it as it is.
@torch.compiler.assume_constant_result
def _lowered_here(device: int) -> str:
    return _lowered(device)


@torch.compiler.assume_constant_result
def _fp8_fits_here(device: int, rows: int, channels: int) -> bool:
    return fp8_fits(device, rows, channels)


def lowered(a: Tensor) -> str:
    """The operator's last argument for codes ``a`` on a GPU: Inductor does not take up code of other kernels then."""
    return _lowered_here(a.device.index or 0)


def compiles_fp8(a: Tensor, b: Tensor) -> bool:
    """Whether a compiler may call ``torch._scaled_mm`` for E4M3 codes on a GPU."""
    return _fp8_fits_here(a.device.index or 0, *b.shape)


def code_gemm(operands: Operands, out_dtype: torch.dtype) -> Tensor:
    """:func:`modelopt_ext.kernels.scaled_mm` by the Triton kernels of :mod:`.triton_gemm`."""
    from .triton_gemm import launch_gemm

    return launch_gemm(operands, out_dtype)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``x`` the current one, where Triton launches: a device map's hooks move tensors, not that."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def fp8_gemm(operands: Operands, out_dtype: torch.dtype) -> Tensor:
    """:func:`modelopt_ext.kernels.scaled_mm` of E4M3 codes; each product is rounded to bfloat16.

    Sums run in the tensor cores' own accumulators (``use_fast_accum``), which keep 14 bits or more of each partial sum:
    30 dB below the rounding of the codes.
    """
    half, bias = torch.bfloat16, operands.bias
    if not operands.is_dual and out_dtype == half:
        return _row_wise(operands, operands.a, operands.scale_a, None if bias is None else bias.to(half))
    total = _row_wise(operands, operands.a, operands.scale_a, None).float()
    if operands.a2 is not None and operands.scale_a2 is not None:
        # No kernel shares the weight between two E4M3 products of many rows.
        second = _row_wise(operands, operands.a2, operands.scale_a2, None)
        total = total + operands.sign * second.float()
    return (total if bias is None else total + bias).to(out_dtype)


def for_scaled_mm(operands: Operands, out_dtype: torch.dtype) -> Operands:
    """The same as ``torch._scaled_mm`` takes it: a scale for each row of either matrix, and a bias in ``out_dtype``."""
    return operands._replace(
        scale_a=operands.scale_a.expand(operands.a.shape[0], 1).contiguous(),
        scale_b=operands.scale_b.contiguous(),
        bias=None if operands.bias is None else operands.bias.to(out_dtype),
    )


def _row_wise(operands: Operands, a: Tensor, scale_a: Tensor, bias: Tensor | None) -> Tensor:
    """One product with a scale per row of ``a`` and of ``b``, (M, N) bfloat16."""
    return torch._scaled_mm(
        _part(a, operands.channels),
        _part(operands.b, operands.channels).t(),
        scale_a=scale_a.expand(a.shape[0], 1).contiguous(),
        scale_b=operands.scale_b.reshape(1, -1).contiguous(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _part(x: Tensor, channels: slice) -> Tensor:
    """Its channels, where they lie, or copied where rows would not start and end at multiples of 16 bytes."""
    part = x if channels == slice(0, x.shape[1]) else x[:, channels]
    missing = -part.shape[1] % FP8_MULTIPLE
    fits = part.stride(1) == 1 and channels.start % FP8_MULTIPLE == 0 and part.stride(0) % FP8_MULTIPLE == 0
    if fits and not missing:
        return part
    # Not every dtype of 8-bit floats can be padded.
    return pad(part.view(torch.int8), (0, missing)).view(x.dtype) if missing else part.contiguous()
