"""Rivals: weights that fill the space, decay where it belongs, more steps on the same schedule."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR, OneCycleLR

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.tuning.rivals import (
    NAMES,
    SWEEP,
    Longer,
    WeightDecay,
    add_rivals,
    fixed_weights,
)
from tests.compare.compare_model import Points, TwoTasks


def test_two_tasks_are_weighted_from_one_extreme_to_the_other():
    found = fixed_weights(["a", "b"], 8)
    logs = [math.log10(w["a"] / w["b"]) for w in found]
    assert logs == pytest.approx([-1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75], abs=1e-3)
    assert all(sum(w.values()) == pytest.approx(2, rel=1e-3) for w in found)


@pytest.mark.parametrize("tasks", [3, 5])
def test_more_tasks_are_weighted_without_gaps(tasks: int):
    names = [f"t{i}" for i in range(tasks)]
    found = fixed_weights(names, 64)
    assert all(sum(w.values()) == pytest.approx(tasks, rel=1e-3) for w in found)
    for name in names[:-1]:
        logs = [-2, *sorted(math.log10(w[name] / w[names[-1]]) for w in found), 2]
        assert min(b - a for a, b in pairwise(logs)) >= 0
        assert max(b - a for a, b in pairwise(logs)) < 0.3  # 4 decades, 64 points


def test_rivals_are_as_many_as_can_be_had():
    found = add_rivals(list(NAMES), ["a", "b"], 12, [], {})
    assert list(found.methods) == list(NAMES.values())
    assert found.spaces[NAMES["weights"]].trials == 12  # as many as an entry of the file has
    assert add_rivals(["weights"], ["a", "b"], 3, [], {}).spaces[NAMES["weights"]].trials == SWEEP
    found = add_rivals(["weights", "decay"], [], 1, [], {"decay": "LBFGS has no weight decay"})
    assert not found.methods
    assert found.missing == [
        "equal (same time) left out by --rivals",
        (
            "fixed weights (tuned) left out, because the names of the tasks are known from the "
            "first batch on"
        ),
        "equal (weight decay) left out, because LBFGS has no weight decay",
    ]


class Grouped(TwoTasks):
    def __init__(self, decays: list[float]) -> None:
        super().__init__()
        self.decays = decays

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parts = [self.trunk, self.heads]
        groups = [
            {"params": part.parameters(), "weight_decay": decay}
            for part, decay in zip(parts, self.decays, strict=True)
        ]
        return torch.optim.AdamW(groups, 0.01)


def fit(model: Any, *callbacks: Any, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 2, **options},
    )
    trainer.fit(model, datamodule=Points(size=24))
    return trainer


@pytest.mark.parametrize(("before", "after"), [([0.1, 0.0], [0.3, 0.0]), ([0.0, 0.0], [0.3, 0.3])])
def test_groups_without_decay_stay_so(before: list[float], after: list[float]):
    trainer = fit(Grouped(before), WeightDecay(0.3), max_epochs=1)
    assert [g["weight_decay"] for g in trainer.optimizers[0].param_groups] == after


SCHEDULES = {
    "cosine": (CosineAnnealingLR, "step"),
    "one cycle": (lambda o, n: OneCycleLR(o, 0.1, total_steps=n), "step"),
    "milestones": (lambda o, n: MultiStepLR(o, [n // 2, n - 1]), "step"),
    "epochs": (lambda o, _: LambdaLR(o, lambda epoch: 1 - epoch / 4), "epoch"),
}


class Scheduled(TwoTasks):
    schedule = "cosine"
    planned = 0

    def configure_optimizers(self) -> dict:
        self.rates: list[float] = []
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        self.planned = int(self.trainer.estimated_stepping_batches)
        build, interval = SCHEDULES[self.schedule]
        scheduler = {"scheduler": build(optimizer, self.planned), "interval": interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_batch_start(self, *args: Any) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("factor", [1.0, 1.6, 3.0])
def test_a_longer_training_has_the_same_schedule(name: str, factor: float):
    """Whatever the schedule was told its length is."""
    plain, longer = Scheduled(), Scheduled()
    plain.schedule = longer.schedule = name
    fit(plain, max_epochs=4)
    trainer = fit(longer, Longer(factor), max_epochs=4)
    epochs = math.ceil(4 * factor - 1e-9)
    assert trainer.current_epoch == epochs
    assert longer.planned == plain.planned == len(plain.rates) == 4  # a batch an epoch
    parts = [math.floor(i * 4 / epochs + 1e-9) for i in range(epochs)]  # of the training
    assert longer.rates == [plain.rates[part] for part in parts]


def test_steps_are_multiplied_where_they_are_the_limit():
    trainer = fit(TwoTasks(), Longer(1.5), max_steps=5, max_epochs=-1)
    assert trainer.global_step == 8
    with pytest.raises(CompareError, match=r"`trainer.max_epochs` or `trainer.max_steps`"):
        fit(TwoTasks(), Longer(1.5), max_epochs=-1, max_time={"seconds": 1})


def test_decay_needs_an_optimizer_that_has_it():
    class Plain(TwoTasks):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Rprop(self.parameters())

    with pytest.raises(CompareError, match="weight decay but found Rprop"):
        fit(Plain(), WeightDecay(0.1))
