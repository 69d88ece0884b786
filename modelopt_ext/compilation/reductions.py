"""Norms with a row in registers: :func:`keep_rows`.

Inductor makes one pass over rows of up to 1024 values. Over longer ones, which are those of real models, its norms go
twice, and divide once for each value that they add to a running variance.
"""

from __future__ import annotations

import logging
from typing import Any

from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.dependencies import MemoryDep
from torch._inductor.virtualized import V

logger = logging.getLogger(__name__)

# Values of a row that Inductor's kernels of that kind hold at most.
LONGEST_ROW = 4096


class WholeRows(InductorChoices):
    """Inductor's heuristics, but for reductions over channels in what is compiled with a pass that ``keeps_rows``."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """Whether a reduction holds its rows in registers."""
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        if cooperative_reduction or not getattr(config.post_grad_custom_pre_pass, "keeps_rows", False):
            return False
        return V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_ROW) and _along_rows(features)


def _along_rows(features: Any) -> bool:
    """Whether what is reduced lies value by value in memory.

    Inductor's own hint also asks how other nodes of the kernel read. Norms of q and k, whose rotation reads pairs and
    whose results are transposed, would be left out.
    """
    reads = [read for node in features.reduction_nodes() for read in node.read_writes.reads]
    return all(
        isinstance(read, MemoryDep)
        and (not read.var_names or V.graph.sizevars.stride_hints(read.index, read.var_names)[-1] in (0, 1))
        for read in reads
    )


def keep_rows() -> None:
    """Have this thread's compilations use :class:`WholeRows`, if nobody has set heuristics of their own."""
    current = type(V.choices)
    if current is InductorChoices:
        V.set_choices_handler(WholeRows())
    elif current is not WholeRows:
        logger.warning("segquant: Inductor's choices are %s here; norms over long rows stay slower", current.__name__)
