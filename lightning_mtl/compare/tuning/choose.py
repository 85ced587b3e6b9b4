"""Trials: which are to run next, and which of them is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from lightning_mtl.compare.grid import SINGLE, Run, trial_runs
from lightning_mtl.compare.tuning.settings import described
from lightning_mtl.compare.tuning.space import ROUND, Settings, Space, grid
from lightning_mtl.compare.tuning.suggest import suggest
from lightning_mtl.metrics.delta_p import delta_p

Metrics = Mapping[str, Mapping[str, float]]
Subject = tuple[str, str | None]  # a method, and the task of a single-task training
Records = Mapping[Run, Mapping[str, Any]]


@dataclass(frozen=True)
class Choice:
    """What was chosen for a row.

    Attributes:
        settings: the best ones; ``None`` where no trial finished.
        trial: its number.
        score: its Δp on validation data, relative to the best single-task trials; ``None`` for
            those themselves.
        failed: how many trials failed.
        trials: how many there were.
    """

    settings: Settings | None
    trial: int | None
    score: float | None
    failed: int
    trials: int

    def __str__(self) -> str:
        if self.settings is None:
            return f"none: all {self.trials} trials failed"
        failed = f", {self.failed} of them failed" if self.failed else ""
        score = "" if self.score is None else f", Δp on validation {self.score:+.2f} %"
        return f"{described(self.settings)} (the best of {self.trials} trials{failed}{score})"


class Tuning:
    """The trials of a comparison, as a function of its records.

    Every trial is one training with the tuning seed, evaluated on validation data. The single-task
    trainings are among them: the best one of each task is what the Δp of the other trials is
    relative to.

    Args:
        spaces: by method; ``single-task`` may be among them and is tuned task by task.
        methods: all names of the comparison, which names of runs depend on.
        directions: ``{task: {metric: higher is better}}``.
        records: of the comparison; read again whenever something is asked.
        singles_first: let other trials wait for the single-task ones, where their trainings need
            what those gave.
    """

    def __init__(
        self,
        spaces: Mapping[str, Space],
        methods: Sequence[str],
        directions: Mapping[str, Mapping[str, bool]],
        records: Records,
        singles_first: bool = False,
    ) -> None:
        self.directions, self.records, self.singles_first = directions, records, singles_first
        single = spaces.get(SINGLE, grid([{}]))
        self.spaces: dict[Subject, Space] = {(SINGLE, task): single for task in directions}
        self.spaces |= {(m, None): space for m, space in spaces.items() if m != SINGLE}
        sizes = {subject: space.trials for subject, space in self.spaces.items()}
        self.runs = trial_runs(list(directions), methods, sizes)

    def todo(self) -> list[Run]:
        """Trials that can start now, with their settings; none once all have ended.

        A round of a search waits for the round before it, and from the second on for the
        single-task trials, which its scores are relative to.
        """
        found: list[Run] = []
        judged = all(self._ended((SINGLE, task)) for task in self.directions)
        for subject, space in self.spaces.items():
            runs = self.runs[subject]
            step = ROUND if space.ranges else len(runs)
            for first in range(0, len(runs), step):
                waiting = [run for run in runs[first : first + step] if run not in self.records]
                if not waiting or self._fixed(subject) is not None:
                    continue
                free = subject[0] == SINGLE or (first == 0 and not self.singles_first)
                if free or judged:
                    found += self._with_settings(subject, waiting, first)
                break
        return found

    def _with_settings(self, subject: Subject, waiting: list[Run], first: int) -> list[Run]:
        space = self.spaces[subject]
        points: Sequence[Settings] = space.points
        if space.ranges:
            before = self.runs[subject][:first]
            scores = self._scores(subject, before)
            history = [(self.records[r]["settings"], scores.get(r)) for r in before]
            points = suggest(space, history, first // ROUND)
        return [run.set(points[(run.trial or 0) - first]) for run in waiting]

    def choice(self, subject: Subject) -> Choice:
        """The best of the trials that have ended; the first of equals.

        What a finished run of the row was made with stays chosen: a trial that failed and would now
        succeed cannot change the half of a row.
        """
        runs = self.runs[subject]
        scores = self._scores(subject, runs)
        failed = sum(self._failed(run) for run in runs)
        fixed = self._fixed(subject)
        if fixed is not None:
            best = next((r for r in scores if self.records[r]["settings"] == fixed), None)
        elif not scores:
            return Choice(None, None, None, failed, len(runs))
        else:
            best = max(scores, key=lambda run: scores[run])
            fixed = self.records[best]["settings"]
        if best is None:
            return Choice(fixed, None, None, failed, len(runs))
        score = None if subject[0] == SINGLE else scores[best]
        return Choice(fixed, best.trial, score, failed, len(runs))

    def reference(self) -> dict[str, dict[str, float]]:
        """Metrics on validation data of the best single-task trial of every task that has one."""
        found = {}
        for task in self.directions:
            scores = self._scores((SINGLE, task), self.runs[SINGLE, task])
            if scores:
                best = max(scores, key=lambda run: scores[run])
                found[task] = dict(self.records[best]["metrics"][task])
        return found

    def _fixed(self, subject: Subject) -> Settings | None:
        for run, record in self.records.items():
            final = run.kind == "train" and run.trial is None and record["status"] == "finished"
            if final and (run.method, run.task) == subject and "settings" in record:
                settings: Settings = record["settings"]
                return settings
        return None

    def _ended(self, subject: Subject) -> bool:
        whole = all(run in self.records for run in self.runs[subject])
        return whole or self._fixed(subject) is not None

    def _failed(self, run: Run) -> bool:
        return run in self.records and self.records[run]["status"] == "failed"

    def _scores(self, subject: Subject, runs: Sequence[Run]) -> dict[Run, float]:
        """Δp of those that finished; where there is no reference, to their median."""
        metrics = {
            run: self.records[run]["metrics"]
            for run in runs
            if run in self.records and self.records[run]["status"] == "finished"
        }
        if not metrics:
            return {}
        reference = {} if subject[0] == SINGLE else self.reference()
        base = {
            task: {
                metric: reference.get(task, {}).get(metric)
                or median(found[task][metric] for found in metrics.values())
                or 1.0  # a Δp has to be relative to something
                for metric in self.directions[task]
            }
            for task in (self.directions if subject[1] is None else [subject[1]])
        }
        return {
            run: fmean(delta_p(found, base, self.directions).values())
            for run, found in metrics.items()
        }
