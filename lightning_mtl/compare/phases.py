"""What a comparison trains, one phase after the other: trials, the grid, the longer rival."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_mtl.compare.grid import SINGLE, Run, plan
from lightning_mtl.compare.pool import execute
from lightning_mtl.compare.progress import Progress
from lightning_mtl.compare.request import Request
from lightning_mtl.compare.results import Results
from lightning_mtl.compare.selection import BEST
from lightning_mtl.compare.stopping import undisturbed
from lightning_mtl.compare.texts import name, say, visible
from lightning_mtl.compare.tuning.choose import Choice, Tuning
from lightning_mtl.compare.tuning.rivals import NAMES, TIME


class Phases:
    """The trainings of a comparison; a finished one is not done again.

    Args:
        request: what was asked for.
        results: where finished runs are, and are added.
        seeds: how many, from 0.
        workers: processes side by side.

    Attributes:
        factor: how many times as many steps the longer rival makes; ``None`` until it is known, and
            where there is none.
        missing: why rivals are not there, in words.
    """

    def __init__(self, request: Request, results: Results, seeds: int, workers: int) -> None:
        self.request, self.results, self.seeds, self.workers = request, results, seeds, workers
        spaces = {n: s for n, s in request.spaces.items() if n in (SINGLE, *request.chosen)}
        self._tuned = set(spaces)
        self._tuning = Tuning(spaces, list(request.methods), request.directions, results.records)
        self._needs_trials = bool(spaces) or request.select == BEST
        self.factor: float | None = None
        self.missing = list(request.rivals.missing)
        self._started = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def choices(self) -> dict[str, Choice]:
        """What was chosen, by row; of a single-task training by its task."""
        return {
            method if task is None else f"{method} {task}": self._tuning.choice((method, task))
            for method, task in self._tuning.spaces
            if method in self._tuned
        }

    def unjudged(self) -> list[str]:
        """Tasks whose single-task trials all failed, so that trials are not relative to them."""
        reference = self._tuning.reference() if self._needs_trials else self.request.directions
        return [task for task in self.request.directions if task not in reference]

    # ------------------------------------------------------------------------------------- phases

    def tune(self) -> None:
        """Try the settings, round after round, and say what was chosen."""
        todo = self._tuning.todo() if self._needs_trials else []
        if not todo:
            return
        runs = [run for some in self._tuning.runs.values() for run in some]
        say("Trials of settings, on validation data:")
        progress = self._progress(runs)
        while todo:
            self._train(todo, progress)
            todo = self._tuning.todo()
        for row, choice in self.choices().items():
            say(visible(f"{name(row)}: {choice}"))
        say("")

    def grid(self) -> None:
        """Train every row that is chosen; then step times, with nothing beside the process."""
        chosen = {SINGLE, *self.request.chosen} - {NAMES[TIME]}
        self.train([run for run in self.runs() if run.method in chosen])

    def longer(self) -> None:
        """Train equal weighting for as long as the slowest balancer takes."""
        rival = NAMES[TIME]
        if rival not in self.request.chosen:
            return
        runs = [run for run in self.runs() if run.method == rival]
        records = {run: self.results.records[run] for run in runs if run in self.results.records}
        done = [self._factor_of(record) for record in records.values()]
        factor = max([self._slowest(), *done])
        if factor <= 1:
            self.missing.append(f"{rival} left out, because no balancer takes longer")
            self.request.drop(rival)
            return
        self.factor = factor
        for run, record in records.items():
            if self._factor_of(record) < factor:  # a balancer added since is slower still
                del self.results.records[run]
        say(f"\n{rival}: {factor:.2f} times the steps, as long as the slowest balancer takes")
        self.train(self.with_settings(runs))

    def train(self, runs: Sequence[Run]) -> None:
        """Train what is not finished of ``runs``."""
        self._train([r for r in runs if r not in self.results.records], self._progress(runs))

    # --------------------------------------------------------------------------------------- runs

    def runs(self) -> list[Run]:
        """The runs of the grid with their settings; none of rows for which none were chosen.

        A step of a rival is one of equal weighting with other numbers, and is not measured again.
        """
        request = self.request
        runs = plan(list(request.directions), list(request.methods), request.equal, self.seeds)
        rivals = request.rivals.methods
        return self.with_settings(r for r in runs if r.kind != "timing" or r.method not in rivals)

    def with_settings(self, runs: Iterable[Run]) -> list[Run]:
        """The runs with what was chosen for their rows."""
        found = []
        for run in runs:
            if run.method == NAMES[TIME]:
                found.append(run.set(self._longer()))
            elif run.method not in self._tuned:
                found.append(run)
            elif (settings := self._tuning.choice((run.method, run.task)).settings) is not None:
                found.append(run.set(settings))
        return found

    def _longer(self) -> dict[str, Any]:
        """Equal weighting as it was chosen, for longer."""
        equal = self.request.equal
        chosen = self._tuning.choice((equal, None)).settings if equal in self._tuned else None
        factor = self.factor
        if factor is None:  # a command that does not train the rival, but confirms against it
            records = [x for r, x in self.results.records.items() if r.method == NAMES[TIME]]
            factor = max(map(self._factor_of, records), default=1.0)
        return {**(chosen or {}), self._factor_key(): factor}

    def _factor_key(self) -> str:
        return f"callbacks.{len(self.request.methods[self.request.equal])}.factor"

    def _factor_of(self, record: dict[str, Any]) -> float:
        return float(record.get("settings", {}).get(self._factor_key(), 0.0))

    def _slowest(self) -> float:
        """The longest step of a balancer, in steps of equal weighting; 1 where none is longer."""
        ratios = [
            record["step_ratio"]
            for run, record in self.results.records.items()
            if run.kind == "timing"
            and record["status"] == "finished"
            and self.request.kinds.get(run.method) == "balancer"
        ]
        return round(max(1.0, *map(float, ratios), 1.0), 2)

    # ---------------------------------------------------------------------------------- processes

    def _progress(self, runs: Sequence[Run]) -> Progress:
        todo = [run for run in runs if run not in self.results.records]
        progress = Progress(
            total=len(runs),
            kinds=Counter(run.kind for run in todo),
            before=self.results.of(runs),
            workers=self.workers,
        )
        say(progress.headline())
        return progress

    def _train(self, todo: Sequence[Run], progress: Progress) -> None:
        def finished(run: Run, record: dict[str, Any]) -> None:
            with undisturbed():
                self.results.append(run, record)
            say(progress.line(run, record))

        reference = self._tuning.reference() if self.request.select == BEST else {}
        job = self.request.job(self.results.path.with_name("logs"), reference)
        execute([r for r in todo if r.kind != "timing"], job, self.workers, finished)
        execute([r for r in todo if r.kind == "timing"], job, 1, finished)
