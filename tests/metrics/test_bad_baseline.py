"""A baseline of another problem: refused by name before the first batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError

from lightning_mtl import MultiTaskModule, Task
from tests.common.faulty import batches, parameters, same
from tests.common.models import TASKS, Balanced, Network, loader, sgd, trainer

METRIC = "MeanSquaredError"
RIGHT = {task: {METRIC: 1.0} for task in TASKS}
BASELINES = {
    "other tasks": (
        {"x": {METRIC: 1.0}, "b": {METRIC: 1.0}},
        r"of this run, \['a', 'b'\].* has \['x', 'b'\]: unknown here \['x'\], missing .*'a'",
    ),
    "one task too many": (
        {**RIGHT, "c": {METRIC: 1.0}},
        r"unknown here \['c'\], missing in the baseline \[\]",
    ),
    "one task too few": ({"a": {METRIC: 1.0}}, r"here \[\], missing in the baseline \['b'\]"),
    "other metrics": (
        {**RIGHT, "b": {"Accuracy": 1.0}},
        r"every metric of task 'b' of this run, \['MeanSquaredError'\].* it has \['Accuracy'\]",
    ),
    "a letter": (
        {**RIGHT, "b": {"MeanSquareError": 1.0}},
        r"missing .* Is 'MeanSquareError' of the baseline meant as 'MeanSquaredError'\?",
    ),
}


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize(("baseline", "message"), BASELINES.values(), ids=BASELINES)
def test_baseline_of_another_problem(
    tmp_path: Path, baseline: Any, message: str, from_file: bool, stage: str
) -> None:
    path = tmp_path / "baseline.json"
    tasks = {
        t: {m: {"value": v, "higher_is_better": False} for m, v in metrics.items()}
        for t, metrics in baseline.items()
    }
    path.write_text(json.dumps({"format": 1, "tasks": tasks}))
    content = path.read_bytes()
    module = Balanced(baseline=path if from_file else baseline)
    run = trainer()
    with pytest.raises(ValueError, match=f"^Expected a .*{message}"):
        # Before the first batch: an epoch of training is not lost to a wrong file.
        run.fit(module, batches(), loader(8)) if stage == "fit" else getattr(run, stage)(
            module, loader(8), verbose=False
        )
    assert same(parameters(module), parameters(Balanced()))
    assert run.global_step == 0
    assert path.read_bytes() == content


@pytest.mark.parametrize("active", [None, ["b"]])
def test_baseline_of_this_problem(active: Any) -> None:
    module = Balanced(baseline=RIGHT, active_tasks=active)
    run = trainer()
    run.validate(module, loader(8), verbose=False)
    logged = {name for name in run.callback_metrics if "delta_p" in name}
    assert logged == {"val/delta_p", *(f"val/delta_p/{task}" for task in active or TASKS)}


class OwnLoop(MultiTaskModule):
    """Losses and metrics of its own."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(TASKS, **kwargs)
        self.net = Network()
        self.errors = nn.ModuleDict({task: MeanAbsoluteError() for task in TASKS})

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {t: nn.functional.mse_loss(y, batch[1][t]) for t, y in self.net(batch[0]).items()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for task, y in self.net(batch[0]).items():
            if task in self.training_tasks:
                self.errors[task].update(y, batch[1][task])
                self.log(f"val/{task}/error", self.errors[task])

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


OWN = {task: {f"val/{task}/error": False} for task in TASKS}
ERRORS = {task: {"error": 1.0} for task in TASKS}


@pytest.mark.parametrize("active", [None, ["b"]])
def test_baseline_of_a_module_with_its_own_loop(active: Any) -> None:
    run = trainer()
    module = OwnLoop(baseline=ERRORS, delta_p_metrics=OWN, active_tasks=active)
    run.validate(module, loader(8), verbose=False)
    logged = {name for name in run.callback_metrics if "delta_p" in name}
    assert logged == {"val/delta_p", *(f"val/delta_p/{task}" for task in active or TASKS)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": ERRORS}, "`delta_p_metrics` beside `baseline` but found none: OwnLoop comp"),
        (
            {"baseline": ERRORS, "delta_p_metrics": {**OWN, "depht": {"val/error": False}}},
            r"names the unknown task \['depht'\]; the module declares \['a', 'b'\]",
        ),
        (
            {"baseline": ERRORS, "delta_p_metrics": {**OWN, "b": {"val/b/iou": True}}},
            r"every metric of task 'b' of this run, \['iou'\].* it has \['error'\]",
        ),
        (
            {"baseline": {"a": {"mae": 1.0}}, "delta_p_metrics": {"a": {"val/a/mae": False}}},
            r"the metric 'val/a/mae' of task 'a' .* found \['val/a/error', 'val/b/error'\]. Log ",
        ),
    ],
)
def test_baseline_and_a_loop_of_its_own(arguments: dict[str, Any], message: str) -> None:
    module = OwnLoop(**arguments)
    before = parameters(module)
    with pytest.raises(ValueError, match=message):
        trainer().validate(module, loader(8), verbose=False)
    assert same(parameters(module), before)


def test_metric_without_a_direction() -> None:
    class UndirectedError(MeanSquaredError):
        higher_is_better = None

    module = Balanced(baseline=RIGHT)
    module.tasks["b"].metrics["val"] = Task(nn.MSELoss(), {METRIC: UndirectedError()}).metrics[
        "val"
    ]
    with pytest.raises(ValueError, match=r"Metric `MeanSquaredError` of task 'b' does not say"):
        trainer().validate(module, loader(8), verbose=False)
