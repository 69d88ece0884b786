"""Which launch compiled code makes of a product of codes; that it computes the product is tested on a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from modelopt_ext.kernels import cuda
from modelopt_ext.kernels.operands import Operands
from modelopt_ext.kernels.scaled_mm import scaled_mm

lowering: Any = pytest.importorskip("modelopt_ext.kernels.lowering", reason="Triton is not installed")

E4M3, HALF = torch.float8_e4m3fn, torch.bfloat16


@pytest.mark.parametrize(
    ("rows", "codes", "expected", "changes"),
    [
        (64, torch.int8, "_few", {}),
        (65, torch.int8, "_tiles", {}),
        (16, E4M3, "_few", {}),
        (17, E4M3, "_row_wise", {}),
        (100, E4M3, "_row_wise", {"start": 16, "size": 32}),
        # What cuBLAS does not take as it lies, or in one product.
        (100, E4M3, None, {"start": 8, "size": 32}),
        (100, E4M3, None, {"size": 24}),
        (100, E4M3, None, {"dual": True}),
        (100, E4M3, None, {"out_dtype": torch.float32}),
        (100, torch.int8, "_tiles", {"dual": True, "start": 8, "size": 24}),
        # Groups of outputs have one launch where they are few rows in whole tiles.
        (4, torch.int8, "_few", {"groups": 2}),
        (4, torch.int8, None, {"groups": 4}),
        (100, torch.int8, None, {"groups": 2}),
        (100, torch.int8, None, {"device": "cpu"}),
        (100, torch.int8, None, {"multiplies": False}),
    ],
)
def test_what_a_product_becomes(
    rows: int, codes: torch.dtype, expected: str | None, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"groups": 1, "dual": False, "out_dtype": HALF, "device": "cuda", "multiplies": True} | changes
    monkeypatch.setattr(cuda, "multiplies", lambda *_: given["multiplies"])
    device = given["device"]
    with FakeTensorMode():
        a = torch.empty(given["groups"] * rows, 64, dtype=codes, device=device)
        b, one = torch.empty(32, 64, dtype=codes, device=device), torch.empty(1, 1, device=device)
        second = {"a2": torch.empty_like(a), "scale_a2": one} if given["dual"] else {}
        scale_b, bias = torch.empty(32, device=device), torch.empty(32, dtype=HALF, device=device)
        part = {"start": given.get("start", 0), "size": given.get("size", 64)}
        values = Operands(a, b, one, scale_b, bias, groups=given["groups"], **second, **part)
        with V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator())):
            launch = lowering._launch_of(values, given["out_dtype"])
    assert (launch and launch.__name__) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(not hasattr(triton_kernel_wrap, lowering.FINDS_WRITTEN), reason="this PyTorch asks for more")
def test_inductor_finds_what_the_kernels_are_said_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    find, found = getattr(triton_kernel_wrap, lowering.FINDS_WRITTEN), []

    def note(*arguments: Any) -> Any:
        found.append(find(*arguments))
        return found[-1]

    monkeypatch.setattr(triton_kernel_wrap, lowering.FINDS_WRITTEN, note)
    monkeypatch.setattr(lowering, "_known_to_write", lambda _: nullcontext())
    b, scale_b = torch.ones(32, 64, dtype=torch.int8, device="cuda"), torch.ones(32, device="cuda")
    one = torch.ones(1, 1, device="cuda")

    def products(*codes: torch.Tensor) -> list[torch.Tensor]:
        alone = [scaled_mm(a, b, one, scale_b) for a in codes]
        return alone + [scaled_mm(a, b, one, scale_b, a2=a, scale_a2=one) for a in codes]

    codes = [torch.ones(rows, 64, dtype=torch.int8, device="cuda") for rows in (2, 100)]
    outputs = torch.compile(products, fullgraph=True)(*codes)
    assert found == [[lowering.OUTPUT]] * 4
    assert all(torch.equal(x, y) for x, y in zip(outputs, products(*codes), strict=True))
