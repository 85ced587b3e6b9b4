"""What a diagnosis was asked for, checked before anything is trained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_mtl import Balancer, MultiTaskModule
from lightning_mtl.compare import CompareError
from lightning_mtl.compare.build import RunCLI
from lightning_mtl.compare.texts import error_text
from lightning_mtl.compare.yaml_file import YamlFile
from lightning_mtl.diagnose import DiagnoseError

LEAST_STEPS = 4
# The training ends when the callback has seen enough; until then it is the config's own, so that a
# schedule over all of its steps goes as it would.
_SHORT = {"min_epochs": None, "min_steps": None, "limit_val_batches": 1}


class Request:
    """A checked request; building it trains nothing and writes nothing.

    Args:
        options: the parsed command line.

    Attributes:
        text: the config, as it was read.
        notes: what is worth knowing and no error.

    Raises:
        DiagnoseError: the request cannot be carried out.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        for name, least in (("steps", LEAST_STEPS), ("measure", 2)):
            if (found := getattr(options, name)) < least:
                raise DiagnoseError(f"Expected --{name} to be at least {least} but found {found}.")
        if not options.out:
            raise DiagnoseError('Expected --out to name a folder but found "". Name one.')
        self.config: str = options.config
        self.seed: int = options.seed
        self.notes: list[str] = []
        try:
            self.text = YamlFile(self.config).text
        except CompareError as error:
            raise DiagnoseError(str(error)) from error
        self._check(self._build([]))

    def train(self, callbacks: Sequence[Callback], task: str | None) -> None:
        """One training of the config, all tasks or one.

        Raises:
            DiagnoseError: it failed.
        """
        cli = self._build(callbacks)
        if task is not None:
            cli.model.active_tasks = [task]
        # after building, as `compare` does: the order of the data is that of its runs
        seed_everything(self.seed, workers=True, verbose=False)
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        except DiagnoseError:
            raise
        except (Exception, SystemExit) as error:
            who = "all tasks" if task is None else f"task `{task}` alone"
            raise DiagnoseError(
                f"Expected a short training of {who} but it failed. {error_text(error)} Let "
                f"`lightning-mtl fit --config {self.config}` run first: the diagnosis trains the "
                f"same way."
            ) from error

    def _build(self, callbacks: Sequence[Callback]) -> RunCLI:
        try:
            return RunCLI(self.config, self.seed, callbacks, _SHORT, may_stop_early=False)
        except (Exception, SystemExit) as error:
            raise DiagnoseError(
                f"Expected {self.config} to be a config that `lightning-mtl fit` takes, with "
                f"`model`, `data` and `trainer`, but building it failed. {error_text(error)}"
            ) from error

    def _check(self, cli: RunCLI) -> None:
        trainer: Any = cli.trainer
        model: Any = cli.model
        balancers = [type(c).__name__ for c in trainer.callbacks if isinstance(c, Balancer)]
        if balancers:
            raise DiagnoseError(
                f"Expected no balancer in the `trainer.callbacks` of {self.config} but found "
                f"{', '.join(balancers)}. A diagnosis is of equal weighting: remove it, or keep it "
                f"in a file for `lightning-mtl compare --balancers`."
            )
        if cli.config.get("ckpt_path"):
            raise DiagnoseError(
                f"Expected no `ckpt_path` in {self.config} but found {cli.config.ckpt_path}. The "
                f"diagnosis starts from its seed: remove it, or load the weights in the model's "
                f"constructor."
            )
        devices = trainer.num_devices * trainer.num_nodes
        if devices > 1:
            raise DiagnoseError(
                f"Expected one device but {self.config} asks for {devices}. Set "
                f"`trainer.devices: 1` for the diagnosis."
            )
        if not isinstance(model, MultiTaskModule):
            raise DiagnoseError(
                f"Expected a MultiTaskModule in {self.config} but found {type(model).__name__}. "
                f"Let it inherit from lightning_mtl.MultiTaskModule."
            )
        tasks = list(model.active_tasks or model.task_names)
        if len(tasks) == 1:
            raise DiagnoseError(
                f"Expected a model of at least 2 tasks but found {tasks}. With one task there is "
                f"nothing to balance: train it with `lightning-mtl fit`."
            )
        parts = [part for part in (cli.datamodule, model) if part is not None]
        if not any(is_overridden("train_dataloader", part) for part in parts):
            raise DiagnoseError(
                f"Expected a batch to measure, from `train_dataloader` of "
                f"{' or '.join(f'`{type(p).__name__}`' for p in parts)}, but found none. Add it, "
                f"or name another `data` in {self.config}."
            )
        if not any(model.metric_directions().values()):
            self.notes.append(
                "The model has no metric of which is known which way is better. The diagnosis does "
                "without, `lightning-mtl compare` cannot: give a task `Task(loss, metrics)`, or "
                "name metrics that the module logs in `delta_p_metrics`."
            )
