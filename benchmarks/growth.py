"""How the cost of a MinNorm step grows with tasks, shared parameters and accumulated batches.

``Trainer.fit`` with MinNorm beside plain Lightning on the same network and batch, in turn, by rows
and by blocks (which do not accumulate). Each series gets the least-squares line of its ratios with
rows; over P, of the ratio on log10 P.

    python benchmarks/growth.py [--rounds 5] [--largest 1e8] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from networks import Model, square
from report import arguments, begin, end, lines, table
from timing import interleaved
from ways import FITS, LIGHTNING, MINNORM, balanced

TASKS = (2, 3, 5, 10, 20, 50, 100)
PARAMETERS = (1e4, 1e5, 1e6, 1e7, 1e8)
ACCUMULATED = (1, 2, 4, 8)
BATCH = 32
BLOCKS = balanced(MINNORM, gradient_memory="blocks", gradient_blocks=16)


@dataclass
class Line:
    """The least-squares line through some points."""

    slope: float
    intercept: float
    r2: float
    log: bool

    def at(self, x: float) -> float:
        return self.intercept + self.slope * (math.log10(x) if self.log else x)

    def __str__(self) -> str:
        x = "log10 P" if self.log else "x"
        return f"{self.intercept:.2f} {self.slope:+.3f} {x}, R² = {self.r2:.3f}"


def line(x: list[float], y: list[float], *, log: bool) -> Line:
    seen = [math.log10(v) for v in x] if log else x
    slope, intercept = statistics.linear_regression(seen, y)
    mean = statistics.fmean(y)
    total = sum((v - mean) ** 2 for v in y)
    left = sum((v - intercept - slope * u) ** 2 for u, v in zip(seen, y, strict=True))
    return Line(slope, intercept, 1 - left / total if total else 1.0, log)


def model(tasks: int, parameters: float) -> Model:
    """Four square layers with about so many parameters."""
    width = max(round(math.sqrt(parameters / 4)), 1)
    return Model("", tasks, square(width, 4), (BATCH, width))


def series(
    title: str,
    label: str,
    points: tuple[float, ...],
    case: Callable[[float], tuple[Model, dict[str, Any]]],
    rounds: int,
) -> dict[str, Any]:
    """Times, ratios and line over ``points``; ``case`` gives the model and options of each."""
    rows, ratios = [], []
    for x in points:
        network, options = case(x)
        plain = partial(FITS[LIGHTNING], **options)
        ways = {LIGHTNING: plain, MINNORM: balanced(MINNORM, **options)}
        if not options:
            ways["blocks"] = BLOCKS
        times = interleaved(network, ways, rounds)
        ms = [1e3 * statistics.median(times.seconds[way]) for way in (LIGHTNING, MINNORM)]
        ratios.append(statistics.median(times.ratios(MINNORM, LIGHTNING)))
        by_blocks = times.ratio("blocks", LIGHTNING) if "blocks" in ways else None
        rows.append([f"{x:,.0f}", *ms, ratios[-1], by_blocks])
    fitted = line(list(points), ratios, log=label == "P")
    print(f"### {title}\n")
    table([label, "plain Lightning, ms", "MinNorm, ms", "ratio", "ratio, 16 blocks"], rows)
    print(f"ratio = {fitted}\n", flush=True)
    figures = {"title": title, "label": label, "x": list(points), "ratio": ratios}
    figures |= {"plain_ms": [r[1] for r in rows], "ms": [r[2] for r in rows]}
    return {**figures, "line": fitted, "blocks": [r[4] for r in rows]}


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--largest", type=float, default=1e8, help="P to go up to")
    parser.add_argument("--most", type=int, default=100, help="T to go up to")
    args = begin(parser)
    tasks = tuple(t for t in TASKS if t <= args.most)
    sizes = tuple(p for p in PARAMETERS if p <= args.largest)
    found = [
        series("Tasks, P = 1e6", "T", tasks, lambda t: (model(int(t), 1e6), {}), args.rounds),
        series("Shared parameters, T = 3", "P", sizes, lambda p: (model(3, p), {}), args.rounds),
        series(
            "Accumulated batches, T = 3, P = 1e6",
            "batches a step",
            ACCUMULATED,
            lambda k: (model(3, 1e6), {"accumulate": int(k)}),
            args.rounds,
        ),
    ]
    figures = [{**of, "line": dataclasses.asdict(of["line"])} for of in found]
    end(args, figures, partial(plot, found=found))


def plot(path: Path, found: list[dict[str, Any]]) -> None:
    lines(path, [(s["title"], s["label"], s["x"], s["ratio"], s["line"]) for s in found])


if __name__ == "__main__":
    main()
