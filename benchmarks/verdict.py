"""How often `lightning-mtl compare` is wrong, and what it finds: its own rules on made-up scores.

    python benchmarks/verdict.py                 # every table of docs/compare.md, minutes
    python benchmarks/verdict.py --draws 2000    # a quick look

Scores are drawn with K balancers, equal weighting and two fixed weightings (J = 3 rivals) alike, or
with one balancer better. The worst case of "no difference" is one rival as good as the balancers
and the others far below: a "yes" has to get past one rival only. Each cell shows the larger of
the two rates, all alike and worst case, in percent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lightning_mtl.compare.verdict import (
    Differences,
    Joint,
    Paired,
    advantage,
    against_baseline,
    as_good_within,
    simultaneous_intervals,
    ties_with_best,
)

RIVALS = 3
CHUNK = 2500  # draws at a time: what 45 methods and 10 seeds need stays small
ALPHA = 0.05
FAR = 1e3
SHAPES = {
    "normal": ("normal", 1.0, 0.0),
    "normal, ρ .7": ("normal", 1.0, 0.7),
    "sd × 10": ("normal", 10.0, 0.0),
    "sd × 10, ρ .7": ("normal", 10.0, 0.7),
    "t, 3 df": ("t3", 1.0, 0.0),
    "right skew": ("right", 1.0, 0.0),
    "left skew": ("left", 1.0, 0.0),
    "right skew, sd × 10": ("right", 10.0, 0.0),
    "left skew, sd × 10": ("left", 10.0, 0.0),
}


def noise(law: str, size: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Mean 0 and variance 1."""
    if law == "normal":
        return rng.standard_normal(size)
    if law == "t3":
        return rng.standard_t(3, size) / np.sqrt(3)
    sign = 1 if law == "right" else -1
    return sign * (rng.standard_exponential(size) - 1)


class Laws:
    """Scores of methods that are all alike in the mean, whatever their spreads are.

    Args:
        shape: a key of ``SHAPES``.
        methods: how many.
        draws: repetitions.
        rng: of numpy.
    """

    def __init__(self, shape: str, methods: int, draws: int, rng: np.random.Generator) -> None:
        self.law, factor, self.shared = SHAPES[shape]
        self.rng, self.draws, self.methods = rng, draws, methods
        self.sd = factor ** rng.uniform(-0.5, 0.5, (draws, methods, 1))

    def scores(self, seeds: int) -> np.ndarray:
        own = noise(self.law, (self.draws, self.methods, seeds), self.rng)
        seed = noise(self.law, (self.draws, 1, seeds), self.rng)
        return self.sd * (np.sqrt(1 - self.shared) * own + np.sqrt(self.shared) * seed)


def chunks(draws: int) -> Iterator[int]:
    for start in range(0, draws, CHUNK):
        yield min(CHUNK, draws - start)


def one_stage(scores: np.ndarray, balancers: int) -> Differences:
    """The rule of `compare` without --confirm."""
    return Joint(scores).between(range(balancers), range(balancers, scores.shape[-2]))


def by_hand(scores: np.ndarray, balancers: int) -> Differences:
    """What one would do without it: paired t-tests with Bonferroni's correction."""
    return Paired(scores).between(range(balancers), range(balancers, scores.shape[-2]))


def lower(differences: Differences, tried: int | None = None) -> np.ndarray:
    """Lower bounds by method and rival."""
    return differences.lower(ALPHA / (tried or differences.estimate.shape[-2]))


def confirmed(laws: Laws, balancers: int, seeds: int, fresh: int) -> np.ndarray:
    """Fresh scores of the balancer that is picked on the screening seeds, and of the rivals."""
    picked = laws.scores(seeds)[:, :balancers].mean(-1).argmax(-1)
    second = laws.scores(fresh)
    best = np.take_along_axis(second, picked[:, None, None], 1)
    return np.concatenate([best, second[:, balancers:]], 1)


# ------------------------------------------------------------------------------- false positives


