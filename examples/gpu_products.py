"""Single kernels of packed Linears: matrix products of FLUX.1's shapes, and rounding to codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from gpu_timing import in_turns, product_milliseconds
from torch import Tensor

from modelopt_ext.formats import QuantFormat
from modelopt_ext.kernels import quantize, scaled_mm
from modelopt_ext.kernels.scaled_mm import reference

# (name, rows, channels, outputs): 4096 image and 512 text tokens at 1024 x 1024.
SHAPES = (
    ("QKV, 4608 tokens", 4608, 3072, 3072),
    ("QKV fused, 4608 tokens", 4608, 3072, 9216),
    ("ff.net.0", 4608, 3072, 12288),
    ("ff.net.2", 4608, 12288, 3072),
    ("AdaLN, batch 1", 1, 3072, 18432),
)
TINY_SHAPES = (("tiny", 32, 64, 48),)
FEW_ROWS = 64  # below, what counts is how fast the weight is read
COPIES = 4  # sets of inputs, so that no product finds its own in the cache
LARGEST = 4.5  # standard deviations that the largest code stands for


def ways(m: int, k: int, n: int, device: torch.device) -> dict[str, Callable[[int], Tensor]]:
    """Ways to multiply (m, k) activations by an (n, k) weight; the argument rotates among the sets of inputs."""
    half = torch.bfloat16
    x = [torch.randn(m, k, device=device, dtype=half) for _ in range(COPIES)]
    w = [torch.randn(n, k, device=device, dtype=half) for _ in range(COPIES)]
    a, b = ([_int8(value) for value in values] for values in (x, w))
    xf, wf = ([value.to(torch.float8_e4m3fn) for value in values] for values in (x, w))
    one, scalar = torch.ones(1, 1, device=device), torch.ones((), device=device)
    rows, scale, bias = torch.rand(m, 1, device=device), torch.rand(n, device=device), x[0].new_ones(n)
    sums = [codes.sum(dim=1, dtype=torch.int32) for codes in b]

    def dual8(i: int) -> Tensor:
        i, other = i % COPIES, (i + 1) % COPIES
        return scaled_mm(a[i], b[i], one, scale, bias, -128, sums[i], a[other], one, -1, out_dtype=half)

    def bare(i: int, fast: bool) -> Tensor:
        i %= COPIES
        return torch._scaled_mm(xf[i], wf[i].t(), scale_a=scalar, scale_b=scalar, out_dtype=half, use_fast_accum=fast)

    return {
        "bf16": lambda i: torch.nn.functional.linear(x[i % COPIES], w[i % COPIES], bias),
        "torch._int_mm": lambda i: torch._int_mm(a[i % COPIES], b[i % COPIES].t()),
        "int8 static": lambda i: scaled_mm(a[i % COPIES], b[i % COPIES], one, scale, bias, out_dtype=half),
        "int8 per token": lambda i: scaled_mm(a[i % COPIES], b[i % COPIES], rows, scale, bias, out_dtype=half),
        "int8 dual8": dual8,
        "torch._scaled_mm": lambda i: bare(i, False),
        "torch._scaled_mm, fast accumulation": lambda i: bare(i, True),
        "fp8 static": lambda i: scaled_mm(xf[i % COPIES], wf[i % COPIES], one, scale, bias, out_dtype=half),
    }


def _int8(values: Tensor) -> Tensor:
    """Codes as calibrated scales give them: a bell, not all codes alike often."""
    return (values.float() * (127 / LARGEST)).round().clamp(-128, 127).to(torch.int8)


def check(m: int, k: int, n: int, device: torch.device) -> None:
    """Compare our products with the reference.

    Raises:
        AssertionError: they differ by more than the output's rounding.
    """
    a, a2 = (torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device) for _ in range(2))
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    one, scale = torch.ones(1, 1, device=device), torch.rand(n, device=device)
    sums = b.sum(dim=1, dtype=torch.int32)
    for arguments in ((a, b, one, scale), (a, b, one, scale, scale, -128, sums, a2, one, -1)):
        torch.testing.assert_close(scaled_mm(*arguments), reference(*arguments), rtol=1e-6, atol=1e-3)


def products(
    device: torch.device, shapes: Sequence[tuple[str, int, int, int]], report: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Milliseconds of every product and way."""
    results: dict[str, dict[str, float]] = {}
    for name, m, k, n in shapes:
        check(m, k, n, device)
        possible = {}
        for way, work in ways(m, k, n, device).items():
            try:
                work(0)
                possible[way] = work
            except (RuntimeError, ValueError) as error:
                report(f"{name}, {way}: not possible here ({str(error).splitlines()[0][:100]})")
        row = results[name] = in_turns(possible, device)
        few = m < FEW_ROWS
        rates = {way: (n * k if few else 2 * m * k * n) / ms / 1e9 for way, ms in row.items()}
        ceiling = max(row[way] and rates[way] for way in rates if way.startswith("torch._scaled_mm") or way == "bf16")
        unit = "TB/s" if few else "TFLOP/s"
        report(
            f"{name} ({m} x {k} x {n}): "
            + ", ".join(
                f"{way} {ms * 1e3:.0f} us ({rates[way]:.{2 if few else 0}f} {unit}, {rates[way] / ceiling:.0%})"
                for way, ms in row.items()
            )
        )
    return results


def rounding(device: torch.device, tiny: bool, report: Callable[[str], None]) -> dict[str, float]:
    """Milliseconds of rounding (4608, 12288) activations by the kernel that runs outside of ``torch.compile``."""
    rows, channels = (64, 256) if tiny else (4608, 12288)
    x = [torch.randn(rows, channels, device=device, dtype=torch.bfloat16) for _ in range(COPIES)]
    shift, smoothing = torch.randn(channels, device=device), torch.rand(1, channels, device=device) + 0.5
    scale, fmt = torch.full((1, 1), LARGEST / 127, device=device), QuantFormat(8)
    # (polarity, whether scales are static, bytes written for each value)
    cases = {
        "static": ("none", True, 1),
        "per token": ("none", False, 1),
        "static, both signs": ("dual8", True, 2),
        "per token, both signs": ("dual8", False, 2),
    }
    results = {}
    for name, (polarity, static, written) in cases.items():
        scales = (scale, scale) if static else (None, None)

        def work(i: int, polarity: str = polarity, scales: tuple[Tensor | None, Tensor | None] = scales) -> object:
            return quantize(x[i % COPIES], fmt, (channels,), (polarity,), shift, smoothing, *scales)

        results[name] = product_milliseconds(work, device)
        moved = rows * channels * (2 + written) / results[name] / 1e9
        report(f"rounding {rows} x {channels}, shift and smoothing, {name}: {moved:.2f} TB/s")
    results["copy"] = product_milliseconds(lambda i: x[i % COPIES].clone(), device)
    report(f"copy of the same: {rows * channels * 4 / results['copy'] / 1e9:.2f} TB/s")
    return results
