"""What a comparison was asked for, checked before anything is trained."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.build import (
    RunCLI,
    build,
    callbacks_with,
    check_space,
    kind_of,
    read_balancers,
)
from lightning_mtl.compare.folder import source_hash
from lightning_mtl.compare.grid import SINGLE
from lightning_mtl.compare.rehearsal import Rehearsal, rehearse
from lightning_mtl.compare.selection import LAST, LAST_K
from lightning_mtl.compare.tuning.rivals import DECAY, NAMES, TIME, WEIGHTS, add_rivals
from lightning_mtl.compare.tuning.space import Settings
from lightning_mtl.compare.worker import Job
from lightning_mtl.compare.yaml_file import YamlFile
from lightning_mtl.engine.stages import attached_balancers, check_tasks
from lightning_mtl.module import MultiTaskModule
from lightning_mtl.trainer.evaluation import in_stage, metric_key


class Request:
    """A checked request; building it trains nothing and writes nothing.

    Args:
        options: the parsed command line.

    Attributes:
        methods: the callbacks of every balancer, by name; equal weighting is always among them, and
            the rivals are, at the end.
        spaces: settings that are tried, by name; of rivals too, and of ``single-task``.
        kinds: ``equal``, ``fixed`` (a rival) or ``balancer``, by name.
        equal: the name of equal weighting.
        chosen: the methods that are run.
        rivals: which were added, and why others were not.
        rehearsal: what a training met up to its first step.
        directions: ``{task: {metric: higher is better}}`` of tasks that have a metric.
        unmeasured: tasks that have none: they are trained, and Δp is over the others.
        texts: the two files, as they were read, by path.

    Raises:
        CompareError: the request cannot be carried out.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        for name in ("seeds", "workers", "last_k"):
            found = getattr(options, name)
            if found < 1:
                option = name.replace("_", "-")
                raise CompareError(f"Expected --{option} to be at least 1 but found {found}.")
        self.config: str = options.config
        self.split: str = options.split
        self.select: str = options.select
        self.last_k: int = options.last_k if options.select == LAST_K else 1
        config, balancers = YamlFile(self.config), YamlFile(options.balancers)
        self.texts = {file.path: file.text for file in (config, balancers)}
        self.config_hash = config.hash
        self._config = config.content
        entries = read_balancers(options.balancers, balancers.content)
        self.methods, self.spaces = entries.methods, entries.spaces
        callbacks = {
            name: callbacks_with(name, specs, self._first(name))
            for name, specs in self.methods.items()
        }
        self.kinds = {name: kind_of(found) for name, found in callbacks.items()}
        if "equal" not in self.kinds.values():  # the reference of the answer and of step times
            if "equal" in self.methods:
                raise CompareError(
                    f"Expected `equal` in {options.balancers} to be equal weighting but found a "
                    f"balancer. Rename it."
                )
            self.methods = {"equal": [], **self.methods}
            self.kinds = {"equal": "equal", **self.kinds}
            entries.identity = {"equal": [], **entries.identity}
        self._balancers = entries.identity
        self.equal = next(name for name, kind in self.kinds.items() if kind == "equal")
        _check_names(list(self.methods))
        asked = _rivals_asked(options.rivals, list(self.methods))
        own = list(self.methods)

        logging.disable(logging.INFO)  # Lightning's notes belong to the logs of the runs
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cli = build(self.config)
                tasks = self._read_metrics(cli.model)
                self._check_loaders(cli)
                self._check_callbacks(cli, callbacks, tasks)
        finally:
            logging.disable(logging.NOTSET)
        self.rehearsal = self._rehearse(asked)
        trials = max((self.spaces[n].trials for n in own if n in self.spaces), default=0)
        faults = rival_faults(self.rehearsal)
        self.rivals = add_rivals(asked, tasks, trials, self.methods[self.equal], faults)
        self.methods |= self.rivals.methods
        self.spaces |= self.rivals.spaces
        self.kinds |= dict.fromkeys(self.rivals.methods, "fixed")
        self.chosen = self._choose(options.only)
        parts = [cli.model] + ([] if cli.datamodule is None else [cli.datamodule])
        self.sources = {
            f"{type(p).__module__}.{type(p).__qualname__}": source_hash(type(p)) for p in parts
        }

    def _first(self, name: str) -> Settings:
        return self.spaces[name].first() if name in self.spaces else {}

    def _check_callbacks(
        self, cli: RunCLI, callbacks: Mapping[str, list[Callback]], tasks: Sequence[str]
    ) -> None:
        """Balancers have to fit the model, with every value that is tried."""

        def fits(found: list[Callback]) -> None:
            attached = attached_balancers(found)
            if tasks:
                check_tasks(attached, tasks)

        for name, found in callbacks.items():
            try:
                fits(found)
            except Exception as error:
                raise CompareError(f"Balancer `{name}` does not fit the model. {error}") from error
        for name, space in self.spaces.items():
            check_space(name, self.methods.get(name, []), space, cli, fits)

    def _rehearse(self, asked: Sequence[str]) -> Rehearsal:
        """Look for data and optimizers now, or every run would train and then fail."""
        needed = ["train", self.split]
        if self.spaces or self.select != LAST:
            needed.append("val")
        more = ["val"] * bool({WEIGHTS, DECAY} & set(asked))
        found = rehearse(self.config, list(dict.fromkeys([*needed, *more])))
        for stage in needed:
            if stage in found.errors:
                where = f"{stage} data to be there"
                why = "no run could be evaluated"
                if stage == "train":
                    where, why = "a training to reach its first step", "no run could be trained"
                elif stage != self.split:
                    why = "no settings or weights could be chosen"
                raise CompareError(
                    f"Expected {where} with {self.config} but found an error, so {why}. "
                    f"{found.errors[stage]}"
                )
        return found

    def _choose(self, only: str | None) -> list[str]:
        if only is None:
            return list(self.methods)
        wanted = _listed(only, self.methods)
        unknown = [name for name in wanted if name not in self.methods]
        if unknown:
            raise CompareError(
                f"Expected --only to name some of {', '.join(self.methods)} but found {unknown}. "
                f"Correct the names, or leave the option out to run all."
            )
        return [name for name in self.methods if name in wanted]

    def _read_metrics(self, model: MultiTaskModule) -> list[str]:
        """What Δp is made of; the model's tasks, empty where only its losses will tell them."""
        directions = model.metric_directions()
        tasks = list(model.active_tasks or model.task_names)
        if len(tasks) == 1:
            raise CompareError(
                f"Expected a model of at least 2 tasks but found {tasks}. With one task there is "
                f"nothing to balance: train it with `lightning-mtl fit`."
            )
        self.directions: dict[str, dict[str, bool]] = {}
        self.logged: dict[str, dict[str, str]] = {}
        self.validation: dict[str, dict[str, str]] = {}
        self.unmeasured = [task for task in tasks if not directions.get(task)]
        for task in tasks or directions:
            if not directions.get(task):
                continue
            names = {metric_key(task, name): name for name in directions[task]}
            self.directions[task] = {m: directions[task][name] for m, name in names.items()}
            self.logged[task] = {m: in_stage(n, self.split) for m, n in names.items()}
            self.validation[task] = {m: in_stage(n, "val") for m, n in names.items()}
        if not self.directions:
            raise CompareError(
                f"Expected a metric for at least one task, since Δp is made of them, but found "
                f"none for {', '.join(tasks) or 'any'}. Give a task `Task(loss, metrics)`, or name "
                f"metrics that the module logs in `delta_p_metrics`."
            )
        return tasks

    def _check_loaders(self, cli: RunCLI) -> None:
        """Name loaders that nobody defines and limits of 0; :meth:`_rehearse` finds the rest."""
        parts = [part for part in (cli.datamodule, cli.model) if part is not None]
        for stage in ("train", self.split):
            loader = f"{stage}_dataloader"
            where = f"--split {stage}, so" if stage == "test" else "so"
            if not any(is_overridden(loader, part) for part in parts):
                raise CompareError(
                    f"Expected {' or '.join(f'`{type(p).__name__}`' for p in parts)} to define "
                    f"`{loader}` but found none, {where} no run could be "
                    f"{'trained' if stage == 'train' else 'evaluated'}. Add it, or name another "
                    f"`data` in {self.config}."
                )
        limits: dict[str, Sequence[str]] = {self.split: [f"limit_{self.split}_batches"]}
        limits["train"] = ["max_steps", "max_epochs", "limit_train_batches"]
        for stage, names in limits.items():
            for name in names:
                if getattr(cli.trainer, name) == 0:
                    raise CompareError(
                        f"Expected batches to {'train' if stage == 'train' else 'evaluate'} on but "
                        f"found `trainer.{name}: 0` in {self.config}. Remove it."
                    )

    def drop(self, rival: str) -> None:
        """Leave out a rival that turned out to be no other than equal weighting."""
        self.chosen.remove(rival)
        del self.kinds[rival], self.methods[rival], self.rivals.methods[rival]

    def identity(self) -> dict[str, Any]:
        """What makes two comparisons the same: all but seeds, workers, ``--only``, ``--rivals``."""
        select = {} if self.select == LAST else {"select": [self.select, self.last_k]}
        return {
            "config": self._config,
            "balancers": self._balancers,
            "split": self.split,
            "metrics": self.directions,
            "source code": self.sources,
            **select,
        }

    def job(self, logs: Path, reference: Mapping[str, Mapping[str, float]]) -> Job:
        """What the processes of the runs have to know."""
        return Job(
            self.config,
            self.config_hash,
            self.methods,
            self.logged,
            self.split,
            logs,
            self.directions,
            self.validation,
            self.select,
            self.last_k,
            reference,
        )