def false_positives(shape: str, balancers: int, seeds: int, draws: int, fresh: int) -> dict:
    rng = np.random.default_rng(abs(hash((balancers, seeds))) % 2**32 + list(SHAPES).index(shape))
    counts: dict[str, np.ndarray] = {}

    def count(rule: str, *hits: np.ndarray) -> None:
        counts[rule] = counts.get(rule, 0) + np.array([h.sum() for h in hits])

    for size in chunks(draws):
        laws = Laws(shape, balancers + RIVALS, size, rng)
        scores = laws.scores(seeds)
        for rule, bounds in (
            ("all seeds", lower(one_stage(scores, balancers))),
            ("by hand", lower(by_hand(scores, balancers))),
        ):
            above = bounds > 0
            count(rule, above.all(-1).any(-1), above[..., 0].any(-1))
        pair = confirmed(laws, balancers, seeds, fresh)
        above = lower(Paired(pair).between([0], range(1, 1 + RIVALS)))[:, 0] > 0
        count("confirmed", above.all(-1), above[:, 0])
        base = Laws(shape, 1, size, rng).scores(seeds)[:, 0]
        count("single", (lower(against_baseline(scores, base)) > 0).any((-1, -2)))
        plain = against_baseline(scores, base, moderate=False)
        count("single, Welch", (lower(plain) > 0).any((-1, -2)))
        # the best row of all on fresh seeds would be picked likewise; here the best balancer
        count("single, confirmed", (lower(against_baseline(pair[:, :1], base)) > 0)[:, 0, 0])
    return {rule: 100 * found.max() / draws for rule, found in counts.items()}


# ------------------------------------------------------------------------------------------ power


def found_with(critical: Sequence[np.ndarray], power: float = 0.8) -> float:
    """The advantage that passes in so many of the draws."""
    return float(np.quantile(np.concatenate(critical), power))


def effects(shape: str, balancers: int, draws: int) -> list[tuple[str, int, float]]:
    """Training runs of each way, and the advantage it finds with 80 %, in sd of a run."""
    rows = []
    arms = balancers + RIVALS

    def power(label: str, runs: int, critical: Callable[[Laws], np.ndarray]) -> None:
        rng = np.random.default_rng(7)
        found = found_with([critical(Laws(shape, arms, n, rng)) for n in chunks(draws)])
        rows.append((label, runs, found))

    def first(differences: Differences, tried: int) -> np.ndarray:
        return -lower(differences, tried)[:, 0].min(-1)

    for n in (3, 5, 10):
        power(
            f"{n} seeds for all",
            n * arms,
            lambda laws, n=n: first(one_stage(laws.scores(n), balancers), balancers),
        )
    for n in (3, 5, 10):
        power(
            f"{n} seeds, paired t-tests",
            n * arms,
            lambda laws, n=n: first(by_hand(laws.scores(n), balancers), balancers),
        )
    for n, m in ((3, 5), (3, 10), (5, 5), (5, 10)):

        def staged(laws: Laws, n: int = n, m: int = m) -> np.ndarray:
            means = laws.scores(n)[:, :balancers].mean(-1)
            ahead = means[:, 1:].max(-1) - means[:, 0] if balancers > 1 else np.full(len(means), -9)
            pair = laws.scores(m)[:, [0, *range(balancers, arms)]]
            return np.maximum(ahead, first(Paired(pair).between([0], range(1, RIVALS + 1)), 1))

        power(f"{n} seeds, confirm {m}", n * arms + m * (1 + RIVALS), staged)
    for m in (5, 10):
        power(
            f"one balancer named beforehand, {m} seeds",
            m * (1 + RIVALS),
            lambda laws, m=m: first(
                Paired(laws.scores(m)[:, [0, *range(balancers, arms)]]).between(
                    [0], range(1, RIVALS + 1)
                ),
                1,
            ),
        )
    return rows


# ------------------------------------------------------------------------------ the other answers


def others(shape: str, balancers: int, seeds: int, draws: int) -> dict[str, float]:
    """Rates of the other statements, in percent.

    The margin is the one that methods which are all alike pass with 80 %; "as good" is wrong with
    one balancer ahead by that much.
    """
    rng = np.random.default_rng(11 + seeds)
    margin, wrong, covered, kept, advantages = [], 0, 0, 0, 0
    for size in chunks(draws):
        scores = Laws(shape, balancers + RIVALS, size, rng).scores(seeds)
        found = one_stage(scores, balancers)
        margin.append(found.upper(ALPHA / RIVALS).max(-2).min(-1))
    at = float(np.quantile(np.concatenate(margin), 0.8))
    for size in chunks(draws):
        scores = Laws(shape, balancers + RIVALS, size, rng).scores(seeds)
        kept += ties_with_best(Joint(scores))[:, 0].sum()
        scores[:, 0] += at
        found = one_stage(scores, balancers)
        wrong += as_good_within(found, at).any(-1).sum()
        low, high = advantage(found)[1:]
        advantages += ((low[:, 0] > at) | (high[:, 0] < at)).sum()
        joint = Joint(scores)
        low, high = simultaneous_intervals(joint.between(range(balancers), [balancers]))
        truth = np.where(np.arange(balancers) == 0, at, 0.0)[:, None]
        covered += ((low <= truth) & (truth <= high)).all((-1, -2)).sum()
    return {
        "margin": at,
        "as good, wrong": 100 * wrong / draws,
        "advantage not in its interval": 100 * advantages / draws,
        "intervals hold": 100 * covered / draws,
        "the best is among the ties": 100 * kept / draws,
    }


# ------------------------------------------------------------------------------------------ tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=20_000, help="a cell (default: 20,000)")
    parser.add_argument("--fresh", type=int, default=5, help="confirming seeds (default: 5)")
    options = parser.parse_args()
    started = time.perf_counter()
    cells = [(k, n) for k in (1, 16, 42) for n in (3, 5, 10)]
    found = {
        (shape, k, n): false_positives(shape, k, n, options.draws, options.fresh)
        for shape in SHAPES
        for k, n in cells
    }
    names = {
        "all seeds": "yes, all seeds",
        "confirmed": f"yes, after --confirm {options.fresh}",
        "single": "above single-task",
        "single, confirmed": f"above single-task after --confirm {options.fresh}",
        "by hand": "paired t-tests by hand",
        "single, Welch": "above single-task, plain Welch",
    }
    for rule, title in names.items():
        print(f'False "{title}", %, {options.draws:,} draws a cell\n')
        table(
            ["", *(f"K={k}, n={n}" for k, n in cells)],
            [[shape, *(f"{found[shape, k, n][rule]:.1f}" for k, n in cells)] for shape in SHAPES],
        )
    for shape in ("normal", "normal, ρ .7", "sd × 10"):
        print(f"Found with 80 %, {shape}, in sd of a run\n")
        by_k = {k: effects(shape, k, options.draws) for k in (1, 16, 42)}
        table(
            ["", *(text for k in by_k for text in (f"K={k}: runs", "effect"))],
            [
                [rows[0][0], *(text for _, runs, e in rows for text in (str(runs), f"{e:.1f}"))]
                for rows in zip(*by_k.values(), strict=True)
            ],
        )
    print("Other statements, %\n")
    some = [("normal", 16, n) for n in (3, 5, 10)] + [("sd × 10", 16, 3), ("sd × 10", 16, 10)]
    some += [("normal", 1, 5), ("normal, ρ .7", 16, 5), ("t, 3 df", 16, 5)]
    rates = [others(*cell, options.draws) for cell in some]
    table(
        ["", *rates[0]],
        [
            [f"{s}, K={k}, n={n}", *(f"{v:.1f}" for v in rate.values())]
            for (s, k, n), rate in zip(some, rates, strict=True)
        ],
    )
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
