"""Time several ways in turn, again and again, so that what slows the machine slows all of them."""

from __future__ import annotations

import gc
import math
import statistics
from dataclasses import dataclass, field

from networks import Model
from ways import LIMIT, PLAIN, Way, forward

FORWARD = "forward"
FEWEST, MOST = 3, 300  # steps of a way in a round


@dataclass
class Times:
    """Seconds of a step of each way, one for each round, and why a way has none."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    ways: list[str] = field(default_factory=list)  # all of them, in their order

    def median(self, way: str) -> float | None:
        """Seconds of a step; ``None`` for a way that does not work."""
        return statistics.median(self.seconds[way]) if way in self.seconds else None

    def ratios(self, way: str, base: str) -> list[float]:
        """Ratios of two ways, each within a round."""
        pairs = zip(self.seconds[way], self.seconds[base], strict=True)
        return [a / b for a, b in pairs]

    def ratio(self, way: str, base: str) -> float | None:
        """The median of the ratios; ``None`` where one of the two does not work."""
        if way not in self.seconds or base not in self.seconds:
            return None
        return statistics.median(self.ratios(way, base))

    def adds(self, way: str, base: str) -> float | None:
        """The median of the differences of two ways in seconds, each within a round."""
        if way not in self.seconds or base not in self.seconds:
            return None
        pairs = zip(self.seconds[way], self.seconds[base], strict=True)
        return statistics.median(a - b for a, b in pairs)

    def add_limit(self, tasks: int) -> None:
        """What a backward pass a task costs at least: one forward pass, T times the rest."""
        pairs = zip(self.seconds[FORWARD], self.seconds[PLAIN], strict=True)
        self.seconds[LIMIT] = [f + tasks * (p - f) for f, p in pairs]


def interleaved(model: Model, ways: dict[str, Way], rounds: int, seconds: float = 0.25) -> Times:
    """Run every way for about ``seconds`` in each round, beginning with another one each time."""
    times, ready, steps = Times(ways=list(ways)), {}, {}
    for name, make in ways.items():
        try:
            ready[name] = make(model)
            steps[name] = steps_for(seconds / ready[name](FEWEST))
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            times.reasons[name] = f"{type(error).__name__}: {text}"
            continue
        times.seconds[name] = []
    names = list(times.seconds)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            times.seconds[name].append(ready[name](steps[name]))
    return times


def steps_for(number: float) -> int:
    """How many steps of a way a round takes."""
    return min(max(math.ceil(number), FEWEST), MOST)


def with_limit(model: Model, ways: dict[str, Way], rounds: int) -> Times:
    """Times of ``ways``, the plain PyTorch step among them, of the forward pass and the limit."""
    times = interleaved(model, {FORWARD: forward, **ways}, rounds)
    times.add_limit(model.tasks)
    return times
