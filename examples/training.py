"""A training loop for small models on one GPU: bfloat16 copy, float32 masters, moving average, CUDA graphs.

A model of five million parameters computes a step in a few milliseconds, less than Python needs to launch its kernels.
So a step, from drawing the data to the optimizer, is captured once as a CUDA graph and replayed. On a CPU the same
steps run one by one, in float32.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

log = logging.getLogger(__name__)

EMA_DECAY = 0.999
LOG_EVERY = 1000  # steps
TIMED = (40, 140)  # the steps between which the speed is measured

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. ``seconds`` cuts ``steps`` down, once the speed is known, to what fits."""

    steps: int
    peak: float  # learning rate
    seconds: float | None = None
    warmup: int = 200  # steps
    clip: float = 1.0  # gradient norm

    def rate(self, step: int, steps: int) -> float:
        """Learning rate: linear warm-up, then half a cosine down to zero."""
        return self.peak * min((step + 1) / self.warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(
    name: str,
    module: Module,
    losses: Sequence[Callable[[Module], torch.Tensor]],
    schedule: Schedule,
    prepare: Callable[[Module], None] | None = None,
    *,
    rates: Callable[[str], float] = lambda _: 1.0,
    watch: Callable[[Module], None] | None = None,
    watch_every: float = 90.0,
) -> Module:
    """Minimise losses over the parameters of ``module`` that require gradients, by AdamW.

    Args:
        name: for the log.
        module: float32, on the device to train on.
        losses: taken in turn, one a step (one may come several times). A loss gets the copy that computes and returns a
            scalar. It draws its own data, on the device, from torch's default generator, and must not look at the
            value of any tensor.
        schedule: steps and learning rate.
        prepare: called once with the copy that computes, on a GPU only: the place to compile parts of it.
        rates: factor on the learning rate, by the parameter's name. The gradients of parameters with different factors
            are clipped apart, so that one part's spikes don't slow down the other.
        watch: called every ``watch_every`` seconds with the moving average, which it must not change.
        watch_every: seconds.

    Returns:
        A copy of ``module`` with the exponential moving average of the parameters, in eval mode.
    """
    device = next(module.parameters()).device
    on_gpu = device.type == "cuda"
    average = copy.deepcopy(module).eval().requires_grad_(False)
    worker = copy.deepcopy(module)
    if on_gpu:
        worker.to(torch.bfloat16)
        if prepare:
            prepare(worker)
    trained = [p.requires_grad for p in module.parameters()]
    factors = [rates(name) for name, p in module.named_parameters() if p.requires_grad]
    masters, averages, working = (
        [p for p, t in zip(m.parameters(), trained, strict=True) if t] for m in (module, average, worker)
    )
    averaged: list[torch.Tensor] = [a.detach() for a in averages]
    values: list[torch.Tensor] = [m.detach() for m in masters]
    working_values: list[torch.Tensor] = [p.detach() for p in working]
    rate = schedule.rate(0, schedule.steps)
    groups: list[dict[str, Any]] = [
        {
            "params": [m for m, f in zip(masters, factors, strict=True) if f == factor],
            "lr": torch.tensor(rate * factor, device=device) if on_gpu else rate * factor,
            "factor": factor,
        }
        for factor in dict.fromkeys(factors)
    ]
    optimizer = torch.optim.AdamW(
        groups,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=on_gpu,
        capturable=on_gpu,
    )
    gradients = [torch.zeros_like(m) for m in masters]

    def update(loss_of: Callable[[Module], torch.Tensor]) -> torch.Tensor:
        for p in working:
            p.grad = None
        loss = loss_of(worker)
        loss.backward()
        used = [(m, g, p.grad) for m, g, p in zip(masters, gradients, working, strict=True) if p.grad is not None]
        torch._foreach_copy_([g for _, g, _ in used], [computed for _, _, computed in used])
        for m, g, _ in used:
            m.grad = g
        for group in groups:
            nn.utils.clip_grad_norm_(group["params"], schedule.clip)
        optimizer.step()
        torch._foreach_copy_(working_values, values)
        return loss.detach()

    started = time.perf_counter()
    # dict.fromkeys: a loss that comes several times is captured once.
    distinct = {
        loss: _graphed(update, loss) if on_gpu else functools.partial(update, loss) for loss in dict.fromkeys(losses)
    }
    updates = [distinct[loss] for loss in losses]
    log.info("%s: ready after %.1f s", name, time.perf_counter() - started)
    steps, step, total, timed_from = schedule.steps, 0, torch.zeros((), device=device), (0, started)
    pace, watched = math.inf, time.perf_counter()

    def fitting() -> int:
        """Steps in all that end within the time given, at least those done."""
        if schedule.seconds is None or pace == math.inf:
            return steps
        left = schedule.seconds - (time.perf_counter() - started)
        return min(steps, max(step, step + int(left / pace)))

    while step < steps:
        for group in optimizer.param_groups:
            rate = group["factor"] * schedule.rate(step, steps)
            if on_gpu:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        total += updates[step % len(updates)]()
        torch._foreach_lerp_(averaged, values, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        step += 1
        if step in TIMED:
            float(total)  # waits for the device
            now = time.perf_counter()
            pace = (now - timed_from[1]) / (step - timed_from[0])
            log.info("%s: step %d after %.1f s, %.2f ms a step", name, step, now - started, 1e3 * pace)
            timed_from = (step, now)
            if step == TIMED[-1] and (fits := fitting()) < steps:
                log.warning("%s: %d steps fit into the time given, not %d", name, fits, steps)
                steps = fits
        if schedule.seconds and time.perf_counter() - started > schedule.seconds:
            steps = step
        if step % LOG_EVERY == 0 or step == steps:
            log.info("%s: step %d of %d, loss %.5f", name, step, steps, float(total) / (step % LOG_EVERY or LOG_EVERY))
            total.zero_()
        if watch and step < steps and time.perf_counter() - watched > watch_every:
            watch(average)
            watched = time.perf_counter()
            steps = fitting()  # watching took time too
    log.info("%s: %d steps in %.1f s", name, steps, time.perf_counter() - started)
    return average


def _graphed(
    update: Callable[[Callable[[Module], torch.Tensor]], torch.Tensor], loss: Callable[[Module], torch.Tensor]
) -> Callable[[], torch.Tensor]:
    """``update(loss)`` as a CUDA graph. It runs three times, at the first learning rate, before it is captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            update(loss)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = update(loss)

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay
