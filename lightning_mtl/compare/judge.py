"""From the Δp of every run to what can be said of the methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_mtl.compare.grid import SINGLE
from lightning_mtl.compare.verdict import (
    Differences,
    Joint,
    Paired,
    Verdict,
    against_baseline,
    decide,
    luck_of_the_best,
    settled,
    simultaneous_intervals,
    smallest_that_shows,
    ties_with_best,
)
from lightning_mtl.compare.verdict.scores import Array

# In points of Δp: one percent of a metric, averaged over the tasks. Less than that is less than
# what the seed alone does in every example here, and seldom worth a step that takes 1.5 times
# as long.
MARGIN = 1.0
ALPHA = 0.05
FEWEST = 3  # seeds of a "yes": with two, a difference has to be many times what seeds do
MODERATED = "many-to-one t-tests, moderated and blocked by seed (4 %), or paired by seed (1 %)"
PAIRED = "paired one-sided t-tests on fresh seeds against every rival"
WELCH = "Welch's t-test with the spread of the single-task runs counted"
_CONFIRM = (5, 10, 20, 50)  # seeds to propose


@dataclass(frozen=True)
class Candidate:
    """One method of a comparison.

    Attributes:
        method: its name.
        kind: ``equal``, ``fixed`` or ``balancer``.
        scores: Δp of each finished run, by seed.
        baseline: what the seeds of the single-task runs do to its Δp, a number a seed; mean 0.
    """

    method: str
    kind: str
    scores: Mapping[int, float]
    baseline: Sequence[float] = ()


@dataclass(frozen=True)
class Finding:
    """A verdict with the names of what it is about, and what it rests on.

    Attributes:
        verdict: on ``methods`` against ``rivals``.
        methods: what was tried.
        rivals: what it has to exceed.
        rule: the procedure, in words.
        seeds: of ``methods`` and ``rivals``.
        runs: how many trainings that is.
    """

    verdict: Verdict
    methods: list[str]
    rivals: list[str]
    rule: str
    seeds: list[int]
    runs: int

    @property
    def method(self) -> str:
        """The method that is better, or else the one that is ahead."""
        return self.methods[self.verdict.method]

    @property
    def rival(self) -> str:
        """The rival that is as good, or else the best one."""
        return self.rivals[self.verdict.rival]


@dataclass
class Judgement:
    """What can be said of a comparison.

    Attributes:
        margin: the smallest difference that matters, in points of Δp.
        seeds: those of equal weighting, which a method needs all of to be judged.
        judged: the methods that have them.
        left_out: seeds that the others lack, by method.
        balancing: is a balancer better than equal weighting and every fixed weighting?
        single: is joint training better than a model per task?
        beside_equal: intervals of the difference to equal weighting, by method.
        delta_p: intervals of Δp, the spread of the single-task runs counted, by method.
        ties: methods that may be the best one.
        luck: how far above its true mean the best of as many identical methods stands.
        next_confirm: seeds of ``--confirm`` that are proposed, and what then would show.
    """

    margin: float
    seeds: list[int]
    judged: list[str] = field(default_factory=list)
    left_out: dict[str, list[int]] = field(default_factory=dict)
    balancing: Finding | None = None
    single: Finding | None = None
    beside_equal: dict[str, tuple[float, float]] = field(default_factory=dict)
    delta_p: dict[str, tuple[float, float]] = field(default_factory=dict)
    ties: list[str] = field(default_factory=list)
    luck: float | None = None
    next_confirm: tuple[int, float] | None = None


def judge(candidates: Sequence[Candidate], margin: float = MARGIN) -> Judgement:
    """Judge the methods of a comparison on the seeds that they share.

    A method that lacks a seed of equal weighting is left out: dropping the runs that diverged would
    make it look better than it is.

    Args:
        candidates: every method with a finished run.
        margin: the smallest difference that matters, in points of Δp.
    """
    equal = next((c for c in candidates if c.kind == "equal"), None)
    found = Judgement(margin, [] if equal is None else sorted(equal.scores))
    if equal is None or not found.seeds:
        return found
    whole = [c for c in candidates if set(found.seeds) <= c.scores.keys()]
    found.judged = [c.method for c in whole]
    found.left_out = {
        c.method: [seed for seed in found.seeds if seed not in c.scores]
        for c in candidates
        if c not in whole
    }
    scores = _array(whole, found.seeds)
    if scores.shape[1] < 2:
        return found
    if (baseline := _baseline(whole)) is not None:
        differences = against_baseline(scores, baseline)
        low, high = simultaneous_intervals(differences, ALPHA)
        found.delta_p = _named(found.judged, low, high)
        found.single = _finding(differences, whole, [SINGLE], WELCH, found)
    if len(whole) > 1:
        _compare(found, whole, whole.index(equal), scores)
    return found


def _compare(found: Judgement, whole: list[Candidate], equal: int, scores: Array) -> None:
    """What needs at least two methods."""
    joint = Joint(scores)
    others = [i for i in range(len(whole)) if i != equal]
    beside = settled(joint.between(others, [equal]), scores[others], scores[equal : equal + 1])
    low, high = simultaneous_intervals(beside, ALPHA)
    found.beside_equal = _named([whole[i].method for i in others], low, high)
    found.ties = [c.method for c, tie in zip(whole, ties_with_best(joint), strict=True) if tie]
    found.luck = float(luck_of_the_best(joint.moderated))
    balancers = [i for i, c in enumerate(whole) if c.kind == "balancer"]
    rivals = [i for i, c in enumerate(whole) if c.kind != "balancer"]
    if not balancers:
        return
    differences = settled(joint.between(balancers, rivals), scores[balancers], scores[rivals])
    names = [whole[i].method for i in rivals]
    finding = _finding(differences, [whole[i] for i in balancers], names, MODERATED, found)
    found.balancing = finding
    if len(found.seeds) >= FEWEST and np.isfinite(finding.verdict.shows):
        found.next_confirm = _next(joint.paired, balancers[finding.verdict.method], rivals, found)


def _next(paired: Paired, leader: int, rivals: list[int], found: Judgement) -> tuple[int, float]:
    """The fewest confirming seeds that would show the margin, or ten, and what they would show.

    Spreads of single pairs would be too rough with a few seeds: they are taken together.
    """
    before = paired.between([leader], rivals)
    error = np.full_like(before.error, np.sqrt((before.error**2).mean()))
    shown = {}
    for seeds in _CONFIRM:
        after = Differences(
            before.estimate,
            error * np.sqrt(before.seeds / seeds),
            np.full_like(before.freedom, seeds - 1.0),
            seeds,
        )
        shown[seeds] = float(smallest_that_shows(after, ALPHA)[0])
        if shown[seeds] <= found.margin:
            return seeds, shown[seeds]
    return 10, shown[10]


def confirm(
    candidates: Sequence[Candidate], balancer: str, rivals: Sequence[str], margin: float
) -> Judgement | None:
    """Judge a balancer that was picked on other seeds, on fresh seeds of it and all its rivals.

    Args:
        candidates: the balancer and its rivals, with the fresh runs only.
        balancer: the one that was picked.
        rivals: all that were fixed with it.
        margin: the smallest difference that matters.

    Returns:
        ``None`` while a run is missing.
    """
    by_name = {c.method: c for c in candidates}
    names = [balancer, *rivals]
    seeds = sorted({seed for c in candidates for seed in c.scores})
    if any(n not in by_name or by_name[n].scores.keys() != set(seeds) for n in names):
        return None
    if len(seeds) < 2:
        return None
    whole = [by_name[n] for n in names]
    scores = _array(whole, seeds)
    found = Judgement(margin, seeds, names)
    differences = settled(Paired(scores).between([0], range(1, len(names))), scores[:1], scores[1:])
    found.balancing = _finding(differences, whole[:1], list(rivals), PAIRED, found)
    return found


def confirm_single(candidate: Candidate, seeds: Sequence[int], margin: float) -> Finding | None:
    """Judge the best row of the screening seeds against a model per task, on fresh seeds."""
    if len(candidate.baseline) < 2 or len(seeds) < 2:
        return None
    found = Judgement(margin, list(seeds), [candidate.method])
    differences = against_baseline(_array([candidate], found.seeds), np.array([candidate.baseline]))
    return _finding(differences, [candidate], [SINGLE], WELCH, found)


def _finding(
    differences: Differences,
    methods: Sequence[Candidate],
    rivals: list[str],
    rule: str,
    found: Judgement,
) -> Finding:
    names = [c.method for c in methods]
    arms = len(names) + (0 if rivals == [SINGLE] else len(rivals))
    verdict = decide(differences, found.margin, ALPHA)
    return Finding(verdict, names, rivals, rule, found.seeds, arms * len(found.seeds))


def _array(candidates: Sequence[Candidate], seeds: Sequence[int]) -> Array:
    return np.array([[c.scores[seed] for seed in seeds] for c in candidates], dtype=np.float64)


def _baseline(candidates: Sequence[Candidate]) -> Array | None:
    """By method, where there are seeds enough to know a spread."""
    if min(len(c.baseline) for c in candidates) < 2:
        return None
    return np.array([c.baseline for c in candidates], dtype=np.float64)


def _named(names: Sequence[str], low: Array, high: Array) -> dict[str, tuple[float, float]]:
    return {
        name: (float(a), float(b)) for name, a, b in zip(names, low[:, 0], high[:, 0], strict=True)
    }
