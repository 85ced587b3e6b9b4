"""Fail when a balanced step has become dearer: the check that ``make ci`` runs.

Each figure is a ratio to plain training in the same run. Two do not depend on the machine, so that
their limits are close: how often a step calls a function, of Python or of PyTorch, which is what a
small network waits for; and how many numbers its operations write, so that a copy of J, or one that
is allocated in each step, shows even where it takes little time. The third is time, of the
processor, and of each way its fastest round: a neighbour on the same machine moves it by a third,
so its limit is wide, and a ratio above it is measured again, up to three times, before it counts.

    python benchmarks/check.py [--rounds 5] [--json FILE] [--plot FILE]

Exit status 1 if a ratio is above its limit.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from networks import MODELS, Model, square
from report import arguments, bars, begin, end, table
from timing import interleaved
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from ways import FITS, LIGHTNING, PLAIN, Time, Way, balanced, ours, plain

ENGINE, NONE, MINNORM, DUAL = "our engine", "no balancer", "MinNorm", "DualBalance"
BLOCKS = "MinNorm by blocks"
WAYS: dict[str, tuple[Way, str]] = {  # and what each is compared with
    PLAIN: (plain, PLAIN),
    LIGHTNING: (FITS[LIGHTNING], LIGHTNING),
    ENGINE: (ours, PLAIN),
    NONE: (FITS["MultiTaskModule, no balancer"], LIGHTNING),
    MINNORM: (balanced(MINNORM), LIGHTNING),
    DUAL: (balanced(DUAL), LIGHTNING),
    BLOCKS: (balanced(MINNORM, gradient_memory="blocks"), LIGHTNING),
}
TINY, WIDE = "tiny MLP, T=2", "MLP 0.9M, T=3"
CALLS, WRITTEN = "functions called, T=2", "numbers written, T=3"
# Few samples and many weights: what is written is J and what is made from it.
COPIES = Model(WRITTEN, 3, square(256, 4), (2, 256))
ROUND = 0.05  # seconds of a way
ATTEMPTS = 4  # a neighbour on the same machine can slow one way for seconds

# In brackets what was measured. Calls and numbers written are the same in every run: 5 % are for
# other versions of Python, PyTorch and Lightning. A copy of J would add 0.75 to the numbers. Times
# are of x86-64 machines of two cores with one thread; one figure was up to 1.5 times another.
LIMITS: dict[tuple[str, str], float] = {
    (CALLS, ENGINE): 1.82,  # [1.73]
    (CALLS, NONE): 0.88,  # [0.83]
    (CALLS, MINNORM): 1.01,  # [0.96]
    (CALLS, DUAL): 1.03,  # [0.98]
    (CALLS, BLOCKS): 1.68,  # [1.60]
    (WRITTEN, ENGINE): 2.60,  # [2.49]: T rows from autograd, T in J, one direction, the optimiser
    (WRITTEN, NONE): 1.32,  # [1.25]: the look for numbers that are not finite
    # Rows made float64 for inner products and norms, a block at a time: 0.75 of these.
    (WRITTEN, MINNORM): 3.40,  # [3.23]
    (WRITTEN, DUAL): 6.25,  # [5.95]
    (WRITTEN, BLOCKS): 4.63,  # [4.41]: the direction by a pass of its own
    (TINY, ENGINE): 2.1,  # [0.98 to 1.45]
    (TINY, NONE): 1.7,  # [0.89 to 1.14]
    (TINY, MINNORM): 2.5,  # [1.39 to 1.68]
    (TINY, DUAL): 2.8,  # [1.43 to 2.12]
    (WIDE, ENGINE): 3.8,  # [2.43 to 2.59]
    (WIDE, NONE): 1.7,  # [1.03 to 1.11]
    (WIDE, MINNORM): 3.9,  # [2.30 to 2.66]
    (WIDE, DUAL): 4.2,  # [2.55 to 3.07]
}


class Written(TorchDispatchMode):
    """Counts the numbers that operations write, into new memory or in place; views write none."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        named = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
        written = [
            named[a.name]
            for a in schema.arguments
            if a.alias_info is not None and a.alias_info.is_write and a.name in named
        ]
        if all(r.alias_info is None for r in schema.returns):  # neither a view nor in place
            written.append(result)
        self.numbers += sum(x.numel() for x in tree_leaves(written) if isinstance(x, Tensor))
        return result


def written(timed: Time, steps: int) -> int:
    """Numbers that some steps write."""
    with Written() as count:
        timed(steps)
    return count.numbers


def called(timed: Time, steps: int) -> int:
    """How many functions some steps call, in Python and out of it."""
    number = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # which would call what is called at the end of objects
    sys.setprofile(note)
    try:
        timed(steps)
    finally:
        sys.setprofile(None)
        gc.enable()
    return number


def of_a_step(counted: Callable[[Time, int], int], model: Model) -> dict[str, float]:
    """Ratios of what one step does: of each way the difference of two runs, so without set-up."""
    found = {}
    for name, (way, _) in WAYS.items():
        timed = way(model)
        timed(1)
        once, twice = (counted(timed, steps) for steps in (2, 4))
        found[name] = (twice - once) / 2
    return {name: found[name] / found[base] for name, (_, base) in WAYS.items()}


def times(model: Model, rounds: int) -> dict[str, float]:
    """Ratios of the fastest rounds; measured again while one is above its limit."""
    clocked = dataclasses.replace(model, clock=time.process_time)
    ways = {name: way for name, (way, _) in WAYS.items() if name != BLOCKS}
    ratios: dict[str, float] = {}
    for _ in range(ATTEMPTS):
        measured = interleaved(clocked, ways, rounds, ROUND)
        if measured.reasons:
            raise RuntimeError(f"Expected every way to work but found {measured.reasons}.")
        least = {name: min(seconds) for name, seconds in measured.seconds.items()}
        found = {name: least[name] / least[WAYS[name][1]] for name in ways}
        ratios = {name: min(ratio, ratios.get(name, ratio)) for name, ratio in found.items()}
        limits = {name: LIMITS.get((model.name, name), ratio) for name, ratio in ratios.items()}
        if all(ratio <= limits[name] for name, ratio in ratios.items()):
            break
    return ratios


def main() -> int:
    args = begin(arguments(__doc__, rounds=5))
    found = {CALLS: of_a_step(called, MODELS[TINY]), WRITTEN: of_a_step(written, COPIES)}
    found |= {name: times(MODELS[name], args.rounds) for name in (TINY, WIDE)}
    rows = [
        [f"{what}: {way}", ratio, LIMITS.get((what, way))]
        for what, ratios in found.items()
        for way, ratio in ratios.items()
        if way not in (PLAIN, LIGHTNING)
    ]
    table(["", "ratio to plain", "limit"], rows)
    end(args, found, partial(plot, found=found))
    failed = [(name, ratio, limit) for name, ratio, limit in rows if limit and ratio > limit]
    for name, ratio, limit in failed:
        print(f"{name}: {ratio:.2f} times plain training, above the limit of {limit:.2f}.")
    return 1 if failed else 0


def plot(path: Path, found: dict[str, dict[str, float]]) -> None:
    panels = {
        what: {way: ratio for way, ratio in ratios.items() if way not in (PLAIN, LIGHTNING)}
        for what, ratios in found.items()
    }
    bars(path, panels, "ratio to plain training", ours=tuple(WAYS))


if __name__ == "__main__":
    raise SystemExit(main())
