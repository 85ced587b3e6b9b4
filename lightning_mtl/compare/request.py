"""What a comparison was asked for, checked before anything is trained."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.build import build, callbacks_from, kind_of, read_balancers, read_yaml
from lightning_mtl.compare.grid import SINGLE, file_hash, file_name, source_hash
from lightning_mtl.compare.worker import Job
from lightning_mtl.evaluation import in_stage, metric_key
from lightning_mtl.module import MultiTaskModule
from lightning_mtl.stages import attached_balancers, check_tasks


class Request:
    """A checked request; building it trains nothing and writes nothing.

    Args:
        options: the parsed command line.

    Attributes:
        methods: the callbacks of every balancer, by name; equal weighting is always among them.
        kinds: ``equal``, ``fixed`` or ``balancer``, by name.
        equal: the name of equal weighting.
        directions: ``{task: {metric: higher is better}}``.

    Raises:
        CompareError: the request cannot be carried out.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        for name in ("seeds", "workers"):
            found = getattr(options, name)
            if found < 1:
                raise CompareError(f"Expected --{name} to be at least 1 but found {found}.")
        self.config: str = options.config
        self.split: str = options.split
        self.config_hash = file_hash(self.config)
        self.methods = read_balancers(options.balancers)
        callbacks = {name: callbacks_from(name, specs) for name, specs in self.methods.items()}
        self.kinds = {name: kind_of(found) for name, found in callbacks.items()}
        if "equal" not in self.kinds.values():  # the reference of the answer and of step times
            if "equal" in self.methods:
                raise CompareError(
                    f"Expected `equal` in {options.balancers} to be equal weighting but found a "
                    f"balancer. Rename it."
                )
            self.methods = {"equal": [], **self.methods}
            self.kinds = {"equal": "equal", **self.kinds}
        self.equal = next(name for name, kind in self.kinds.items() if kind == "equal")
        _check_names(list(self.methods))
        self.chosen = self._choose(options.only)

        logging.disable(logging.INFO)  # Lightning's notes belong to the logs of the runs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli = build(self.config)
        logging.disable(logging.NOTSET)
        self._read_metrics(cli.model)
        for name, found in callbacks.items():
            try:
                check_tasks(attached_balancers(found), list(self.directions))
            except Exception as error:
                raise CompareError(f"Balancer `{name}` does not fit the model. {error}") from error
        parts = [cli.model] + ([] if cli.datamodule is None else [cli.datamodule])
        self.sources = {
            f"{type(p).__module__}.{type(p).__qualname__}": source_hash(type(p)) for p in parts
        }

    def _choose(self, only: str | None) -> list[str]:
        if only is None:
            return list(self.methods)
        wanted = [name.strip() for name in only.split(",")]
        unknown = [name for name in wanted if name not in self.methods]
        if unknown:
            raise CompareError(
                f"Expected --only to name some of {', '.join(self.methods)} but found {unknown}. "
                f"Correct the names, or leave the option out to run all."
            )
        return [name for name in self.methods if name in wanted]

    def _read_metrics(self, model: MultiTaskModule) -> None:
        directions = model.metric_directions()
        tasks = list(model.active_tasks or model.task_names or directions)
        if len(tasks) < 2:
            raise CompareError(
                f"Expected a model of at least 2 tasks but found {tasks}. With one task there is "
                f"nothing to balance: train it with `lightning-mtl fit`."
            )
        self.directions: dict[str, dict[str, bool]] = {}
        self.logged: dict[str, dict[str, str]] = {}
        for task in tasks:
            if not directions.get(task):
                raise CompareError(
                    f"Expected a metric for every task, since Δp is made of them, but task "
                    f"`{task}` has none. Give it `Task(loss, metrics)`, or name metrics that the "
                    f"module logs in `delta_p_metrics`."
                )
            names = {metric_key(task, name): name for name in directions[task]}
            self.directions[task] = {m: directions[task][name] for m, name in names.items()}
            self.logged[task] = {m: in_stage(n, self.split) for m, n in names.items()}

    def identity(self) -> dict[str, Any]:
        """What makes two comparisons the same: all but seeds, workers and ``--only``."""
        return {
            "config": read_yaml(self.config),
            "balancers": self.methods,
            "split": self.split,
            "metrics": self.directions,
            "source code": self.sources,
        }

    def job(self, logs: Path) -> Job:
        """What the processes of the runs have to know."""
        return Job(self.config, self.config_hash, self.methods, self.logged, self.split, logs)


def _check_names(methods: Sequence[str]) -> None:
    files = Counter(file_name(name) for name in methods)
    bad = [n for n in methods if not n or files[file_name(n)] > 1 or n.startswith(SINGLE)]
    if bad:
        raise CompareError(
            f"Expected names of balancers that are not empty, differ in letters or digits, and do "
            f"not start with `{SINGLE}`, but found {bad}. Rename them."
        )
