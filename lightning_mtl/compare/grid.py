"""The grid of runs, and what each of them is called."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

SINGLE = "single-task"
FIRST_FRESH = 10_000  # seeds of a confirmation: never among those of a screening, however many
TUNING_SEED = 1_000_000  # of every trial: no seed that decides has been tuned on
_LONGEST = 80  # of a file name 255 bytes are allowed, 143 where names are encrypted
# Names of devices on Windows, and those that are hidden elsewhere.
_RESERVED = re.compile(r"\.|(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        kind: ``train`` (a result), ``curves`` (equal weighting again, with task gradients
            recorded) or ``timing`` (a few steps with nothing beside it).
        method: the name in the file of balancers, or ``single-task``.
        seed: seeds weights, data order and everything else; those of a confirmation start at
            ``FIRST_FRESH``.
        task: the one task of a single-task run.
        trial: number of a trial of settings, from 0; ``None`` for all other runs.
        settings: what a trial, or a row that was tuned, changes in the two files.
        name: unique in a comparison, also where case makes no difference, and a file name
            everywhere. Two runs are the same by what they do, whatever they are called.
    """

    kind: str
    method: str
    seed: int
    task: str | None = None
    name: str = field(default="", compare=False)
    trial: int | None = None
    settings: Mapping[str, Any] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Run:
        """The run that a record is about."""
        kind, method, seed = record["kind"], record["method"], record["seed"]
        return cls(kind, method, seed, record.get("task"), trial=record.get("trial"))

    def set(self, settings: Mapping[str, Any] | None) -> Run:
        """The same run with ``settings``."""
        return replace(self, settings=settings)

    @property
    def stage(self) -> str:
        """``screen``, ``confirm`` for a run on fresh seeds, ``tune`` for a trial of settings."""
        if self.trial is not None:
            return "tune"
        return "confirm" if self.seed >= FIRST_FRESH else "screen"

    @property
    def label(self) -> str:
        """How progress and errors name the run."""
        task = f" {self.task}" if self.task is not None else ""
        what = f"seed {self.seed}" if self.kind == "train" else self.kind
        what = what if self.trial is None else f"trial {self.trial}"
        return f"{self.method}{task}, {what}"

    def record(self) -> dict[str, Any]:
        """The start of its record."""
        about = {"run": self.name, "kind": self.kind, "method": self.method, "seed": self.seed}
        about |= {"stage": self.stage}
        more = {"task": self.task, "trial": self.trial, "settings": self.settings}
        return about | {key: value for key, value in more.items() if value is not None}


def plan(tasks: Sequence[str], methods: Sequence[str], equal: str, seeds: int) -> list[Run]:
    """All runs in the order they start: baselines, balancers, one for curves, then timings.

    Args:
        tasks: the model's tasks that have a metric.
        methods: names of the balancers.
        equal: which of them is equal weighting.
        seeds: how many seeds, from 0.
    """
    run = _maker(tasks, methods)
    runs = [run("train", seed, SINGLE, task) for seed in range(seeds) for task in tasks]
    runs += [run("train", seed, method) for seed in range(seeds) for method in methods]
    runs += [run("curves", 0, equal)] if equal in methods else []
    return runs + [run("timing", 0, method) for method in methods]


def train_runs(
    tasks: Sequence[str], methods: Sequence[str], seeds: Iterable[int], some: Sequence[str]
) -> list[Run]:
    """Trainings of ``some`` of the methods, named as :func:`plan` names them."""
    run = _maker(tasks, methods)
    return [run("train", seed, method) for seed in seeds for method in some]


def trial_runs(
    tasks: Sequence[str], methods: Sequence[str], sizes: Mapping[tuple[str, str | None], int]
) -> dict[tuple[str, str | None], list[Run]]:
    """Trials of each method, or of single-task training on a task, without their settings."""
    run = _maker(tasks, methods)
    found = {}
    for (method, task), size in sizes.items():
        first = run("train", TUNING_SEED, method, task)
        stem = first.name.removesuffix(f"-seed{TUNING_SEED}")
        found[method, task] = [
            replace(first, trial=trial, name=f"{stem}-trial{trial}") for trial in range(size)
        ]
    return found


def _maker(tasks: Sequence[str], methods: Sequence[str]) -> Callable[..., Run]:
    names = file_names([(SINGLE, task) for task in tasks] + [(method,) for method in methods])

    def run(kind: str, seed: int, method: str, task: str | None = None) -> Run:
        stem = names[(method,) if task is None else (method, task)]
        end = "" if kind == "train" else f"-{kind}"
        return Run(kind, method, seed, task, f"{stem}-seed{seed}{end}")

    return run


def file_names(subjects: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A name for each subject that every file system takes and tells from the others.

    It is the subject's own words, other characters than letters and digits replaced, as long as
    that is short and nobody else's; else its beginning and a hash of the whole.
    """
    plain = {subject: "-".join(map(_plain, subject)) for subject in subjects}
    times = Counter(name.casefold() for name in plain.values())
    taken = set(times)
    names = {}
    for subject, name in plain.items():
        if times[name.casefold()] > 1 or len(name) > _LONGEST:
            digest = hashlib.sha256(repr(subject).encode()).hexdigest()[:12]
            name = f"{name[:_LONGEST]}-{digest}"
            while name.casefold() in taken:  # somebody chose just this name
                name += "_"
            taken.add(name.casefold())
        names[subject] = name
    return names


def _plain(text: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", text)
    return f"_{name}" if _RESERVED.match(name) else name
