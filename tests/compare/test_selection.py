"""The weights that count are those that were validated: the last, the mean of k, or the best."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.selection import Kept
from tests.compare.compare_model import Points, TwoTasks

LOGGED = {
    "classify": {"acc": "val/classify/MulticlassAccuracy"},
    "regress": {"mse": "val/regress/MeanSquaredError"},
}
DIRECTIONS = {"classify": {"acc": True}, "regress": {"mse": False}}
REFERENCE = {"classify": {"acc": 0.6}, "regress": {"mse": 1.0}}


def read(logged: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {t: {m: float(logged[n]) for m, n in names.items()} for t, names in LOGGED.items()}


class Seen(Callback):
    """What each validation of the training gave."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, dict[str, float]]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: TwoTasks) -> None:
        if trainer.state.fn == "fit":
            self.metrics.append(read(trainer.callback_metrics))


def selected(kept: Kept, **options: Any) -> tuple[list, dict]:
    """What was seen in the training, and what is evaluated after it."""
    seed_everything(0, verbose=False)
    model, seen = TwoTasks(lr=0.5), Seen()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen, kept],
        **{"max_epochs": 6, "num_sanity_val_steps": 0, **options},
    )
    trainer.fit(model, datamodule=Points())

    def evaluate() -> dict:
        trainer.validate(model, datamodule=Points(), verbose=False)
        return read(trainer.callback_metrics)

    return seen.metrics, kept.mean(model, evaluate)


@pytest.mark.parametrize("k", [1, 3, 99])
def test_the_mean_of_the_last_k(k: int):
    seen, found = selected(Kept("last_k_mean", k, read, DIRECTIONS, {}))
    assert len(seen) == 6
    assert seen[-1] != seen[-2]
    for task, metrics in found.items():
        for metric, value in metrics.items():
            assert value == pytest.approx(fmean(run[task][metric] for run in seen[-k:]), rel=1e-5)


@pytest.mark.parametrize("reference", [REFERENCE, {}])
def test_the_best_on_validation_data(reference: dict):
    seen, found = selected(Kept("best_val", 1, read, DIRECTIONS, reference), max_epochs=12)
    base = reference or seen[0]

    def score(run: dict) -> float:
        acc, mse = (run["classify"]["acc"], base["classify"]["acc"]), run["regress"]["mse"]
        return (acc[0] - acc[1]) / acc[1] - (mse - base["regress"]["mse"]) / base["regress"]["mse"]

    best = max(seen, key=score)
    assert best is not seen[-1]  # or the test would show nothing
    assert found["classify"] == pytest.approx(best["classify"])
    assert found["regress"] == pytest.approx(best["regress"], rel=1e-5)


def test_a_training_without_validation_has_no_such_weights():
    with pytest.raises(CompareError, match="a validation during the training for `--select best"):
        selected(Kept("best_val", 1, read, DIRECTIONS, {}), limit_val_batches=0)
