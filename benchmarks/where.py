"""Where the microseconds of a step go: of plain Lightning, and of ours beside it.

Functions are wrapped for one fit of the tiny network of `overhead.py`, and what one takes is its
own processor time, without that of wrapped functions inside it. Fits of all kinds take turns; a
figure is the least of the rounds' medians over steps. A wrapper itself takes about a
microsecond, which is counted where it is called from.

    python benchmarks/where.py [--rounds 5]
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from overhead import CASES, Network, time_per_step
from report import arguments, bars, begin, end, table

from lightning_mtl.engine.forms import balanced, form
from lightning_mtl.engine.forms.rows import Rows
from lightning_mtl.engine.forms.sum import Sum
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.group import Group
from lightning_mtl.engine.step import Flow
from lightning_mtl.trainer.flags import TrainerFlags
from lightning_mtl.trainer.stepping import Stepping

WAYS = ("plain Lightning", "no balancer", "MinNorm", "DualBalance")
LOOP = "Lightning's loop: the batch, its hooks and counts"
STEPS, WARM_UP = 400, 40

# What is timed, from the outside in; a function of a class or of a module.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "the forward pass": [(Network, "losses")],
    "backward passes": [(torch.Tensor, "backward"), (torch.autograd, "grad")],
    "the optimizer's arithmetic": [(torch.optim.AdamW, "step")],
    "the way of a step: who listens, what is told": [(Flow, "training_step")],
    "losses: read and checked": [(Flow, "read_losses")],
    "a form for the step, memory for rows": [(Flow, "_begin")],
    "sums of losses and counts": [(Group, "add"), (Group, "close")],
    "what a form does around its passes": [
        (Sum, "run"),
        (form.Form, "run"),
        (Rows, "add"),
        (Rows, "finish"),
    ],
    "rows: gradients to their places": [(TaskGradients, "add_to_row"), (TaskGradients, "finish")],
    "inner products, checks, one transfer": [(balanced.Balanced, "balance")],
    "weights of the method, the direction": [(balanced, "aggregate")],
    "the direction to `.grad`": [(TaskGradients, "write_shared"), (TaskGradients, "write_heads")],
    "the optimizer step by Lightning's hooks": [(Stepping, "step"), (Stepping, "zero_grad")],
    "our hooks of a batch": [(TrainerFlags, "on_train_batch_start")],
}
torch.optim.AdamW([torch.zeros(1)])  # gives the class a `step` of its own


class Stopwatch:
    """Own time of wrapped functions, a step at a time."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []
        self.inside = [LOOP]
        self.now: dict[str, int] = defaultdict(int)
        self.since = time.thread_time_ns()

    def turn(self) -> None:
        """Count what has passed since to what runs now."""
        now = time.thread_time_ns()
        self.now[self.inside[-1]] += now - self.since
        self.since = now

    def wrapped(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(function)  # also what torch notes on a function
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            self.inside.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.turn()
                self.inside.pop()

        return timed

    def next_step(self) -> None:
        self.turn()
        self.steps.append(self.now)
        self.now = defaultdict(int)


class Steps(Callback):
    """Tells the stopwatch where a step ends."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_batch_end(self, *args: Any) -> None:
        self.watch.next_step()


@contextmanager
def timed(watch: Stopwatch) -> Iterator[None]:
    """Functions of :data:`PARTS` under the stopwatch, for a while."""
    places = [(place, name, part) for part, all_ in PARTS.items() for place, name in all_]
    before = [(place, name, vars(place)[name]) for place, name, _ in places]
    for (place, name, part), (_, _, function) in zip(places, before, strict=True):
        setattr(place, name, watch.wrapped(function, part))
    try:
        yield
    finally:
        for place, name, function in before:
            setattr(place, name, function)


def one(way: str) -> dict[str, float]:
    """Microseconds of each part, the median over steps."""
    make, watch = CASES[way], Stopwatch()

    def callbacks() -> list[Any]:
        return [Steps(watch), *(make() if make else [])]

    with timed(watch):
        time_per_step(callbacks, 32, STEPS, plain=make is None)
    kept = watch.steps[WARM_UP:]
    return {part: statistics.median(s[part] for s in kept) / 1e3 for part in (LOOP, *PARTS)}


def measure(rounds: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for way in WAYS:
            again, before = one(way), found.get(way, {})
            found[way] = {part: min(time, before.get(part, time)) for part, time in again.items()}
    return found


def plot(path: Path, measured: dict[str, dict[str, float]]) -> None:
    bars(path, measured, "microseconds")


def main() -> None:
    args = begin(arguments(__doc__, rounds=5))
    measured = measure(args.rounds)
    rows = [
        [part, *(round(measured[way][part]) or None for way in WAYS)] for part in (LOOP, *PARTS)
    ]
    rows.append(["all", *(round(sum(measured[way].values())) for way in WAYS)])
    table(["microseconds of a step", *WAYS], rows)
    end(args, measured, partial(plot, measured=measured))


if __name__ == "__main__":
    main()