def rival_faults(rehearsal: Rehearsal) -> dict[str, str]:
    """Rivals that cannot be had, and why."""
    found = {}
    if "val" in rehearsal.errors:
        found = dict.fromkeys((WEIGHTS, DECAY), "there is no validation data to choose on")
    if not rehearsal.decay:
        names = ", ".join(rehearsal.optimizers)
        found.setdefault(DECAY, f"{names} has no weight decay")
    if not rehearsal.limited:
        found[TIME] = "neither epochs nor steps limit the training"
    return found


def _listed(text: str, known: Collection[str]) -> list[str]:
    """The names in a list with commas, also where a name has commas or spaces at its ends."""
    parts = text.split(",")
    found = []
    while parts:
        for size in range(len(parts), 0, -1):
            whole = ",".join(parts[:size])
            name = whole if whole in known else whole.strip()
            if name in known or size == 1:
                found.append(name)
                del parts[:size]
                break
    return found


def _rivals_asked(text: str, own: Sequence[str]) -> list[str]:
    asked = {"all": list(NAMES), "none": []}.get(text, [key.strip() for key in text.split(",")])
    unknown = [key for key in asked if key not in NAMES]
    if unknown:
        raise CompareError(
            f"Expected --rivals to be all, none or some of {', '.join(NAMES)} but found {unknown}."
        )
    taken = [NAMES[key] for key in asked if NAMES[key] in own]
    if taken:
        raise CompareError(
            f"Expected names of balancers that no rival has but found {taken}. Rename them, or "
            f"leave the rival out with --rivals."
        )
    return asked


def _check_names(methods: Sequence[str]) -> None:
    bad = [name for name in methods if not name.strip() or name.startswith(SINGLE)]
    if bad:
        raise CompareError(
            f"Expected names of balancers that are not empty and do not start with `{SINGLE}`, but "
            f"found {bad}. Rename them."
        )
