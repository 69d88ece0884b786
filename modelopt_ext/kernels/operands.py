"""What a product of codes takes, as one value: :class:`Operands`."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The operands of :func:`modelopt_ext.kernels.scaled_mm`, M rows a group, N outputs, K channels.

    Attributes:
        a: activations' codes, (G M, K), int8 or float8_e4m3fn.
        b: weights' codes, (N, K), ``a``'s dtype.
        scale_a: float32, (G, 1), or (G M, 1) for scales per token.
        scale_b: float32, (N,).
        bias: (N,), any float dtype, or None.
        zero: the code that means 0.0.
        sum_b: int32 (N,), the sums of b's rows over the channels; needed with ``zero``.
        a2: a second matrix like ``a`` that is multiplied with the same ``b``, or None.
        scale_a2: its scale, of ``scale_a``'s shape, or None.
        sign: 1 or -1, for its product.
        groups: G, equal groups of outputs.
        start: the first channel to multiply.
        size: how many channels; -1 for all that follow.
    """

    a: Tensor
    b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    bias: Tensor | None = None
    zero: int = 0
    sum_b: Tensor | None = None
    a2: Tensor | None = None
    scale_a2: Tensor | None = None
    sign: int = 1
    groups: int = 1
    start: int = 0
    size: int = -1

    @property
    def rows(self) -> int:
        """M."""
        return self.a.shape[0] // self.groups

    @property
    def channels(self) -> slice:
        """Those to multiply."""
        return slice(self.start, self.a.shape[1] if self.size < 0 else self.start + self.size)

    @property
    def is_dual(self) -> bool:
        """Whether there are two products."""
        return self.a2 is not None

    def by_group(self) -> list[Operands]:
        """The same as one product for each group."""

        def parts(x: Tensor | None) -> tuple[Any, ...]:
            return (None,) * self.groups if x is None else x.chunk(self.groups)

        a, b, scale_a, scale_b = parts(self.a), parts(self.b), parts(self.scale_a), parts(self.scale_b)
        bias, sum_b, a2, scale_a2 = parts(self.bias), parts(self.sum_b), parts(self.a2), parts(self.scale_a2)
        return [
            self._replace(
                a=a[group],
                b=b[group],
                scale_a=scale_a[group],
                scale_b=scale_b[group],
                bias=bias[group],
                sum_b=sum_b[group],
                a2=a2[group],
                scale_a2=scale_a2[group],
                groups=1,
            )
            for group in range(self.groups)
        ]
