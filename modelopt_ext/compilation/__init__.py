"""What to tell ``torch.compile`` about diffusion transformers: :func:`compile_options`.

Once Linears are fast, a step waits for what lies between them. These options change three things that the compiler
makes slow kernels of: :mod:`.rotary`, :mod:`.scales`, :mod:`.reductions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from .reductions import keep_rows
from .rotary import turn_pairs
from .scales import spread_together
from .workers import start_workers


def compile_options() -> dict[str, Any]:
    """``options`` for ``torch.compile``, ``nn.Module.compile`` and diffusers' ``compile_repeated_blocks``.

    What changes in the numbers is the order of sums inside norms, as with all of Inductor's tuning. Models that are not
    packed may be compiled with them as well. On a GPU this starts Inductor's compile workers: ask early, and they are
    there when they are needed.

    Raises:
        ValueError: Inductor's ``post_grad_custom_pre_pass``, whose place is taken, is set already.
    """
    if config.post_grad_custom_pre_pass is not None:
        raise ValueError(
            "torch._inductor.config.post_grad_custom_pre_pass is set, and these options would replace it: call "
            "modelopt_ext.compilation.Rewrites()(graph) in that pass instead, and compile without these options"
        )
    start_workers()
    return {"post_grad_custom_pre_pass": Rewrites()}


@dataclass(frozen=True)
class Rewrites(CustomGraphPass):
    """A pass of Inductor's over a graph of ATen operators, in place."""

    keeps_rows: ClassVar[bool] = True

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite what is found."""
        keep_rows()
        turn_pairs(graph)
        spread_together(graph)

    def uuid(self) -> Any:
        """What compiled graphs are kept by."""
        return get_hash_for_files(tuple(str(path) for path in sorted(Path(__file__).parent.glob("*.py"))))
